"""Classification with a head: sentences to token ids, images to pixels, and the loss on the head's outputs.

Legend: B batch, T tokens, C outputs of the head (classes; 1 where a score is predicted).
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


def encode_sentences(example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Encoded:
    """The one or two sentences of ``meta["texts"]`` as the model's family joins them; ``meta["label"]`` is the label.

    Tokenizers with a separator (BERT, DeBERTa) make pairs of their own; for the others (LLaMA), which would glue a pair
    together, a newline stands between the sentences. Beyond ``max_length`` tokens the longer sentence loses its end
    first.
    """
    texts = list(example.meta["texts"])
    if tokenizer.sep_token_id is None:
        texts = ["\n".join(texts)]
    whole = tokenizer(*texts)
    truncated = len(whole["input_ids"]) > max_length
    if truncated:
        whole = tokenizer(*texts, truncation=True, max_length=max_length)
    return Encoded(
        input_ids=list(whole["input_ids"]),
        labels=[example.meta["label"]],
        truncated=truncated,
        token_type_ids=list(whole["token_type_ids"]) if "token_type_ids" in whole else None,
    )


def encode_image(example: Example) -> Encoded:
    """The image whose pixels the prompt holds, as JSON: channels of rows of whole numbers from 0 to 255."""
    channels = json.loads(example.prompt)
    return Encoded(
        input_ids=[pixel for rows in channels for row in rows for pixel in row],
        labels=[example.meta["label"]],
        image=(len(channels), len(channels[0]), len(channels[0][0])),
    )


class ClassificationHead:
    """Runs a sequence or image classification model; an `Objective` of `kronlab.train`.

    Classes: cross entropy. Scores (`regression`): squared error, one output.
    """

    def __init__(self, network: nn.Module, *, regression: bool) -> None:
        self.regression = regression
        base: Any = network
        if isinstance(network, PeftModel):
            base = network.get_base_model()
        # DistilBERT and LLaMA are not told which sentence a token belongs to, whatever their tokenizer says
        self._inputs = {"input_ids", "attention_mask", "token_type_ids", "pixel_values"} & set(
            inspect.signature(base.forward).parameters
        )

    def logits(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(B, C) outputs of the head, in fp32."""
        return network(**{name: batch[name] for name in self._inputs if name in batch}).logits.float()

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(B,) loss of every example: nats, or squared error."""
        logits, labels = self.logits(network, batch), batch["labels"][:, 0]
        if self.regression:
            return (logits[:, 0] - labels) ** 2
        return nn.functional.cross_entropy(logits, labels, reduction="none")
