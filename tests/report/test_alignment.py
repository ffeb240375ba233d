"""The verdict on alignment, against cosines made up to obey or to defy the theory; and its figure."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from kronlab.cell import compose_config
from kronlab.report.alignment import findings, verdict_line
from kronlab.report.figures import alignment_figure
from kronlab.reproduce import reproduce


def table12() -> dict[str, Any]:
    found = OmegaConf.to_container(compose_config(["table=table12"], name="align").table, resolve=True)
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("align")
    extra = ["runtime.progress=false", "runtime.threads=1"]
    reproduce(table12(), scale="smoke", results_dir=str(results), extra=extra)
    return json.loads((results / "align/smoke/table12.json").read_text())  # type: ignore[no-any-return]


def remade(record: dict[str, Any], cosine: Callable[[dict[str, int], int], float]) -> dict[str, Any]:
    """The record with other cosines: a function of the point's sizes and d_in, with 1 % of noise over layers."""
    made, noise = copy.deepcopy(record), np.random.default_rng(0)
    for layer in made["layers"]:
        for key, point in made["settings"]["points"].items():
            sizes = {"r1": 1, "r2": 1} | point
            values = cosine(sizes, layer["d_in"]) * (1 + 0.01 * noise.standard_normal(2))
            layer["cosines"][key] = {"sgd": list(values), "adamw": list(values)}
    return made


def test_verdict_of_the_theory_and_of_its_opposite(record: dict[str, Any]) -> None:
    thresholds = table12()["verdict"]

    def theory(s: dict[str, int], d_in: int) -> float:
        # Kron-LoRA's own formula puts it between the others
        return math.sqrt(s["r"] * s["r2"] / s["r1"] / d_in) * (0.09 if "d_a2" in s else 0.1)

    found = findings(remade(record, theory), thresholds)
    correlations, exponents = ["rank correlation", "rank correlation, AdamW"], ["r2", "r1", "r"]
    assert [f.name for f in found] == [*correlations, *(f"exponent of {size}" for size in exponents)]
    assert [f.value for f in found[2:]] == pytest.approx([0.5, -0.5, 0.5], abs=0.01)
    assert [f.verdict for f in found] == ["holds"] * 5
    assert all(f.interval[0] <= f.value <= f.interval[1] for f in found)
    assert verdict_line(found).startswith("Verdict: the theory of the first step holds: rank correlation ")

    flat = findings(remade(record, lambda s, d_in: theory(s, d_in) / math.sqrt(s["r2"] / s["r1"])), thresholds)
    assert {f.name: f.verdict for f in flat[2:]} == {
        "exponent of r2": "fails", "exponent of r1": "fails", "exponent of r": "holds"
    }  # fmt: skip
    assert verdict_line(flat).startswith("Verdict: the theory of the first step fails: ")

    opposite = findings(remade(record, lambda s, d_in: 0.01 / theory(s, d_in)), thresholds)
    assert [f.verdict for f in opposite] == ["fails"] * 5
    tight = dict(thresholds, exponent=0.5)
    assert "undecided" in {f.verdict for f in findings(remade(record, theory), tight)}


def test_every_point_and_kind_is_a_dot(record: dict[str, Any]) -> None:
    figure = alignment_figure(record)
    left, right = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["r1 = 1", "r1 = 2", "r1 = 8", "Kron-LoRA"]
    dots = [container.lines[0] for container in left.containers]
    assert sum(len(line.get_xdata()) for line in dots) == 8 * 7, "eight points, seven kinds of layers"
    diagonal = left.lines[-1]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert (left.get_title(), right.get_title()) == ("gradient descent", "AdamW")
