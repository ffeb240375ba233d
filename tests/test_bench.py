"""The benchmark: what its instruments count, that its peers are what they say, and that a killed bench goes on."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from kronlab import models
from kronlab.adapters.kron import cdka_delta
from kronlab.adapters.quantized_base import bits_of
from kronlab.bench import cases as bench_cases
from kronlab.bench import run as bench_run
from kronlab.bench.cases import ONE_LINEAR_MODEL, TrainingStep, plan_cases, random_batch, sharing_weights
from kronlab.bench.measure import count_flops, interleaved, saved_bytes
from kronlab.bench.peers import (
    KronLoop,
    OneLinear,
    count_shapes,
    lokr_parameters,
    lora_parameters,
    make_peers,
    match_lokr,
)
from kronlab.bench.run import run_bench
from kronlab.cell import compose_config
from kronlab.encode import IGNORED
from kronlab.errors import CheckpointError, ConfigError
from kronlab.report.cost import interquartile_range, ratio_of_medians
from kronlab.reproduce import reproduce


def table9() -> dict[str, Any]:
    found = OmegaConf.to_container(compose_config(["table=table9"], name="bench").table, resolve=True)
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def small_table9() -> dict[str, Any]:
    """Table 9 at scale smoke with every part, but few peers."""
    spec = table9()
    layout = spec["scales"]["smoke"]
    layout |= {"dtypes": ["fp32"], "peers": ["base", "lora", "cdka_2_2_8"]}
    layout["memory"]["batches"] = [{"rows": 2, "length": 8, "peers": ["lora"]}]
    return spec


def tiny_llama() -> tuple[dict[str, Any], nn.Module]:
    config = bench_cases._model_config("tiny_llama")
    return config, models.load(config, dtype=torch.float32)[0]


# ---- instruments


def test_every_work_runs_once_a_round_and_the_order_changes() -> None:
    ran: list[str] = []
    works = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = interleaved(works, rounds=6, repeats={"a": 1, "b": 2, "c": 1})
    rounds = [ran[at : at + 4] for at in range(0, 24, 4)]
    assert all(Counter(one) == {"a": 1, "b": 2, "c": 1} for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert all(len(times[name].wall) == len(times[name].cpu) == 6 for name in "abc")


def test_saved_bytes_are_those_of_each_storage_once_without_weights() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    layer = nn.Linear(4, 3)
    frozen = nn.Linear(4, 3).requires_grad_(False)
    assert saved_bytes(lambda: layer(x), layer) == 5 * 4 * 4, "x, for the weight's gradient"
    assert saved_bytes(lambda: frozen(x), frozen) == 0, "only the weight is needed"
    assert saved_bytes(lambda: layer(x) + layer(x[:2]).sum(), layer) == 5 * 4 * 4, "a view is no second storage"
    assert saved_bytes(lambda: layer(x).exp(), layer) == 5 * 4 * 4 + 5 * 3 * 4, "exp keeps its result"


def test_flops_of_a_linear_layer() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    frozen = nn.Linear(4, 3, bias=False).requires_grad_(False)
    assert count_flops(lambda: frozen(x).sum().backward()) == 2 * (2 * 5 * 4 * 3)  # forward, input gradient


def test_ratio_of_medians() -> None:
    ratio, low, high = ratio_of_medians([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert ratio == 2.0
    assert 2.0 == low <= ratio <= high == 3.0
    assert ratio_of_medians([1.5] * 4, [1.0] * 4) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="zip"):
        ratio_of_medians([1.0], [1.0, 2.0])
    assert interquartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert interquartile_range([1.0]) is None


# ---- peers


def test_kron_loop_is_cdka_written_out() -> None:
    r1, r2, r, d_in, d_out = 2, 3, 4, 6, 8
    layer = KronLoop(nn.Linear(d_in, d_out, bias=False), r1, r2, r).double()
    nn.init.normal_(layer.B)
    A = layer.A.transpose(0, 1).reshape(r1 * r, d_in // r2)  # component i in rows [i::r]
    B = layer.B.permute(1, 2, 0).reshape(d_out // r1, r2 * r)  # component i in columns [:, i::r]
    x = torch.randn(5, d_in, dtype=torch.float64)
    expected = layer.base(x) + x @ cdka_delta(A, B, r, scale=64 / (r * r2) ** 0.5).T
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wanted", [3_000, 8_192])
def test_matched_lokr_has_the_nearest_count_and_peers_have_it_too(wanted: int) -> None:
    config, network = tiny_llama()
    linears = count_shapes(network)
    assert lora_parameters(linears, 8) == 8_192
    r, factor, total = match_lokr(linears, wanted)
    for other in (max(1, r - 1), r + 1):
        near = sum(n * lokr_parameters(*shape, other, factor) for shape, n in linears.items())
        assert abs(near - wanted) >= abs(total - wanted)
    rows = {kind: {"kind": kind, "match_lora_r": 8} for kind in ("peft_lokr", "lycoris_lokr")}
    matched = match_lokr(linears, lora_parameters(linears, 8))[2]
    for peer in make_peers(rows, list(rows), linears):
        if peer.absent is None:
            attached = peer.attach(sharing_weights(network), config)
            assert sum(p.numel() for p in attached.parameters() if p.requires_grad) == matched, peer.label


def test_peers_share_weights_and_nothing_else() -> None:
    """All start as the base model, and a step of one changes no other: else a bench would measure a mixture."""
    config, network = tiny_llama()
    rows = table9()["rows"]
    keys = ["base", "lora", "dora", "peft_lokr", "lycoris_lokr", "kron_loop", "cdka_2_2_8", "kron_lora"]
    batch = random_batch(260, rows=2, length=8, supervised=0.5)
    plain = network(batch["input_ids"]).logits
    steps = {}
    for peer in make_peers(rows, keys, count_shapes(network)):
        if peer.absent is None:
            attached = peer.attach(sharing_weights(network), config)
            torch.testing.assert_close(attached(batch["input_ids"]).logits, plain, atol=1e-5, rtol=1e-4)
            steps[peer.key] = TrainingStep(attached, batch, torch.float32)
    losses = {key: step.loss().item() for key, step in steps.items()}
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(2):
        steps["lora"]()
    assert steps["lora"].loss().item() < losses["lora"]
    assert {key: step.loss().item() for key, step in steps.items() if key != "lora"} == {
        key: loss for key, loss in losses.items() if key != "lora"
    }
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_a_package_that_is_not_installed_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lycoris.modules.lokr", None)
    (peer,) = make_peers(table9()["rows"], ["lycoris_lokr"], Counter({(32, 32): 1}))
    assert peer.absent == "lycoris-lora is not installed"


def test_one_layer_takes_every_method() -> None:
    rows = table9()["rows"]
    layers = [key for key, row in rows.items() if row["kind"] not in ("training", "decoder", "lycoris_lokr")]
    layers = [key for key in layers if "quantization" not in rows[key] or importlib.util.find_spec("bitsandbytes")]
    for peer in make_peers(rows, layers, Counter({(64, 32): 1})):
        network = peer.attach(OneLinear(64, 32), ONE_LINEAR_MODEL)
        assert network(torch.randn(3, 64)).shape == (3, 32)
        assert (sum(p.requires_grad for p in network.parameters()) > 0) == (peer.key != "base")


def test_random_batch_supervises_the_share_it_is_told() -> None:
    labels = random_batch(260, rows=3, length=10, supervised=0.3)["labels"]
    assert (labels[:, :7] == IGNORED).all()
    assert (labels[:, 7:] != IGNORED).all()


# ---- plan, run, resume


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("bench")
    reproduce(small_table9(), scale="smoke", results_dir=str(results))
    return results


def written(results: Path) -> dict[str, bytes]:
    return {str(p.relative_to(results)): p.read_bytes() for p in sorted(results.rglob("*")) if p.is_file()}


def test_a_record_three_tables_and_a_figure(made: Path) -> None:
    assert {name for name in written(made) if not name.startswith("checkpoints")} == {
        "bench/smoke/table9.json",
        *(f"bench/smoke/table9-layers.{suffix}" for suffix in ("md", "csv", "tex")),
        *(f"tables/smoke/table9.{suffix}" for suffix in ("md", "csv", "tex")),
        *(f"figures/smoke/table9.{suffix}" for suffix in ("svg", "png")),
    }
    record = json.loads((made / "bench/smoke/table9.json").read_text())
    step, memory, layer = record["cases"]
    assert [case["part"] for case in record["cases"]] == ["step", "memory", "layer"]
    assert step["peers"]["lora"]["trainable"] == step["peers"]["cdka_2_2_8"]["trainable"] == 8_192
    assert step["peers"]["base"]["trainable"] == 0
    assert all(len(row["wall"]) == 3 for case in (step, layer) for row in case["peers"].values())
    assert step["peers"]["base"]["saved_bytes"] < step["peers"]["lora"]["saved_bytes"]
    assert step["peers"]["base"]["flops_per_token"] < step["peers"]["lora"]["flops_per_token"]
    assert step["peers"]["lora"]["paths"] == {}
    assert sum(step["peers"]["cdka_2_2_8"]["paths"].values()) == 14, "one for each adapted layer"
    assert sum(layer["peers"]["cdka_2_2_8"]["paths"].values()) == 1
    lora = memory["peers"]["lora"]
    if lora["peak_memory_bytes"] is not None:
        assert lora["peak_memory_bytes"] >= lora["resident_bytes"] > 0
    text = (made / "tables/smoke/table9.md").read_text()
    assert "29.28 [M]" in text
    assert "| LoRA r=8 |" in text
    assert "1.00 [1.00, 1.00]" in text


def test_typed_again_it_measures_and_writes_nothing_new(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(made)
    monkeypatch.setattr(bench_run, "measure", lambda *_: pytest.fail("measured again"))
    reproduce(small_table9(), scale="smoke", results_dir=str(made))
    assert written(made) == before


def test_a_killed_bench_goes_on_with_what_is_missing(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    journal = Path("checkpoints/bench/smoke/table9.jsonl")
    lines = (made / journal).read_text().splitlines(keepends=True)
    (tmp_path / journal).parent.mkdir(parents=True)
    (tmp_path / journal).write_text(lines[0] + lines[1] + lines[2][:50])  # killed in the middle of writing the third
    measured = []
    plain = bench_cases.measure
    monkeypatch.setattr(bench_run, "measure", lambda case, done: measured.append(case.part) or plain(case, done))
    reproduce(small_table9(), scale="smoke", results_dir=str(tmp_path))
    assert measured == ["layer"]
    record = json.loads((tmp_path / "bench/smoke/table9.json").read_text())
    assert record["cases"][:2] == [json.loads(line) for line in lines[:2]]
    assert len((tmp_path / journal).read_text().splitlines()) == 3


def test_render_only_gives_the_same_bytes_from_the_record_alone(made: Path, tmp_path: Path) -> None:
    record = tmp_path / "bench/smoke/table9.json"
    record.parent.mkdir(parents=True)
    record.write_bytes((made / "bench/smoke/table9.json").read_bytes())
    reproduce(small_table9(), scale="smoke", results_dir=str(tmp_path), render_only=True)
    assert written(tmp_path) == {k: v for k, v in written(made).items() if not k.startswith("checkpoints")}


def test_dry_run_lists_the_cases_and_touches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert reproduce(small_table9(), scale="smoke", results_dir=str(tmp_path), dry_run=True) is None
    assert "table9 at scale smoke: 3 cases, 0 done; about 0 minutes" in caplog.messages[0]
    assert [message.split()[0] for message in caplog.messages[1:]] == ["missing"] * 3
    assert list(tmp_path.iterdir()) == []


def test_what_counts_as_the_same_measurement(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_table9()
    cases = plan_cases(spec["rows"], spec["scales"]["smoke"])

    def missing(**changed: Any) -> int:
        settings = {"results": made, "scale": "smoke", "name": "table9", "threads": 1} | changed
        return len(bench_run.Bench(cases, **settings).missing())

    assert missing() == 0
    assert missing(threads=2) == 3
    assert missing(name="another") == 3
    monkeypatch.setattr(bench_run, "journal_path", lambda *_: made / "nothing")
    assert missing() == 3, "a record that came with a clone is somebody else's measurement"
    assert missing(reuse="any") == 0
    monkeypatch.setattr(bench_run, "code_mark", lambda: "other code")
    assert missing(reuse="any") == 3


def test_a_part_of_it_lies_beside_its_record_and_force_measures_again(tmp_path: Path) -> None:
    def run(**named: Any) -> None:
        run_bench(
            small_table9(), "smoke", name="mine", results=tmp_path, threads=1, progress=False,
            parts=["step"], peers=["lora", "base"], rounds=2, **named,
        )  # fmt: skip

    run()
    first = json.loads((tmp_path / "bench/smoke/mine.json").read_text())
    assert {p.name for p in (tmp_path / "bench/smoke").iterdir()} == {
        f"mine.{suffix}" for suffix in ("json", "md", "csv", "tex", "svg", "png")
    }
    assert list(first["cases"][0]["peers"]) == ["base", "lora"]
    assert len(first["cases"][0]["peers"]["lora"]["wall"]) == 2
    run(force=True)
    second = json.loads((tmp_path / "bench/smoke/mine.json").read_text())
    assert second["cases"][0]["peers"]["lora"]["wall"] != first["cases"][0]["peers"]["lora"]["wall"]


def test_trainer_beside_the_plain_one(tmp_path: Path) -> None:
    """Same batches, same loss curve: ours not grouped, and in chunks, differ from the plain one by rounding alone."""
    spec = table9()
    spec["scales"]["smoke"]["trainer"]["overrides"] += ["task.n=32", "runtime.progress=false"]
    run_bench(spec, "smoke", name="trainer", results=tmp_path, threads=1, progress=False, parts=["trainer"])
    record = json.loads((tmp_path / "bench/smoke/trainer.json").read_text())
    runs = record["cases"][0]["peers"]
    assert list(runs) == ["plain", "ours", "ours_shuffled", "ours_chunked"]
    assert all(len(run[key]) == 3 for run in runs.values() for key in ("seconds", "losses", "tokens"))
    assert runs["plain"]["tokens"] == runs["ours_shuffled"]["tokens"] != runs["ours"]["tokens"]
    # bf16 has 8 bits, and fp32 weights stand against bf16 ones: 1e-2 of a loss of 5.5
    assert runs["ours_shuffled"]["losses"] == pytest.approx(runs["plain"]["losses"], abs=5e-2)
    assert runs["ours_chunked"]["losses"] == pytest.approx(runs["ours"]["losses"], abs=5e-3)
    assert {p.name for p in (tmp_path / "bench/smoke").iterdir()} == {
        f"trainer.{suffix}" for suffix in ("json", "md", "csv", "tex")
    }
    text = (tmp_path / "bench/smoke/trainer.md").read_text()
    assert "| transformers.Trainer, LoRA r=8 |" in text
    assert "| kronlab, not grouped by length, LoRA r=8 |" in text


@pytest.mark.parametrize("scale", list(table9()["scales"]))
def test_every_scale_can_be_planned(scale: str) -> None:
    spec = table9()
    layout = spec["scales"][scale]
    cases = plan_cases(spec["rows"], layout)
    assert {case.part for case in cases} == set(layout["parts"])
    assert len({json.dumps(case.settings, sort_keys=True) for case in cases}) == len(cases)
    assert all(case.work > 0 for case in cases)
    assert all(spec["baseline"] in case.settings["peers"] for case in cases)
    (trainings,) = plan_cases(spec["rows"], layout, parts=["trainer"])
    assert list(trainings.settings["peers"])[:2] == ["plain", "ours"]
    assert all(row["kind"] == "training" for row in trainings.settings["peers"].values())
    assert spec["scales"] == table9()["scales"], "planning leaves the config as it was"


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    spec, layout = small_table9(), small_table9()["scales"]["smoke"]
    for named, message in (
        ({"parts": ["steps"]}, "what: 'steps' not known; use some of step, memory, layer, trainer, generate, bank"),
        ({"peers": ["lra"]}, "peers: 'lra' not known; use some of base, lora"),
        ({"dtypes": ["fp16"]}, "dtypes: 'fp16' not known; use some of bf16, fp32"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_cases(spec["rows"], layout, **named)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="table9: nothing has been measured at scale smoke yet"):
        reproduce(spec, scale="smoke", results_dir=str(tmp_path), render_only=True)
    with pytest.raises(ConfigError, match="made of no cells"):
        reproduce(spec, scale="smoke", results_dir=str(tmp_path), extra=["trainer.lr=1"])
    with pytest.raises(ConfigError, match="kind='bnch' is not known; use one of cells, sequential, bench, align"):
        reproduce(copy.deepcopy(spec) | {"kind": "bnch"}, scale="smoke", results_dir=str(tmp_path))
    (tmp_path / "bench/smoke").mkdir(parents=True)
    (tmp_path / "bench/smoke/table9.json").write_text('{"schema": 0}')
    with pytest.raises(CheckpointError, match=r"is not a whole record .* delete it and measure again"):
        reproduce(spec, scale="smoke", results_dir=str(tmp_path), render_only=True)


def test_generation_beside_a_loop_and_hflm(tmp_path: Path) -> None:
    run_bench(table9(), "smoke", name="generate", results=tmp_path, threads=1, progress=False, parts=["generate"])
    record = json.loads((tmp_path / "bench/smoke/generate.json").read_text())
    (case,) = record["cases"]
    batches, hflm, loop = (case["peers"][key] for key in ("batches", "hflm", "loop"))
    assert (batches["samples"], hflm["samples"], loop["samples"]) == (6, 6, 2)
    # one model, one task, fp32: the same texts from all three
    assert (batches["agree"], hflm["agree"], loop["agree"]) == (6, 6, 2)
    assert batches["tokens"] > 0
    text = (tmp_path / "bench/smoke/generate.md").read_text()
    assert "| kronlab | 6 |" in text
    assert "lm-eval HFLM" in text


def test_a_bank_of_each_method_beside_peft(tmp_path: Path) -> None:
    run_bench(table9(), "smoke", name="bank", results=tmp_path, threads=1, progress=False, parts=["bank"])
    record = json.loads((tmp_path / "bench/smoke/bank.json").read_text())
    (case,) = record["cases"]
    peers = case["peers"]
    assert list(peers) == ["lora_by_peft", "lora", "cdka_2_2_1", "cdka_2_2_8", "kron_lora"]
    lora, peft = peers["lora"], peers["lora_by_peft"]
    assert lora["trainable"] == peft["trainable"] == 8_192
    assert peft["memory_bytes"] == 5 * 4 * 8_192, "all five are loaded"
    assert lora["memory_bytes"] == 3 * 4 * 8_192, "a bank has as many as a batch can mix"
    assert peers["cdka_2_2_1"]["memory_bytes"] * 8 == lora["memory_bytes"]
    assert 5 * 4 * 8_192 < lora["disk_bytes"] < 2 * 5 * 4 * 8_192, "the tensors, and what is written around them"
    for row in peers.values():
        assert row["gap"] < 1e-4
        for clock in ("wall", "cpu"):
            assert {action: len(times) for action, times in row[clock].items()} == dict.fromkeys(
                ("switch", "read", "one", "mixed"), 2
            )
    assert {p.name for p in (tmp_path / "bench/smoke").iterdir()} == {
        f"bank.{suffix}" for suffix in ("json", "md", "csv", "tex")
    }
    text = (tmp_path / "bench/smoke/bank.md").read_text()
    assert "| 5 tasks, LoRA r=8, PEFT alone (fp32) | 8,192 |" in text
    assert "| 5 tasks, CDKA (2,2,1) (fp32) | 1,024 |" in text


def test_a_quantised_peer_is_quantised_alone() -> None:
    pytest.importorskip("bitsandbytes")
    config = bench_cases._model_config("tiny_llama_128")
    network = models.load(config, dtype=torch.float32)[0]
    rows = table9()["rows"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for peer in make_peers(rows, ["lora_8bit", "cdka_2_2_8_4bit"], count_shapes(network)):
        attached = peer.attach(sharing_weights(network), config)
        assert {bits_of(m) for m in attached.modules()} == {
            None,
            8 if "8-bit" in peer.label or "8bit" in peer.label else 4,
        }
        step = TrainingStep(attached, random_batch(260, rows=2, length=8, supervised=0.5), torch.float32)
        first = step.loss().item()
        for _ in range(3):
            step()
        assert step.loss().item() < first
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(bits_of(m) is None for m in network.modules())
