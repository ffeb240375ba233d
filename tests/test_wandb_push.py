"""Records replayed into W&B: one run per cell as its record says, and a second push that changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kronlab.cell import CONFIG_DIR
from kronlab.errors import ConfigError
from kronlab.report.wandb_mirror import headlines, summary, view
from kronlab.runs import Store, read_jsonl
from kronlab.wandb_push import chosen, wandb_push
from wandb_files import Run, offline_runs

wandb = pytest.importorskip("wandb", reason="the mirror is optional: wandb is not installed")

RESULTS = CONFIG_DIR.parent / "results"
EVERY = {"scale": None, "table": None, "method": None}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def committed() -> list[dict[str, Any]]:
    """All records of this repository."""
    return [r for scale in ("smoke", "mini", "small", "paper") for r in Store(RESULTS).records(scale)]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Table 2's records at scale small, with their loss curves."""
    for record in chosen(Store(RESULTS), EVERY | {"scale": "small", "table": "table2"}):
        target, source = Store(tmp_path).folder("small", record["id"]), Store(RESULTS).folder("small", record["id"])
        target.mkdir(parents=True)
        shutil.copyfile(f"{source}.json", f"{target}.json")
        if (source / "loss.jsonl").is_file():
            shutil.copyfile(source / "loss.jsonl", target / "loss.jsonl")
    return tmp_path


def settings(results: Path, **changed: Any) -> dict[str, Any]:
    """configs/wandb.yaml without what was typed."""
    plain = {
        "project": "kronlab", "entity": None, "mode": "offline", "dashboard": False, "only": EVERY,
        "link": None, "force": False, "dry_run": False, "results": {"dir": str(results)},
    }  # fmt: skip
    return plain | changed


def by_id(results: Path) -> dict[str, Run]:
    runs = offline_runs(results)
    assert len({run.id for run in runs}) == len(runs), "a cell has two runs"
    return {run.id: run for run in runs}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("run-*.wandb"))}


def test_every_record_becomes_a_run(results: Path) -> None:
    link = "https://example.org/results"
    wandb_push(settings(results, only=EVERY | {"table": "table2"}, link=link))
    runs, records = by_id(results), {r["id"]: r for r in Store(results).records("small")}
    assert runs.keys() == records.keys()
    assert len(runs) > 4
    for cell_id, run in runs.items():
        record = records[cell_id]
        lines = read_jsonl(Store(results).folder("small", cell_id) / "loss.jsonl")
        assert run.steps == [line["step"] for line in lines]
        assert [row["train/loss"] for row in run.history] == [line["loss"] for line in lines]
        assert run.group == "table2"
        assert run.tags == list(view(record).tags)
        assert f"method:{record['config']['method']['name']}" in run.tags
        assert run.config.items() >= record["config"].items()
        expected = summary(record, link=link)
        assert {key: run.summary[key] for key in expected} == expected
        for name in record["eval"]:
            assert run.summary[f"{name}/samples"] == f"{link}/runs/small/{cell_id}/{name}/samples.jsonl"
        assert run.exit_code == 0


def test_a_second_push_changes_nothing_and_a_changed_record_is_pushed_again(
    results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wandb_push(settings(results))
    first, before = by_id(results), files(results)
    wandb_push(settings(results))
    assert files(results) == before

    changed = next(iter(first))
    path = Store(results).record_path("small", changed)
    record = json.loads(path.read_text())
    name = next(iter(record["eval"]))
    metric = next(iter(record["eval"][name]["metrics"]))
    record["eval"][name]["metrics"][metric]["value"] = 0.125
    path.write_text(json.dumps(record))
    wandb_push(settings(results))
    again = by_id(results)
    assert again.keys() == first.keys()
    assert again[changed].summary[f"{name}/{metric}"] == 0.125
    assert again[changed].steps == first[changed].steps
    wandb.teardown()
    same = {path: data for path, data in files(results).items() if changed not in path}
    assert same == {path: data for path, data in before.items() if changed not in path}


def test_a_push_that_was_stopped_goes_on(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kronlab.report import wandb_mirror

    opened, true = [], wandb_mirror.open_run

    def second_fails(*arguments: Any, **named: Any) -> Any:
        opened.append(arguments[0].id)
        if len(opened) == 2:
            raise KeyboardInterrupt
        return true(*arguments, **named)

    monkeypatch.setattr(wandb_mirror, "open_run", second_fails)
    with pytest.raises(KeyboardInterrupt):
        wandb_push(settings(results))
    assert list(by_id(results)) == opened[:1]
    wandb_push(settings(results))
    everything = {r["id"] for r in Store(results).records("small")}
    assert by_id(results).keys() == everything
    assert sorted(opened[2:]) == sorted(everything - set(opened[:1]))


def test_every_record_of_the_repository_can_be_shown(committed: list[dict[str, Any]]) -> None:
    assert len(committed) > 200
    for record in committed:
        told = view(record)
        assert told.id == record["id"]
        assert told.group
        assert all(0 < len(tag) <= 64 for tag in told.tags)
        for key, value in summary(record).items():
            assert isinstance(value, str | int | float), key
    assert {view(r).group for r in committed} >= {"table2", "table13"}, "cells of tables are grouped by their table"
    assert "spell/exact_match" in headlines(committed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"only": EVERY | {"table": "tabel2"}}, "only.table=tabel2: no such table; did you mean 'table2'"),
        ({"only": EVERY | {"method": "ckda"}}, "only.method=ckda: no such method; did you mean 'cdka'"),
        ({"only": EVERY | {"scale": "huge"}}, "only.scale=huge"),
        ({"only": EVERY | {"scale": "smoke"}}, "no such record"),
        ({"mode": "on"}, "mode='on'"),
        ({"dashboard": True}, "mode=online"),
        ({"mode": "online"}, "not logged in"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(results: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        wandb_push(settings(results, **changed))
    assert "\n" not in str(caught.value)
    assert not (results / "wandb").exists() or not by_id(results)
