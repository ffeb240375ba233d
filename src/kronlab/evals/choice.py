"""Multiple choice by log-likelihood: the choice that the model finds likeliest, as lm-evaluation-harness defines it.

For question x with choices c_1 .. c_K (continuations of x, or x differs and the continuation is shared):

    acc       argmax_k log p(c_k | x) is the right one
    acc_norm  argmax_k log p(c_k | x) / len(c_k) is, len in characters, without the blank before the choice

The first of equal values wins. `choice_nll` is -log softmax_k(log p(c_k | x)) of the right one, in nats: what accuracy
rounds to 0 or 1. Source: lm-evaluation-harness 0.4.13 (`ConfigurableTask.process_results`, `LM._encode_pair`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kronlab.data import Example
from kronlab.encode import Encoded, collate, prompt_ids
from kronlab.errors import ConfigError
from kronlab.evals.harness import Harness, Row, Settings, Subject, positive
from kronlab.evals.statistics import mean_metric
from kronlab.generate import length_sorted_batches

METRICS = {"acc": "correct", "acc_norm": "correct_norm"}
"""Metric -> the field of a graded row that it is the mean of."""


@dataclass(frozen=True)
class Pair:
    """Token ids of one context and its continuation; neither is empty."""

    context: list[int]
    continuation: list[int]


class Choice(Harness):
    """Settings: `metrics` (acc, acc_norm; the first is the headline), `batch_size` in questions, `max_length` in tokens
    (a longer context loses its beginning). Examples are those of `kronlab.data.commonsense` in format choices."""

    kind: ClassVar[str] = "choice"
    version: ClassVar[str] = "1"

    def faults(self, name: str, settings: Settings) -> Iterator[str]:
        metrics = settings.get("metrics")
        if not metrics or not set(metrics) <= set(METRICS):
            yield f"eval.{name}.metrics={metrics!r}: must be a list of {', '.join(METRICS)}"
        for key in ("batch_size", "max_length"):
            if not positive(settings.get(key)):
                yield f"eval.{name}.{key}={settings.get(key)!r}: must be a whole number of at least 1"

    def batches(self, examples: Sequence[Example], settings: Settings) -> Iterator[list[Example]]:
        yield from length_sorted_batches(examples, settings["batch_size"])

    def collect(self, subject: Subject, batch: Sequence[Example], settings: Settings) -> list[Row]:
        groups = [
            [
                encode_pair(*texts, subject.tokenizer, causal=subject.causal, max_length=settings["max_length"])
                for texts in pairs_of(example)
            ]
            for example in batch
        ]
        values = loglikelihoods(subject, groups)
        return [
            {"id": example.id, "loglikelihoods": found, "tokens": [len(pair.continuation) for pair in group]}
            for example, group, found in zip(batch, groups, values, strict=True)
        ]

    def grade(self, row: Row, settings: Settings) -> Row:
        gold = json.loads(row["gold"])
        values = np.array(row["loglikelihoods"], dtype=np.float64)
        lengths = np.array([float(len(choice)) for choice in gold["choices"]])
        right = gold["answer"]
        with np.errstate(divide="ignore", invalid="ignore"):
            answer, answer_norm = int(np.argmax(values)), int(np.argmax(values / lengths))
        readable = bool(np.isfinite(values).all())
        correct = readable and answer == right
        return {
            "answer": answer,
            "answer_norm": answer_norm,
            "correct": correct,
            "correct_norm": readable and answer_norm == right,
            "choice_nll": log_sum_exp(values) - float(values[right]) if readable else math.nan,
            "reason": "right" if correct else "wrong answer" if readable else "not finite",
        }

    def score(self, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
        metrics = {name: mean_metric([float(row[METRICS[name]]) for row in rows]) for name in settings["metrics"]}
        metrics["choice_nll"] = mean_metric([row["choice_nll"] for row in rows])
        headline = METRICS[settings["metrics"][0]]
        return {
            "metrics": metrics,
            "graders": {self.kind: self.version},
            "samples": {
                "id": [row["id"] for row in rows],
                "correct": [int(row[headline]) for row in rows],
                "choice_nll": [round(row["choice_nll"], 4) for row in rows],
            },
        }


def log_sum_exp(values: np.ndarray | Sequence[float]) -> float:
    """log sum exp(values), without overflow."""
    top = float(np.max(values))
    return top + math.log(float(np.exp(np.asarray(values) - top).sum()))


def pairs_of(example: Example) -> list[tuple[str, str]]:
    """(context, continuation) of each choice, as text. Few-shot examples stand at the front of the prompt."""
    gold = json.loads(example.gold)
    if "contexts" not in gold:
        return [(example.prompt, f" {choice}") for choice in gold["choices"]]
    shots = example.prompt.removesuffix(gold["contexts"][gold["answer"]])
    return [(shots + context, example.completion) for context in gold["contexts"]]


def encode_pair(
    context: str, continuation: str, tokenizer: PreTrainedTokenizerBase, *, causal: bool, max_length: int
) -> Pair:
    """Token ids as lm-evaluation-harness cuts them: context and continuation are encoded as one text, and what goes
    beyond the context's own ids is the continuation, to which blanks at the end of the context are moved.

    A causal pair keeps its last max_length + 1 ids, the last of which is predicted and not read. An empty context is
    BOS, or EOS where there is none. (An EOS that a tokenizer closes texts with is left off, unlike there.)

    Raises:
        ConfigError: the continuation alone is longer than `max_length`.
    """
    trimmed = context.rstrip()
    continuation = context[len(trimmed) :] + continuation
    if not causal:
        ids = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        pair = Pair(prompt_ids(trimmed, tokenizer, causal=False)[-max_length:], ids)
    elif not trimmed:
        ids = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        pair = Pair([start], ids)
    else:
        before = prompt_ids(trimmed, tokenizer, causal=True)
        ids = prompt_ids(trimmed + continuation, tokenizer, causal=True)[len(before) :]
        pair = Pair(before[-max(max_length + 1 - len(ids), 1) :], ids)
    if not len(pair.continuation) <= max_length:
        raise ConfigError(
            f"a choice has {len(pair.continuation)} tokens and max_length={max_length}: raise max_length of the eval"
        )
    return pair


@torch.inference_mode()
def loglikelihoods(subject: Subject, groups: Sequence[Sequence[Pair]]) -> list[list[float]]:
    """log p(continuation | context) in nats, fp32, of every pair of every group (the choices of one question)."""
    pairs = [pair for group in groups for pair in group]
    if subject.causal:
        values = _causal(subject, groups)
    else:
        rows = [Encoded(pair.context, pair.continuation) for pair in pairs]
        batch = collate(rows, pad_id=subject.tokenizer.pad_token_id)
        nll, row = subject.scorer.head.token_nll(subject.network, {k: v.to(subject.device) for k, v in batch.items()})
        values = _sums(-nll, row, len(pairs)).tolist()
    found = iter(values)
    return [[next(found) for _ in group] for group in groups]


def _sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(count,) sums of `values` (N,) by `index` (N,), in fp64 on the CPU."""
    return torch.zeros(count, dtype=torch.float64).index_add_(0, index.cpu(), values.double().cpu())


def _causal(subject: Subject, groups: Sequence[Sequence[Pair]]) -> list[float]:
    """In two passes: what the contexts of a group share is read once, then every rest on top of its cached keys.

    Pass 1, (U, P): one row for each shared beginning; its last position predicts the first token of a continuation that
    follows at once. Pass 2, (N, R): each pair's ids from there on, without the last, which nothing is predicted from.
    """
    network, head, device = subject.network, subject.scorer.head, subject.device
    prefixes, owner = _shared_prefixes(groups)
    pairs = [pair for group in groups for pair in group]
    pad = subject.tokenizer.pad_token_id
    ids, mask = _right_padded(prefixes, pad, device)
    lengths = mask.sum(1)  # (U,)
    last = torch.zeros_like(mask, dtype=torch.bool)
    last[torch.arange(len(prefixes), device=device), lengths - 1] = True
    with head.only(last):
        output = network(input_ids=ids, attention_mask=mask, use_cache=True)
    first = output.logits[0].float().log_softmax(-1)  # (U, V)

    values = torch.zeros(len(pairs), dtype=torch.float64)
    rests, skipped = [], []
    for i, (pair, unit) in enumerate(zip(pairs, owner, strict=True)):
        begin = len(prefixes[unit])
        rests.append((pair.context + pair.continuation)[begin:-1])
        skipped.append(len(pair.context) - begin)  # ids of the rest that are context still
        if skipped[i] == 0:
            values[i] = float(first[unit, pair.continuation[0]])
    if any(rests):
        values += _rests(network, head, output.past_key_values, mask, pairs, owner, rests, skipped, pad)
    return values.tolist()


def _rests(
    network: nn.Module,
    head: Any,
    cache: Any,
    mask: Tensor,
    pairs: Sequence[Pair],
    owner: Sequence[int],
    rests: Sequence[list[int]],
    skipped: Sequence[int],
    pad: int,
) -> Tensor:
    """(all pairs,) log-likelihood of the continuation tokens that pass 2 predicts."""
    there = [i for i, rest in enumerate(rests) if rest]
    units = torch.tensor([owner[i] for i in there], device=mask.device)
    cache.batch_select_indices(units)
    ids, own = _right_padded([rests[i] for i in there], pad, mask.device)
    before = mask[units]  # (N, P)
    positions = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=mask.device)  # (N, R)
    keep = torch.zeros_like(own, dtype=torch.bool)
    targets: list[int] = []
    for row, i in enumerate(there):
        start = max(skipped[i] - 1, 0)  # the last context id predicts the first continuation id
        keep[row, start : len(rests[i])] = True
        targets += pairs[i].continuation[0 if skipped[i] else 1 :]
    with head.only(keep):
        output = network(
            input_ids=ids,
            attention_mask=torch.cat([before, own], 1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    wanted = torch.tensor(targets, device=mask.device)
    nll = nn.functional.cross_entropy(output.logits[0].float(), wanted, reduction="none")
    return _sums(-nll, torch.tensor(there)[keep.nonzero()[:, 0].cpu()], len(pairs))


def _shared_prefixes(groups: Sequence[Sequence[Pair]]) -> tuple[list[list[int]], list[int]]:
    """The beginnings that are read once, and for each pair the number of its own.

    A group's is what all its contexts begin with; where that is nothing, each pair has its whole context.
    """
    prefixes: list[list[int]] = []
    owner: list[int] = []
    for group in groups:
        shared = _common([pair.context for pair in group])
        for pair in group:
            if not shared or pair is group[0]:
                prefixes.append(shared or pair.context)
            owner.append(len(prefixes) - 1)
    return prefixes, owner


def _common(lists: Sequence[list[int]]) -> list[int]:
    low, high = min(lists), max(lists)  # in lexical order, what these two share is what all share
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return low[:i]
    return low


def _right_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask
