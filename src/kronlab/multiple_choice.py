"""Multiple choice with a head: a question's choices to token ids, and the loss over their scores.

An encoder with `architecture: multiple_choice` reads question and choice k together and gives one score s_k for each;

    loss = -log softmax_k(s)[right one]          (nats per question)

as `transformers`' `...ForMultipleChoice` models compute it. Legend: B questions, K choices of the question that has
most, T tokens of the longest choice.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kronlab.data import Example
from kronlab.encode import Encoded
from kronlab.evals.choice import pairs_of


def encode_question(example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Encoded:
    """Every choice of a question (format choices of `kronlab.data.commonsense`) behind its context.

    Tokenizers with a separator make pairs of their own; for the others a blank stands between context and choice.
    Beyond `max_length` tokens the longer of the two loses its end first.

    Returns:
        `input_ids` are those of all choices one after another, `choices` their lengths, `labels` the right one's index.
    """
    ids: list[int] = []
    kinds: list[int] = []
    lengths = []
    truncated = False
    for context, choice in pairs_of(example):
        texts = [context.strip(), choice.strip()]
        if tokenizer.sep_token_id is None:
            texts = [" ".join(texts)]
        whole = tokenizer(*texts)
        if len(whole["input_ids"]) > max_length:
            truncated = True
            whole = tokenizer(*texts, truncation=True, max_length=max_length)
        ids += whole["input_ids"]
        kinds += whole.get("token_type_ids", [])
        lengths.append(len(whole["input_ids"]))
    return Encoded(
        input_ids=ids,
        labels=[json.loads(example.gold)["answer"]],
        truncated=truncated,
        token_type_ids=kinds or None,
        choices=lengths,
    )


class MultipleChoiceHead:
    """Runs a multiple choice model; an `Objective` of `kronlab.train`."""

    def __init__(self, network: nn.Module) -> None:
        base: Any = network.get_base_model() if isinstance(network, PeftModel) else network
        # DistilBERT is not told which sentence a token belongs to, whatever its tokenizer says
        self._inputs = {"input_ids", "attention_mask", "token_type_ids"} & set(
            inspect.signature(base.forward).parameters
        )

    def scores(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(B, K) scores of the choices in fp32; minus infinity where a question has no such choice."""
        scores = network(**{name: batch[name] for name in self._inputs if name in batch}).logits.float()
        return scores.masked_fill(~batch["choice_mask"], float("-inf"))

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(B,) cross entropy of every question, in nats."""
        return nn.functional.cross_entropy(self.scores(network, batch), batch["labels"][:, 0], reduction="none")
