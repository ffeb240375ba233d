"""Along training: measures of two updates, real runs whose update is known, and a comparison that can be killed."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from kronlab import align_training, methods, models
from kronlab.adapters import adapter_layers
from kronlab.adapters.alignment import arrange, spanned
from kronlab.align_training import (
    FULL,
    FullUpdates,
    TrainingPlan,
    adapter_updates,
    compare,
    leading,
    overlap,
    run_training,
)
from kronlab.cell import compose_config
from kronlab.errors import CheckpointError, ConfigError, KronlabError
from kronlab.evals.statistics import crossed_interval
from kronlab.experiment import run_cell
from kronlab.report.alignment_training import chance, findings, overlap_over_chance, series
from kronlab.reproduce import reproduce
from kronlab.runs import Store
from kronlab.train import Journal, newest_checkpoint, trail_file, trail_steps

QUIET = ["runtime.progress=false", "runtime.threads=1"]
RECORD = "align/smoke/table12-training.json"
JOURNAL = "checkpoints/align/smoke/table12-training.jsonl"


def table12(**changes: Any) -> dict[str, Any]:
    """The table's config; changes: of the smoke scale's part along training."""
    found = OmegaConf.to_container(compose_config(["table=table12"], name="align").table, resolve=True)
    assert isinstance(found, dict)
    found["scales"]["smoke"]["training"] |= changes
    return found  # type: ignore[return-value]


def run(results: Path, spec: dict[str, Any] | None = None, **named: Any) -> Any:
    return run_training(spec or table12(), "smoke", results=results, **{"extra": QUIET} | named)


# ---- two matrices


def random_matrix(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_update_against_itself_its_opposite_and_one_elsewhere() -> None:
    full = random_matrix(12, 20)
    for scaled, cosine in ((0.3 * full, 1.0), (-2 * full, -1.0)):
        same = compare(scaled, full, leading(full, 8), 3)
        assert same["cosine"] == pytest.approx(cosine)
        assert [same[key] for key in ("share", "left", "right")] == pytest.approx([1, 1, 1])
        assert same["norm"] == pytest.approx(float(scaled.norm()))
    u, v = leading(full, 12)
    elsewhere = u[:, 9:12] @ v[:, 9:12].T  # singular directions of ΔW_f behind its first eight
    apart = compare(elsewhere, full, (u[:, :8], v[:, :8]), 3)
    assert apart["left"] == pytest.approx(0, abs=1e-20)
    assert apart["right"] == pytest.approx(0, abs=1e-20)
    assert 0 < apart["cosine"] < 0.3
    assert compare(torch.zeros(12, 20), full, (u, v), 3) == dict.fromkeys(align_training.METRICS, 0)


def test_subspaces_of_one_side_only() -> None:
    """Left and right are told apart: same column space, other row space."""
    a, b, c = random_matrix(30, 2), random_matrix(2, 40, seed=1), random_matrix(2, 40, seed=2)
    found = compare(a @ b, a @ c, leading(a @ c, 2), 2)
    assert found["left"] == pytest.approx(1)
    assert found["right"] < 0.5


@pytest.mark.parametrize(("d", "k"), [(40, 8), (16, 4)])
def test_random_subspaces_overlap_by_k_over_d(d: int, k: int) -> None:
    found = [
        overlap(leading(random_matrix(d, 50, seed=2 * i), k)[0], leading(random_matrix(d, 50, seed=2 * i + 1), k)[0])
        for i in range(60)
    ]
    assert np.mean(found) == pytest.approx(k / d, rel=0.06)  # four standard errors


def test_the_formula_of_the_lora_paper() -> None:
    """φ = 1 - d²/k with d the projection-metric distance of the two subspaces, ‖UUᵀ - U'U'ᵀ‖_F / √2."""
    u, v = leading(random_matrix(9, 9), 3)[0], leading(random_matrix(9, 9, seed=1), 3)[0]
    distance = torch.linalg.matrix_norm(u @ u.T - v @ v.T) / math.sqrt(2)
    assert overlap(u, v) == pytest.approx(1 - float(distance) ** 2 / 3)


# ---- the trail


def test_trail_steps() -> None:
    assert [trail_steps(last) for last in (1, 2, 3, 4, 9)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8, 9]]


def test_a_killed_run_leaves_the_same_trail(make: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Killed after step 5 with a checkpoint at step 3: steps 4 and 5 are done again."""
    changes = ("method=cdka", "trainer.max_steps=6", "trainer.warmup_ratio=0", "runtime.save_every=3", "eval_n=1")
    whole, cut = (make(*changes, "runtime.trail=true", results=tmp_path / name) for name in ("whole", "cut"))
    run_cell(whole)
    kept = Store(tmp_path / "whole").checkpoints(whole.train_id)
    assert sorted(p.name for p in (kept / "trail").iterdir()) == sorted(f"{s}.safetensors" for s in (1, 2, 4, 6))

    class Killed(BaseException):
        pass

    def die(journal: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        plain(journal, args, state, control)
        if state.global_step == 5:
            raise Killed

    plain = Journal.on_step_end
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "on_step_end", die)
        with pytest.raises(Killed):
            run_cell(cut)
    folder = Store(tmp_path / "cut").checkpoints(cut.train_id)
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.name == "checkpoint-3"
    trail_file(folder, 4).write_bytes(b"of before the kill")  # must be written again
    run_cell(cut)
    for step in (1, 2, 4, 6):
        expected, found = load_file(trail_file(kept, step)), load_file(trail_file(folder, step))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), step
    zero_at_the_start = [p for n, p in load_file(trail_file(kept, 1)).items() if ".cdka_B." in n]
    assert len(zero_at_the_start) == 14
    assert all(float(p.abs().max()) > 0 for p in zero_at_the_start), "of after the step, not before it"


def test_the_trail_is_no_part_of_a_cell_and_off_unless_asked_for(make: Callable[..., Any], tmp_path: Path) -> None:
    assert make("runtime.trail=true").id == make().id
    cell = make("method=lora", "trainer.max_steps=1", "eval_n=1")
    run_cell(cell)
    assert not (Store(tmp_path).checkpoints(cell.train_id) / "trail").exists()
    with pytest.raises(ConfigError, match=r"runtime\.trail=3: must be true or false"):
        make("runtime.trail=3")


# ---- real runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("training")
    torch.set_num_threads(1)
    run(results)
    return results


def record_of(results: Path) -> dict[str, Any]:
    return json.loads((results / RECORD).read_text())  # type: ignore[no-any-return]


def written(results: Path) -> dict[str, bytes]:
    return {str(p.relative_to(results)): p.read_bytes() for p in sorted(results.rglob("*")) if p.is_file()}


def plan_of(results: Path, **changes: Any) -> TrainingPlan:
    return TrainingPlan(table12(**changes), "smoke", results, extra=QUIET)


def full_updates(plan: TrainingPlan, results: Path, at: int = 0) -> FullUpdates:
    folder = Store(results).checkpoints(plan.cells[FULL][at].train_id)
    return FullUpdates(folder, align_training._base_weights(plan), [1, 2, 3])


@pytest.mark.parametrize("row", ["lora_8", "cdka_2_8_4", "kron_lora_8"])
def test_an_adapters_update_is_what_merging_it_adds(made: Path, row: str) -> None:
    """Against the merged weights of the adapter that the cell has saved, of another road to the same numbers."""
    from peft import PeftModel

    plan = plan_of(made)
    cell = plan.cells[row][1]
    folder = Store(made).checkpoints(cell.train_id)
    network, _ = models.load(plan.model, dtype=torch.float32)
    before = {layer.name: network.get_parameter(f"{layer.name}.weight").detach().clone() for layer in plan.layers}
    merged = PeftModel.from_pretrained(network, str(folder / "final")).merge_and_unload()
    updates = adapter_updates(plan, row, folder, 3)
    assert updates.keys() == before.keys()
    assert len(updates) == 14
    for name, delta in updates.items():
        assert delta.dtype == torch.float64
        expected = merged.get_parameter(f"{name}.weight").detach() - before[name]
        torch.testing.assert_close(delta.float(), expected, rtol=1e-4, atol=1e-6)


def test_the_first_full_step_follows_the_sign_of_the_gradient(made: Path) -> None:
    """AdamW's first step is lr·sign(g) wherever |g| is far above ε; the batch is the trainer's first."""
    plan = plan_of(made)
    full = full_updates(plan, made)
    lr = plan.cells[FULL][0].config["trainer"]["lr"]
    for layer in plan.layers:
        sizes = full.delta(layer, 1).abs() / lr
        assert float(sizes.median()) == pytest.approx(1, rel=2e-3)
        assert float(sizes.max()) < 1.01


def test_an_adapters_first_step_moves_the_zero_factor_by_its_signs(made: Path) -> None:
    """ΔW = V·U with the V that the run has started from and U one size times a sign: part one's AdamW column."""
    plan = plan_of(made)
    cell = plan.cells["cdka_2_8_4"][0]
    updates = adapter_updates(plan, "cdka_2_8_4", Store(made).checkpoints(cell.train_id), 1)
    network, _ = models.load(plan.model, dtype=torch.float32)
    torch.manual_seed(cell.config["seed"])
    for name, module in adapter_layers(methods.attach(network, plan.model, cell.config["method"])):
        c = module.components["default"]
        v = spanned({key: factor.detach() for key, factor in module.factors("default").items()}, c).double()
        moved = arrange(updates[name.removeprefix("base_model.model.")], c)
        u = torch.linalg.lstsq(v, moved).solution
        torch.testing.assert_close(v @ u, moved, rtol=1e-4, atol=1e-7)
        assert float(u.abs().median() / u.abs().max()) > 0.99, "below it: entries with a gradient near AdamW's ε"


def test_an_adapter_that_can_be_full_fine_tuning_goes_its_way(tmp_path: Path) -> None:
    """CDKA (1, 1, 32) in a model of width 32, A orthogonal: every ΔW is within its reach from the first step on."""
    spec = table12(
        rows=["all", "one", "lora_8"], seeds=[0], row_overrides={"one": [], "all": ["method.init=orthogonal"]}
    )
    spec["rows"] |= {
        "all": {"method": "cdka", "r1": 1, "r2": 1, "r": 32},
        "one": {"method": "cdka", "r1": 1, "r2": 1, "r": 1},
    }
    run(tmp_path, spec)
    record = record_of(tmp_path)
    most, least = (series(record, row, "cosine")[0] for row in ("all", "one"))
    assert most[0] > 0.6
    assert (most > 2 * least).all()
    assert record["rows"]["all"]["kinds"]["q_proj"]["chance_right"] == 8 / 32
    assert record["rows"]["one"]["kinds"]["q_proj"]["chance_right"] == 1 / 32


def test_the_record_holds_what_the_runs_have_done(made: Path) -> None:
    record, plan = record_of(made), plan_of(made)
    assert list(record["rows"]) == [FULL, "lora_8", "cdka_2_8_4", "kron_lora_8"]
    assert record["steps"] == [1, 2, 3]
    assert len(record["layers"]) == 14
    assert str(made) not in json.dumps(record)
    full = full_updates(plan, made, at=1)
    folder = Store(made).checkpoints(plan.cells["cdka_2_8_4"][1].train_id)
    updates = adapter_updates(plan, "cdka_2_8_4", folder, 2)
    cosines, lefts = [], []
    for layer in plan.layers:
        a, b = updates[layer.name], full.delta(layer, 2)
        cosines.append(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)))
        u, w = torch.linalg.svd(a)[0], torch.linalg.svd(b)[0]
        lefts.append(float((u[:, :8].T @ w[:, :8]).square().sum()) / 8)
    assert series(record, "cdka_2_8_4", "cosine")[1, 1] == pytest.approx(np.mean(cosines), rel=1e-4)
    assert series(record, "cdka_2_8_4", "left")[1, 1] == pytest.approx(np.mean(lefts), rel=1e-4)
    assert series(record, "cdka_2_8_4", "cosine")[0, 0] == pytest.approx(
        np.mean(record["rows"]["cdka_2_8_4"]["seeds"][0]["ends"]["first"]), rel=1e-4
    )
    expected = np.mean([8 / layer.d_out for layer in plan.layers])
    assert chance(record, "lora_8", "left") == pytest.approx(expected)
    assert (overlap_over_chance(record, "lora_8") > 0).all()
    text = (made / "tables/smoke/table12-training.md").read_text()
    assert "Verdict: the formula's ranking along training" in text
    mean = series(record, "cdka_2_8_4", "cosine")[:, -1].mean()
    assert f"| {mean:.3f} ± " in next(line for line in text.splitlines() if line.startswith("| CDKA (2,8,4)"))
    assert {p.name for p in (made / "figures/smoke").iterdir()} == {"table12-training.svg", "table12-training.png"}


# ---- the verdict


def invented(cosines: dict[str, list[list[list[float]]]], predicted: dict[str, float]) -> dict[str, Any]:
    """A record of given cosines: row -> [first, last] -> seed -> layer."""
    rows = {
        key: {
            "kinds": {"q": {"predicted": predicted[key]}},
            "seeds": [{"ends": {"first": a, "last": b}} for a, b in zip(*ends, strict=True)],
        }
        for key, ends in cosines.items()
    }
    return {"layers": ["q"] * 5, "rows": rows | {FULL: {}}}


def test_the_verdict_follows_from_the_cosines() -> None:
    rng = np.random.default_rng(0)

    def ends(first: float, last: float) -> list[list[list[float]]]:
        return [(value + 1e-3 * rng.standard_normal((3, 5))).tolist() for value in (first, last)]

    sizes = dict(zip("abcdef", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))
    kept = findings(invented({k: ends(v, 2 * v) for k, v in sizes.items()}, sizes), 0.8)
    assert [f.value for f in kept] == pytest.approx([1, 1, 1])
    assert [f.verdict for f in kept] == ["holds"] * 3
    turned = findings(invented({k: ends(v, 1 - v) for k, v in sizes.items()}, sizes), 0.8)
    assert [f.value for f in turned] == pytest.approx([-1, 1, -1])
    assert [f.verdict for f in turned] == ["fails", "holds", "fails"]
    assert findings(invented({k: ends(v, v) for k, v in list(sizes.items())[:2]}, sizes), 0.8) == []


def test_crossed_interval_is_wider_than_that_of_pairs() -> None:
    """Where a seed shifts all its layers, three seeds say what three numbers say, however many layers there are."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 1)) + 0.01 * rng.standard_normal((3, 200))
    low, high = crossed_interval(lambda x: float(x.mean()), values) or (0, 0)
    assert low == pytest.approx(values.mean(axis=1).min(), abs=0.05)
    assert high == pytest.approx(values.mean(axis=1).max(), abs=0.05)


# ---- going on


def test_typed_again_it_trains_and_writes_nothing_new(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(made)
    monkeypatch.setattr(align_training, "run_cell", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(align_training, "measure_run", lambda *_: pytest.fail("measured again"))
    run(made)
    assert written(made) == before


def test_a_killed_comparison_goes_on_to_the_same_numbers(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / RECORD).unlink()
    lines = (made / JOURNAL).read_text().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_text("".join(lines[:3]) + lines[3][:90])  # killed while writing the fourth
    seen = []
    plain = align_training.measure_run
    monkeypatch.setattr(align_training, "measure_run", lambda *a: seen.append(a[1]) or plain(*a))
    run(tmp_path)
    assert seen == ["kron_lora_8", "lora_8", "cdka_2_8_4", "kron_lora_8"]
    assert record_of(tmp_path)["rows"] == record_of(made)["rows"]


def test_a_cell_that_was_trained_without_a_trail_is_trained_again(tmp_path: Path, made: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    plan = plan_of(tmp_path)
    shutil.rmtree(Store(tmp_path).checkpoints(plan.cells["lora_8"][0].train_id) / "trail")
    (tmp_path / JOURNAL).unlink()
    run(tmp_path)
    assert record_of(tmp_path)["rows"] == record_of(made)["rows"]


def test_what_counts_as_measured(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / RECORD).parent.mkdir(parents=True)
    shutil.copyfile(made / RECORD, tmp_path / RECORD)

    def done(results: Path, spec: dict[str, Any] | None = None, **named: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run(results, spec, dry_run=True, **named)
        return caplog.messages[0].rpartition(": ")[2]

    assert done(tmp_path) == "8 runs, 0 measured"
    assert done(tmp_path, reuse="any") == "8 runs, 8 measured"
    assert done(made, table12(rows=["lora_8"], seeds=[1])) == "2 runs, 2 measured", "a part of it"
    assert done(made, table12(rows=["lora_8", "lora_1"], seeds=[1, 2])) == "6 runs, 2 measured", "others stay valid"
    small = table12(rows=["lora_8"], seeds=[1])
    assert done(made, small, force=True) == "2 runs, 0 measured"
    assert done(made, small, extra=[*QUIET, "task.n=8"]) == "2 runs, 0 measured"
    assert [p.name for p in tmp_path.rglob("*.json*")] == ["table12-training.json"]


def test_render_only_gives_the_same_bytes_from_the_record_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / RECORD).parent.mkdir(parents=True)
    shutil.copyfile(made / RECORD, tmp_path / RECORD)
    run(tmp_path, render_only=True)
    expected = {k: v for k, v in written(made).items() if k.startswith(("align", "tables", "figures"))}
    assert written(tmp_path) == expected


@pytest.mark.parametrize("scale", [s for s, layout in table12()["scales"].items() if "training" in layout])
def test_dry_run_plans_every_scale_without_weights_or_data(
    scale: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = table12()["scales"][scale]["training"]
    with caplog.at_level(logging.INFO):
        assert run_training(table12(), scale, results=tmp_path, dry_run=True) is None
    count = (1 + len(layout["rows"])) * len(layout["seeds"])
    assert sum(message.startswith("  missing ") for message in caplog.messages) == count
    assert list(tmp_path.iterdir()) == []


def test_the_table_makes_both_parts_and_a_scale_may_lack_the_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        reproduce(table12(rows=["lora_8"]), scale="smoke", results_dir=str(tmp_path), dry_run=True)
        assert run_training(table12(), "paper", results=tmp_path) is None
    text = "\n".join(caplog.messages)
    assert "table12 at scale smoke: " in text
    assert "table12-training at scale smoke: 4 runs" in text
    assert "table12: no part along training at scale paper" in text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run(tmp_path, render_only=True) is None
    assert "table12-training: nothing has been measured at scale smoke yet" in caplog.text


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    def small(**changes: Any) -> dict[str, Any]:
        return table12(**{"rows": ["lora_8"], "seeds": [0]} | changes)

    common = table12()["scales"]["smoke"]["training"]["common"]
    for spec, extra, words in (
        (small(rows=["lora_9"]), [], "training.rows=['lora_9']: no such grid point; known are lora_1"),
        (small(), ["method=lora"], "method is no setting of an alignment"),
        (
            small(row_overrides={"lora_8": ["trainer.max_steps=2"]}),
            [],
            "training.row_overrides.lora_8: runs that are compared differ in method and trainer.lr alone",
        ),
        (small(common=[*common, "trainer.precision=bf16"]), [], "use trainer.precision=fp32"),
        (small(common=[*common, "trainer.warmup_ratio=0.1"]), [], "use trainer.warmup_ratio=0"),
    ):
        with pytest.raises(KronlabError) as caught:
            run(tmp_path, spec, extra=[*QUIET, *extra])
        assert words in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / RECORD).parent.mkdir(parents=True)
    (tmp_path / RECORD).write_text('{"schema": 0}')
    with pytest.raises(CheckpointError, match="is not a whole record"):
        run(tmp_path, render_only=True)


def test_kept_weights_that_are_not_the_adapters(made: Path, tmp_path: Path) -> None:
    plan = plan_of(made, rows=["lora_8"], seeds=[0])
    whole = load_file(trail_file(Store(made).checkpoints(plan.cells["lora_8"][0].train_id), 2))
    for kept, words in (
        (dict(list(whole.items())[1:]), "1 tensors too few or too many, such as "),
        ({name: tensor[:, :1].contiguous() for name, tensor in whole.items()}, "size mismatch"),
    ):
        trail_file(tmp_path, 2).parent.mkdir(exist_ok=True)
        save_file(kept, trail_file(tmp_path, 2))
        with pytest.raises(CheckpointError, match=words) as caught:
            adapter_updates(plan, "lora_8", tmp_path, 2)
        assert len(str(caught.value).splitlines()) == 1


def test_a_run_that_diverges_is_named(tmp_path: Path) -> None:
    spec = table12(rows=["lora_8"], seeds=[0], row_overrides={"lora_8": ["trainer.lr=1e30"]})
    with pytest.raises(KronlabError, match=r"LoRA r=8, .* is not finite.*training.row_overrides.lora_8"):
        run(tmp_path, spec)
