"""Tuning: the right value out of the grid, never from the test set, and nothing trained twice."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kronlab.cell import Cell, compose_config
from kronlab.errors import ConfigError, KronlabError
from kronlab.layout import PlannedRow, plan
from kronlab.reproduce import load_rows, reproduce
from kronlab.runs import Store
from kronlab.tuning import Choice, Tuning, rule

SECTION: dict[str, Any] = {
    "grid": {"trainer.lr": [1e-3, 3e-3, 1e-2]},
    "seeds": [0, 1],
    "overrides": ["eval.held.split=validation"],
    "by": {"eval": "held", "metric": "nll_per_token", "goal": "min"},
}
TUNING = Tuning.read(SECTION, where="here")


def record(value: float | None, metric: str = "nll_per_token") -> dict[str, Any]:
    """A record with this score; None: diverged."""
    if value is None:
        return {"status": "diverged"}
    return {"status": "done", "eval": {"held": {"metrics": {metric: {"value": value}}}}}


def choose(*scores: list[float | None], tuning: Tuning = TUNING) -> Choice:
    """The choice after trials with these scores, a list for each value of the grid."""
    pairs = zip(tuning.values, scores, strict=True)
    return tuning.choose([(value, record(score)) for value, found in pairs for score in found])


# ---- the rule ----


def test_the_best_mean_over_seeds_wins_not_the_best_seed() -> None:
    choice = choose([1.0, 1.1], [0.2, 2.4], [1.2, 1.3])
    assert choice.scores == {1e-3: pytest.approx(1.05), 3e-3: pytest.approx(1.3), 1e-2: pytest.approx(1.25)}
    assert choice.value == 1e-3
    highest = Tuning.read(SECTION | {"by": SECTION["by"] | {"goal": "max"}}, where="here")
    assert choose([1.0, 1.1], [0.2, 2.4], [1.2, 1.3], tuning=highest).value == 3e-3


def test_a_value_that_diverged_at_one_seed_is_never_chosen() -> None:
    choice = choose([1.0, 1.0], [0.5, 0.5], [0.1, None])
    assert choice.value == 3e-3
    assert choice.scores[1e-2] is None
    assert "0.01: diverged" in choice.told()


def test_a_score_that_is_not_finite_counts_as_diverged() -> None:
    assert choose([1.0, 1.0], [float("nan"), 0.5], [0.9, float("inf")]).value == 1e-3


def test_ties_go_to_the_smaller_value() -> None:
    assert choose([1.0, 1.0], [0.5, 0.7], [0.7, 0.5]).value == 3e-3


@pytest.mark.parametrize(("best", "edge"), [(0, True), (1, False), (2, True)])
def test_the_edge_of_the_grid_is_flagged(best: int, edge: bool) -> None:
    scores: list[list[float | None]] = [[1.0, 1.0] for _ in TUNING.values]
    scores[best] = [0.5, 0.5]
    choice = choose(*scores)
    assert choice.at_edge == edge
    assert ("edge of the grid" in choice.told()) == edge
    assert choice.told().startswith(f"trainer.lr {TUNING.values[best]:g}")


def test_all_diverged_chooses_nothing_and_says_so() -> None:
    choice = choose([None, 1.0], [None, None], [1.0, None])
    assert choice.value is None
    assert choice.why_not() == "diverged at every trainer.lr of the grid (0.001, 0.003, 0.01): no value can be chosen"


def test_nothing_is_chosen_while_a_trial_is_missing() -> None:
    trials = [(1e-3, record(0.5)), (1e-3, record(0.5)), (3e-3, record(0.1)), (3e-3, None), (1e-2, record(0.6))]
    choice = TUNING.choose([*trials, (1e-2, None)])
    assert choice.value is None
    assert choice.scores == {1e-3: 0.5}, "no mean over a part of the seeds"
    assert choice.why_not() == "trainer.lr is not chosen yet: 2 of its trials are missing"


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tune.by.metric='nll_per_token': eval held gives accuracy"):
        TUNING.choose([(1e-3, record(0.5, metric="accuracy"))])


def test_the_rule_is_told_in_one_sentence() -> None:
    assert rule(TUNING) == (
        "trainer.lr of every trained row, out of 0.001, 0.003, 0.01: the one with the lowest mean nll_per_token "
        "of held at seeds 0, 1, on data that are neither trained nor tested on (eval.held.split=validation)."
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid": {"trainer.lr": [1e-2, 1e-3]}}, r"here\.grid\.trainer\.lr=\[0\.01, 0\.001\]: must ascend"),
        ({"grid": {"trainer.lr": [1e-3, 1e-3]}}, "must ascend"),
        ({"grid": {"trainer.lr": []}}, "must be numbers"),
        ({"grid": {"trainer.lr": ["fast"]}}, "must be numbers"),
        ({"grid": {"trainer.lr": [1.0], "method.alpha": [1]}}, "must be one setting with its values"),
        ({"seeds": []}, r"here\.seeds=\[\]: must be one or more seeds, each once"),
        ({"seeds": [1, 1]}, "each once"),
        ({"by": SECTION["by"] | {"goal": "least"}}, r"must be eval, metric and goal \(min or max"),
        ({"by": {"eval": "held"}}, "must be eval, metric and goal"),
        ({"more": 1}, "it must have grid, seeds, overrides, by"),
    ],
)  # fmt: skip
def test_a_wrong_section_is_one_line_that_says_what_is_right(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Tuning.read(SECTION | change, where="here")
    assert "\n" not in str(caught.value)


# ---- in a table ----

QUIET = ["runtime.progress=false", "runtime.threads=1"]
LISTED = ("  done", "  missing", "  after")  # what a dry run says of trials and cells, behind its estimate
# The validation eval is one more, from another seed of the generator.
HELD_OUT = ["+eval@eval.held=chain_sum", "eval.held.source.test_seed=20000017", "eval.held.generation.max_new_tokens=1"]


def tuned_spec(rows: tuple[str, ...] = ("base", "lora", "cdka_2_8_4")) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(compose_config(["table=table2"], name="tables").table, resolve=True)
    layout = found["scales"]["smoke"]
    short = ["eval.chain_sum.generation.max_new_tokens=2", "trainer.max_steps=2"]
    layout |= {"rows": list(rows), "common": [*layout["common"], *short], "seeds": [0, 1]}
    layout["tune"] = {
        "grid": {"trainer.lr": [1e-3, 1e-1]},
        "seeds": [0],
        "overrides": HELD_OUT,
        "by": {"eval": "held", "metric": "nll_per_token", "goal": "min"},
    }
    return found  # type: ignore[no-any-return]


def planned(spec: dict[str, Any], store: Store | None = None) -> dict[str, PlannedRow]:
    find = (lambda cell: store.read(cell.scale, cell.id)) if store else (lambda cell: None)
    rows, _ = plan(spec, "smoke", weights_needed=False, find=find)
    return {row.key: row for row in rows}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("tuned")
    reproduce(tuned_spec(), scale="smoke", results_dir=str(results), extra=QUIET)
    return results


def test_the_best_value_of_each_row_trains_its_cells(tuned: Path) -> None:
    store = Store(tuned)
    rows = planned(tuned_spec(), store)
    assert rows["base"].choices == {}, "nothing is trained, so there is nothing to tune"
    assert not rows["base"].awaits
    for key in ("lora", "cdka_2_8_4"):
        row = rows[key]
        assert [(t.value, t.seed) for t in row.trials] == [(1e-3, 0), (1e-1, 0)]
        scores = {}
        for trial in row.trials:
            seen = store.read("smoke", trial.cell.id)
            assert seen is not None
            assert seen["config"]["trainer"]["lr"] == trial.value
            assert seen["config"]["eval"]["held"]["source"]["test_seed"] == 20000017
            scores[trial.value] = seen["eval"]["held"]["metrics"]["nll_per_token"]["value"]
        assert row.choices[""].scores == scores
        assert row.choices[""].value == min(scores, key=lambda value: scores[value])
        made = [store.read("smoke", cell.id) for cell in row.cells]
        assert len(made) == 2
        for seed, found in enumerate(made):
            assert found is not None
            assert found["status"] == "done"
            assert (found["config"]["seed"], found["config"]["trainer"]["lr"]) == (seed, row.choices[""].value)
            assert "held" not in found["eval"], "the table is graded on its own evals"


def test_what_a_trial_has_trained_serves_the_cell_of_the_same_seed(tuned: Path) -> None:
    """Grading alone differs between the two: one training, and the same time and loss in both records."""
    store = Store(tuned)
    for key in ("lora", "cdka_2_8_4"):
        row = planned(tuned_spec(), store)[key]
        (trial,) = [t.cell for t in row.trials if t.value == row.choices[""].value]
        first, second = row.cells
        assert trial.id != first.id
        assert trial.train_id == first.train_id != second.train_id
        records = [store.read("smoke", cell.id) for cell in (trial, first)]
        assert records[0] is not None
        assert records[1] is not None
        assert records[0]["train"] == records[1]["train"], "even the seconds: they are of the same training"
    folders = [path for path in (tuned / "checkpoints").iterdir() if path.name not in ("made_here", "running")]
    assert len(folders) == 2 * (2 + 1), "two values at seed 0 and the better one at seed 1, for each of two rows"


def test_the_table_tells_the_rule_and_every_score(tuned: Path) -> None:
    text = (tuned / "tables" / "smoke" / "table2.md").read_text()
    assert "- Tuned: trainer.lr of every trained row, out of 0.001, 0.1: the one with the lowest mean" in text
    for key in ("lora", "cdka_2_8_4"):
        row = planned(tuned_spec(), Store(tuned))[key]
        assert f"- {row.label}: {row.choices[''].told()}." in text
        assert "**edge of the grid**" in row.choices[""].told(), "a grid of two has nothing but edges"


def test_typed_again_it_does_nothing_and_renders_the_same(tuned: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {path: path.stat().st_mtime_ns for path in tuned.glob("runs/smoke/*.json")}
    text = (tuned / "tables" / "smoke" / "table2.md").read_text()
    with caplog.at_level(logging.INFO):
        reproduce(tuned_spec(), scale="smoke", results_dir=str(tuned), extra=QUIET)
    assert "table2 at scale smoke: 4 trials to tune with, 4 done; 5 cells, 5 done" in caplog.messages
    assert {path: path.stat().st_mtime_ns for path in tuned.glob("runs/smoke/*.json")} == files
    reproduce(tuned_spec(), scale="smoke", results_dir=str(tuned), render_only=True)
    assert (tuned / "tables" / "smoke" / "table2.md").read_text() == text


def test_dry_run_lists_the_trials_and_says_what_comes_after(
    tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        reproduce(tuned_spec(), scale="smoke", results_dir=str(tmp_path), dry_run=True)
    listed = [m for m in caplog.messages if m.startswith(LISTED)]
    assert [m.split()[0] for m in listed] == ["missing"] * 4 + ["missing", "after", "after"]
    assert listed[0].endswith(", trial of 0.001")
    assert listed[-1] == "  after tuning: CDKA (2,8,4), 2 cells"
    assert list(tmp_path.iterdir()) == []
    caplog.clear()
    with caplog.at_level(logging.INFO):
        reproduce(tuned_spec(), scale="smoke", results_dir=str(tuned), dry_run=True)
    assert [m.split()[0] for m in caplog.messages if m.startswith(LISTED)] == ["done"] * 9


def test_a_row_whose_tuning_is_incomplete_is_not_run_yet(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned / "runs", tmp_path / "runs")
    whole = {row.key: row for row in load_rows(tuned_spec(), "smoke", tmp_path)}
    assert [len(whole[key].records) for key in ("base", "lora", "cdka_2_8_4")] == [1, 2, 2]
    assert all(found is not None for row in whole.values() for found in row.records)
    assert not (tmp_path / "checkpoints").exists(), "records that came from elsewhere are read, too"

    gone = planned(tuned_spec(), Store(tuned))["lora"].trials[0].cell
    (tmp_path / "runs" / "smoke" / f"{gone.id}.json").unlink()
    rows = {row.key: row for row in load_rows(tuned_spec(), "smoke", tmp_path)}
    assert list(rows["lora"].records) == [None, None]
    assert rows["cdka_2_8_4"] == whole["cdka_2_8_4"]
    table = reproduce(tuned_spec(), scale="smoke", results_dir=str(tmp_path), render_only=True)
    assert table is not None
    assert "LoRA r=8: trainer.lr is not chosen yet: 1 of its trials are missing." in table.notes
    assert "Cells not run yet: LoRA r=8 (all)." in table.notes


def test_interrupted_between_the_stages_it_goes_on(
    tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All trials of one row are there, one of the other's is not, and no final cell is."""
    copied = tmp_path / "results"
    shutil.copytree(tuned, copied)
    rows = planned(tuned_spec(), Store(tuned))
    lost = [rows["lora"].trials[1].cell, *rows["lora"].cells, *rows["cdka_2_8_4"].cells]
    for cell in lost:
        (copied / "runs" / "smoke" / f"{cell.id}.json").unlink()
    before = {path.name for path in copied.glob("runs/smoke/*.json")}
    with caplog.at_level(logging.INFO):
        reproduce(tuned_spec(), scale="smoke", results_dir=str(copied), extra=QUIET)
    assert {path.stem for path in copied.glob("runs/smoke/*.json") if path.name not in before} == {c.id for c in lost}
    assert "table2 at scale smoke: 4 trials to tune with, 3 done; 5 cells, 1 done" in caplog.messages
    for name in ("table2.md", "table2.csv"):
        fresh, old = [(where / "tables" / "smoke" / name).read_text() for where in (copied, tuned)]
        assert fresh == old


def test_records_that_came_with_a_clone_are_tuned_anew_unless_reused(
    tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tuned / "runs", tmp_path / "runs")
    for reuse, first in (("local", "missing"), ("any", "done")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            reproduce(tuned_spec(), scale="smoke", results_dir=str(tmp_path), dry_run=True, reuse=reuse)
        assert next(m.split()[0] for m in caplog.messages if m.startswith(LISTED)) == first
        assert any("after tuning" in m for m in caplog.messages) == (reuse == "local")


def test_a_row_that_diverges_everywhere_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    spec = tuned_spec(("lora", "cdka_2_8_4"))
    spec["rows"]["lora"]["overrides"] += ["trainer.weight_decay=1e38", "trainer.warmup_ratio=0"]
    spec["scales"]["smoke"]["seeds"] = [0]
    with pytest.raises(KronlabError) as caught:
        reproduce(spec, scale="smoke", results_dir=str(tmp_path), extra=QUIET)
    assert str(caught.value) == (
        "LoRA r=8: diverged at every trainer.lr of the grid (0.001, 0.1): no value can be chosen"
    )
    states = sorted(json.loads(path.read_text())["status"] for path in tmp_path.glob("runs/smoke/*.json"))
    assert states == ["diverged"] * 2 + ["done"] * 3
    text = (tmp_path / "tables" / "smoke" / "table2.md").read_text()
    assert "- LoRA r=8: diverged at every trainer.lr" in text


def test_a_trial_that_fails_holds_back_its_row_alone(tmp_path: Path) -> None:
    spec = tuned_spec(("cdka_2_8_4", "lora"))
    spec["rows"]["cdka_2_8_4"]["overrides"].append("method.r2=7")
    spec["scales"]["smoke"]["seeds"] = [0]
    with pytest.raises(KronlabError) as caught:
        reproduce(spec, scale="smoke", results_dir=str(tmp_path), extra=QUIET)
    first, second, last = str(caught.value).splitlines()
    assert "trial of 0.001: " in first
    assert "r2=7 does not divide d_in=32" in first
    assert "trial of 0.1: " in second
    assert last == "CDKA (2,7,4): trainer.lr is not chosen yet: 2 of its trials are missing"
    rows = {row.key: row for row in load_rows(spec, "smoke", tmp_path)}
    assert list(rows["cdka_2_8_4"].records) == [None]
    assert rows["lora"].records[0] is not None


# ---- what must not be chosen on ----


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "tune.by.eval='held': its trials are graded on chain_sum"),
        (["+eval@eval.held=chain_sum", "eval.held.n=4"], "the data that eval chain_sum of the table is graded on"),
        (["+eval@eval.held=chain_sum", "eval.held.split=train"], "the data that the trials are trained on"),
    ],
)
def test_a_choice_on_test_or_training_data_is_refused(overrides: list[str], said: str) -> None:
    spec = tuned_spec()
    spec["scales"]["smoke"]["tune"]["overrides"] = overrides
    with pytest.raises(ConfigError, match=said):
        planned(spec)


def test_the_tuned_setting_cannot_be_given_as_well() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.lr is tuned in table2 and cannot be given"):
        plan(tuned_spec(), "smoke", overrides=["trainer.lr=1"], weights_needed=False)


def test_an_unknown_setting_in_the_grid_is_one_line() -> None:
    spec = tuned_spec()
    spec["scales"]["smoke"]["tune"]["grid"] = {"trainer.rate": [1e-3]}
    with pytest.raises(ConfigError, match=r"table2, row lora: trainer.rate: unknown key") as caught:
        planned(spec)
    assert "\n" not in str(caught.value)


def test_every_arm_is_tuned_by_itself() -> None:
    """Overrides and metric may differ from arm to arm; trials and cells keep their arm's task."""
    spec = tuned_spec(("lora",))
    layout = spec["scales"]["smoke"]
    layout["common"] = ["model=tiny_llama"]
    layout["arms"] = {"sums": ["task=chain_sum"], "words": ["task=gsm_symbolic"]}
    by = {"eval": "held", "metric": "nll_per_token", "goal": "min"}
    layout["tune"]["overrides"] = {
        "sums": HELD_OUT,
        "words": [o.replace("chain_sum", "gsm_symbolic") for o in HELD_OUT],
    }
    layout["tune"]["by"] = {"sums": by, "words": by | {"metric": "exact_match", "goal": "max"}}
    scores = {
        ("chain_sum", 1e-3): 0.5,
        ("chain_sum", 1e-1): 0.9,
        ("gsm_symbolic", 1e-3): 0.2,
        ("gsm_symbolic", 1e-1): 0.3,
    }

    def find(cell: Cell) -> dict[str, Any] | None:
        if "held" not in cell.config["eval"]:
            return None
        score = {"value": scores[cell.config["task"]["name"], cell.config["trainer"]["lr"]]}
        return {"status": "done", "eval": {"held": {"metrics": {"nll_per_token": score, "exact_match": score}}}}

    ((row,), _) = plan(spec, "smoke", weights_needed=False, find=find)
    assert {arm: choice.value for arm, choice in row.choices.items()} == {"sums": 1e-3, "words": 1e-1}
    assert [name for name, _ in row.tuned()] == ["LoRA r=8, sums", "LoRA r=8, words"]
    seen = [(p.arm, p.seed, p.cell.config["task"]["name"], p.cell.config["trainer"]["lr"]) for p in row.parts]
    assert seen == [
        *[("sums", seed, "chain_sum", 1e-3) for seed in (0, 1)],
        *[("words", seed, "gsm_symbolic", 1e-1) for seed in (0, 1)],
    ]
    assert [part.place for part in row.parts][1:3] == ["sums, seed 1", "words, seed 0"]
    del layout["tune"]["by"]["words"]
    with pytest.raises(
        ConfigError, match=r"tune.by=.*must be eval, metric and goal \(min or max\), or an arm's for each"
    ):
        planned(spec)
