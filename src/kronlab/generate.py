"""Batched greedy decoding with every setting explicit, and the held-out likelihood of the reference completions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from kronlab.data import Example
from kronlab.encode import SupervisedHead, collate, encode, prompt_ids

_LOOK_BACK = 48  # tokens decoded at each step to look for the answer line: longer than any answer line worth reading


@dataclass(frozen=True)
class Completion:
    """One greedy completion. `text` is everything up to EOS or the stop, as the model wrote it."""

    text: str
    tokens: int
    finished: bool  # False: max_new_tokens ran out


class AnswerStop(StoppingCriteria):
    """Stops a row once its answer line is complete (matches `pattern`) or one of `strings` has appeared."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        *,
        pattern: str | None,
        strings: Sequence[str],
    ) -> None:
        self.tokenizer, self.prompt_length, self.strings = tokenizer, prompt_length, tuple(strings)
        self.pattern = re.compile(pattern) if pattern else None

    def met(self, text: str) -> bool:
        return any(s in text for s in self.strings) or bool(self.pattern and self.pattern.search(text))

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = input_ids[:, max(self.prompt_length, input_ids.shape[1] - _LOOK_BACK) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([self.met(text) for text in texts], device=input_ids.device)


def ready_to_grade(network: nn.Module, dtype: torch.dtype) -> None:
    """Freeze the model and cast what was trained to the base's dtype, in place.

    Training multiplies fp32 adapters under bf16 autocast, that is, rounded to bf16; casting them once gives the same
    products and saves a cast in every layer at every token. Nothing is merged: rounding W + dW to bf16 would lose
    small updates.
    """
    network.requires_grad_(False)
    network.to(dtype)
    network.eval()


def left_padded(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, causal: bool) -> dict[str, Tensor]:
    """Token ids (B, T) with padding on the left, where it stands before the first real token of a causal model."""
    rows = [prompt_ids(prompt, tokenizer, causal=causal) for prompt in prompts]
    longest = max(map(len, rows))
    pads = [[tokenizer.pad_token_id] * (longest - len(ids)) for ids in rows]
    if causal:
        input_ids = [pad + ids for pad, ids in zip(pads, rows, strict=True)]
        mask = [[0] * len(pad) + [1] * len(ids) for pad, ids in zip(pads, rows, strict=True)]
    else:
        input_ids = [ids + pad for pad, ids in zip(pads, rows, strict=True)]
        mask = [[1] * len(ids) + [0] * len(pad) for pad, ids in zip(pads, rows, strict=True)]
    return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}


@contextmanager
def _without_defaults(network: nn.Module) -> Iterator[None]:
    """Hide the generation defaults of the model: transformers fills every setting that we leave out from them."""
    owners = [module for module in network.modules() if "generation_config" in vars(module)]
    defaults = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, default in zip(owners, defaults, strict=True):
            module.generation_config = default


@torch.inference_mode()
def generate(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    *,
    causal: bool,
) -> list[Completion]:
    """Greedy completions of one batch of prompts.

    Args:
        settings: `max_new_tokens`, `stop_pattern` (a regular expression or null) and `stop_strings`.
    """
    batch = {
        k: v.to(next(network.parameters()).device) for k, v in left_padded(prompts, tokenizer, causal=causal).items()
    }
    start = batch["input_ids"].shape[1] if causal else 1  # an encoder-decoder starts from one start token
    stop = AnswerStop(tokenizer, start, pattern=settings["stop_pattern"], strings=settings["stop_strings"])
    config = GenerationConfig(
        max_new_tokens=settings["max_new_tokens"],
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=None if causal else network.config.decoder_start_token_id,  # type: ignore[union-attr]
    )
    with _without_defaults(network):
        output = network.generate(  # type: ignore[operator]
            **batch, generation_config=config, stopping_criteria=StoppingCriteriaList([stop])
        )
    completions = []
    for row in output[:, start:].tolist():
        ended = tokenizer.eos_token_id in row
        ids = row[: row.index(tokenizer.eos_token_id)] if ended else row
        if not ended:  # a row stopped by its answer line is padded while the others go on
            while ids and ids[-1] == tokenizer.pad_token_id:
                ids.pop()
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        completions.append(Completion(text, len(ids), ended or stop.met(text) or len(ids) < settings["max_new_tokens"]))
    return completions


def length_sorted_batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches of like prompt length, longest first: memory peaks at once, and the bar's ETA errs on the late side."""
    order = sorted(examples, key=lambda example: (-len(example.prompt), example.id))
    for at in range(0, len(order), batch_size):
        yield order[at : at + batch_size]


class CompletionScorer:
    """Held-out negative log-likelihood of reference completions, in nats, in the dtype of `ready_to_grade`."""

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase, *, causal: bool) -> None:
        self.network, self.tokenizer, self.causal = network, tokenizer, causal
        self.head = SupervisedHead(network, causal=causal)

    @torch.inference_mode()
    def score(self, examples: Sequence[Example], *, max_length: int) -> list[tuple[float, int]]:
        """(sum of token NLL, number of tokens, EOS included) for each example of one batch."""
        rows = [encode(example, self.tokenizer, causal=self.causal, max_length=max_length) for example in examples]
        batch = collate(rows, pad_id=self.tokenizer.pad_token_id)
        batch = {k: v.to(next(self.network.parameters()).device) for k, v in batch.items()}
        nll, row = self.head.token_nll(self.network, batch)
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row.cpu(), nll.double().cpu())
        counts = torch.bincount(row.cpu(), minlength=len(rows))
        return list(zip(sums.tolist(), counts.tolist(), strict=True))
