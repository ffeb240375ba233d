"""A cell over two processes is the cell of one: losses, weights, record, resume; and a failure of one ends both."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from kronlab import models, processes
from kronlab.cell import Cell
from kronlab.errors import CheckpointError, ConfigError
from kronlab.experiment import run_cell
from kronlab.runs import Store, read_jsonl
from kronlab.train import Deal, EpochSampler
from processes_worker import cell_of, cut

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("processes_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LIMIT_S = 800  # a hang fails; the work itself takes seconds
pytestmark = pytest.mark.timeout(LIMIT_S + 100)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
CLASSIFIER = ["model=tiny_llama", "model.architecture=sequence_classification", "task=glue_cola"]
# In fp32. Only what has no dropout can be compared: each process drops out units of its own.
DDP_CASES: dict[str, list[str]] = {
    "cdka": ["method=cdka"],
    "kron_lora": ["method=kron_lora", "method.dropout=0"],
    "adalora": ["method=adalora", "method.dropout=0", "method.t_final=0.1", "method.delta_t=1"],
    "lora_plus": ["method=lora_plus", "method.dropout=0"],
    "pissa": ["method=pissa"],
    "gradient": ["method=cdka", "method.init=gradient"],
    "full_checkpointing": ["method=full", "trainer.gradient_checkpointing=true", "trainer.lr=1e-3"],
    "full_t5": ["model=tiny_t5", "method=full", "trainer.lr=1e-3"],
    "loss_rows": ["method=lora", "method.dropout=0", "trainer.loss_rows=16"],
    "classifier": [*CLASSIFIER, "method=cdka"],
}
FSDP_CASES: dict[str, list[str]] = {
    "cdka": ["method=cdka"],
    "kron_lora": ["method=kron_lora", "method.dropout=0"],
    "lora_plus": ["method=lora_plus", "method.dropout=0"],
    "pissa": ["method=pissa"],
    "full": ["method=full", "trainer.lr=1e-3"],
    "classifier": [*CLASSIFIER, "method=cdka"],
}
BF16 = ["method=cdka", "trainer.precision=bf16"]
INDIVISIBLE = ["method=cdka", "trainer.batch_size=5"]
DROPOUT = ["method=kron_lora"]  # its published dropout: a resume must take up each process's random numbers
CUT = 3  # the newest checkpoint at or before it is of step 2, in the first epoch


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CoLA with made-up sentences."""
    root = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for name in ("train", "dev"):
        path = root / "glue" / "CoLA" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [" ".join(draw.choices(["cats", "run", "eat"], k=draw.randint(2, 9))) for _ in range(30)]
        path.write_text("".join(f"made\t{i % 2}\t\t{text}\n" for i, text in enumerate(texts)))
    return root


def accelerate(config: str) -> list[str]:
    """`accelerate launch` with a shipped config, two processes, on a port of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    path = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    return [
        "-m", "accelerate.commands.launch", "--config_file", str(path), "--num_processes", "2",
        "--main_process_port", str(port),
    ]  # fmt: skip


def launch(
    plan: list[dict[str, Any]], folder: Path, launcher: Sequence[str] = TORCHRUN
) -> subprocess.CompletedProcess[str]:
    """Run the jobs of a plan in two processes over gloo."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    command = [sys.executable, *launcher, str(WORKER), str(path)]
    return subprocess.run(
        command, env=clean(), cwd=folder.parent, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def clean() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Runs:
    """The same cells in one process and in two; a case is run when it is first asked for."""

    def __init__(self, root: Path, data_dir: Path) -> None:
        self.root, self.data = root, [f"data.dir={data_dir}"]

    def cell(self, overrides: list[str], where: str) -> Cell:
        return cell_of([*overrides, *self.data], self.root / where)

    def one(self, overrides: list[str], where: str) -> Cell:
        """The cell of one process."""
        cell = self.cell(overrides, where)
        run_cell(cell)
        return cell

    def job(self, overrides: list[str], where: str, **more: Any) -> dict[str, Any]:
        return {"overrides": [*overrides, *self.data], "results": str(self.root / where), **more}


def trained(cell: Cell) -> dict[str, Tensor]:
    final = Store(cell.config["results"]["dir"]).final(cell.train_id)
    return load_file(next(final.glob("*.safetensors")))


def losses(cell: Cell) -> list[float]:
    lines = read_jsonl(Store(cell.config["results"]["dir"]).folder(cell.scale, cell.id) / "loss.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def record(cell: Cell) -> dict[str, Any]:
    found = Store(cell.config["results"]["dir"]).read(cell.scale, cell.id)
    assert found is not None
    return found


def assert_like(two: Cell, one: Cell, *, losses_to: float = 1e-6, weights_to: float = 1e-5) -> None:
    """Rounding alone may differ: sums over processes are taken in another order."""
    assert (two.id, two.train_id) == (one.id, one.train_id)
    assert len(losses(one)) == 6
    assert losses(two) == pytest.approx(losses(one), rel=losses_to)
    mine, theirs = trained(two), trained(one)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=weights_to, msg=lambda m, n=name: f"{n}: {m}")


# ---- DDP: every process has the whole model


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Runs:
    """Every case in two processes, all started once; and what one process has begun, to be gone on with by two."""
    runs = Runs(tmp_path_factory.mktemp("ddp"), data_dir)
    begun = runs.one(DDP_CASES["cdka"], "one_then_two")
    cut(begun, CUT)
    jobs = [runs.job(overrides, name) for name, overrides in DDP_CASES.items()]
    jobs += [runs.job(DROPOUT, "killed", cut=CUT), runs.job(DDP_CASES["cdka"], "one_then_two")]
    jobs += [
        runs.job(INDIVISIBLE, "indivisible"),
        runs.job(["method=none"], "untrained"),
    ]
    done = launch(jobs, runs.root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("told: ") == 1, done.stdout
    return runs


@pytest.mark.parametrize("name", DDP_CASES)
def test_two_processes_are_as_one(ddp: Runs, name: str) -> None:
    assert_like(ddp.cell(DDP_CASES[name], name), ddp.one(DDP_CASES[name], f"one-{name}"))


def test_record_says_how_many_processes_made_it(ddp: Runs) -> None:
    two, one = (record(ddp.cell(DDP_CASES["cdka"], "cdka")), record(ddp.one(DDP_CASES["cdka"], "one-cdka")))
    assert (two["machine"]["processes"], one["machine"]["processes"]) == (2, 1)
    for same in ("config", "parameters", "status"):
        assert two[same] == one[same]
    for same in ("steps", "examples", "tokens", "supervised_tokens", "data_sha"):
        assert two["train"][same] == one["train"][same]


def test_killed_and_started_again_ends_alike_to_the_last_bit(ddp: Runs) -> None:
    """With dropout, so it fails if a process does not take up the random numbers that it left off at."""
    whole, again = ddp.cell(DROPOUT, "killed-uncut"), ddp.cell(DROPOUT, "killed")
    assert losses(again) == losses(whole)
    mine, theirs = trained(again), trained(whole)
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_processes_drop_out_units_of_their_own(ddp: Runs) -> None:
    one = ddp.one(DROPOUT, "one-dropout")
    assert losses(ddp.cell(DROPOUT, "killed")) != pytest.approx(losses(one), rel=1e-6)


def test_what_one_process_began_two_end(ddp: Runs) -> None:
    assert_like(ddp.cell(DDP_CASES["cdka"], "one_then_two"), ddp.one(DDP_CASES["cdka"], "one-cdka"))


def test_what_two_processes_began_one_ends(ddp: Runs) -> None:
    shutil.copytree(ddp.root / "cdka", ddp.root / "two_then_one")
    cell = ddp.cell(DDP_CASES["cdka"], "two_then_one")
    cut(cell, CUT)
    run_cell(cell)
    assert_like(cell, ddp.one(DDP_CASES["cdka"], "one-cdka"))


def test_a_batch_that_cannot_be_shared_fails_its_cell_alone(ddp: Runs) -> None:
    """All processes refuse it, and the cell after it is run."""
    failed = record(ddp.cell(INDIVISIBLE, "indivisible"))
    assert failed["status"] == "failed"
    assert failed["error"].startswith("trainer.batch_size=5 cannot be shared by 2 processes")
    assert record(ddp.cell(["method=none"], "untrained"))["status"] == "done"


# ---- FSDP: the processes split the parameters


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("fsdp"), data_dir)
    jobs = [runs.job(overrides, name) for name, overrides in FSDP_CASES.items()]
    jobs += [runs.job(BF16, "bf16"), runs.job(DROPOUT, "killed", cut=CUT)]
    jobs += [runs.job(DDP_CASES["adalora"], "adalora"), runs.job(DDP_CASES["loss_rows"], "loss_rows")]
    begun = runs.one(DDP_CASES["cdka"], "one_then_fsdp")
    cut(begun, CUT)
    jobs += [runs.job(DDP_CASES["cdka"], "one_then_fsdp")]
    done = launch(jobs, runs.root, accelerate("fsdp"))
    assert done.returncode == 0, done.stderr[-3000:]
    (runs.root / "told.txt").write_text(done.stdout)
    return runs


@pytest.mark.parametrize("name", FSDP_CASES)
def test_split_parameters_are_as_whole_ones(fsdp: Runs, name: str) -> None:
    cell = fsdp.cell(FSDP_CASES[name], name)
    assert_like(cell, fsdp.one(FSDP_CASES[name], f"one-{name}"))
    # so it was FSDP: accelerate's own way on CPUs is to go on with copies
    checkpoints = Store(cell.config["results"]["dir"]).checkpoints(cell.train_id)
    assert (checkpoints / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()


def test_an_adapter_of_split_parameters_is_an_ordinary_one(fsdp: Runs) -> None:
    cell = fsdp.cell(FSDP_CASES["cdka"], "cdka")
    network, _ = models.load(cell.config["model"], dtype=torch.float32)
    final = Store(cell.config["results"]["dir"]).final(cell.train_id)
    loaded: Any = PeftModel.from_pretrained(network, final)
    tensors = load_file(final / "adapter_model.safetensors")
    assert not set(tensors) & set(network.state_dict())  # the adapter only
    assert sum(p.numel() for n, p in loaded.named_parameters() if ".default" in n) == sum(
        t.numel() for t in tensors.values()
    )


def test_adapters_stay_in_fp32_beside_a_base_in_bf16(fsdp: Runs) -> None:
    """FSDP computes with bf16 copies of the adapters, one process with themselves: they only come near."""
    two, one = fsdp.cell(BF16, "bf16"), fsdp.one(BF16, "one-bf16")
    assert {tensor.dtype for tensor in trained(two).values()} == {torch.float32}
    assert losses(two) == pytest.approx(losses(one), rel=1e-2)
    assert losses(two)[-1] < losses(two)[0]


def test_killed_under_fsdp_ends_alike_to_the_last_bit(fsdp: Runs) -> None:
    whole, again = fsdp.cell(DROPOUT, "killed-uncut"), fsdp.cell(DROPOUT, "killed")
    assert losses(again) == losses(whole)
    mine, theirs = trained(again), trained(whole)
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_what_fsdp_cannot_do_is_one_line(fsdp: Runs) -> None:
    told = [line for line in (fsdp.root / "told.txt").read_text().splitlines() if line.startswith("told: ")]
    assert len(told) == 3
    assert told[0].startswith("told: method=adalora ranks whole factors")
    assert told[1].startswith("told: trainer.loss_rows=16 does not go with FSDP")
    assert "was made without FSDP; go on without it" in told[2]


def test_one_process_does_not_go_on_with_split_parameters(fsdp: Runs) -> None:
    shutil.copytree(fsdp.root / "cdka", fsdp.root / "fsdp_then_one")
    cell = fsdp.cell(FSDP_CASES["cdka"], "fsdp_then_one")
    cut(cell, CUT)
    with pytest.raises(CheckpointError, match="was made under FSDP; go on under it"):
        run_cell(cell)


# ---- faults


@pytest.mark.parametrize("missing", ["data", "results"])
def test_a_failure_in_one_process_ends_both_with_its_own_words(tmp_path: Path, data_dir: Path, missing: str) -> None:
    """Process 1 stands elsewhere. Without data it cannot make itself ready; without a folder for results it fails where
    process 0 waits for it in a collective."""
    where = tmp_path / "jobs"
    where.mkdir()
    data, results = str(data_dir), str(tmp_path / "r")
    if missing == "data":
        shutil.copytree(data_dir, tmp_path / "data")
        data = "data"
    else:
        (where / "r").touch()  # a file, where process 1 would make a folder
        results = "r"
    overrides = [*CLASSIFIER, "method=cdka", f"data.dir={data}"]
    jobs = [{"overrides": overrides, "results": results, "elsewhere": True}]
    jobs += [{"overrides": ["method=none"], "results": str(tmp_path / "after")}]
    done = launch(jobs, where)
    assert done.returncode != 0
    assert done.stdout.count("told: ") == 1, done.stdout + done.stderr[-3000:]
    assert "told: process 1 of 2 failed: " in done.stdout
    assert not (tmp_path / "after").exists()
    (path,) = (tmp_path / "r").glob("runs/smoke/*.json")
    failed = json.loads(path.read_text())
    assert failed["status"] == "failed"
    assert failed["error"].startswith("process 1 of 2 failed: ")
    assert {"data": "train.tsv", "results": "NotADirectoryError"}[missing] in failed["error"]


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_command_line_runs_a_sweep_over_two_processes(tmp_path: Path, launcher: str) -> None:
    starts = {
        "accelerate": accelerate("ddp"),
        "torchrun": TORCHRUN,
    }
    command = [
        sys.executable, *starts[launcher], str(ROOT / "scripts" / "train.py"), "-m", "scale=smoke", "runtime.threads=1",
        "runtime.device=cpu", "runtime.progress=false", "eval_n=2", "trainer.max_steps=2", "trainer.micro_batch_size=1",
        "trainer.batch_size=3,8",  # 3 cannot be shared, 8 can
        f"results.dir={tmp_path}/r",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=clean(), cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 2, done.stderr[-3000:]
    assert ours[0].startswith("error: trainer.batch_size=3 cannot be shared by 2 processes")
    assert ours[1].startswith("error: 1 of the sweep's 2 cells failed; the same command with retry_failed=true")
    assert done.returncode != 0
    found = [json.loads(path.read_text()) for path in (tmp_path / "r").glob("runs/smoke/*.json")]
    assert sorted(r["status"] for r in found) == ["done", "failed"]
    assert {r["machine"]["processes"] for r in found} == {2}
    assert next(r for r in found if r["status"] == "done")["config"]["trainer"]["precision"] == "fp32"


# ---- in one process


def test_alone_the_helpers_do_what_they_are_given() -> None:
    assert (processes.count(), processes.rank(), processes.is_first(), processes.sharded()) == (1, 0, True, False)
    assert processes.led(lambda: 3) == 3
    assert processes.together(lambda: 4, print) == 4
    assert processes.agree(lambda: 5) == 5
    assert processes.mean(0.25) == 0.25
    assert (processes.any_of(True), processes.any_of(False)) == (True, False)


def test_a_cell_started_by_every_process_is_refused_before_it_writes(
    make: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make("method=lora")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"started with 2 processes.*scripts/train.py"):
        run_cell(cell)
    assert not Path(cell.config["results"]["dir"], "runs").exists()


@pytest.mark.parametrize(
    ("key", "value", "mend"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "fsdp_state_dict_type: FULL_STATE_DICT"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false", "fsdp_cpu_ram_efficient_loading: true"),
    ],
)
def test_another_form_of_fsdp_is_refused(key: str, value: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, right in (FSDP | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, right)
    assert processes.sharded()
    monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=mend):
        processes.sharded()


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"DeepSpeed: .* use configs/accelerate/fsdp.yaml"):
        processes.sharded()


@pytest.mark.parametrize(("n", "batch", "micro", "hands"), [(19, 8, 2, 2), (19, 8, 4, 2), (16, 8, 1, 4), (1, 6, 1, 3)])
@pytest.mark.parametrize("grouped", [False, True])
def test_dealt_micro_batches_are_those_of_one_process(
    n: int, batch: int, micro: int, hands: int, grouped: bool
) -> None:
    """In each step every process gets as many, each example once, in the order of one process."""
    sampler = EpochSampler([7 + i % 5 for i in range(n)], batch_size=batch, seed=3, group_by_length=grouped)
    sampler.set_epoch(1)
    deal = list(Deal(sampler, micro_batch_size=micro, hands=hands))
    assert len(deal) == len(Deal(sampler, micro_batch_size=micro, hands=hands))
    assert len(deal) % hands == 0
    assert [i for part in deal for i in part if i >= 0] == sampler.order(1)
    blank = [at for at, part in enumerate(deal) if part[0] < 0]
    assert len(blank) < hands
    assert all(len(deal[at]) == 1 and ~deal[at][0] in range(n) for at in blank)
    full = (n // batch) * (batch // micro)
    assert all(len(part) == micro for part in deal[:full])
