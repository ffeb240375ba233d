"""Paper scale, which nobody has run here: every table is planned offline, in words that say what it would take."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kronlab.cell import CONFIG_DIR, compose_config
from kronlab.estimate import size_of
from kronlab.layout import PlannedRow, plan
from kronlab.reproduce import reproduce


def specs() -> dict[str, Any]:
    names = sorted((path.stem for path in (CONFIG_DIR / "table").glob("table*.yaml")), key=lambda name: int(name[5:]))
    return {name: spec(name) for name in names}


def spec(name: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(compose_config([f"table={name}"], name="tables").table, resolve=True)
    return dict(found)


CELLS = [name for name, s in specs().items() if s.get("kind", "cells") == "cells" and "paper" in s["scales"]]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronlab.models.hub_reachable", lambda: False)

    def refuse(*_: Any) -> str:
        raise AssertionError("a dry run asks no hub")

    monkeypatch.setattr("kronlab.data.common.hub_unreachable", refuse)


@pytest.mark.parametrize("name", CELLS)
def test_a_dry_run_tells_what_it_would_take(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert reproduce(spec(name), scale="paper", results_dir=str(tmp_path), dry_run=True) is None
    said = caplog.text
    assert not list(tmp_path.iterdir())
    total = re.search(r"all: (\d+) cells, (.*), one after another", said)
    assert total is not None
    assert "h on one A100 80 GB or" in total[2]
    assert "unknown time" not in said, "every task and eval of a paper-scale table is in configs/estimate.yaml"
    assert "trainable parameters" in said
    assert "no cell is graded on it" not in said, "an optional eval is one that some cell asks for"
    assert "weights: " in said
    assert "data: " in said
    if "llama" in said:
        assert "gated: accept it on the hub" in said


def planned(name: str, *keys: str) -> dict[str, PlannedRow]:
    """The named rows of a table at scale paper, with their first seed alone: the others are copies."""
    table = spec(name)
    layout = table["scales"]["paper"]
    layout["rows"], layout["seeds"] = list(keys), layout["seeds"][:1]
    rows, _ = plan(table, "paper", weights_needed=False, every_eval=True)
    return {row.key: row for row in rows}


def counts(name: str, *keys: str) -> dict[str, set[int]]:
    return {key: {size_of(cell.config).trainable for cell in row.cells} for key, row in planned(name, *keys).items()}


def test_published_counts_come_out_in_the_tables() -> None:
    """The anchors of the papers, through the tables' own configs."""
    table7, table8 = counts("table7", "kron_lora", "lora_16"), counts("table8", "lora", "krona", "kron_lora")
    assert table7["kron_lora"] == {840_481}
    assert table7["lora_16"] == {1_918_465}
    assert table8["Mistral-7B/lora"] == {21_260_288}
    assert table8["Mistral-7B/krona"] == {2_284_032}
    assert table8["Mistral-7B/kron_lora"] == {5_708_448}


def test_budgets_of_table_1() -> None:
    table = counts("table1", "lora", "cdka_2_2_8", "cdka_2_2_4", "cdka_2_2_1", "cdka_2_8_4")
    full = table["T5-base/lora"]
    assert full == table["T5-base/cdka_2_2_8"] == {3_244_032}
    assert table["T5-base/cdka_2_2_4"] == {3_244_032 // 2}
    assert table["T5-base/cdka_2_2_1"] == {3_244_032 // 8}
    assert table["T5-base/cdka_2_8_4"] == {3_446_784}


def test_groups_have_arms_of_their_own() -> None:
    rows = planned("table1", "lora")
    evals = {(row.group, part.arm): set(part.cell.config["eval"]) for row in rows.values() for part in row.parts}
    assert evals["T5-base", "mnli"] == {"glue_mnli_text"}
    assert evals["DeBERTa-v3-base", "mnli"] == {"glue_mnli"}
    assert len(evals) == 10
    assert rows["T5-base/lora"].published["mean"]["value"] == 82.08
    assert rows["DeBERTa-v3-base/lora"].published == {}


def test_published_numbers_say_where_they_were_read() -> None:
    found = 0
    for table in specs().values():
        if table.get("kind", "cells") != "cells":
            continue
        sections = [row.get("published", {}) for row in table["rows"].values()]
        sections += [row for group in table.get("published_by_group", {}).values() for row in group.values()]
        columns = [column for layout in table["scales"].values() for column in layout["columns"]]
        keys = {column.get("published", column.get("eval", "mean")) for column in columns}
        for section in sections:
            for key, value in section.items():
                assert key in keys, (table["name"], key)
                assert set(value) == {"value", "source", "confidence"}
                assert value["confidence"] in ("H", "M", "C")
                found += 1
    assert found > 30


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")))
def test_every_model_says_its_licence_and_its_gate(name: str) -> None:
    config: Any = OmegaConf.to_container(compose_config(["scale=smoke", f"model={name}"]).model)
    assert config["licence"]
    if config.get("hub"):
        assert isinstance(config["gated"], bool)
        assert config["gated"] is config["hub"].startswith("meta-llama/")
