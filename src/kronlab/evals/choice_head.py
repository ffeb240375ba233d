"""Multiple choice by an encoder's head: the choice with the largest score (`kronlab.multiple_choice`).

Not comparable with `kind: choice`: there a language model's likelihoods decide, here a head that was trained for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from kronlab.data import Example
from kronlab.encode import collate
from kronlab.evals.choice import log_sum_exp
from kronlab.evals.harness import Harness, Row, Settings, Subject, positive
from kronlab.evals.statistics import mean_metric
from kronlab.generate import length_sorted_batches
from kronlab.multiple_choice import MultipleChoiceHead, encode_question


class ChoiceHead(Harness):
    """Settings: `batch_size` in questions, `max_length` of context and choice in tokens. A row holds `scores`, the
    head's output for each choice in fp32."""

    kind: ClassVar[str] = "choice_head"
    version: ClassVar[str] = "1"
    architectures: ClassVar[tuple[str, ...]] = ("multiple_choice",)

    def faults(self, name: str, settings: Settings) -> Iterator[str]:
        for key in ("batch_size", "max_length"):
            if not positive(settings.get(key)):
                yield f"eval.{name}.{key}={settings.get(key)!r}: must be a whole number of at least 1"
        if settings.get("shots"):
            yield f"eval.{name}.shots={settings['shots']}: must be null, a head reads one question"

    def batches(self, examples: Sequence[Example], settings: Settings) -> Iterator[list[Example]]:
        yield from length_sorted_batches(examples, settings["batch_size"])

    @torch.inference_mode()
    def collect(self, subject: Subject, batch: Sequence[Example], settings: Settings) -> list[Row]:
        rows = [encode_question(example, subject.tokenizer, max_length=settings["max_length"]) for example in batch]
        inputs = collate(rows, pad_id=subject.tokenizer.pad_token_id)  # type: ignore[arg-type]
        head = MultipleChoiceHead(subject.network)
        scores = head.scores(subject.network, {name: value.to(subject.device) for name, value in inputs.items()})
        return [
            {"id": example.id, "scores": found[: len(row.choices or ())], "tokens": len(row),
             "truncated": row.truncated}
            for example, row, found in zip(batch, rows, scores.tolist(), strict=True)
        ]  # fmt: skip

    def grade(self, row: Row, settings: Settings) -> Row:
        scores, right = row["scores"], json.loads(row["gold"])["answer"]
        readable = all(map(math.isfinite, scores))
        answer = max(range(len(scores)), key=scores.__getitem__)
        correct = readable and answer == right
        return {
            "answer": answer,
            "correct": correct,
            "choice_nll": log_sum_exp(scores) - scores[right] if readable else math.nan,
            "reason": "right" if correct else "wrong answer" if readable else "not finite",
        }

    def score(self, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
        """`acc`, and `choice_nll`: the mean held-out cross entropy in nats per question."""
        return {
            "metrics": {
                "acc": mean_metric([float(row["correct"]) for row in rows]),
                "choice_nll": mean_metric([row["choice_nll"] for row in rows]),
            },
            "graders": {self.kind: self.version},
            "samples": {
                "id": [row["id"] for row in rows],
                "correct": [int(row["correct"]) for row in rows],
                "choice_nll": [round(row["choice_nll"], 4) for row in rows],
            },
        }
