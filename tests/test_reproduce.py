"""From a table config to a table: every cell once, what is missing and no more, failures kept and told."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from kronlab.cell import CONFIG_DIR, compose_config, digest
from kronlab.errors import ConfigError, KronlabError
from kronlab.reproduce import MAKERS, choose_scale, load_rows, plan, reproduce

ROOT = Path(__file__).resolve().parents[1]
QUIET = ["runtime.progress=false", "runtime.threads=1"]
KEYS = ["base", "lora", "cdka_2_2_8", "cdka_2_8_4", "cdka_2_2_1", "kron_lora"]


def spec(name: str = "table2") -> dict[str, Any]:
    found = OmegaConf.to_container(compose_config([f"table={name}"], name="tables").table, resolve=True)
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def records(results: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in results.glob("runs/smoke/*.json")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The command that a stranger types, once. Its results directory has a blank and an equals sign."""
    results = tmp_path_factory.mktemp("a=b c")
    arguments = ["table=table2", "table_scale=smoke", f"results.dir='{results}'", 'extra=["runtime.progress=false"]']
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "tables.py"), *arguments],
        env=environment, cwd=results, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return results, done


def test_the_command_runs_every_row_and_writes_the_table(
    made: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    results, done = made
    assert done.returncode == 0, done.stderr
    read = [json.loads(path.read_text()) for path in records(results)]
    assert len(read) == len(KEYS)
    assert {r["status"] for r in read} == {"done"}
    assert all(digest(r["config"]) == r["id"] for r in read), "the id can be computed anew from the record"
    assert str(results) not in json.dumps(read), "a record names no path of the machine it was made on"
    folder = results / "tables" / "smoke"
    assert sorted(p.name for p in folder.iterdir()) == ["table2.csv", "table2.md", "table2.seeds.csv", "table2.tex"]
    rows = list(csv.DictReader((folder / "table2.csv").open()))
    assert [row["key"] for row in rows] == KEYS
    by_label = {r["label"]: r for r in read}
    for row in rows:
        metrics = by_label[row["method"]]["eval"]["chain_sum"]["metrics"]
        assert float(row["chain_sum NLL (nats/token)"]) == pytest.approx(metrics["nll_per_token"]["value"], rel=1e-9)
        assert int(row["trainable parameters"]) == by_label[row["method"]]["parameters"]["trainable"]
    values = list(csv.DictReader((folder / "table2.seeds.csv").open()))
    assert {(v["row"], v["record"]) for v in values} == {(row["key"], by_label[row["method"]]["id"]) for row in rows}
    assert (folder / "table2.md").read_text() in done.stdout, "the table is printed too"


def test_typed_twice_it_does_nothing_new(
    made: tuple[Path, subprocess.CompletedProcess[str]], caplog: pytest.LogCaptureFixture
) -> None:
    results, _ = made
    before, tables = records(results), {p: p.read_bytes() for p in (results / "tables" / "smoke").iterdir()}
    with caplog.at_level(logging.INFO):
        reproduce(spec(), scale="smoke", results_dir=str(results), extra=QUIET)
    assert "table2 at scale smoke: 6 cells, 6 done" in caplog.messages
    assert records(results) == before
    assert {p: p.read_bytes() for p in tables} == tables


def test_a_deleted_record_is_made_again_and_no_other(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    results, _ = made
    before = records(results)
    (victim,) = [path for path in before if json.loads(path.read_text())["label"] == "CDKA (2,8,4)"]
    old = json.loads(victim.read_text())
    victim.unlink()
    reproduce(spec(), scale="smoke", results_dir=str(results), extra=QUIET)
    after = records(results)
    assert {path for path in after if after[path] != before[path]} == {victim}
    new = json.loads(victim.read_text())
    for key in ("id", "config", "weights", "parameters"):
        assert new[key] == old[key]
    assert new["eval"]["chain_sum"]["metrics"] == old["eval"]["chain_sum"]["metrics"]
    assert new["train"]["final_loss"] == old["train"]["final_loss"]


def test_dry_run_lists_the_cells_and_touches_nothing(
    made: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results, _ = made
    with caplog.at_level(logging.INFO):
        for where in (results, tmp_path):
            assert reproduce(spec(), scale="smoke", results_dir=str(where), dry_run=True) is None
    listed = [m.split()[0] for m in caplog.messages if m.startswith(("  done", "  missing"))]
    assert listed == ["done"] * 6 + ["missing"] * 6
    assert list(tmp_path.iterdir()) == []


def test_render_only_writes_the_table_from_records_alone(
    made: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    import shutil

    results, _ = made
    shutil.copytree(results / "runs", tmp_path / "runs")
    gone = next(iter((tmp_path / "runs" / "smoke").glob("*.json")))
    label = json.loads(gone.read_text())["label"]
    gone.unlink()
    table = reproduce(spec(), scale="smoke", results_dir=str(tmp_path), render_only=True)
    assert table is not None
    assert f"Not run yet: {label} (1 seed)." in table.notes
    assert not gone.exists()
    shutil.copy(results / "runs" / "smoke" / gone.name, gone)
    reproduce(spec(), scale="smoke", results_dir=str(tmp_path), render_only=True)
    for path in (tmp_path / "tables" / "smoke").iterdir():
        assert path.read_bytes() == (results / "tables" / "smoke" / path.name).read_bytes()


def test_the_figures_are_drawn_with_the_table(
    made: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    import shutil

    results, _ = made
    shutil.copytree(results / "runs", tmp_path / "runs")
    table = spec()
    table["scales"]["smoke"]["figures"] = [
        {"kind": "loss", "name": "loss"},
        {"kind": "forest", "eval": "chain_sum", "metric": "nll_per_token"},
    ]
    reproduce(table, scale="smoke", results_dir=str(tmp_path), render_only=True)
    folder = tmp_path / "figures" / "smoke"
    names = [f"{name}.{suffix}" for name in ("table2", "table2_loss") for suffix in ("csv", "png", "svg")]
    assert sorted(path.name for path in folder.iterdir()) == names
    read = {r["label"]: r for r in (json.loads(path.read_text()) for path in records(tmp_path))}
    for line in csv.DictReader((folder / "table2_loss.csv").open()):
        curve = (tmp_path / "runs" / "smoke" / read[line["label"]]["id"] / "loss.jsonl").read_text().splitlines()
        assert float(line["value"]) == pytest.approx(json.loads(curve[int(line["x"]) - 1])["loss"], rel=1e-7)
    assert [line["key"] for line in csv.DictReader((folder / "table2.csv").open())] == KEYS[2:]


def test_a_cell_that_fails_stops_no_other_and_is_told_at_the_end(tmp_path: Path) -> None:
    """r2=7 divides nothing in the tiny model; a target that is not there is PEFT's own error."""
    broken = spec()
    broken["scales"]["smoke"]["rows"] = ["cdka_2_8_4", "kron_lora", "lora"]
    broken["rows"]["cdka_2_8_4"]["overrides"].append("method.r2=7")
    broken["rows"]["kron_lora"]["overrides"].append("method.target_modules=[nowhere]")
    with pytest.raises(KronlabError) as caught:
        reproduce(broken, scale="smoke", results_dir=str(tmp_path), extra=QUIET)
    first, second = str(caught.value).splitlines()
    assert "CDKA (2,7,4)" in first
    assert "r2=7 does not divide d_in=32" in first
    assert "Kron-LoRA" in second
    assert "nowhere" in second
    states = {r["label"]: r["status"] for r in (json.loads(p.read_text()) for p in records(tmp_path))}
    assert states == {"CDKA (2,7,4)": "failed", "Kron-LoRA r=8": "failed", "LoRA r=8": "done"}
    text = (tmp_path / "tables" / "smoke" / "table2.md").read_text()
    assert "| CDKA (2,7,4) |  |  | failed |" in text
    assert "Failed: CDKA (2,7,4) (1 seed), Kron-LoRA r=8 (1 seed)." in text


def test_force_does_a_done_cell_again(tmp_path: Path) -> None:
    only = spec()
    only["scales"]["smoke"]["rows"] = ["lora"]
    reproduce(only, scale="smoke", results_dir=str(tmp_path), extra=QUIET)
    before = records(tmp_path)
    reproduce(only, scale="smoke", results_dir=str(tmp_path), extra=QUIET, force=True)
    after = records(tmp_path)
    assert before.keys() == after.keys()
    assert before != after


# ---- planning ----


def test_an_eval_without_data_is_left_out_and_said_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub.constants

    monkeypatch.delenv("KRONLAB_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        rows, notes = plan(spec(), "mini", weights_needed=False)
        reproduce(spec(), scale="mini", results_dir=str(tmp_path), dry_run=True)
    assert [row.key for row in rows] == KEYS
    assert all(list(cell.config["eval"]) == ["chain_sum"] for row in rows for cell in row.cells)
    assert len(notes) == 1
    assert notes[0].startswith("gsm8k is left out: ")
    assert "KRONLAB_DATA" in notes[0]
    assert len(notes[0].splitlines()) == 1
    assert notes[0] in caplog.messages

    local = tmp_path / "data" / "gsm8k"
    local.mkdir(parents=True)
    (local / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    with_data, none = plan(spec(), "mini", overrides=[f"data.dir={local.parent}"], weights_needed=False)
    assert none == []
    assert all(list(cell.config["eval"]) == ["chain_sum", "gsm8k"] for row in with_data for cell in row.cells)
    for without, having in zip(rows, with_data, strict=True):
        assert without.cells[0].id != having.cells[0].id
        assert without.cells[0].train_id == having.cells[0].train_id, "the trained weights serve both"


def test_render_only_finds_records_that_were_graded_where_the_data_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A table with an optional eval is not overwritten by an empty one on a machine without the data."""
    import huggingface_hub.constants

    monkeypatch.delenv("KRONLAB_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny = spec()
    tiny["scales"]["smoke"] |= {
        "rows": ["base"],
        "common": [*tiny["scales"]["smoke"]["common"], "+eval@eval.gsm8k=gsm8k"],
        "optional_evals": ["gsm8k"],
    }
    local = tmp_path / "data" / "gsm8k"
    local.mkdir(parents=True)
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(8)]
    (local / "test.jsonl").write_text("\n".join(lines))
    short = [*QUIET, "eval.gsm8k.generation.max_new_tokens=4"]
    whole = reproduce(tiny, scale="smoke", results_dir=str(tmp_path), extra=[*short, f"data.dir={local.parent}"])
    again = reproduce(tiny, scale="smoke", results_dir=str(tmp_path), extra=short, render_only=True)
    assert whole is not None
    assert again is not None
    assert any(note.endswith("gsm8k: 8 test samples, greedy decoding.") for note in whole.notes)
    assert again.markdown() == whole.markdown()


def test_the_base_model_is_one_cell_whatever_the_seeds() -> None:
    several = spec()
    several["scales"]["smoke"]["seeds"] = [0, 1, 2]
    rows, _ = plan(several, "smoke", weights_needed=False)
    assert {row.key: len(row.cells) for row in rows} == dict.fromkeys(KEYS, 3) | {"base": 1}


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "table").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_table_says_what_it_must(path: Path) -> None:
    table = spec(path.stem)
    assert table["name"] == path.stem
    assert table["baseline"] in table["rows"]
    assert table.get("kind", "cells") in MAKERS
    if table.get("kind", "cells") != "cells":
        return  # the other kinds have tests of their own
    by_group = [row for rows in table.get("published_by_group", {}).values() for row in rows.values()]
    for numbers in [*(row.get("published", {}) for row in table["rows"].values()), *by_group]:
        for said in numbers.values():
            assert set(said) == {"value", "source", "confidence"}, "a published number says where it was read"
            assert said["source"]
            assert said["confidence"] in ("H", "M", "C")


@pytest.mark.parametrize("scale", ["smoke", "mini", "small", "paper"])
def test_every_scale_of_table2_can_be_planned(scale: str) -> None:
    table = spec()
    rows, notes = plan(table, scale, weights_needed=False, every_eval=True)
    assert notes == []
    assert [row.key for row in rows] == table["scales"][scale]["rows"]
    assert len({cell.id for row in rows for cell in row.cells}) == sum(len(row.cells) for row in rows), (
        "two rows are the same experiment"
    )
    for column in table["scales"][scale]["columns"]:
        assert all(any(column["eval"] in cell.config["eval"] for cell in row.cells) for row in rows)


# ---- groups and arms ----


def several() -> dict[str, Any]:
    """Two models, each with two rows trained on two tasks with two seeds; every part of the format at once."""
    made = spec()
    made["published_by_group"] = {"LLaMA": {"lora": {"gsm8k": {"value": 1.0, "source": "here", "confidence": "H"}}}}
    made["scales"]["smoke"] |= {
        "rows": ["base", "lora"],
        "seeds": [0, 1],
        "common": ["trainer.max_steps=1", "trainer.lr=1e-5", "task.n=8"],
        "groups": {"LLaMA": ["model=tiny_llama", "task.n=9"], "Mistral": ["model=tiny_mistral"]},
        "arms": {"sums": ["task=chain_sum", "eval_n=2"], "words": ["task=gsm_symbolic", "eval_n=2", "trainer.lr=1e-4"]},
        "row_overrides": {"lora": ["trainer.warmup_ratio=0.5"]},
        "columns": [
            {"eval": "chain_sum", "metric": "nll_per_token", "title": "sums"},
            {"eval": "gsm_symbolic", "metric": "nll_per_token", "title": "words"},
        ],
    }
    made["rows"]["lora"]["overrides"].append("method.alpha=3")
    return made


def test_every_row_has_a_cell_for_each_arm_and_seed_in_every_group() -> None:
    rows, _ = plan(several(), "smoke", overrides=["eval_n=3"], weights_needed=False)
    assert [(row.key, row.group, row.name) for row in rows] == [
        ("LLaMA/base", "LLaMA", "LLaMA, base model"),
        ("LLaMA/lora", "LLaMA", "LLaMA, LoRA r=8"),
        ("Mistral/base", "Mistral", "Mistral, base model"),
        ("Mistral/lora", "Mistral", "Mistral, LoRA r=8"),
    ]
    assert [part.place for part in rows[0].parts] == ["sums", "words"], "the base model has no seed"
    assert [part.place for part in rows[1].parts] == ["sums, seed 0", "sums, seed 1", "words, seed 0", "words, seed 1"]
    for row in rows:
        for part in row.parts:
            config = part.cell.config
            assert config["model"]["name"] == {"LLaMA": "tiny_llama", "Mistral": "tiny_mistral"}[row.group]
            assert list(config["eval"]) == [{"sums": "chain_sum", "words": "gsm_symbolic"}[part.arm]]
            assert config["task"]["n"] == {"LLaMA": 9, "Mistral": 8}[row.group], "a group wins over what is common"
            assert config["trainer"]["lr"] == {"sums": 1e-5, "words": 1e-4}[part.arm], "so does an arm"
            assert config["seed"] == part.seed
            assert next(iter(config["eval"].values()))["n"] == 3, "what is typed wins over all"
    for part in rows[1].parts:
        assert (part.cell.config["method"]["alpha"], part.cell.config["trainer"]["warmup_ratio"]) == (3, 0.5)


def test_a_group_may_have_arms_of_its_own() -> None:
    """Models of different kinds are trained on different forms of the tasks."""
    table = several()
    own = {"overrides": ["model=tiny_mistral"], "arms": {"only": ["task=gsm_symbolic", "task.n=5"]}}
    table["scales"]["smoke"]["groups"]["Mistral"] = own
    rows, _ = plan(table, "smoke", weights_needed=False)
    assert [part.place for part in rows[1].parts] == ["sums, seed 0", "sums, seed 1", "words, seed 0", "words, seed 1"]
    assert [part.place for part in rows[3].parts] == ["only, seed 0", "only, seed 1"]
    for part in rows[3].parts:
        assert (part.cell.config["model"]["name"], part.cell.config["task"]["n"]) == ("tiny_mistral", 5)


def test_published_numbers_come_from_the_row_and_from_its_group() -> None:
    rows, _ = plan(several(), "smoke", weights_needed=False)
    published = {row.key: {key: said["value"] for key, said in row.published.items()} for row in rows}
    assert published == {
        "LLaMA/base": {},
        "LLaMA/lora": {"gsm8k": 1.0, "humaneval": 14.76},
        "Mistral/base": {},
        "Mistral/lora": {"gsm8k": 42.08, "humaneval": 14.76},
    }


def test_a_partial_table_names_row_arm_and_seed_of_what_is_missing(tmp_path: Path) -> None:
    table = several()
    table["scales"]["smoke"]["groups"] = {"LLaMA": ["model=tiny_llama"]}
    short = ["eval.gsm_symbolic.generation.max_new_tokens=1"]
    table["scales"]["smoke"]["arms"]["words"] += short
    reproduce(table, scale="smoke", results_dir=str(tmp_path), extra=QUIET)
    rows, _ = plan(table, "smoke", weights_needed=False)
    for part in (rows[1].parts[1], rows[1].parts[2]):
        (tmp_path / "runs" / "smoke" / f"{part.cell.id}.json").unlink()
    made = reproduce(table, scale="smoke", results_dir=str(tmp_path), render_only=True)
    assert made is not None
    assert "Cells not run yet: LLaMA, LoRA r=8 (sums, seed 1; words, seed 0)." in made.notes
    read = load_rows(table, "smoke", tmp_path)
    assert [(row.key, row.group) for row in read] == [("LLaMA/base", "LLaMA"), ("LLaMA/lora", "LLaMA")]
    assert [found is not None for found in read[1].records] == [True, False, False, True]
    assert read[1].published["gsm8k"]["value"] == 1.0


def test_load_rows_reads_what_is_there_and_asks_nobody(
    made: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, _ = made

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("data were asked for")

    monkeypatch.setattr("kronlab.layout.available", never)
    rows = load_rows(spec(), "smoke", results)
    assert [row.key for row in rows] == KEYS
    for row, planned in zip(rows, plan(spec(), "smoke", weights_needed=False)[0], strict=True):
        assert [found["id"] for found in row.records if found] == [cell.id for cell in planned.cells]
    assert all(found is None for row in load_rows(spec(), "mini", results) for found in row.records)
    with pytest.raises(ConfigError, match=r"table9 is made of no cells \(kind=bench\)"):
        load_rows(spec("table9"), "smoke", results)


def test_a_wrong_override_names_table_and_row() -> None:
    wrong = spec()
    wrong["rows"]["lora"]["overrides"].append("method.rank=3")
    with pytest.raises(ConfigError, match=r"table2, row lora: method\.rank: unknown key"):
        plan(wrong, "smoke", weights_needed=False)
    wrong["scales"]["smoke"]["rows"] = ["nowhere"]
    with pytest.raises(ConfigError, match="table2 has no row 'nowhere'; it has base, full"):
        plan(wrong, "smoke", weights_needed=False)


def test_two_rows_that_are_one_experiment_are_refused() -> None:
    table = spec()
    table["rows"]["again"] = {"overrides": list(table["rows"]["lora"]["overrides"])}
    table["scales"]["smoke"]["rows"] = ["lora", "again"]
    with pytest.raises(ConfigError, match=r"^table2, scale smoke: rows lora and again are the same experiment \(LoRA"):
        plan(table, "smoke", weights_needed=False)


def test_a_column_that_no_cell_can_fill_is_refused() -> None:
    table = several()
    table["scales"]["smoke"]["columns"][0]["eval"] = "chain_sums"
    fault = r"column sums: no cell is graded on chain_sums; did you mean 'chain_sum'\?"
    with pytest.raises(ConfigError, match=fault):
        plan(table, "smoke", weights_needed=False)


def test_choose_scale_says_what_it_picks(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    assert choose_scale("small") == "small"
    assert caplog.messages == []
    with caplog.at_level(logging.INFO):
        picked = choose_scale(None)
    if not torch.cuda.is_available():
        assert picked == "mini"
        assert "SCALE=mini chosen (no GPU found)" in caplog.text
    assert f"SCALE={picked} chosen" in caplog.text
    with pytest.raises(ConfigError, match="scale='tiny' is not known; use one of smoke, mini, small, paper"):
        choose_scale("tiny")


def test_a_scale_that_a_table_lacks_is_one_line() -> None:
    lacking = spec()
    del lacking["scales"]["paper"]
    with pytest.raises(ConfigError, match="table2 has no scale 'paper'; it has smoke, mini, small"):
        reproduce(lacking, scale="paper", results_dir="unused")


# ---- what is committed ----


@pytest.mark.parametrize("scale", ["mini", "small", "paper"])
def test_committed_tables_are_what_the_committed_records_say(scale: str, tmp_path: Path) -> None:
    import shutil

    committed = ROOT / "results" / "tables" / scale
    names = sorted(
        {path.stem.partition("-")[0] for path in committed.glob("table*.md")}
    )  # table12-training is table12's
    if not names:
        pytest.skip(f"no table of scale {scale} is committed yet")
    for kind in ("runs", "bench", "align"):
        if (ROOT / "results" / kind / scale).is_dir():
            no_samples = shutil.ignore_patterns("samples.jsonl")  # loss curves are drawn
            shutil.copytree(ROOT / "results" / kind / scale, tmp_path / kind / scale, ignore=no_samples)
    for name in names:
        assert (CONFIG_DIR / "table" / f"{name}.yaml").is_file(), f"{name} has no config"
        reproduce(spec(name), scale=scale, results_dir=str(tmp_path), render_only=True)
        paths = sorted(committed.glob(f"{name}[.-]*"))
        made = sorted((tmp_path / "tables" / scale).glob(f"{name}[.-]*"))
        assert [path.name for path in made] == [path.name for path in paths]
        for path, fresh in zip(paths, made, strict=True):
            assert without_absence(fresh.read_text()) == without_absence(path.read_text()), (
                f"{path.name}: render it again"
            )
    # of a figure its data are compared: the pictures depend on the versions of the libraries that draw them
    drawn, kept = (folder / "figures" / scale for folder in (tmp_path, ROOT / "results"))
    assert [path.name for path in sorted(kept.glob("*.csv"))] == [path.name for path in sorted(drawn.glob("*.csv"))]
    for path in kept.glob("*.csv"):
        assert path.read_text() == (drawn / path.name).read_text(), f"{path.name}: draw it again"
        for suffix in ("svg", "png"):
            assert path.with_suffix(f".{suffix}").is_file(), f"{path.stem}.{suffix} is not committed"


def without_absence(text: str) -> str:
    """Why data could not be had differs between machines; what was made of the rest does not."""
    return "\n".join(line for line in text.splitlines() if " is left out: " not in line)


def test_makefile_has_a_target_for_every_table() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in (CONFIG_DIR / "table").glob("table*.yaml"):
        assert f"reproduce-{path.stem}" in done.stdout
        assert yaml.safe_load(path.read_text())["name"] == path.stem
