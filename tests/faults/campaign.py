"""The fault campaign: break sweeps in every way that is known to happen, and see whether anything is lost or wrong.

    python tests/faults/campaign.py                     the long form: record and docs/reliability.md are written
    python tests/faults/campaign.py --quick --out DIR   what the tests run

The reference is the same table made undisturbed. Whatever is done to a results directory, in the end its records,
samples, losses, trained weights and tables must be the reference's, up to times and memory; on the way no finished
record may change or vanish, nothing may be made twice, and every command that does not succeed says why in one line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faultlab as lab
from faultlab import Ledger, Outcome, Violation, apart, refusal, sweep, table

from kronlab import cli, experiment, reproduce, runs, train  # noqa: F401 - the children find all of it imported
from kronlab import sweep as _sweep  # noqa: F401
from kronlab.align import run_align  # noqa: F401
from kronlab.runs import Store

SIGNALS = {signal.SIGTERM: 143, signal.SIGUSR2: 140, signal.SIGINT: 130}
RECORD = lab.ROOT / "results" / "faults" / "campaign.json"
PAGE = lab.ROOT / "docs" / "reliability.md"


@dataclass
class Bench:
    """Where the campaign works, and what it compares with."""

    folder: Path
    data: Path
    draw: random.Random
    quick: bool
    whole: Outcome  # of table faults
    pair: Outcome  # of table faults_pair
    steps: int  # optimizer steps of table faults
    states: dict[str, Path]  # of `_states`, once they are made
    seconds: float  # that it takes
    made: int = 0

    def fresh(self) -> Path:
        """A results directory that does not exist yet."""
        self.made += 1
        return self.folder / f"r{self.made}"

    def ledger(self, results: Path) -> Ledger:
        return Ledger(results, self.whole)

    def missed(self, ended: lab.Ended) -> None:
        """Draw earlier moments after a command that has ended by itself: the machine may be less busy by now."""
        if not ended.injected:
            self.seconds = max(5.0, min(self.seconds, 2 * ended.seconds))


def prepare(folder: Path, seed: int, quick: bool) -> Bench:
    """Make the data and the reference."""
    data = folder / "data"
    (data / "gsm8k").mkdir(parents=True)
    row = '{"question": "What is %d + 1?", "answer": "%d + 1 = %d\\n#### %d"}\n'
    for split in ("train", "test"):
        (data / "gsm8k" / f"{split}.jsonl").write_text("".join(row % (i, i, i + 1, i + 1) for i in range(40)))
    ended = table(folder / "reference", data).run()
    if ended.status:
        raise SystemExit(f"the undisturbed table fails: {ended.err[-3000:]}")
    whole = Outcome.of(folder / "reference")
    steps = sum(kind == "S" for kind, _ in ended.events)
    second = table(folder / "reference2", data, "faults_pair").run()
    pair = Outcome.of(folder / "reference2")
    if second.status or not pair.records.keys() <= whole.records.keys():
        raise SystemExit(f"the pair's cells are not the table's: {second.err[-3000:]}")
    return Bench(folder, data, random.Random(seed), quick, whole, pair, steps, {}, ended.seconds)


# ---- the parts; each returns what it has done, and raises Violation


def kills(bench: Bench, wanted: int) -> dict[str, Any]:
    """SIGKILL of the whole process group, at random moments and before random file operations; again until done."""
    done: Counter[str] = Counter()
    steps = rounds = checks = 0
    while done["kills"] < wanted:
        results = bench.fresh()
        ledger = bench.ledger(results)
        swept = False
        for tries in range(200):
            last = tries >= 40 or (bench.quick and done["kills"] >= wanted)
            use_sweep = not swept and bench.draw.random() < 0.4
            full = not last and not bench.quick and bench.draw.random() < 0.04
            command = (sweep if use_sweep else table)(results, bench.data, full=full)
            by_operation = not full and bench.draw.random() < 0.5
            running = command.start(die_at=bench.draw.randrange(250) if by_operation and not last else None)
            if not by_operation and not last:
                begun = Path(running._log("out"))
                when = (lambda log=begun: log.exists() and log.stat().st_size > 0) if full else (lambda: True)
                running.inject(signal.SIGKILL, after=bench.draw.uniform(0, bench.seconds / 5), when=when)
            ended = running.wait()
            ledger.look([ended])
            bench.missed(ended)
            if ended.status == -signal.SIGKILL:
                done["kills"] += 1
                done["before a file operation" if by_operation else "at a moment"] += 1
                done["of full command lines"] += full
            elif ended.status:
                raise Violation(f"status {ended.status}: {ended.err[-2000:]}")
            elif use_sweep:
                swept = True
            else:
                break
        ledger.finish(killed=True)
        rounds, steps, checks = rounds + 1, steps + ledger.steps, checks + ledger.checks
        shutil.rmtree(results)
    again = steps - rounds * bench.steps  # full command lines do not report theirs, so this is a lower bound
    return dict(done) | {
        "sweeps": rounds,
        "records_seen_again": checks,
        "steps": steps,
        "steps_done_again": max(again, 0),
    }


def signals(bench: Bench, wanted: int) -> dict[str, Any]:
    """SIGTERM, SIGUSR2 and SIGINT at random moments: a line, the right status, and the same command goes on."""
    done: Counter[str] = Counter()
    steps = rounds = 0
    while sum(done.values()) < wanted:
        results = bench.fresh()
        ledger = bench.ledger(results)
        while True:
            more = sum(done.values()) < wanted
            use_sweep = more and bench.draw.random() < 0.3
            running = (sweep if use_sweep else table)(results, bench.data).start()
            number = bench.draw.choice(list(SIGNALS))
            if more:
                running.inject(number, after=bench.draw.uniform(0, bench.seconds / 3))
            ended = running.wait()
            ledger.look([ended])
            bench.missed(ended)
            if ended.status == SIGNALS[number]:
                said = [line for line in ended.err.splitlines() if line.startswith("stopped by ")]
                if len(said) != 1 or "the same command goes on" not in said[0]:
                    raise Violation(f"a stop is not told in one line: {ended.err[-1000:]}")
                done[signal.Signals(number).name] += 1
            elif ended.status == -number and not ended.out and not ended.events:
                done["before it had begun"] += 1  # the interpreter's own answer
            elif ended.status:
                raise Violation(f"status {ended.status} after signal {number}: {ended.err[-2000:]}")
            elif not use_sweep:
                break
        ledger.finish(killed=False)
        rounds, steps = rounds + 1, steps + ledger.steps
        shutil.rmtree(results)
    return dict(done) | {"sweeps": rounds, "steps": steps, "steps_done_again": steps - rounds * bench.steps}


def together(bench: Bench, groups: list[tuple[int, int]]) -> dict[str, Any]:
    """Several processes on one results directory; (how many, how many kills among them)."""
    done: Counter[str] = Counter()
    for count, deaths in groups:
        results = bench.fresh()
        ledger = bench.ledger(results)
        commands = [table(results, bench.data), table(results, bench.data), sweep(results, bench.data)][-count:]
        running = [command.start() for command in commands]
        for _ in range(deaths):
            victim = bench.draw.randrange(count)
            time.sleep(bench.draw.uniform(0, bench.seconds / 4))
            running[victim].inject(signal.SIGKILL)
            ended = running[victim].wait()
            ledger._count(ended)
            done["kills"] += ended.status == -signal.SIGKILL
            running[victim] = commands[victim].start()
        last = [one.wait() for one in running]
        if any(one.status for one in last):
            raise Violation(f"statuses {[one.status for one in last]}: {[one.err[-1000:] for one in last]}")
        ledger.look(last)
        ledger.finish(killed=deaths > 0)
        done["sweeps"] += 1
        done["processes"] += count
        shutil.rmtree(results)
    return dict(done)


def _states(bench: Bench) -> dict[str, Path]:
    """Results directories of the pair, killed while training, while grading, and between the two cells."""
    if bench.states:
        return bench.states

    def stopped(name: str, when: Callable[[Path], bool], right: Callable[[Path], bool]) -> Path:
        for _ in range(20):
            results = bench.fresh()
            running = table(results, bench.data, "faults_pair").start()
            running.inject(signal.SIGKILL, when=lambda made=results: when(made))
            running.wait()
            if right(results):
                return results
        raise Violation(f"no process could be killed {name}")

    def has(results: Path, pattern: str) -> bool:
        return any(path.is_dir() or path.stat().st_size for path in results.glob(pattern))

    final, record, rows = "checkpoints/*/final", "runs/smoke/*.json", "runs/smoke/*/chain_sum/samples.jsonl"
    bench.states = {
        "training": stopped(
            "while training",
            lambda r: has(r, "checkpoints/*/checkpoint-6/COMPLETE"),
            lambda r: has(r, "checkpoints/*/checkpoint-6/COMPLETE") and not has(r, final),
        ),
        "grading": stopped("while grading", lambda r: has(r, rows), lambda r: has(r, rows) and not has(r, record)),
        "between": stopped("between cells", lambda r: has(r, record), lambda r: len(list(r.glob(record))) == 1),
    }
    return bench.states


def _damages() -> Iterator[tuple[str, str, str, lab.Damage]]:
    """(state, what, where below the results, how)."""
    newest = "checkpoints/*/checkpoint-6"
    for file in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        for how in (lab.flip, lab.cut, lab.gone):
            yield "training", f"checkpoint, {file}", f"{newest}/{file}", how
    for how in (lab.flip, lab.cut, lab.empty, lab.garbage, lab.gone):
        yield "training", "checkpoint, list of files", f"{newest}/COMPLETE", how
    for how in (lab.cut, lab.last_line, lab.a_line, lab.digit, lab.flip, lab.empty, lab.gone):
        yield "training", "loss.jsonl", "checkpoints/*/loss.jsonl", how
    for how in (lab.cut, lab.last_line, lab.a_line, lab.digit, lab.flip, lab.empty, lab.gone):
        yield "grading", "samples.jsonl", "runs/smoke/*/chain_sum/samples.jsonl", how
    for state in ("grading", "between"):
        for how in (lab.flip, lab.cut, lab.garbage, lab.gone):
            yield state, "trained weights", "checkpoints/*/final/adapter_model.safetensors", how
    for how in (lab.digit, lab.flip, lab.cut, lab.empty, lab.gone):
        yield "between", "trained weights, train.json", "checkpoints/*/final/train.json", how
    for how in (lab.digit, lab.flip, lab.cut, lab.garbage, lab.empty, lab.gone):
        yield "between", "record", "runs/smoke/*.json", how


def damaged(bench: Bench, share: float) -> dict[str, Any]:
    """Files cut, emptied, overwritten, removed, or with one bit or digit changed at the same size."""
    states = _states(bench)
    done: Counter[str] = Counter()
    broken = []
    for state, what, where, how in _damages():
        if bench.draw.random() >= share:
            continue
        results = lab.copy_of(states[state], f"{states[state].name}-{done['files']}")
        targets = sorted(results.glob(where))
        if len(targets) != 1:
            raise Violation(f"{state}: {where} is {len(targets)} files")
        how(targets[0], bench.draw)
        done["files"] += 1
        try:
            done[_mended(bench, results)] += 1
        except Violation as violation:
            broken.append(f"{what}, {how.__name__}, {state}: {violation}")
        shutil.rmtree(results)
    if broken:
        raise Violation("; ".join(broken))
    return dict(done)


def _mended(bench: Bench, results: Path) -> str:
    """Run the pair, doing what its messages ask for, until it is done; whether it had to ask."""
    for asked in range(4):
        ended = table(results, bench.data, "faults_pair").run()
        if ended.status == 0:
            Outcome.of(results).same_as(bench.pair)
            return "refused, and right after what the message says" if asked else "mended by the same command"
        line = refusal(ended)
        paths = [Path(word.rstrip(":;,")) for word in line.split() if word.startswith(str(results))]
        if "delete" not in line or not paths or not paths[0].exists():
            raise Violation(f"the message does not say what to delete: {line}")
        shutil.rmtree(paths[0]) if paths[0].is_dir() else paths[0].unlink()
    raise Violation("what the messages say does not help")


def record_alone(bench: Bench) -> dict[str, Any]:
    """A table that is written from records alone refuses one that was damaged."""
    done: Counter[str] = Counter()
    finished = bench.fresh()
    table(finished, bench.data, "faults_pair").run()
    for how in (lab.digit, lab.flip, lab.cut, lab.garbage, lab.empty):
        results = lab.copy_of(finished, f"{finished.name}-{how.__name__}")
        path = bench.draw.choice(sorted((results / "runs" / lab.SCALE).glob("*.json")))
        how(path, bench.draw)
        line = refusal(table(results, bench.data, "faults_pair", "render_only=true").run())
        if str(path) not in line:
            raise Violation(f"the damaged record is not named: {line}")
        done["refused"] += 1
        shutil.rmtree(results)
    return dict(done)


def leases(bench: Bench) -> dict[str, Any]:
    """Leases left by the dead, on this machine and others, and files that are none."""
    here = {"host": "here", "place": lab.lease.this_place(), "what": "x", "stage": "", "started": "", "beat": 7}
    texts = {
        "of a process that is gone": json.dumps(here | {"pid": 2**22 - 1, "start": 1}),
        "of a process number that another has now": json.dumps(here | {"pid": os.getpid(), "start": 1}),
        "of a silent process elsewhere": json.dumps(here | {"place": "another", "pid": 1, "start": 1}),
        "garbage": "\x00\x17{]",
        "cut": json.dumps(here)[:20],
    }
    done: Counter[str] = Counter()
    record = next(iter(bench.pair.records.values()))
    for what, text in texts.items():
        results = bench.fresh()
        for work in (f"{lab.SCALE}-{record['id']}", f"train-{record['train_id']}"):
            folder = Store(results).running() / work
            folder.mkdir(parents=True)
            (folder / "41.json").write_text(text)
            (folder / ".beat-41").write_text("left")
        ended = table(results, bench.data, "faults_pair").run()
        if ended.status:
            raise Violation(f"a lease {what}: status {ended.status}: {ended.err[-1000:]}")
        Outcome.of(results).same_as(bench.pair)
        done["taken over"] += 1
        shutil.rmtree(results)
    return dict(done)


def full_disk(bench: Bench) -> dict[str, Any]:
    """A tmpfs that is too small, and grows a little whenever the command has ended."""
    place = bench.fresh()
    place.mkdir()
    what = "faults_pair" if bench.quick else "faults"

    def work() -> dict[str, Any]:
        size, refused = 40, 0
        with lab.own_mounts(place, "tmpfs", f"size={size}k"):
            results = place / "r"
            ledger = Ledger(results, bench.pair if bench.quick else bench.whole)
            while True:
                ended = table(results, bench.data, what).run()
                if ended.status == 0:
                    break
                if "cannot be written" not in refusal(ended) or "make room" not in refusal(ended):
                    raise Violation(f"a full disk is told as: {refusal(ended)}")
                ledger.look([ended])
                refused += 1
                size += bench.draw.randrange(100, 500)
                lab.grow(place, f"size={size}k")
            ledger.look([ended])
            ledger.finish(killed=True)
        return {"refused": refused, "from_KiB": 40, "to_KiB": size}

    return dict(apart(work))


def read_only(bench: Bench) -> dict[str, Any]:
    """A results directory that cannot be written: one line, and nothing is computed."""
    results = bench.fresh()
    first = table(results, bench.data, "faults_pair").start()
    first.inject(signal.SIGKILL, when=lambda: any(results.glob("checkpoints/*/checkpoint-3/COMPLETE")))
    first.wait()

    def work() -> dict[str, Any]:
        with lab.own_mounts(results, "bind", ""):
            ended = table(results, bench.data, "faults_pair").run()
            line = refusal(ended)
            if "Read-only file system" not in line or ended.events:
                raise Violation(f"read-only is told as {line}; done before: {ended.events}")
        return {"refused": 1}

    found = dict(apart(work))
    if table(results, bench.data, "faults_pair").run().status:
        raise Violation("writable again, it does not go on")
    Outcome.of(results).same_as(bench.pair)
    return found


def clock(bench: Bench) -> dict[str, Any]:
    """A wall clock that jumps back and forth by a day and by years; file times from 1970 and 2100."""
    done: Counter[str] = Counter()
    for name, state in _states(bench).items():
        for stamp in (0, 4102444800):
            results = lab.copy_of(state, f"{state.name}-{name}-{stamp}")
            for path in [results, *results.rglob("*")]:
                os.utime(path, (stamp, stamp))
            if table(results, bench.data, "faults_pair").run().status:
                raise Violation(f"{name}, files of time {stamp}: it does not go on")
            Outcome.of(results).same_as(bench.pair)
            done["directories with other file times"] += 1
            shutil.rmtree(results)
    library = bench.folder / "clock.so"
    if shutil.which("cc") is None:
        return dict(done) | {"wrong_clock": "no C compiler"}
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(lab.HERE / "clock.c")], check=True)
    results = bench.fresh()

    def at_wrong_time(shift: int) -> lab.Running:
        wrong = (("LD_PRELOAD", str(library)), ("KRONLAB_TEST_SHIFT", str(shift)))
        return table(results, bench.data, "faults_pair", full=True, environment=wrong).start()

    running = at_wrong_time(86400)
    running.inject(signal.SIGKILL, when=lambda: any(results.glob("checkpoints/*/checkpoint-6/COMPLETE")))
    running.wait()
    ended = at_wrong_time(-800000000).wait()
    if ended.status:
        raise Violation(f"a wrong clock: status {ended.status}: {ended.err[-1500:]}")
    Outcome.of(results).same_as(bench.pair)
    return dict(done) | {"runs_by_a_wrong_clock": 2}


def data_gone(bench: Bench) -> dict[str, Any]:
    """The local data set vanishes: its cells fail, each in one line; the others are done, and they after it is back."""
    results, away = bench.fresh(), bench.data.with_name("away")
    ledger = bench.ledger(results)
    running = table(results, bench.data).start()
    running.inject(signal.SIGTERM, when=lambda: len(list(results.glob("runs/smoke/*.json"))) >= 3)
    stopped = running.wait()
    ledger.look([stopped])
    bench.data.rename(away)
    try:
        ended = table(results, bench.data).run()
    finally:
        away.rename(bench.data)
    line = refusal(ended)
    if "gsm8k" not in line:
        raise Violation(f"the data set is not named: {line}")
    store = Store(results)
    records = {cell: store.read(lab.SCALE, cell) for cell in bench.whole.records}
    failed = [cell for cell, record in records.items() if record is not None and record["status"] == "failed"]
    if any(record is None for record in records.values()) or not failed:
        raise Violation(f"not all others were done: {[cell for cell, record in records.items() if record is None]}")
    ledger._count(ended)
    for cell in failed:
        if "gsm8k" not in bench.whole.records[cell]["config"]["eval"]:
            raise Violation(f"cell {cell} has failed for another's data")
        ledger.recorded[cell] -= 1
    last = table(results, bench.data).run()
    ledger.look([last])
    ledger.finish(killed=False)
    return {"cells_failed": len(failed), "cells_done_beside": len(records) - len(failed)}


# ---- all of it


def parts(bench: Bench, wanted_kills: int, share: float) -> dict[str, Callable[[], dict[str, Any]]]:
    quick = bench.quick
    groups = [(2, 1)] if quick else [(2, 0), (3, 0), (3, 3)]
    every: dict[str, Callable[[], dict[str, Any]]] = {
        "full_disk": lambda: full_disk(bench),
        "read_only": lambda: read_only(bench),
        "record_alone": lambda: record_alone(bench),
        "data_gone": lambda: data_gone(bench),
        "kills": lambda: kills(bench, wanted_kills),
        "leases": lambda: leases(bench),
        "damaged": lambda: damaged(bench, share),
        "signals": lambda: signals(bench, max(1, round(12 * share))),
        "clock": lambda: clock(bench),
        "together": lambda: together(bench, groups),
    }
    return {name: work for name, work in every.items() if not quick or name in QUICK}


def campaign(
    *, quick: bool, seed: int, wanted_kills: int, share: float, only: list[str], keep: Path | None, out: Path | None
) -> dict[str, Any]:
    """Run the parts that the record at `out` does not have yet; the record, which is written after each of them."""
    folder = keep or Path(tempfile.mkdtemp(prefix="kronlab-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()
    runs.git_state(), runs.versions(), experiment._settle()  # once for all children
    lab.SEEDS = "0" if quick else "0,1"
    bench = prepare(folder, seed, quick)
    said(f"undisturbed: {len(bench.whole.records)} records, {bench.steps} steps, {bench.seconds:.1f} s")
    same = {"schema": 1, "seed": seed, "quick": quick}
    before = json.loads(out.read_text()) if out is not None and out.is_file() else {}
    found: dict[str, Any] = before["parts"] if same.items() <= before.items() else {}
    record: dict[str, Any] = {}
    for name, work in parts(bench, wanted_kills, share).items():
        if (only and name not in only) or found.get(name, {}).get("outcome") == "held":
            continue
        bench.draw = random.Random(f"{seed} {name}")
        begun = time.monotonic()
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = usage.ru_utime + usage.ru_stime
        try:
            found[name] = {"outcome": "held"} | work()
        except Violation as broken:
            found[name] = {"outcome": "broken", "why": str(broken)[:4000]}
        except OSError as refused:
            found[name] = {"outcome": "not run", "why": f"this system does not allow it ({refused})"}
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        found[name] |= {
            "wall_seconds": round(time.monotonic() - begun, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime - spent, 1),
            "commit": runs.git_state()["commit"],
        }
        said(f"{name}: {json.dumps(found[name])}")
        whole = bench.whole
        record = same | {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": runs.versions(),
            "machine": runs.machine(),
            "reference": {"records": len(whole.records), "trainings": len(whole.weights), "steps": bench.steps},
            "parts": {part: found[part] for part in TITLES if part in found},
        }
        if out is not None:
            runs.write_json(out, record)
    if keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def said(text: str) -> None:
    print(text, flush=True)


# ---- the page


def as_table(record: dict[str, Any]) -> str:
    """The record as the page's table."""
    lines = ["| fault | injected | outcome |", "| --- | --- | --- |"]
    for name, title in TITLES.items():
        part = record["parts"].get(name)
        if part is None:
            lines.append(f"| {title} | | not run yet |")
            continue
        counts = "; ".join(
            f"{key.replace('_', ' ')}: {value:,}" if isinstance(value, int) else f"{key.replace('_', ' ')}: {value}"
            for key, value in part.items()
            if key not in ("outcome", "why", "wall_seconds", "cpu_seconds", "commit")
        )
        outcome = part["outcome"] + (f": {part['why']}" if "why" in part else "")
        lines.append(f"| {title} | {counts} | {outcome} |")
    reference = record["reference"]
    seconds = {kind: sum(part[f"{kind}_seconds"] for part in record["parts"].values()) for kind in ("wall", "cpu")}
    told = (
        f"Seed {record['seed']}, {record['made'][:10]}: a sweep of {reference['records']} cells with "
        f"{reference['trainings']} trainings of {reference['steps']} steps in all; the campaign took "
        f"{seconds['cpu']:,.0f} s of CPU, {seconds['wall']:,.0f} s on a machine that was shared."
    )
    return "\n".join([told, "", *lines])


TITLES = {
    "kills": "SIGKILL of the process group",
    "signals": "SIGTERM, SIGUSR2, SIGINT",
    "together": "two and three processes at once, some killed",
    "damaged": "a file cut, emptied, overwritten, removed, one bit or digit changed",
    "record_alone": "a table from records alone, one of them damaged",
    "leases": "a lease left behind, or garbage in its place",
    "full_disk": "a full disk",
    "read_only": "a read-only results directory",
    "clock": "clocks and file times that are wrong",
    "data_gone": "a data set that vanishes mid-way",
}
QUICK = ("kills", "signals", "together", "damaged", "full_disk")
MARKS = "<!-- made from results/faults/campaign.json by tests/faults/campaign.py -->", "<!-- end -->"


def page(text: str, record: dict[str, Any]) -> str:
    """The page with its table made anew."""
    before, _, rest = text.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{as_table(record)}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--kills", type=int, help="how many (105; quick: 4)")
    parser.add_argument("--share", type=float, help="of the damages and signals that there are (1; quick: 0.08)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=list(TITLES), metavar="part", help=", ".join(TITLES))
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    parser.add_argument("--out", type=Path, help="write the record here, and leave the page alone")
    asked = parser.parse_args()
    record = campaign(
        quick=asked.quick,
        seed=asked.seed,
        wanted_kills=asked.kills or (4 if asked.quick else 105),
        share=asked.share or (0.08 if asked.quick else 1.0),
        only=asked.only,
        keep=asked.keep,
        out=asked.out or (None if asked.quick else RECORD),
    )
    if asked.out is None and not asked.quick and record:
        PAGE.write_text(page(PAGE.read_text(), record))
    if any(part["outcome"] == "broken" for part in record.get("parts", {}).values()):
        sys.exit("error: a promise was broken, see above")


if __name__ == "__main__":
    main()
