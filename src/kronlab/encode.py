"""Examples to token ids: where the prompt ends, which positions carry loss, how a batch is padded.

Legend: B batch, T tokens, N supervised tokens of the batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kronlab.chunked_loss import autocast_as_it_is, check_logits_are_final, nll_in_chunks
from kronlab.data import Example

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Causal models read `input_ids` = prompt + completion + EOS, and `labels` the same with the prompt ignored.
    Encoder-decoder models read the prompt as `input_ids`; `labels` is completion + EOS.
    For a classification head, `labels` is one class or one score (`kronlab.classification`); for multiple choice it is
    the index of the right choice, and `input_ids` are all choices one after another (`kronlab.multiple_choice`).
    Of an image, `input_ids` are the brightnesses of its pixels, 0 to 255, by channel, row and column.
    """

    input_ids: list[int]
    labels: list[int] | list[float]
    truncated: bool = False
    token_type_ids: list[int] | None = None  # which sentence of a pair, where the model is told
    choices: list[int] | None = None  # multiple choice: the length of each choice in input_ids
    image: tuple[int, int, int] | None = None  # channels, height, width

    def __len__(self) -> int:
        return len(self.input_ids)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, *, causal: bool) -> list[int]:
    """Token ids of a prompt, for training and generation alike.

    Some tokenizers close every text with EOS; where the completion follows in the same sequence, it is taken off.
    """
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if causal and ids and ids[-1] == tokenizer.eos_token_id else ids


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, *, causal: bool, max_length: int) -> Encoded:
    """Tokenise prompt and completion apart, so that training sees the prompt ids that generation starts from."""
    prompt = prompt_ids(example.prompt, tokenizer, causal=causal)
    completion = [
        *tokenizer(example.completion, add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    if causal:
        ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
        return Encoded(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)
    return Encoded(
        prompt[:max_length], completion[:max_length], truncated=max(len(prompt), len(completion)) > max_length
    )


def collate(rows: Sequence[Encoded], *, pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest row: input_ids, attention_mask (B, T) and labels (B, T or longest completion).

    token_type_ids (B, T) are there if the rows have them. Rows with choices become (B, K, T), see `_collate_choices`;
    images, which must be of one size, become pixel_values (B, C, H, W) between -1 and 1, and labels (B, 1).
    """
    if rows[0].choices is not None:
        return _collate_choices(rows, pad_id)
    if rows[0].image is not None:
        pixels = torch.tensor([row.input_ids for row in rows]).view(len(rows), *rows[0].image)
        return {"pixel_values": pixels / 127.5 - 1, "labels": torch.tensor([row.labels for row in rows])}

    def padded(lists: Sequence[Sequence[float]], value: int) -> Tensor:
        longest = max(map(len, lists))
        return torch.tensor([[*ids, *[value] * (longest - len(ids))] for ids in lists])

    inputs = [row.input_ids for row in rows]
    batch = {
        "input_ids": padded(inputs, pad_id),
        "attention_mask": padded([[1] * len(ids) for ids in inputs], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }
    sentences = [row.token_type_ids for row in rows if row.token_type_ids is not None]
    return batch | {"token_type_ids": padded(sentences, 0)} if sentences else batch


def _collate_choices(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask, token_type_ids (B, K, T), labels (B, 1), choice_mask (B, K): the choices there are.

    A choice that a question lacks is one padding token that is attended to: no row of the attention is empty.
    """
    most = max(len(row.choices or ()) for row in rows)
    blank = Encoded([pad_id], [0], token_type_ids=[0])
    flat: list[Encoded] = []
    mask = torch.zeros(len(rows), most, dtype=torch.bool)
    for number, row in enumerate(rows):
        at = 0
        for k, length in enumerate(row.choices or ()):
            kinds = row.token_type_ids[at : at + length] if row.token_type_ids is not None else None
            flat.append(Encoded(row.input_ids[at : at + length], [0], token_type_ids=kinds))
            mask[number, k] = True
            at += length
        told = row.token_type_ids is not None
        flat += [blank if told else replace(blank, token_type_ids=None)] * (most - len(row.choices or ()))
    batch = {name: value.view(len(rows), most, -1) for name, value in collate(flat, pad_id=pad_id).items()}
    return batch | {"labels": torch.tensor([row.labels for row in rows]), "choice_mask": mask}


class Objective(Protocol):
    """What training minimises. The trainer knows nothing else of it."""

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(N,) loss of every supervised item of the batch (every label that is not IGNORED), in fp32."""


class SupervisedHead:
    """Runs the output layer on supervised positions only.

    The vocabulary dominates the memory and time of small models, and most positions (prompt, padding) carry no loss. A
    pre-hook on the output layer replaces its input (B, T, H) by the (1, N, H) rows that predict a supervised token, so
    whatever the architecture does with the logits afterwards (scaling, soft caps) still happens.

    With `rows_at_once`, no more than that many rows of logits exist at a time: the network gives logits of one row
    alone, and behind it the output layer is run on all rows in chunks (`kronlab.chunked_loss`).

    Raises:
        ConfigError: `rows_at_once` with an architecture that changes its logits behind the output layer.
    """

    def __init__(self, network: nn.Module, *, causal: bool, rows_at_once: int | None = None) -> None:
        self.causal, self.rows_at_once = causal, rows_at_once
        self._keep: Tensor | None = None
        self._rows: tuple[Tensor, torch.autocast] | None = None  # (N, H) for the output layer, and its precision
        if rows_at_once is not None:
            check_logits_are_final(network)
        # of the network itself: what `losses` is given may be wrapped for several processes
        self._config: Any = network.config
        self._output: nn.Module = network.get_output_embeddings()  # type: ignore[operator]
        self._output.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._keep is None:
            return None
        hidden, *rest = arguments
        rows = hidden[self._keep]
        if self.rows_at_once is not None:
            # mixed precision may end where the network's forward ends, and the chunks come after it
            self._rows = rows, autocast_as_it_is(hidden.device.type)
            rows = rows[:1]
        return (rows.unsqueeze(0), *rest)

    @contextmanager
    def only(self, keep: Tensor) -> Iterator[None]:
        """Within the block the output layer sees the positions of `keep` (B, T) alone: logits are (1, N, V)."""
        self._keep = keep
        try:
            yield
        finally:
            self._keep = None

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The values of `token_nll`, for training."""
        return self.token_nll(network, batch)[0]

    def token_nll(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every supervised token, in nats and fp32.

        Returns:
            (N,) values in row-major order of the batch, and (N,) the row that each belongs to.
        """
        labels = batch["labels"]
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "use_cache": False,
        }
        keep = labels != IGNORED  # (B, T)
        if self.causal:  # position t predicts token t + 1
            keep = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], dim=1)
            targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        else:
            targets = labels[keep]
            inputs["decoder_input_ids"] = self._shifted_right(labels)
        with self.only(keep):
            logits = network(**inputs).logits[0]  # (N, V)
        if self._rows is None:
            nll = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        else:
            assert self.rows_at_once is not None
            (rows, precision), self._rows = self._rows, None
            with precision:
                nll = nll_in_chunks(self._output, rows, targets, self.rows_at_once)
        return nll, keep.nonzero()[:, 0]

    def _shifted_right(self, labels: Tensor) -> Tensor:
        """What the decoder reads: start token, then the labels without the last; ignored positions become padding."""
        config = self._config
        read = labels.masked_fill(labels == IGNORED, config.pad_token_id)
        return torch.cat([torch.full_like(read[:, :1], config.decoder_start_token_id), read[:, :-1]], dim=1)
