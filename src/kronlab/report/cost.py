"""Table 9 and its companion from the record of a bench: what each method costs, and what it costs layer by layer.

Times are medians over interleaved rounds. A ratio to the baseline is one of medians of the same rounds; its 95 %
interval is the percentile bootstrap over rounds.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kronlab.report.tables import Column, Table

_MIB, _GIB = 2**20, 2**30


def interquartile_range(values: Sequence[float]) -> float | None:
    """Third quartile minus first (linear between order statistics); None for one value."""
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def ratio_of_medians(
    values: Sequence[float], reference: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """median(values) / median(reference) and its 95 % percentile-bootstrap interval (low, high).

    Rounds are drawn with replacement, the same ones for both, because what disturbs a round disturbs both.

    Raises:
        ValueError: the two were not measured in the same number of rounds.
    """
    pairs = list(zip(values, reference, strict=True))
    draw = random.Random(seed)

    def ratio(rounds: Sequence[tuple[float, float]]) -> float:
        return statistics.median(v for v, _ in rounds) / statistics.median(r for _, r in rounds)

    drawn = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(draws))
    return ratio(pairs), drawn[round(0.025 * (draws - 1))], drawn[round(0.975 * (draws - 1))]


def time_ratio(case: Mapping[str, Any], key: str, baseline: str) -> tuple[float, float, float] | None:
    """A peer's wall time over the baseline's with its interval; None where one of them was not measured."""
    rows = [case["peers"].get(name) for name in (key, baseline)]
    if any(row is None or "wall" not in row for row in rows):
        return None
    return ratio_of_medians(rows[0]["wall"], rows[1]["wall"])


def cases_of(record: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The cases of a record that belong to a part, in the order in which they were planned."""
    return [case for case in record["cases"] if case["part"] == part]


def setting(case: Mapping[str, Any]) -> str:
    """The batch and the precision of a step, in short: 8x128 fp32."""
    return f"{case['settings']['rows']}x{case['settings']['length']} {case['settings']['dtype']}"


def peer_labels(cases: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, str]:
    """Label of each peer that the cases hold, in the order of `keys`."""
    found = {key: row["label"] for case in cases for key, row in case["peers"].items()}
    return {key: found[key] for key in keys if key in found}


def cost_table(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> Table | None:
    """The table of the whole step: one row a method; None if neither its time nor its memory was measured."""
    steps, memory = cases_of(record, "step"), cases_of(record, "memory")
    labels = peer_labels([*steps, *memory], list(spec["rows"]))
    if not labels:
        return None
    keys, baseline = list(labels), spec["baseline"]
    columns = [_published_column(spec, keys)] if spec.get("published") else []
    columns += [
        _column("trainable parameters", [_first(steps, key, "trainable") for key in keys], "{:,.0f}"),
        _column("adapter, trained (MiB)", [_first(steps, key, "adapter_bytes", _MIB) for key in keys], "{:.2f}"),
        _column("MFLOPs/token", [_first(steps, key, "flops_per_token", 1e6) for key in keys], "{:.1f}"),
    ]
    for case in steps:
        columns += list(_step_columns(case, keys, baseline))
    for case in memory:
        peaks = [_first([case], key, "peak_memory_bytes", _GIB) for key in keys]
        columns.append(_column(f"{setting(case)}: peak memory (GiB)", peaks, "{:.2f}"))
    return Table(
        name=record["name"],
        scale=scale,
        title=spec["title"],
        labels=list(labels.values()),
        keys=keys,
        columns=columns,
        notes=_notes(spec, scale, record, labels),
    )


def layer_table(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> Table | None:
    """Forward and backward of single layers: one row a shape, number of tokens and precision; None if not measured."""
    cases = cases_of(record, "layer")
    if not cases:
        return None
    labels, baseline = peer_labels(cases, list(spec["rows"])), spec["baseline"]
    reference = [case["peers"].get(baseline, {}).get("wall") for case in cases]
    times = [None if wall is None else 1e3 * statistics.median(wall) for wall in reference]
    columns = [_column(f"{labels.get(baseline, baseline)} (ms)", times, "{:.3g}")]
    for key in labels:
        if key != baseline:
            ratios = [time_ratio(case, key, baseline) for case in cases]
            columns.append(_ratio_column(f"{labels[key]}: time / {baseline}", ratios))
    for key in labels:
        paths = [" ".join(case["peers"].get(key, {}).get("paths", {})) for case in cases]
        if any(paths):
            columns.append(Column(f"{labels[key]}: path", paths, [None] * len(cases)))
    names = [
        f"{s['family']} {s['shape'][0]}x{s['shape'][1]}, {s['tokens']} tokens, {s['dtype']}"
        for s in (case["settings"] for case in cases)
    ]
    return Table(
        name=f"{record['name']}-layers",
        scale=scale,
        title="Cost of one layer (d_in x d_out): forward and backward",
        row_title="layer",
        labels=names,
        keys=[case["key"] for case in cases],
        columns=columns,
        notes=[_RATIO_NOTE, _BF16_NOTE, _machine_note(record)],
    )


def trainer_table(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> Table | None:
    """Whole trainings: tokens/s and loss of each, beside the first one; None if not measured."""
    cases = cases_of(record, "trainer")
    if not cases:
        return None
    (case,) = cases
    keys, runs = list(case["peers"]), list(case["peers"].values())
    first, reference = keys[0], runs[0]
    speeds = [sum(run["tokens"]) / sum(run["seconds"]) for run in runs]
    comparable = [run["tokens"] == reference["tokens"] and run is not reference for run in runs]
    gaps = [
        max(abs(a - b) for a, b in zip(run["losses"], reference["losses"], strict=True)) if same else None
        for run, same in zip(runs, comparable, strict=True)
    ]
    tail = [run["losses"][-max(1, len(run["losses"]) // 4) :] for run in runs]
    columns = [
        _column("tokens/s", speeds, "{:.0f}"),
        _column(f"tokens/s / {first}", [speed / speeds[0] for speed in speeds], "{:.2f}"),
        _column("step, median (s)", [statistics.median(run["seconds"]) for run in runs], "{:.3g}"),
        _column("first step (s)", [run["seconds"][0] for run in runs], "{:.3g}"),
        _column("CPU time, all steps (s)", [run["cpu_seconds"] for run in runs], "{:.1f}"),
        _column("first loss", [run["losses"][0] for run in runs], "{:.3f}"),
        _column("loss, mean of the last quarter", [statistics.fmean(losses) for losses in tail], "{:.3f}"),
        _column(f"largest difference of a loss to {first}", gaps, "{:.4f}"),
    ]
    settings = case["settings"]
    return Table(
        name=f"{record['name']}-trainer" if record["name"] != "trainer" else "trainer",
        scale=scale,
        title="The trainer beside plain transformers.Trainer",
        row_title="training",
        labels=[run["label"] for run in runs],
        keys=keys,
        columns=columns,
        notes=[
            f"Setting: {settings['model']}, {' '.join(settings['overrides'])}, {settings['steps']} steps.",
            "Tokens are those that are not padding; time is wall clock inside the steps, the first one too. "
            "Plain: fp32 weights, bf16 autocast, shuffled, padded to the longest of a batch, the model's own loss.",
            "Losses are in nats per supervised token and compared where both trainings read the same batches.",
            _machine_note(record),
            f"Made by: `{record['command']}`.",
        ],
    )


def generation_table(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> Table | None:
    """Greedy decoding: samples/s and tokens/s of each decoder, beside the first one; None if not measured."""
    cases = cases_of(record, "generate")
    if not cases:
        return None
    (case,) = cases
    keys, runs = list(case["peers"]), list(case["peers"].values())
    seconds = [statistics.median(run["seconds"]) for run in runs]
    speeds = [run["samples"] / each for run, each in zip(runs, seconds, strict=True)]
    columns = [
        _column("samples", [run["samples"] for run in runs], "{:.0f}"),
        _column("samples/s", speeds, "{:.3g}"),
        _column(f"samples/s of {keys[0]} / this", [speeds[0] / speed for speed in speeds], "{:.2f}"),
        _column("tokens/s", [run["tokens"] / each for run, each in zip(runs, seconds, strict=True)], "{:.0f}"),
        _column(f"texts equal to those of {keys[0]}", [run["agree"] for run in runs], "{:.0f}"),
    ]
    settings = case["settings"]
    return Table(
        name=f"{record['name']}-generate" if record["name"] != "generate" else "generate",
        scale=scale,
        title="Greedy decoding beside a loop over the prompts and lm-eval's HFLM",
        row_title="decoder",
        labels=[run["label"] for run in runs],
        keys=keys,
        columns=columns,
        notes=[
            f"Setting: {settings['model']}, {' '.join(settings['overrides'])}, {settings['dtype']}; prompts of eval "
            f"{settings['eval']}, up to {settings['max_new_tokens']} tokens or {settings['stop']!r}, batches of "
            f"{settings['batch_size']} where there are batches.",
            f"Median of {settings['rounds']} rounds, wall clock. Texts are compared up to the stop; in 16 bits the "
            "batch decides near ties.",
            _machine_note(record),
            f"Made by: `{record['command']}`.",
        ],
    )


def bank_table(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> Table | None:
    """Serving many adapters: one row a method and number of tasks, times beside the first method's; or None."""
    cases = cases_of(record, "bank")
    if not cases:
        return None
    rows = [(case, key) for case in cases for key in case["peers"]]
    peers = [case["peers"][key] for case, key in rows]
    first = [next(iter(case["peers"].values())) for case, _ in rows]

    def times(action: str) -> list[float | None]:
        return [1e3 * statistics.median(peer["wall"][action]) for peer in peers]

    def ratios(action: str, references: Sequence[Mapping[str, Any]], reference: str) -> list[Any]:
        return [
            ratio_of_medians(peer["wall"][action], other["wall"][reference])
            for peer, other in zip(peers, references, strict=True)
        ]

    baseline = first[0]["label"]
    tasks = [case["settings"]["tasks"] for case, _ in rows]
    columns = [
        _column("parameters of one", [peer["trainable"] for peer in peers], "{:,.0f}"),
        _column(
            "one on disk (KiB)", [p["disk_bytes"] / n / 2**10 for p, n in zip(peers, tasks, strict=True)], "{:.1f}"
        ),
        _column("all on disk (MiB)", [peer["disk_bytes"] / _MIB for peer in peers], "{:.2f}"),
        _column("in memory (MiB)", [peer["memory_bytes"] / _MIB for peer in peers], "{:.2f}"),
        _column("switch (ms)", times("switch"), "{:.2f}"),
        _ratio_column(f"switch / {baseline}", ratios("switch", first, "switch")),
        _column("read another one (ms)", times("read"), "{:.1f}"),
        _column("batch, one adapter (ms)", times("one"), "{:.1f}"),
        _column("batch, mixed (ms)", times("mixed"), "{:.1f}"),
        _ratio_column("mixed / one adapter", ratios("mixed", peers, "one")),
        _ratio_column(f"mixed / {baseline}", ratios("mixed", first, "mixed")),
        _column("largest gap of a logit to one at a time", [peer["gap"] for peer in peers], "{:.1g}"),
    ]
    settings = cases[0]["settings"]
    return Table(
        name=f"{record['name']}-bank" if record["name"] != "bank" else "bank",
        scale=scale,
        title="Many adapters of one base model",
        row_title="tasks, method",
        labels=[
            f"{n} tasks, {peer['label']} ({case['settings']['dtype']})"
            for (case, _), n, peer in zip(rows, tasks, peers, strict=True)
        ],
        keys=[f"{n}/{key}/{case['settings']['dtype']}" for (case, key), n in zip(rows, tasks, strict=True)],
        columns=columns,
        notes=[
            f"Setting: {settings['model']}, adapters of random values; a batch is {settings['rows']} rows x "
            f"{settings['length']} tokens, forward alone; mixed: each row another adapter, one row the base model.",
            f"A bank (kronlab.bank) has at most {settings['rows']} adapters in memory; PEFT alone has all of them, is "
            "switched by set_adapter and mixes by adapter_names. Switch: another one of those in memory, a bank also "
            "back to the base model. Read: another one from disk in its place; a bank checks the file's sha256.",
            f"{_RATIO_NOTE} Rounds: {settings['rounds']}.",
            _machine_note(record),
            f"Made by: `{record['command']}`.",
        ],
    )


_RATIO_NOTE = (
    "Ratios are of medians over interleaved rounds, wall clock, with their 95 % interval (bootstrap over rounds); "
    "± of a time is its interquartile range."
)
_BF16_NOTE = "bf16: base weights in bf16, adapters in fp32, autocast, as the trainer does it; fp32: fp32 throughout."


def _step_columns(case: Mapping[str, Any], keys: Sequence[str], baseline: str) -> Iterator[Column]:
    peers, where, rows = case["peers"], setting(case), case["settings"]["rows"]
    walls = [peers.get(key, {}).get("wall") for key in keys]
    medians = [None if wall is None else statistics.median(wall) for wall in walls]
    spreads = [None if wall is None else interquartile_range(wall) for wall in walls]
    cells = [
        "" if median is None else f"{median:.3g}" if spread is None else f"{median:.3g} ± {spread:.1g}"
        for median, spread in zip(medians, spreads, strict=True)
    ]
    yield Column(f"{where}: step (s)", cells, medians, spreads)
    yield _ratio_column(f"{where}: time / {baseline}", [time_ratio(case, key, baseline) for key in keys])
    yield _column(f"{where}: examples/s", [None if m is None else rows / m for m in medians], "{:.3g}")
    kept = [_first([case], key, "saved_bytes", _MIB) for key in keys]
    yield _column(f"{where}: kept for backward (MiB)", kept, "{:.1f}")


def _ratio_column(title: str, ratios: Sequence[tuple[float, float, float] | None]) -> Column:
    return Column(
        title,
        ["" if r is None else f"{r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}]" for r in ratios],
        [None if r is None else r[0] for r in ratios],
        [None if r is None else (r[2] - r[1]) / 2 for r in ratios],
    )


def _published_column(spec: Mapping[str, Any], keys: Sequence[str]) -> Column:
    found = [spec["rows"][key].get("published") for key in keys]
    return Column(
        f"{spec['published']['title']} ({spec['published']['unit']})",
        ["" if p is None else f"{p['value']:.2f} [{p['confidence']}]" for p in found],
        [None if p is None else float(p["value"]) for p in found],
    )


def _column(title: str, values: Sequence[float | None], form: str) -> Column:
    return Column(title, ["" if v is None else form.format(v) for v in values], list(values))


def _first(cases: Sequence[Mapping[str, Any]], key: str, name: str, unit: float = 1.0) -> float | None:
    """A peer's value from the first case that has it, in `unit`s."""
    for case in cases:
        value = case["peers"].get(key, {}).get(name)
        if value is not None:
            return float(value) / unit
    return None


def _notes(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    notes = [f"Setting: {spec['scales'][scale]['about']}."]
    absent = {row["label"]: row["absent"] for c in record["cases"] for row in c["peers"].values() if "absent" in row}
    notes += [f"Not measured: {label}: {why}." for label, why in absent.items()]
    steps = cases_of(record, "step")
    for case in steps:
        taken = {labels[key]: row.get("paths") for key, row in case["peers"].items() if row.get("paths")}
        told = "; ".join(f"{name}: " + ", ".join(f"{p} {n}" for p, n in paths.items()) for name, paths in taken.items())
        notes += [f"Paths that the operator chose, {setting(case)}, in layers: {told}."] if told else []
    rounds = ", ".join(f"{setting(case)}: {case['settings']['rounds']}" for case in steps)
    notes += [
        "A step is forward, backward and AdamW (the frozen base has none); columns name rows x tokens and precision.",
        f"{_RATIO_NOTE} Rounds: {rounds}.",
        _BF16_NOTE,
        "Kept for backward: bytes that autograd saves in the forward pass, each storage once, weights left out. "
        "MFLOPs/token: matrix products and attention of forward and backward, a multiply-add is two.",
        "Peak memory: high-water mark of the resident set over two steps, each method in a process of its own; "
        "it holds the interpreter, the packages, the weights and what the allocator keeps.",
        _machine_note(record),
    ]
    if any(spec["rows"][key].get("quantization") == "4bit" for key in labels):
        notes.append(
            "On a base of 4 bits MFLOPs/token leaves out the base's own products, made in a kernel of bitsandbytes."
        )
    if any(spec["rows"][key].get("published") for key in labels):
        notes.append(" ".join(spec["published"]["note"].split()))
    made_by = f"make reproduce-{spec['name']} SCALE={scale}" if record["name"] == spec["name"] else record["command"]
    notes.append(f"Made by: `{made_by}`.")
    return notes


def _machine_note(record: Mapping[str, Any]) -> str:
    m, v = record["machine"], record["versions"]
    return (
        f"Machine: {m['cpu']} ({m['cpu_capability']}), {m['threads']} threads, "
        f"torch {v['torch']}, transformers {v['transformers']}, peft {v['peft']}."
    )
