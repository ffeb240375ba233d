"""Datasets read from files, from a dataset directory, and from a hub that is not there."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kronlab.data import Example, available, common, fingerprint, load_examples
from kronlab.data.math import last_boxed
from kronlab.errors import ConfigError, DataError, KronlabError
from kronlab.evals import gsm8k

DATA = os.environ.get("KRONLAB_DATA")
GSM8K = {"name": "gsm8k"}
MATH = {"name": "math"}
META = {"name": "metamathqa"}


def needs(*files: str) -> pytest.MarkDecorator:
    missing = [f for f in files if not DATA or not (Path(DATA) / f).is_file()]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} under KRONLAB_DATA")


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def load(source: dict[str, Any], split: str, n: int | None = None, seed: int = 0, **kw: Any) -> list[Example]:
    kw.setdefault("data_dir", None)
    return load_examples(source, split=split, n=n, seed=seed, **kw)


def refused(error: type[KronlabError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def gsm8k_dir(tmp_path: Path) -> str:
    def row(i: int) -> dict[str, str]:
        return {
            "question": f" How much is {i} + 1? ",
            "answer": f"{i} + 1 = $<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1:,}",
        }

    write(tmp_path / "gsm8k" / "train.jsonl", map(row, range(1000, 1040)))
    write(tmp_path / "gsm8k" / "test.jsonl", map(row, range(20)))
    return str(tmp_path)


# ---- gsm8k ----


def test_gsm8k_text(gsm8k_dir: str) -> None:
    e = load({**GSM8K, "subset": "first"}, "train", 1, data_dir=gsm8k_dir)[0]
    assert e == Example("gsm8k/train/0", "Q: How much is 1000 + 1?\nA: ", "1000 + 1 = $1001.\n#### 1,001", "1,001")
    kept = load({**GSM8K, "subset": "first", "calculator_annotations": True}, "train", 1, data_dir=gsm8k_dir)[0]
    assert kept.completion == "1000 + 1 = $<<1000+1=1001>>1001.\n#### 1,001"
    own = {**GSM8K, "subset": "first", "prompt": "{{{question}}}", "completion": "The answer is {gold}"}
    e = load(own, "train", 1, data_dir=gsm8k_dir)[0]
    assert (e.prompt, e.completion) == ("{How much is 1000 + 1?}", "The answer is 1,001")


def test_subsets_are_nested_and_test_is_the_same_for_every_seed(gsm8k_dir: str) -> None:
    def ids(split: str, n: int | None, seed: int, **extra: Any) -> list[str]:
        return [e.id for e in load({**GSM8K, **extra}, split, n, seed, data_dir=gsm8k_dir)]

    assert ids("train", 10, 0) == ids("train", None, 0)[:10]
    assert sorted(ids("train", None, 0)) == sorted(f"gsm8k/train/{i}" for i in range(40))
    assert ids("train", 10, 0) != ids("train", 10, 1)
    assert ids("test", 5, 0) == ids("test", 5, 1) == ids("test", None, 2)[:5]
    assert ids("test", None, 0) != [f"gsm8k/test/{i}" for i in range(20)]
    assert ids("test", 5, 0, test_seed=1) != ids("test", 5, 0)
    assert (
        ids("train", 3, 0, subset="first")
        == ids("train", 3, 1, subset="first")
        == [f"gsm8k/train/{i}" for i in range(3)]
    )
    assert ids("test", 5, 0, subset="first") == ids("test", 5, 0)


def test_validation_rows_are_training_rows_that_nobody_trains_on(gsm8k_dir: str) -> None:
    source = {**GSM8K, "validation_rows": 10}
    validation = load(source, "validation", data_dir=gsm8k_dir)
    everything = load(GSM8K, "train", data_dir=gsm8k_dir)
    assert len({e.id for e in validation}) == 10
    assert {e.id for e in validation} < {e.id for e in everything}
    assert load(source, "validation", 4, seed=3, data_dir=gsm8k_dir) == validation[:4]
    for seed, extra in ((0, {}), (1, {}), (0, {"subset": "first"})):
        train = load({**source, **extra}, "train", seed=seed, data_dir=gsm8k_dir)
        assert {e.id for e in train} == {e.id for e in everything} - {e.id for e in validation}
    assert load(source, "test", data_dir=gsm8k_dir) == load(GSM8K, "test", data_dir=gsm8k_dir)
    assert available(source, "validation", gsm8k_dir)[0]
    assert "n=31 asked of split 'train', which has 30" in refused(
        ConfigError, lambda: load(source, "train", 31, data_dir=gsm8k_dir)
    )
    message = refused(ConfigError, lambda: load({**source, "validation_rows": 0}, "validation", data_dir=gsm8k_dir))
    assert "validation_rows=0" in message
    message = refused(ConfigError, lambda: load(GSM8K, "validation", data_dir=gsm8k_dir))
    assert "validation_rows=None" in message


def test_seeded_order_is_a_fixed_permutation() -> None:
    assert sorted(common.seeded_order(100, 3)) == list(range(100))
    assert common.seeded_order(8, 0) == SEEDED_ORDER_8


def test_fingerprint_tells_fields_apart() -> None:
    assert fingerprint([Example("a", "b", "c", "d")]) == fingerprint([Example("a", "b", "c", "d", {"level": 1})])
    variants = [("ab", "", "c", "d"), ("a", "b", "c", "d"), ("a", "b", "cd", ""), ("a", "b\n", "c", "d")]
    assert len({fingerprint([Example(*v)]) for v in variants}) == 4


@needs("gsm8k/train.jsonl", "gsm8k/test.jsonl")
def test_real_gsm8k() -> None:
    train, test = load(GSM8K, "train", data_dir=DATA), load(GSM8K, "test", data_dir=DATA)
    assert (len(train), len(test)) == (7473, 1319)
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    for e in train + test:
        assert gsm8k.grade(e.completion, e.gold)
        assert "<<" not in e.completion
        assert e.completion.endswith(f"\n#### {e.gold}")
        assert e.prompt.startswith("Q: ")
        assert e.prompt.endswith("\nA: ")


# ---- math ----


def test_math_reads_both_layouts(tmp_path: Path) -> None:
    write(tmp_path / "math" / "test_500.jsonl", [
        {"problem": "p", "solution": "so $\\boxed{2}$", "answer": "2", "subject": "Algebra", "level": 4},
    ])  # fmt: skip
    write(tmp_path / "math" / "train_4500.jsonl", [
        {"problem": "q", "solution": "\\boxed{1} \\boxed{\\frac12}.", "type": "Geometry", "level": "Level 3"},
        {"problem": "r", "solution": "\\boxed{x}", "type": "Geometry", "level": "Level ?"},
    ])  # fmt: skip
    d = str(tmp_path)
    meta = {"level": 4, "subject": "Algebra"}
    assert load(MATH, "test", data_dir=d) == [Example("math/test/0", "Q: p\nA: ", "so $\\boxed{2}$", "2", meta)]
    q, r = load({**MATH, "subset": "first"}, "train", data_dir=d)
    assert (q.gold, q.meta) == ("\\frac12", {"level": 3, "subject": "Geometry"})
    assert r.meta["level"] is None
    write(tmp_path / "math" / "train_4500.jsonl", [{"problem": "q", "solution": "none"}])
    assert "math/train row 0: no field 'answer' and no \\boxed" in refused(
        DataError, lambda: load(MATH, "train", data_dir=d)
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{ 5 } then \\fbox{6}", "6"),
        ("\\boxed 7.", "7"),
        ("$\\boxed7$", "7"),
        ("\\boxed{}", ""),
        ("\\boxed{1 + ", None),
        ("no box", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@needs("math/train_4500.jsonl", "math/test_500.jsonl")
def test_real_math() -> None:
    train, test = load(MATH, "train", data_dir=DATA), load(MATH, "test", data_dir=DATA)
    assert (len(train), len(test)) == (4500, 500)
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert all(e.gold for e in train + test)
    assert {e.meta["level"] for e in test} == {1, 2, 3, 4, 5}
    # the answer field of MATH-500 is what is read from its boxes, but for blanks
    differ = [e.id for e in test if "".join((last_boxed(e.completion) or "").split()) != "".join(e.gold.split())]
    assert differ == []


# ---- metamathqa ----

META_ROWS = [
    {"type": "GSM_AnsAug", "query": "q0", "response": "r0\n#### 7\nThe answer is: 7"},
    {"type": "MATH_AnsAug", "query": "q1", "response": "r1\nThe answer is: 1"},
    {"type": "GSM_SV", "query": "q2", "response": "r2 is long " + "word " * 30 + "\nThe answer is: 2"},
    {"type": "GSM_FOBAR", "query": "q3", "response": "r3\nThe answer is: 1,003"},
    {"type": "GSM_Rephrased", "query": "q4", "response": "no tail"},
]


@pytest.fixture
def meta_dir(tmp_path: Path) -> str:
    write(tmp_path / "metamathqa" / "rows.jsonl", META_ROWS)
    return str(tmp_path)


def test_metamathqa_recipe(meta_dir: str) -> None:
    first = {**META, "subset": "first"}
    rows = load(first, "train", data_dir=meta_dir)
    assert [(e.id, e.prompt, e.completion, e.gold) for e in rows if e.id != "metamathqa/train/2"] == [
        ("metamathqa/train/0", "Q: q0\nA: ", "r0\n#### 7", "7"),
        ("metamathqa/train/3", "Q: q3\nA: ", "r3", "1,003"),
        ("metamathqa/train/4", "Q: q4\nA: ", "no tail", ""),
    ]
    assert rows[0].meta == {"type": "GSM_AnsAug"}
    assert [e.id[-1] for e in load({**first, "rows": 2}, "train", data_dir=meta_dir)] == ["0", "2"]
    assert [e.id[-1] for e in load(first, "train", 3, data_dir=meta_dir)] == ["0", "2", "3"]


def test_metamathqa_length_counts_prompt_and_completion_and_allows_the_limit(meta_dir: str) -> None:
    short = {**META, "subset": "first", "max_tokens": len("Q: q0\nA: r0\n#### 7")}
    seen: list[str] = []

    def length(text: str) -> int:
        seen.append(text)
        return len(text)

    assert [e.id[-1] for e in load(short, "train", data_dir=meta_dir, length_fn=length)] == ["0", "3", "4"]
    assert seen[0] == "Q: q0\nA: r0\n#### 7"
    assert len(seen) == 4  # rows that are not GSM are not measured
    short["max_tokens"] -= 1
    assert [e.id[-1] for e in load(short, "train", data_dir=meta_dir, length_fn=length)] == ["3", "4"]


def test_metamathqa_seeded_is_the_shuffle_the_authors_call_would_have_given(tmp_path: Path) -> None:
    import datasets

    rows = [{"type": "GSM_AnsAug", "query": str(i), "response": "r"} for i in range(500)]
    write(tmp_path / "metamathqa" / "MetaMathQA-395K.jsonl", rows)
    kw = {"data_dir": str(tmp_path)}
    seeded = load({**META, "shuffle": "seeded", "subset": "first", "rows": 50}, "train", **kw)
    expected = datasets.Dataset.from_list(rows).shuffle(seed=42)["query"][:50]
    assert [e.id for e in seeded] == [f"metamathqa/train/{q}" for q in expected]
    paper = load({**META, "shuffle": "paper", "subset": "first", "rows": 50}, "train", **kw)
    assert [e.id for e in paper] == [f"metamathqa/train/{i}" for i in range(50)]
    assert load({**META, "shuffle": "paper", "rows": 50}, "train", 20, seed=3, **kw)[0] in paper


def test_metamathqa_reads_a_json_array(tmp_path: Path) -> None:
    (tmp_path / "metamathqa").mkdir()
    path = tmp_path / "metamathqa" / "MetaMathQA-395K.json"
    path.write_text(json.dumps(META_ROWS, indent=1))
    assert len(load(META, "train", data_dir=str(tmp_path))) == 4
    write(tmp_path / "metamathqa" / "b.json", META_ROWS)
    message = refused(DataError, lambda: load(META, "train", data_dir=str(tmp_path)))
    assert "fits 2 files (MetaMathQA-395K.json, b.json)" in message


@pytest.mark.parametrize("subset", ["seeded", "first"])
def test_metamathqa_keeps_validation_rows_out_of_train_whatever_their_length(tmp_path: Path, subset: str) -> None:
    """Training drops long rows, grading does not: what is kept back must not depend on it."""
    kinds = ("GSM_Rephrased", "MATH_AnsAug")
    rows = [
        {"query": f"q{i}", "response": f"{'x' * (i % 5)}\nThe answer is: {i}", "type": kinds[i % 2]} for i in range(40)
    ]
    write(tmp_path / "metamathqa" / "train.jsonl", rows)
    source = {**META, "subset": subset, "validation_rows": 6, "max_tokens": 13}
    validation = load(source, "validation", data_dir=str(tmp_path))
    assert len(validation) == 6
    assert all("GSM" in e.meta["type"] for e in validation)
    train = load(source, "train", data_dir=str(tmp_path), length_fn=len)
    without = load({**META, "max_tokens": 13}, "train", data_dir=str(tmp_path), length_fn=len)
    assert len(train) < len(without) < 20, "some rows are too long, and some are kept back"
    assert {e.id for e in train} == {e.id for e in without} - {e.id for e in validation}
    assert load(source, "train", 3, data_dir=str(tmp_path), length_fn=len) == train[:3]
    assert load(source, "validation", 2, seed=5, data_dir=str(tmp_path)) == validation[:2]
    refused(ConfigError, lambda: load(source, "validation", 7, data_dir=str(tmp_path)))


def test_metamathqa_refuses(meta_dir: str) -> None:
    assert "grade on gsm8k" in refused(ConfigError, lambda: load(META, "test", data_dir=meta_dir))
    first = {**META, "subset": "first"}
    assert "must be one of paper, seeded" in refused(
        ConfigError, lambda: load({**META, "shuffle": "yes"}, "train", data_dir=meta_dir)
    )
    assert "which has 2" in refused(ConfigError, lambda: load({**first, "rows": 2}, "train", 3, data_dir=meta_dir))
    assert "which has 4" in refused(ConfigError, lambda: load(META, "train", 5, data_dir=meta_dir))


# ---- jsonl ----


def test_jsonl_defaults_and_templates(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", [{"prompt": "a ", "completion": "b", "gold": 5, "kind": "x", "u": "\u2028"}])
    source = {"name": "jsonl", "path": str(tmp_path / "mine.jsonl")}
    assert load(source, "test") == [Example("mine/test/0", "a ", "b", "5")]
    own = {**source, "prompt": "<{kind}>", "completion": "{u}{gold}", "gold": "{gold}.0", "meta": ["kind"]}
    assert load(own, "test") == [Example("mine/test/0", "<x>", "\u20285", "5.0", {"kind": "x"})]


def test_jsonl_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cwd = tmp_path / "data", tmp_path / "cwd"
    for folder, word in ((data, "data"), (cwd, "cwd")):
        write(folder / "train.jsonl", [{"prompt": word, "completion": "c"}])
    write(cwd / "test.jsonl", [{"prompt": "test", "completion": "c", "gold": "g"}])
    monkeypatch.chdir(cwd)
    source = {"name": "jsonl", "path": "{split}.jsonl"}
    assert load(source, "train", data_dir=str(data))[0].prompt == "data"
    assert load(source, "train")[0].prompt == "cwd"
    assert load(source, "test", data_dir=str(data))[0].gold == "g"
    per_split = {"name": "jsonl", "path": {"train": "train.jsonl"}}
    assert load(per_split, "train")[0].gold == ""
    assert "no split 'test': it has train (the keys of path)" in refused(ConfigError, lambda: load(per_split, "test"))
    missing = {"name": "jsonl", "path": "nowhere.jsonl"}
    message = refused(DataError, lambda: load(missing, "train", data_dir=str(data)))
    assert f"no file at {data / 'nowhere.jsonl'} and {cwd / 'nowhere.jsonl'}" in message
    assert available(missing, "train", str(data)) == (False, message)
    assert available(source, "train", str(data)) == (True, f"local file {data / 'train.jsonl'}")
    assert "has no path" in refused(ConfigError, lambda: load({"name": "jsonl"}, "train"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b'{"prompt": "a", "completion": "b", "gold": "c"}\n\n{"prompt": "a"',
            r"f\.jsonl:3: not JSON \(.*column 15\)",
        ),
        (
            b'{"prompt": "a", "completion": "b", "gold": "c"}\n["a"]\n',
            r"f\.jsonl:2: expected a JSON object, found list",
        ),
        (
            b'\n{"prompt": "a", "gold": "c"}\n',
            r"f\.jsonl:2: field 'completion' is missing \(has: prompt, gold\)",
        ),
        (
            b'{"prompt": "a", "completion": null, "gold": "c"}\n',
            r"f\.jsonl:1: field 'completion' must be str or .*NoneType",
        ),
        (b'{"prompt": "a", "completion": "b"}\n', r"f\.jsonl:1: field 'gold' is missing"),
        (b'{"prompt": "a"}\n\xff\xfe\n', r"f\.jsonl:2: not UTF-8"),
        (b'[{"prompt": "a",\n]', r"f\.jsonl:2: not JSON"),
        (b'[{"prompt": "a"}]', r"f\.jsonl\[0\]: field 'completion' is missing"),
        (b"\n \n", r"f\.jsonl: no rows: the file is empty"),
        (b"", r"f\.jsonl: no rows"),
    ],
)
def test_malformed_files_name_file_line_and_field(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    message = refused(DataError, lambda: load({"name": "jsonl", "path": str(path)}, "test"))
    assert re.search(words, message), message


def test_malformed_gsm8k(gsm8k_dir: str) -> None:
    path = Path(gsm8k_dir) / "gsm8k" / "train.jsonl"
    for answer in ("no marker", "####", "#### 1\n#### 2"):
        write(path, [{"question": "q", "answer": answer}])
        message = refused(DataError, lambda: load(GSM8K, "train", data_dir=gsm8k_dir))
        assert "gsm8k/train row 0: field 'answer' must end in one line '#### N'" in message
    write(path, [{"question": "q", "answer": 5}])
    assert "train.jsonl:1: field 'answer' must be str, is int" in refused(
        DataError, lambda: load(GSM8K, "train", data_dir=gsm8k_dir)
    )


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b", "gold": "c"}\r\n')
    assert load({"name": "jsonl", "path": str(tmp_path / "f.jsonl")}, "test")[0].prompt == "a"


# ---- the door ----


def test_unknown_sources_and_keys() -> None:
    assert "unknown data source 'gsm8'; did you mean 'gsm8k'?" in refused(
        ConfigError, lambda: load({"name": "gsm8"}, "train")
    )
    assert "set name to one of codefeedback, commonsense" in refused(ConfigError, lambda: load({}, "train"))
    assert "unknown key 'calculator'; did you mean 'calculator_annotations'" in refused(
        ConfigError, lambda: load({**GSM8K, "calculator": True}, "train")
    )
    assert "no split 'dev': it has train, test" in refused(ConfigError, lambda: load(GSM8K, "dev"))
    assert "n=2.5 must be a positive integer" in refused(ConfigError, lambda: load(GSM8K, "train", 2.5))  # type: ignore[arg-type]


def test_n_beyond_the_split(gsm8k_dir: str) -> None:
    message = refused(ConfigError, lambda: load(GSM8K, "test", 21, data_dir=gsm8k_dir))
    assert "n=21 asked of split 'test', which has 20" in message


# ---- the hub ----


def test_hub_path_through_a_dataset_directory(tmp_path: Path, gsm8k_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a local directory as it reads a hub dataset; files under data_dir win over it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"
    for split in ("train", "test"):
        write(hub / f"{split}.jsonl", [{"question": f"{split} {i}", "answer": f"a\n#### {i}"} for i in range(3)])
    source = {**GSM8K, "hub": str(hub), "hub_config": None}
    assert sorted(e.prompt for e in load(source, "test")) == [f"Q: test {i}\nA: " for i in range(3)]
    assert available(source, "test", None) == (True, f"local dataset directory {hub}")
    assert len(load(source, "test", data_dir=gsm8k_dir)) == 20
    assert available(source, "test", gsm8k_dir) == (True, f"local file {gsm8k_dir}/gsm8k/test.jsonl")
    broken = tmp_path / "broken"
    for split in ("train", "test"):
        write(broken / f"{split}.jsonl", [{"question": "q", "reply": "a"}])
    source["hub"] = str(broken)
    assert f"{broken}/test[0]: field 'answer' is missing" in refused(DataError, lambda: load(source, "test"))
    (broken / "test.jsonl").write_text("{")
    message = refused(DataError, lambda: load(source, "test"))
    assert f"(KRONLAB_DATA and data.dir are unset) and at hub {broken}" in message
    assert "JSON" in message  # the reason, not "an error occurred while generating the dataset"


def test_missing_dataset_under_offline_mode_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, because the libraries read HF_HUB_OFFLINE when they are imported."""
    code = """
from kronlab.data import available, load_examples
from kronlab.errors import DataError
try:
    load_examples({"name": "gsm8k"}, split="test", n=None, seed=0, data_dir="/no/such/folder")
except DataError as e:
    print(e)
print(available({"name": "gsm8k"}, "test", None))
print(available({"name": "math"}, "train", None))
"""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    load_line, hub_line, local_line = out.stdout.splitlines()
    assert load_line == (
        "dataset 'gsm8k' split 'test' cannot be loaded: "
        "looked in /no/such/folder/gsm8k/test.jsonl and at hub openai/gsm8k "
        "(offline mode is set in the environment, and there is no cached copy); "
        "set KRONLAB_DATA (or data.dir) to a folder that holds gsm8k/test.jsonl, or connect to the hub"
    )
    assert hub_line.startswith("(False, ")
    assert "KRONLAB_DATA and data.dir are unset" in hub_line
    assert "or connect to the hub" not in local_line  # this split is not on the hub
    assert "math/train_4500.jsonl" in local_line


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterable[str]:
    """A hub that accepts a connection and never answers."""
    import datasets
    import huggingface_hub.constants

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(common, "HUB_TIMEOUT_S", 0.5)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_DATASETS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield "kronlab-test/does-not-exist"


def test_a_silent_hub_is_given_up_on(silent_hub: str) -> None:
    import datasets
    import huggingface_hub.constants

    source = {**GSM8K, "hub": silent_hub}
    start = time.perf_counter()
    message = refused(DataError, lambda: load(source, "test"))
    ok, why = available(source, "test", None)
    assert time.perf_counter() - start < 5
    assert f"at hub {silent_hub} (" in message
    assert not ok
    assert f"at hub {silent_hub} (" in why
    # the libraries are left as they were: a later call may find the hub back
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_cached_copy_is_used_where_the_hub_is_silent(
    tmp_path: Path, silent_hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from datasets.naming import camelcase_to_snakecase

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = write(tmp_path / "test.jsonl", [{"question": "q", "answer": "a\n#### 3"}])
    # prepare a copy as a download of the hub dataset leaves it: cache/namespace___name/config/version/hash
    built = datasets.load_dataset(
        "json", data_files={"test": str(rows)}, split="test", cache_dir=str(tmp_path / "build")
    )
    made = Path(built.cache_files[0]["filename"]).parent
    namespace, name = silent_hub.split("/")
    target = cache / f"{namespace}___{camelcase_to_snakecase(name)}" / "main" / "0.0.0" / ("0" * 40)
    target.parent.mkdir(parents=True)
    made.rename(target)
    info = json.loads((target / "dataset_info.json").read_text())
    info.update(dataset_name=name, config_name="main")
    (target / "dataset_info.json").write_text(json.dumps(info))
    for arrow in target.glob("*.arrow"):
        arrow.rename(target / f"{name}-test.arrow")
    source = {**GSM8K, "hub": silent_hub}
    assert available(source, "test", None) == (True, f"cached copy of hub {silent_hub}")
    assert [e.gold for e in load(source, "test")] == ["3"]


SEEDED_ORDER_8 = [7, 4, 3, 2, 6, 0, 5, 1]
