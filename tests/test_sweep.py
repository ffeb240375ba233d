"""Sweeps that survive: signals, failures, damaged records, full disks, and two at once on the same cells."""

from __future__ import annotations

import json
import logging
import os
import resource
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kronlab import experiment, interrupt, models, sweep
from kronlab.cell import Cell
from kronlab.data import Example
from kronlab.encode import Encoded, encode
from kronlab.errors import Busy, CheckpointError
from kronlab.experiment import run_cell
from kronlab.runs import Store, read_jsonl, write_json
from kronlab.sweep import in_turn
from kronlab.train import Journal

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["method=lora", "task.n=16", "trainer.max_steps=6", "eval_n=4", "eval.chain_sum.generation.max_new_tokens=4"]


@pytest.fixture
def short(make: Callable[..., Cell]) -> Callable[..., Cell]:
    return lambda *overrides, **more: make(*SHORT, "runtime.save_every=100", *overrides, **more)


def weights(cell: Cell) -> dict[str, torch.Tensor]:
    return load_file(Store(cell.config["results"]["dir"]).final(cell.train_id) / "adapter_model.safetensors")


def numbers(record: dict[str, Any]) -> Any:
    """What a run must give again to the last bit."""
    train = record["train"]
    kept = {name: train[name] for name in ("steps", "tokens", "supervised_tokens", "examples", "final_loss")}
    return kept, {name: [e["metrics"], e["samples"]] for name, e in record["eval"].items()}


def at_step(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once, behind the given optimizer step."""
    write, done = Journal.on_step_end, []

    def on_step_end(self: Journal, args: Any, state: Any, control: Any, **more: Any) -> None:
        write(self, args, state, control, **more)
        if state.global_step == step and not done:
            done.append(step)
            act()

    monkeypatch.setattr(Journal, "on_step_end", on_step_end)


# ---- signals


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_in_training_checkpoints_and_the_resume_is_exact(
    short: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    whole, cut = short(results=tmp_path / "whole"), short(results=tmp_path / "cut")
    expected = run_cell(whole)
    at_step(3, lambda: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(interrupt.Interrupted) as caught:
        run_cell(cut)
    assert caught.value.status == 128 + number
    assert str(caught.value) == (
        f"stopped by {number.name} at train 3/6 of LoRA r=8, tiny_llama on chain_sum, seed 0; "
        "the same command goes on from here"
    )
    store = Store(tmp_path / "cut")
    assert [path.name for path in store.checkpoints(cut.train_id).glob("checkpoint-*")] == ["checkpoint-3"]
    assert store.read("smoke", cut.id) is None
    assert signal.getsignal(number) == before
    assert numbers(run_cell(cut)) == numbers(expected)
    one, two = weights(whole), weights(cut)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_signal_behind_the_last_step_keeps_it(
    short: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = short(results=tmp_path / "whole"), short(results=tmp_path / "cut")
    expected = run_cell(whole)
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(interrupt.Interrupted, match="train 6/6"):
        run_cell(cut)
    assert numbers(run_cell(cut)) == numbers(expected)


def test_a_signal_in_grading_keeps_the_batches_that_are_done(
    short: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "eval.chain_sum.generation.batch_size=1"
    expected = run_cell(short(small, results=tmp_path / "whole"))
    cut = short(small, results=tmp_path / "cut")
    generation = experiment.harness_of(cut.config["eval"]["chain_sum"])
    collect, seen = type(generation).collect, []

    def signalled(self: Any, subject: Any, batch: Any, settings: Any) -> Any:
        seen.append(batch[0].id)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        return collect(self, subject, batch, settings)

    monkeypatch.setattr(type(generation), "collect", signalled)
    with pytest.raises(interrupt.Interrupted, match="at grade chain_sum 2/4"):
        run_cell(cut)
    samples = Store(tmp_path / "cut").folder("smoke", cut.id) / "chain_sum" / "samples.jsonl"
    assert [row["id"] for row in read_jsonl(samples)] == seen
    assert numbers(run_cell(cut)) == numbers(expected)
    assert len(seen) == len(set(seen)) == 4, "no batch is graded twice"


def test_the_second_signal_stops_at_once() -> None:
    still_there = []

    def work() -> None:
        with interrupt.guarded():
            os.kill(os.getpid(), signal.SIGUSR2)
            still_there.append(interrupt.pending())
            os.kill(os.getpid(), signal.SIGTERM)
            still_there.append("too long")

    with pytest.raises(interrupt.Interrupted) as caught:
        work()
    assert still_there == [True]
    assert caught.value.signum == signal.SIGTERM
    assert not interrupt.pending()


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.guarded():
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupt.pending()
    finally:
        signal.signal(signal.SIGINT, before)


# ---- what is damaged or full


@pytest.mark.parametrize("text", ['{"id": "', "\udcff\udcfe", "[1]"])
def test_a_damaged_record_is_set_aside_and_the_cell_graded_again(
    short: Callable[..., Cell], caplog: pytest.LogCaptureFixture, text: str
) -> None:
    cell = short()
    expected = run_cell(cell)
    path = Store(cell.config["results"]["dir"]).record_path("smoke", cell.id)
    path.write_bytes(text.encode(errors="surrogateescape"))
    caplog.set_level("INFO")
    assert numbers(run_cell(cell)) == numbers(expected)
    assert [r["id"] for r in Store(cell.config["results"]["dir"]).records("smoke")] == [cell.id]
    assert path.with_name(f"{path.name}.corrupt").read_bytes() == text.encode(errors="surrogateescape")
    assert sum("is not a whole record" in message for message in caplog.messages) == 1
    assert any("taking the weights trained before" in message for message in caplog.messages)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system refuses to write files of more bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [600, 5_000, 20_000])
def test_a_full_disk_is_one_line_no_record_and_the_cell_goes_on(
    short: Callable[..., Cell], tmp_path: Path, size: int
) -> None:
    expected = run_cell(short(results=tmp_path / "whole"))
    cell = short("runtime.save_every=2", results=tmp_path / "full")
    with no_file_above(size), pytest.raises(CheckpointError, match=r"cannot be written \(.*make room") as caught:
        run_cell(cell)
    assert len(str(caught.value).splitlines()) == 1
    assert Store(tmp_path / "full").read("smoke", cell.id) is None
    assert numbers(run_cell(cell)) == numbers(expected)


def test_a_write_that_finds_no_room_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with no_file_above(2_000), pytest.raises(OSError, match="File too large"):
        write_json(path, {"new": list(range(5_000))})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_loss_journal_costs_steps_and_no_wrong_sum(
    short: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run_cell(short(results=tmp_path / "whole"))
    cell = short("runtime.save_every=2", results=tmp_path / "cut")
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with pytest.raises(interrupt.Interrupted):
        run_cell(cell)
    journal = Store(tmp_path / "cut").checkpoints(cell.train_id) / "loss.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"\xfe\x00\n", *lines[4:]]))
    assert numbers(run_cell(cell)) == numbers(expected)
    assert any("loss.jsonl is damaged behind step 3" in message for message in caplog.messages)


# ---- loaded once


def test_weights_that_are_loaded_once_give_the_same_numbers(
    short: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a directory in fp32, which is mapped into memory where it is loaded."""
    network, tokenizer = models.load(short().config["model"], dtype=torch.float32)
    folder = tmp_path / "base"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    own = ["model.source=directory", f"+model.directory={folder}"]
    found: dict[str, list[Any]] = {}
    for which, share in (("apart", 0.0), ("together", 0.25)):
        monkeypatch.setattr(models, "_KEPT_SHARE", share)
        models._kept = None
        for method in ("lora", "cdka", "full"):
            found.setdefault(which, []).append(
                numbers(run_cell(short(*own, f"method={method}", results=tmp_path / which)))
            )
    assert found["apart"] == found["together"]
    assert models.kept_bytes() == sum(p.numel() * 4 for p in network.parameters()) + sum(
        b.numel() * b.element_size() for b in network.buffers()
    )


def test_examples_are_read_once_and_again_where_that_decides(
    short: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised: list[int] = []

    def counted(example: Example, **how: Any) -> Encoded:
        tokenised.append(how["max_length"])
        return encode(example, **how)

    monkeypatch.setattr(experiment, "encode", counted)
    monkeypatch.setattr(experiment, "_read", None)
    models._kept = None
    known: set[tuple[str, str]] = set()
    for overrides in ([], ["method=cdka"], ["task.n=12"], ["seed=1"], ["seed=1", "task.max_length=63"]):
        before, cell = len(tokenised), short(*overrides, results=tmp_path)
        run_cell(cell)
        now = {(example.id, example.prompt) for example in experiment._examples(cell.config, cell.config["task"])}
        if overrides == ["seed=1", "task.max_length=63"]:
            known = set()
        assert tokenised[before:] == [cell.config["task"]["max_length"]] * len(now - known), overrides
        known = now


def test_what_is_kept_is_never_given_away_and_follows_the_files(short: Callable[..., Cell], tmp_path: Path) -> None:
    network, tokenizer = models.load(short().config["model"], dtype=torch.float32)
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path)
    section = short().config["model"] | {"source": "directory", "directory": str(tmp_path)}

    def load() -> Any:
        torch.manual_seed(5)
        loaded, _ = models.load_again(section, dtype=torch.float32, source="directory")
        return loaded, torch.rand(3)

    (one, drawn), (two, drawn_again) = load(), load()
    assert torch.equal(drawn, drawn_again), "the random state is the same, loaded or copied"
    with torch.no_grad():
        next(one.parameters()).add_(1)
        next(two.parameters()).add_(1)
    three, _ = load()
    assert torch.equal(next(three.parameters()), next(network.parameters()))
    with torch.no_grad():
        list(network.parameters())[-1].add_(1)
    network.save_pretrained(tmp_path)
    four, _ = load()
    assert torch.equal(list(four.parameters())[-1], list(network.parameters())[-1])


def test_heads_and_types_are_not_mixed_up(make: Callable[..., Cell]) -> None:
    section = make("model=tiny_deberta").config["model"]
    wanted = [
        (torch.float32, models.Head(("a", "b"), seed=0)),
        (torch.float32, models.Head(("a", "b"), seed=1)),
        (torch.bfloat16, models.Head(("a", "b"), seed=1)),
        (torch.float32, models.Head(("a", "b", "c"), seed=1)),
    ]
    for dtype, head in wanted:
        expected = models.load(section, dtype=dtype, source="random", head=head)[0].state_dict()
        for _ in range(2):
            found = models.load_again(section, dtype=dtype, source="random", head=head)[0].state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- many cells


def test_what_is_busy_comes_last_and_is_waited_for() -> None:
    calls: list[tuple[str, bool | None]] = []

    def attempt(item: str, wait: bool | None) -> None:
        calls.append((item, wait))
        if wait is False and (item in "bd") and calls.count((item, False)) == 1:
            raise Busy(item)

    in_turn(list("abcd"), attempt)
    assert calls == [("a", False), ("b", False), ("c", False), ("d", False), ("b", None), ("d", False)]


def test_a_cell_that_runs_elsewhere_is_left_alone(short: Callable[..., Cell], tmp_path: Path) -> None:
    cell, sharing = short(), short("eval_n=3")
    assert cell.train_id == sharing.train_id
    store = Store(tmp_path)
    with experiment._leased(cell, store, f"train-{cell.train_id}", wait=False):
        for one in (cell, sharing):
            with pytest.raises(Busy, match=f"runs elsewhere, by process {os.getpid()}"):
                run_cell(one, wait=False)
    with experiment._leased(cell, store, f"smoke-{cell.id}", wait=False):
        with pytest.raises(Busy):
            run_cell(short("runtime.wait=false"))
        assert run_cell(sharing)["status"] == "done"
    assert store.read("smoke", cell.id) is None
    assert run_cell(cell)["status"] == "done"


@pytest.fixture
def multirun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, list[str]]]]:
    """Type `train.py -m` here, in this process: exit status and the lines on stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, list[str]]:
        common = ["-m", "scale=smoke", *SHORT, "runtime.progress=false", "runtime.threads=1", f"results.dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["train.py", *common, *overrides])
        status = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
        except SystemExit as leave:
            status = int(leave.code or 0)
        return status, capsys.readouterr().err.splitlines()

    yield run
    root.handlers[:], root.level = handlers, level


def states(results: Path) -> dict[int, str]:
    found = [json.loads(path.read_text()) for path in results.glob("runs/smoke/*.json")]
    return {record["config"]["seed"]: record["status"] for record in found}


def test_a_bug_in_one_cell_does_not_end_the_sweep_and_is_tried_again_when_asked(
    multirun: Callable[..., tuple[int, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = experiment.score
    tried = []

    def broken(rows: Any, examples: Any, settings: Any) -> Any:
        tried.append(len(rows))
        if len(tried) == 1:
            raise ZeroDivisionError("of all things")
        return sound(rows, examples, settings)

    monkeypatch.setattr(experiment, "score", broken)
    status, err = multirun("seed=0,1")
    assert status == 2
    assert states(tmp_path) == {0: "failed", 1: "done"}
    assert "error: ZeroDivisionError: of all things" in err
    assert err[-2].endswith(": ZeroDivisionError: of all things")
    assert err[-1].startswith("error: 1 of the sweep's 2 cells failed")
    status, err = multirun("seed=0,1")
    assert (status, len(tried)) == (2, 2), "not tried again, and not forgotten"
    assert len(err) == 2
    assert multirun("seed=0,1", "retry_failed=true") == (0, [])
    assert states(tmp_path) == {0: "done", 1: "done"}
    assert not list((tmp_path / "checkpoints" / "sweeps").iterdir())
    assert sweep.VARIABLE not in os.environ


def test_a_setting_that_makes_no_cell_is_told_with_what_was_typed(
    multirun: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    status, err = multirun("trainer.lr=-1,0.01")
    assert status == 2
    assert states(tmp_path) == {0: "done"}
    assert err[0] == "error: trainer.lr=-1: must be a number above 0"
    assert err[1].startswith("failed: scale=smoke method=lora")
    assert err[1].endswith("trainer.lr=-1: must be a number above 0")


def test_a_signal_stops_the_whole_sweep(
    multirun: Callable[..., tuple[int, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    status, err = multirun("seed=0,1")
    assert status == 143
    assert err[-1] == (
        "stopped by SIGTERM at train 2/6 of LoRA r=8, tiny_llama on chain_sum, seed 0; "
        "the same command goes on from here"
    )
    assert states(tmp_path) == {}
    assert multirun("seed=0,1")[0] == 0
    assert states(tmp_path) == {0: "done", 1: "done"}


def test_two_sweeps_at_once_do_each_cell_once(tmp_path: Path) -> None:
    """Two storage forms of every seed: they share a training, too."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    typed = [
        sys.executable, str(ROOT / "scripts" / "train.py"), "-m", "scale=smoke", *SHORT, "trainer.max_steps=30",
        "runtime.progress=false", "seed=0,1,2", "adapter_storage.bits=null,8", f"results.dir={tmp_path}/r",
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(typed, env=environment, cwd=tmp_path, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    told = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    out = "".join(said for said, _ in told)
    assert out.count("INT8") + out.count("int8") > 0
    assert out.count(" -> ") == 6, "each record is written once"
    assert out.count("taking the weights trained before") == 3, "and each adapter trained once"
    assert all("sweep of 6 cells: 6 done" in said for said, _ in told)
    for path in tmp_path.glob("r/checkpoints/running/*/*"):
        assert path.stat().st_size == 0, "every lease is given back"
