"""From a plan of cases to one record: what is measured is kept case by case, so that a killed bench goes on.

<results>/bench/<scale>/<name>.json              the record, the only source of tables and figure
<results>/checkpoints/bench/<scale>/<name>.jsonl one line for each case measured here, not for git

The tables and the figure of a bench that a table config names lie with the other tables and figures; those of any
other bench, and companions of a table, beside its record.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import kronlab
from kronlab import runs
from kronlab.bench.cases import Case, measure, plan_cases
from kronlab.cell import digest
from kronlab.errors import ConfigError
from kronlab.experiment import typed_command
from kronlab.progress import bar
from kronlab.report.cost import bank_table, cost_table, generation_table, layer_table, trainer_table
from kronlab.report.tables import Table

log = logging.getLogger(__name__)
SCHEMA = 1
_MEASURED = (
    "adapters",
    "bank.py",
    "bench",
    "chunked_loss.py",
    "encode.py",
    "generate.py",
    "methods.py",
    "train.py",
)  # the code whose speed is measured


def run_bench(
    spec: Mapping[str, Any],
    scale: str,
    *,
    name: str,
    results: str | Path,
    threads: int | None = None,
    dry_run: bool = False,
    render_only: bool = False,
    force: bool = False,
    reuse: str = "local",
    progress: bool = True,
    **subset: Any,
) -> Table | None:
    """Measure what is missing of a bench, write record, tables and figure; return the first table.

    Args:
        spec: a table config of kind `bench`.
        name: of the record; the spec's own for its table, another for a part of it.
        threads: of the CPU; None for all.
        reuse: as `Bench` takes it.
        subset: `parts`, `peers`, `dtypes`, `rounds` of `plan_cases`.

    Raises:
        ConfigError: an unknown part, peer or precision; `render_only` where nothing has been measured.
    """
    if render_only:
        record = read_record(results, scale, name)
        if record is None:
            raise ConfigError(f"{name}: nothing has been measured at scale {scale} yet; leave render_only away")
        return write_results(spec, scale, record, results)
    cases = plan_cases(spec["rows"], spec["scales"][scale], **subset)
    threads = threads or torch.get_num_threads()
    bench = Bench(cases, results=results, scale=scale, name=name, threads=threads, reuse=reuse)
    if force and not dry_run:
        bench.forget()
    missing = bench.missing()
    log.info(
        "%s at scale %s: %d cases, %d done; about %.0f minutes with %d threads",
        name, scale, len(cases), len(cases) - len(missing), estimate_minutes(missing, threads), threads,
    )  # fmt: skip
    if dry_run:
        for case in cases:
            log.info("  %s  %s", "missing" if case in missing else "done   ", case.about)
        return None
    return write_results(spec, scale, bench.run(progress=progress), results)


def write_results(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any], results: str | Path) -> Table | None:
    """Write every table that the record has cases for, and the figure, from the record alone."""
    from kronlab.report.figures import cost_figure, write_figure  # matplotlib is slow to import

    results, name = Path(results), record["name"]
    beside = results / "bench" / scale
    tables, figures = (results / kind / scale if name == spec["name"] else beside for kind in ("tables", "figures"))
    steps = cost_table(spec, scale, record)
    others = [make(spec, scale, record) for make in (layer_table, trainer_table, generation_table, bank_table)]
    written = []
    if steps is not None:
        written += steps.write(tables) + write_figure(cost_figure(spec, record), figures, name)
    for table in others:
        written += table.write(beside) if table is not None else []
    for path in written:
        log.info("wrote %s", path)
    found = [table for table in (steps, *others) if table is not None]
    for table in found:
        log.info("\n%s", table.markdown())
    return found[0] if found else None


def estimate_minutes(cases: Sequence[Case], threads: int) -> float:
    """How long the cases take, roughly: their work at the speed of a matrix product that is timed now."""
    if not cases:
        return 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a = torch.randn(1024, 1024)
    product = partial(torch.mm, a, a)
    product()
    started, n = time.perf_counter(), 20
    for _ in range(n):
        product()
    flops_per_s = 2 * 1024**3 * n / (time.perf_counter() - started)
    torch.set_num_threads(before)
    return sum(case.work for case in cases) / flops_per_s / 60


def record_path(results: str | Path, scale: str, name: str) -> Path:
    return Path(results) / "bench" / scale / f"{name}.json"


def journal_path(results: str | Path, scale: str, name: str) -> Path:
    return Path(results) / "checkpoints" / "bench" / scale / f"{name}.jsonl"


def read_record(results: str | Path, scale: str, name: str) -> dict[str, Any] | None:
    """The record of a bench, or None.

    Raises:
        CheckpointError: the file is there and is not a record.
    """
    return runs.read_measurement(record_path(results, scale, name), schema=SCHEMA, part="cases")


@cache  # the code that runs is the one that was imported
def code_mark() -> str:
    """12 hex digits of the measured code and the packages under it: a time of other code is another measurement."""
    root = Path(kronlab.__file__).parent
    files = [path for name in _MEASURED for path in sorted((root / name).rglob("*.py")) or [root / name]]
    found = hashlib.sha256("".join(f"{path.name}\n{path.read_text()}" for path in files).encode()).hexdigest()
    versions = runs.versions()
    return digest([found, *[versions[package] for package in ("python", "torch", "transformers", "peft")]])


def case_key(case: Case, *, threads: int, code: str) -> str:
    """What makes two measurements the same one."""
    return digest({"settings": case.settings, "threads": threads, "code": code})


class Bench:
    """A plan and what of it is there.

    Args:
        reuse: "local": only what was measured in this results directory counts; "any": a record that came with a
            clone counts too, where code and settings are the same.
    """

    def __init__(
        self, cases: Sequence[Case], *, results: str | Path, scale: str, name: str, threads: int, reuse: str = "local"
    ) -> None:
        self.cases, self.scale, self.name, self.threads = list(cases), scale, name, threads
        self.results = results
        self.path, self.journal = record_path(results, scale, name), journal_path(results, scale, name)
        code = code_mark()
        self.keys = [case_key(case, threads=threads, code=code) for case in self.cases]
        lines = runs.read_jsonl(self.journal)
        if reuse == "any":
            record = read_record(results, scale, name)
            lines = [*(record["cases"] if record else []), *lines]
        self._there = {line["key"]: line for line in lines}

    def missing(self) -> list[Case]:
        return [case for case, key in zip(self.cases, self.keys, strict=True) if key not in self._there]

    def forget(self) -> None:
        """All of it is to be measured again."""
        self.journal.unlink(missing_ok=True)
        self._there = {}

    def run(self, *, progress: bool = True) -> dict[str, Any]:
        """Measure what is missing, then write the record and return it; if nothing is missing, the record as it is."""
        record = read_record(self.results, self.scale, self.name)
        if not self.missing() and record and [case["key"] for case in record["cases"]] == self.keys:
            return record
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            self._measure_missing(progress=progress)
            return self._write()
        finally:
            torch.set_num_threads(before)

    def _measure_missing(self, *, progress: bool) -> None:
        missing = self.missing()
        total = sum(case.work for case in self.cases)
        left = sum(case.work for case in missing)
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        runs.write_jsonl(self.journal, runs.read_jsonl(self.journal))  # drops a line that a kill cut short
        finished = total - left

        def progressed(work: float, share: float) -> None:
            nonlocal finished
            finished += share * work
            shown.update(round(100 * finished / total) - shown.n)

        with bar(total=100, done=round(100 * finished / total), what=self.name, unit="%", show=progress) as shown:
            for case, key in zip(self.cases, self.keys, strict=True):
                if key in self._there:
                    continue
                shown.update(0, note=case.about)
                line = {
                    "key": key,
                    "part": case.part,
                    "settings": case.settings,
                    "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "git": runs.git_state(),
                    "peers": measure(case, partial(progressed, case.work)),
                }
                with self.journal.open("a") as file:
                    file.write(json.dumps(line, allow_nan=False) + "\n")
                self._there[key] = line

    def _write(self) -> dict[str, Any]:
        record = {
            "schema": SCHEMA,
            "name": self.name,
            "scale": self.scale,
            "command": typed_command(),
            "versions": runs.versions(),
            "machine": runs.machine(),
            "cases": [self._there[key] for key in self.keys],
        }
        runs.write_json(self.path, record)
        log.info("wrote %s", self.path)
        return record
