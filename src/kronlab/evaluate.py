"""Grade a model on the evals of a cell: per-sample rows first, scores from the rows alone.

Rows go to `<eval>.jsonl` batch by batch, so that a run that is killed goes on after the last finished batch.
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
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kronlab.data import Example, fingerprint
from kronlab.evals import GRADERS
from kronlab.generate import CompletionScorer, generate, length_sorted_batches

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
    rows = {row["id"]: row for row in read_rows(path)}
    wanted = {example.id for example in examples}
    rows = {key: row for key, row in rows.items() if key in wanted}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))  # drops a line that a kill cut short
    grader = GRADERS[settings["grader"]]
    further = [GRADERS[name] for name in settings["also"]]
    with tqdm(
        total=len(examples), initial=len(rows), desc=f"grade {settings['name']}", unit="sample", disable=not progress,
        dynamic_ncols=True,
    ) as bar, path.open("a") as handle:  # fmt: skip
        for batch in length_sorted_batches(examples, settings["generation"]["batch_size"]):
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
                    "prompt_sha": hashlib.sha256(example.prompt.encode()).hexdigest()[:12],
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
            bar.update(len(rows) - bar.n)
            bar.set_postfix_str(f"{100 * sum(row['correct'] for row in rows.values()) / len(rows):.1f} % right")
    return [rows[example.id] for example in examples]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a sample file."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                rows.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return rows


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
    """
    tokens = sum(row["nll_tokens"] for row in rows)
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
