"""Grade a model on the evals of a cell: per-sample rows first, scores from the rows alone.

Rows go to `<eval>/samples.jsonl` batch by batch, so that a run that is killed goes on after the last finished batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kronlab.data import Example, fingerprint
from kronlab.errors import ConfigError
from kronlab.evals import GRADERS
from kronlab.generate import CompletionScorer, generate, length_sorted_batches
from kronlab.progress import bar
from kronlab.runs import read_jsonl, write_jsonl

log = logging.getLogger(__name__)


def evaluate(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    scorer: CompletionScorer,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    *,
    path: Path,
    causal: bool,
    progress: bool,
) -> list[dict[str, Any]]:
    """Complete, grade and score every example; return one row each, in the order of `examples`.

    A row holds: id, prompt_sha, completion (raw), tokens, finished, gold, answer (extracted), correct, also
    (verdicts of further graders), nll (nats, sum over the reference completion and EOS), nll_tokens,
    seconds (share of its batch).
    """
    batches = list(length_sorted_batches(examples, settings["generation"]["batch_size"]))
    rows = _rows_of_whole_batches(path, batches)
    write_jsonl(path, list(rows.values()))  # without what a kill cut short
    grader = GRADERS[settings["grader"]]
    further = [GRADERS[name] for name in settings["also"]]
    name, total = settings["name"], len(examples)
    with (
        bar(total=total, done=len(rows), what=f"grade {name}", unit="sample", show=progress) as shown,
        path.open("a") as handle,
    ):
        for batch in batches:
            if all(example.id in rows for example in batch):
                continue
            started = time.perf_counter()
            prompts = [example.prompt for example in batch]
            completions = generate(network, tokenizer, prompts, settings["generation"], causal=causal)
            likelihoods = scorer.score(batch, max_length=settings["max_length"])
            seconds = (time.perf_counter() - started) / len(batch)
            for example, completion, (nll, count) in zip(batch, completions, likelihoods, strict=True):
                row = {
                    "id": example.id,
                    "prompt_sha": _sha(example.prompt),
                    "completion": completion.text,
                    "tokens": completion.tokens,
                    "finished": completion.finished,
                    "gold": example.gold,
                    "answer": grader.extract(completion.text),
                    "correct": grader.grade(completion.text, example.gold),
                    "also": {other.name: other.grade(completion.text, example.gold) for other in further},
                    "nll": nll,
                    "nll_tokens": count,
                    "seconds": round(seconds, 4),
                }
                rows[example.id] = row
                handle.write(json.dumps(row) + "\n")
            handle.flush()
            shown.update(len(rows) - shown.n)
            shown.set_postfix_str(f"{100 * sum(row['correct'] for row in rows.values()) / len(rows):.1f} % right")
    return [rows[example.id] for example in examples]


def _rows_of_whole_batches(path: Path, batches: Sequence[Sequence[Example]]) -> dict[str, dict[str, Any]]:
    """What an earlier run has left, by id. A row counts only for the problem that it was made for, not for its id."""
    found = {(row["id"], row["prompt_sha"], row["gold"]): row for row in read_jsonl(path)}
    rows: dict[str, dict[str, Any]] = {}
    for batch in batches:
        kept = [found.get((example.id, _sha(example.prompt), example.gold)) for example in batch]
        rows |= {row["id"]: row for row in kept if row is not None and None not in kept}
    return rows


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean, number of values and standard error of the mean (sample standard deviation / sqrt n; None for n = 1)."""
    n = len(values)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return {"value": mean, "n": n, "stderr": error}


def score(
    rows: Sequence[Mapping[str, Any]], examples: Sequence[Example], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the record keeps of one eval: scores, and per sample the verdict and the likelihood for paired comparisons.

    `nll_per_token` is the mean over all reference tokens of all samples (nats); its standard error is that of a ratio,
    with samples as the units.

    Raises:
        ConfigError: `max_length` leaves no reference token to score.
    """
    tokens = sum(row["nll_tokens"] for row in rows)
    if not tokens:
        raise ConfigError(
            f"eval {settings['name']}: max_length={settings['max_length']} cuts off every reference completion; "
            "raise it"
        )
    per_token = math.fsum(row["nll"] for row in rows) / tokens
    residuals = [row["nll"] - per_token * row["nll_tokens"] for row in rows]
    n = len(rows)
    ratio_error = math.sqrt(n / (n - 1) * math.fsum(x * x for x in residuals)) / tokens if n > 1 else None
    metrics = {
        "exact_match": mean_and_error([float(row["correct"]) for row in rows]),
        "nll_per_token": {"value": per_token, "n": n, "stderr": ratio_error, "tokens": tokens},
        "finished": mean_and_error([float(row["finished"]) for row in rows]),
    }
    for name in settings["also"]:
        metrics[f"exact_match_{name}"] = mean_and_error([float(row["also"][name]) for row in rows])
    return {
        "metrics": metrics,
        "graders": {name: GRADERS[name].version for name in (settings["grader"], *settings["also"])},
        "data_sha": fingerprint(examples),
        "seconds": sum(row["seconds"] for row in rows),
        "completion_tokens": sum(row["tokens"] for row in rows),
        "samples": {
            "id": [row["id"] for row in rows],
            "correct": [int(row["correct"]) for row in rows],
            "nll": [round(row["nll"], 4) for row in rows],
            "nll_tokens": [row["nll_tokens"] for row in rows],
        },
    }
