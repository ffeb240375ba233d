"""Grade a model on the evals of a cell: per-sample rows first, scores from the rows alone.

Rows go to `<eval>/samples.jsonl` batch by batch, so that a run that is killed goes on after the last finished batch.
`regrade` makes verdicts and scores of a record again from those rows, without a model.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kronlab import interrupt, runs
from kronlab.data import Example, fingerprint
from kronlab.errors import CheckpointError, ConfigError
from kronlab.evals.harness import Harness, Row, Settings, Subject
from kronlab.evals.registry import harness_of
from kronlab.progress import bar
from kronlab.runs import Store, json_line, read_jsonl, write_jsonl

log = logging.getLogger(__name__)


def evaluate(
    subject: Subject, examples: Sequence[Example], settings: Settings, *, path: Path, progress: bool
) -> list[Row]:
    """Rows with their verdicts, in the order of `examples`; written to `path` as they are made.

    A row holds `id`, `prompt_sha`, `gold`, `seconds` (its share of its batch), what the harness collects and what it
    grades: `correct` and `reason` among others.
    """
    harness = harness_of(settings)
    batches = list(harness.batches(examples, settings))
    rows = _collect(harness, subject, batches, settings, path=path, progress=progress)
    if harness.grades_late:
        rows = _grade_late(harness, rows, settings, path=path, progress=progress)
    place = {example.id: i for i, example in enumerate(examples)}
    return sorted(rows, key=lambda row: place[_item(row)])


def _collect(
    harness: Harness, subject: Subject, batches: Sequence[Sequence[Example]], settings: Settings, *, path: Path,
    progress: bool,
) -> list[Row]:  # fmt: skip
    each = harness.samples_per_example(settings)
    done = _whole_batches(path, batches, each)
    rows = [row for group in done.values() for row in group]
    if not harness.grades_late:
        for row in rows:  # cheap, and right even where the grader has changed since
            row |= harness.grade(row, settings)
    write_jsonl(path, rows)  # without what a kill cut short
    total = each * sum(map(len, batches))
    with (
        bar(total=total, done=len(rows), what=f"grade {settings['name']}", unit="sample", show=progress) as shown,
        path.open("a") as handle,
    ):
        for number, batch in enumerate(batches):
            if number in done:
                continue
            interrupt.at(f"grade {settings['name']} {len(rows)}/{total}")
            interrupt.check()
            started = time.perf_counter()
            made = harness.collect(subject, batch, settings)
            seconds = round((time.perf_counter() - started) / len(made), 4)
            by_id = {example.id: example for example in batch}
            for raw in made:
                example = by_id[_item(raw)]
                row = {"id": raw["id"], "prompt_sha": _sha(example.prompt), "gold": example.gold} | raw
                if not harness.grades_late:
                    row |= harness.grade(row, settings)
                row["seconds"] = seconds
                rows.append(row)
                handle.write(json_line(row))
            handle.flush()
            right = None if harness.grades_late else f"{100 * sum(map(_right, rows)) / len(rows):.1f} % right"
            shown.update(len(rows) - shown.n, note=right)
    return rows


def _grade_late(harness: Harness, rows: list[Row], settings: Settings, *, path: Path, progress: bool) -> list[Row]:
    """The second stage: verdicts are kept in a file of their own until all are there."""
    kept = path.with_name("verdicts.jsonl")
    stamp = {"version": harness.version, "settings": _sha(json.dumps(dict(settings), sort_keys=True, default=str))}
    found_lines = [line for line in read_jsonl(kept) if line["stamp"] == stamp]
    found = {(line["id"], line["row_sha"]): line["verdict"] for line in found_lines}
    missing = [row for row in rows if (row["id"], _row_sha(row)) not in found]
    write_jsonl(kept, found_lines)  # without what a kill cut short
    with (
        bar(total=len(rows), done=len(rows) - len(missing), what=f"judge {settings['name']}", unit="sample",
            show=progress) as shown,
        kept.open("a") as handle,
    ):  # fmt: skip
        for row, verdict in harness.grade_all(missing, settings):
            interrupt.at(f"judge {settings['name']} {len(found)}/{len(rows)}")
            interrupt.check()  # before the verdict is kept: the signal may have hit the process that it comes from
            key = row["id"], _row_sha(row)
            found[key] = verdict
            line = {"id": key[0], "row_sha": key[1], "stamp": stamp, "verdict": verdict}
            handle.write(json_line(line))
            handle.flush()
            shown.update(1, note=f"{100 * sum(map(_right, found.values())) / len(found):.1f} % right")
    graded = [row | found[row["id"], _row_sha(row)] for row in rows]
    write_jsonl(path, graded)
    kept.unlink()
    return graded


def _whole_batches(path: Path, batches: Sequence[Sequence[Example]], each: int) -> dict[int, list[Row]]:
    """What an earlier run has left: batch number -> its rows, for batches that are whole.

    A row counts only for the problem that it was made for, not for its id.
    """
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in read_jsonl(path):
        found.setdefault((_item(row), row["prompt_sha"], row["gold"]), {})[row["id"]] = row
    whole = {}
    for number, batch in enumerate(batches):
        groups = [found.get((example.id, _sha(example.prompt), example.gold), {}) for example in batch]
        if all(len(group) == each for group in groups):
            whole[number] = [row for group in groups for row in group.values()]
    return whole


def _item(row: Row) -> str:
    """The id of the example that a row belongs to."""
    return str(row["id"]).partition("#")[0]


def _right(row: Mapping[str, Any]) -> bool:
    return bool(row["correct"])


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _row_sha(row: Row) -> str:
    return _sha(json.dumps(row, sort_keys=True))


def score(rows: Sequence[Row], examples: Sequence[Example], settings: Settings) -> dict[str, Any]:
    """What the record keeps of one eval: scores, versions of the graders, cost, and per sample what pairs need.

    Raises:
        ConfigError: the rows leave nothing to score.
    """
    section = harness_of(settings).score(rows, settings)
    return section | {"data_sha": fingerprint(examples), "seconds": math.fsum(row["seconds"] for row in rows)}


def regrade(store: Store, record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Make the verdicts and scores of a finished record again from its samples, without a model.

    The samples' files and the record are replaced; `regraded` in the record says when and by which versions.

    Returns:
        the new record, and for each eval the ids of the samples whose verdict has changed.

    Raises:
        CheckpointError: the record is not finished, or its samples are not there or not whole.
    """
    if record["status"] != runs.DONE:
        raise CheckpointError(f"record {record['id']} is {record['status']}, so there is nothing to grade again")
    folder = store.folder(record["scale"], record["id"])
    sections, changed, files = {}, {}, {}
    for name, old in record["eval"].items():
        path = folder / name / "samples.jsonl"
        rows = read_jsonl(path)
        if sorted(row["id"] for row in rows) != sorted(old["samples"]["id"]):
            raise CheckpointError(
                f"{path} holds {len(rows)} samples and the record {len(old['samples']['id'])}: "
                "run the cell again with force=true"
            )
        settings = record["config"]["eval"][name]
        harness = harness_of(settings)
        graded = [row | verdict for row, verdict in harness.grade_all(rows, settings)]
        place = {sample: i for i, sample in enumerate(old["samples"]["id"])}
        ordered = sorted(graded, key=lambda row: place[row["id"]])
        before = {row["id"]: row["correct"] for row in rows}
        changed[name] = [row["id"] for row in ordered if row["correct"] != before[row["id"]]]
        sections[name] = old | harness.score(ordered, settings)
        files[path] = ordered
    for path, graded in files.items():
        write_jsonl(path, graded)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    new = dict(record) | {"eval": sections, "regraded": {"at": now, "versions": runs.versions()}}
    runs.write_record(store.record_path(record["scale"], record["id"]), new)
    return new, changed


def regrade_records(results: str | Path, which: str) -> None:
    """`regrade` for the record of one id, or for `all` finished ones, and say what has changed.

    Raises:
        ConfigError: there is no such record.
        CheckpointError: as `regrade`.
    """
    store = Store(results)
    scales = sorted(folder.name for folder in (store.results / "runs").glob("*") if folder.is_dir())
    found = [r for scale in scales for r in store.records(scale) if which in ("all", r["id"])]
    if not found:
        raise ConfigError(f"regrade={which}: no such record under {store.results / 'runs'}; give an id, or all")
    for record in found:
        if which == "all" and record["status"] != runs.DONE:
            log.info("%s: %s, left as it is", record["name"], record["status"])
            continue
        new, changed = regrade(store, record)
        for name, ids in changed.items():
            headline, metric = next(iter(new["eval"][name]["metrics"].items()))
            before = record["eval"][name]["metrics"][headline]["value"]
            text = (
                f"{len(ids)} verdicts changed ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
                if ids
                else "same"
            )
            log.info("%s, %s: %s %.4f -> %.4f, %s", record["name"], name, headline, before, metric["value"], text)
