"""Whatever is typed for any key either runs, or is refused in a line that names it: no traceback, no half a result.

The keys are those of the composed configs themselves, so that a new one is drawn too. KRONLAB_FUZZ_DRAWS=500 is the
long form; the draws are the same every time.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kronlab.cell import CONFIG_DIR, compose_config, make_cell
from kronlab.errors import KronlabError
from kronlab.experiment import run_cell
from kronlab.runs import Store
from kronlab.validate import RULES, SCALES, SOURCE_RULES, _rule_of, faults, leaves, sources

DRAWS = int(os.environ.get("KRONLAB_FUZZ_DRAWS", "60"))
MADE_UP = f"data.dir={CONFIG_DIR.parent}/examples/made_up"
TINY = [
    "scale=smoke", "trainer.max_steps=2", "trainer.batch_size=4", "trainer.micro_batch_size=4", "task.n=4", "eval_n=2",
    "runtime.threads=1", "runtime.progress=false", "runtime.save_every=1",
]  # fmt: skip
SUMS = ["eval.chain_sum.generation.max_new_tokens=3", "++eval.chain_sum.source.test_pool=20"]
BASES = {
    **{
        name: [f"method={name}", *SUMS]
        for name in ("cdka", "kron_lora", "lora", "lora_plus", "adalora", "vera", "lokr", "lora_ga", "full", "none")
    },
    "krona": ["method=krona", *SUMS],
    "t5": ["model=tiny_t5", "method=cdka", *SUMS],
    "glue": [
        "model=tiny_distilbert",
        "model.architecture=sequence_classification",
        "task=glue_cola",
        "method=lora",
        MADE_UP,
    ],
    "choice": ["task=arc_easy", "method=kron_lora", MADE_UP],
    "choice_head": ["model=tiny_distilbert", "task=arc_easy_head", "method=cdka", MADE_UP],
    "stored": ["method=cdka", "adapter_storage.bits=8", *SUMS],
}
# Numbers of every kind, words, emptiness, other shapes; no number is both allowed somewhere and hours of work there.
VALUES = [
    "-1", "0", "1", "2", "3", "0.5", "2.5", "-1e-9", "1e30", "1000000000000", "nan", "inf", "-inf",
    "null", "true", "false", "''", "' '", "nonsense", "'{'", "'('", "/no/such/file", "[]", "[1,a]", "[0.5,0.5]",
    "[null]", "{}", "{a: 1}",
]  # fmt: skip


@cache
def fields(base: str) -> list[str]:
    """Every key of a composed config, sections too."""
    config = make_cell(compose_config([*TINY, *BASES[base]])).config
    found = {path for path, _ in leaves(config)}
    return sorted(found | {path.rsplit(".", up)[0] for path in found for up in range(1, path.count(".") + 1)})


DRAW = st.sampled_from(sorted(BASES)).flatmap(
    lambda base: st.tuples(st.just(base), st.sampled_from(fields(base)), st.sampled_from(VALUES))
)


def attempt(base: str, path: str, value: str, results: Path) -> str | None:
    """None if it ran, else how it was refused."""
    override = f"++{path}={value}" if "." in path else f"{path}={value}"
    try:
        cell = make_cell(compose_config([*TINY, *BASES[base], f"results.dir={results}", override]))
        cell.config["results"]["dir"] = str(results) if path != "results.dir" else cell.config["results"]["dir"]
        record = run_cell(cell)
    except KronlabError as error:
        return str(error)
    assert record["status"] in ("done", "diverged", "planned")
    return None


def names(path: str, said: str) -> bool:
    """Whether the key, or the section that it is in, is named: of what a library refuses only the section is known."""
    steps = path.split(".")
    sections = [".".join(steps[:n]) for n in range(2, len(steps))]
    return any(name in said for name in (next(s for s in reversed(steps) if not s.isdigit()), *sections))


def check(base: str, path: str, value: str, results: Path) -> None:
    said = attempt(base, path, value, results)
    if said is not None:
        assert names(path, said), said
        assert "Traceback" not in said
        assert all(line.strip() for line in said.splitlines()), said
        assert len(said.splitlines()) <= 3, said  # a key that others take their value from
    for file in results.rglob("*"):
        assert not file.name.endswith((".part", ".tmp")), f"{file} is half a file"
        assert not (file.is_file() and file.name.startswith(".")), f"{file} is half a file"
        leased = file.parent.parent.name == "running"  # a lease that was given back is empty
        if file.suffix == ".json" and "checkpoint-" not in str(file) and not leased:
            json.loads(file.read_text())


@settings(
    max_examples=DRAWS, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(drawn=DRAW)
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_value_of_any_key_runs_or_is_refused_in_a_line_that_names_it(
    drawn: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path_factory.mktemp("results")
    monkeypatch.chdir(results)  # where a path that is just a word leads to
    check(*drawn, results)


@pytest.mark.parametrize("base", sorted(BASES))
def test_every_key_has_a_rule_or_a_reader_of_its_own(base: str) -> None:
    """A new key of a config needs a line in `RULES`, or in `SOURCE_RULES` if it is a data source's."""
    config = make_cell(compose_config([*TINY, *BASES[base]])).config
    free = ("model.config.", "method.options.", "recipe.", "sequence", "eval.*.kind")
    of_sources = tuple(path for path, _ in sources(config))
    lacking = []
    for path, _ in leaves(config):
        inside = next((source for source in of_sources if path.startswith(f"{source}.")), None)
        if inside is not None:
            known = path[len(inside) + 1 :].split(".")[0] in SOURCE_RULES
        else:
            known = _rule_of(path) is not None or path.startswith(free) or path.endswith(".kind")
        if not known and path.rpartition(".")[2].isdigit() is False:
            lacking.append(path)
    assert lacking == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("+method.r3=1", "method.r3 is not a setting; did you mean 'r'"),
        ("+trainer.learning_rate=1", "trainer.learning_rate is not a setting"),
        ("trainer.lrr=1", "trainer.lrr: unknown key; did you mean 'lr'?"),
        ("+runtime.thread=1", "runtime.thread is not a setting; did you mean 'threads'"),
        ("+logger.projct=x", "logger.projct is not a setting; did you mean 'project'"),
        ("+task.max_len=3", "task.max_len is not a setting; did you mean 'max_length'"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(typed: str, said: str) -> None:
    with pytest.raises(KronlabError) as caught:
        make_cell(compose_config([*TINY, typed]))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_record_of_the_repository_obeys_the_rules() -> None:
    """A rule that is too narrow would refuse a cell that has been run."""
    store, seen = Store(CONFIG_DIR.parent / "results"), 0
    for scale in SCALES:
        for record in store.records(scale):
            seen += 1
            record["config"]["model"].pop("pretraining", None)  # there the id of its training
            assert list(faults(record["config"], CONFIG_DIR)) == [], record["id"]
    assert seen > 200


def test_the_rules_are_about_keys_that_there_are() -> None:
    """A rule whose key was renamed guards nothing."""
    shipped = "\n".join(path.read_text() for path in CONFIG_DIR.rglob("*.yaml"))
    absent = {pattern for pattern in RULES if pattern.rpartition(".")[2] not in ("*", *_OPTIONAL)} - {
        pattern for pattern in RULES if f"{pattern.rpartition('.')[2]}:" in shipped
    }
    assert absent == set()


_OPTIONAL = ("shots", "temperature", "top_p")  # of evals; in no shipped config
