"""Evals by generated text: complete every prompt, read the answer by a rule, score the reference completion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from kronlab.data import Example
from kronlab.errors import ConfigError
from kronlab.evals.graders import GRADERS
from kronlab.evals.harness import Harness, Row, Settings, Subject, positive
from kronlab.evals.statistics import mean_metric, ratio_metric
from kronlab.generate import generate


class Generation(Harness):
    """Settings: `grader` decides; `also`: further graders on the same completions; `by`: keys of the examples' meta for
    scores of groups; `generation`; `max_length` of the reference in tokens, prompt included."""

    kind: ClassVar[str] = "generation"
    version: ClassVar[str] = "1"

    def faults(self, name: str, settings: Settings) -> Iterator[str]:
        for key, value in (("grader", settings.get("grader")), *(("also", other) for other in settings["also"])):
            if value not in GRADERS:
                yield f"eval.{name}.{key}={value!r}: must be one of {', '.join(GRADERS)}"
        for key in ("max_new_tokens", "batch_size"):
            if not positive(settings["generation"][key]):
                yield f"eval.{name}.generation.{key}={settings['generation'][key]!r}: must be a whole number above 0"
        if not positive(settings.get("max_length")):
            yield f"eval.{name}.max_length={settings.get('max_length')!r}: must be a whole number of at least 1"

    def collect(self, subject: Subject, batch: Sequence[Example], settings: Settings) -> list[Row]:
        prompts = [example.prompt for example in batch]
        completions = generate(
            subject.network, subject.tokenizer, prompts, settings["generation"], causal=subject.causal
        )
        likelihoods = subject.scorer.score(batch, max_length=settings["max_length"])
        rows = []
        for example, completion, (nll, count) in zip(batch, completions, likelihoods, strict=True):
            row = {
                "id": example.id,
                "completion": completion.text,
                "tokens": completion.tokens,
                "finished": completion.finished,
                "gold": example.gold,
                "nll": nll,  # nats, sum over the reference completion and EOS
                "nll_tokens": count,
            }
            if settings.get("by"):
                row["meta"] = {key: example.meta[key] for key in settings["by"]}
            rows.append(row)
        return rows

    def grade(self, row: Row, settings: Settings) -> Row:
        grader = GRADERS[settings["grader"]]
        text, gold = row["completion"], row["gold"]
        answer = grader.extract(text)
        if grader.judge is None:
            correct = grader.grade(text, gold)
            reason = "right" if correct else "wrong answer"
        else:
            correct, reason = grader.judge(text, gold)
        if answer is None and not correct:
            reason = "no answer" if row["finished"] else "cut off"
        return {
            "answer": answer,
            "correct": correct,
            "reason": reason,
            "also": {name: GRADERS[name].grade(text, gold) for name in settings["also"]},
        }

    def score(self, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
        """`nll_per_token` is the mean over all reference tokens of all samples, in nats.

        Raises:
            ConfigError: `max_length` leaves no reference token to score.
        """
        tokens = sum(row["nll_tokens"] for row in rows)
        if not tokens:
            raise ConfigError(
                f"eval {settings['name']}: max_length={settings['max_length']} cuts off every reference completion; "
                "raise it"
            )
        nll, counts = [row["nll"] for row in rows], [row["nll_tokens"] for row in rows]
        if all(map(math.isfinite, nll)):
            per_token = ratio_metric(nll, counts)
        else:
            per_token = {"value": math.nan, "n": len(rows), "stderr": None, "ci95": None}
        metrics = {
            "exact_match": mean_metric([float(row["correct"]) for row in rows]),
            "nll_per_token": per_token | {"tokens": tokens},
            "finished": mean_metric([float(row["finished"]) for row in rows]),
        }
        for name in settings["also"]:
            metrics[f"exact_match_{name}"] = mean_metric([float(row["also"][name]) for row in rows])
        for key in settings.get("by") or ():
            for value in sorted({row["meta"][key] for row in rows}, key=str):
                group = [float(row["correct"]) for row in rows if row["meta"][key] == value]
                metrics[f"exact_match[{key}={value}]"] = mean_metric(group)
        return {
            "metrics": metrics,
            "graders": {name: GRADERS[name].version for name in (settings["grader"], *settings["also"])},
            "completion_tokens": sum(row["tokens"] for row in rows),
            "samples": {
                "id": [row["id"] for row in rows],
                "correct": [int(row["correct"]) for row in rows],
                "nll": [round(row["nll"], 4) for row in rows],
                "nll_tokens": counts,
            },
        }
