"""Every table there is: made whole at scale smoke and planned at every scale, without data, weights or a network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kronlab.cell import CONFIG_DIR, SCALES, compose_config
from kronlab.reproduce import reproduce

TABLES = sorted((path.stem for path in (CONFIG_DIR / "table").glob("*.yaml")), key=lambda name: int(name[5:]))
QUIET = ["runtime.progress=false", "runtime.threads=1"]


def spec(name: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(compose_config([f"table={name}"], name="tables").table, resolve=True)
    return found  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _nothing_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.delenv("KRONLAB_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tables, so that what they share is made once."""
    return tmp_path_factory.mktemp("tables")


@pytest.mark.parametrize("name", TABLES)
def test_every_table_can_be_made_at_smoke(name: str, results: Path) -> None:
    table = spec(name)
    quiet = QUIET if table.get("kind", "cells") == "cells" else []
    made = reproduce(table, scale="smoke", results_dir=str(results), extra=quiet)
    assert made is not None
    written = {path.suffix: path.read_text() for path in (results / "tables" / "smoke").glob(f"{name}.*")}
    assert {".md", ".csv", ".tex"} <= set(written)
    assert "Not run yet" not in written[".md"]
    assert "Failed" not in written[".md"]
    for label in made.labels:
        assert f"| {label} |" in written[".md"]
    again = reproduce(table, scale="smoke", results_dir=str(results), render_only=True)
    assert again is not None
    assert again.markdown() == written[".md"], "from the records alone it is the same table"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_every_scale_of_every_table_can_be_planned(
    name: str, scale: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    table = spec(name)
    if scale not in table["scales"]:
        pytest.skip(f"{name} has no scale {scale}")
    if scale == "paper" and table.get("kind", "cells") == "cells":
        pytest.skip("test_paper_scale.py plans it, and reads what it says")
    assert reproduce(table, scale=scale, results_dir=str(tmp_path), dry_run=True) is None
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing behind"
    assert "no cell is graded on it" not in caplog.text, "an optional eval is one that some cell asks for"
