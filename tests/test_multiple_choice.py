"""Multiple choice with an encoder's head: tokens of the choices, the loss against a plain loop, config to record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertTokenizerFast, set_seed

from kronlab import methods, models
from kronlab.cell import Cell
from kronlab.data import Example
from kronlab.encode import collate
from kronlab.errors import ConfigError
from kronlab.evals.choice_head import ChoiceHead
from kronlab.evaluate import regrade
from kronlab.experiment import _head, run_cell
from kronlab.models import Head, head_modules
from kronlab.multiple_choice import MultipleChoiceHead, encode_question
from kronlab.runs import Store, read_jsonl
from kronlab.train import train

BERT = [
    "model=tiny_deberta", "model.architecture=multiple_choice", "model.name=tiny_bert", "model.config.model_type=bert",
    "model.config.type_vocab_size=2",
]  # fmt: skip
FAMILIES = {"distilbert": ["model=tiny_distilbert"], "bert": BERT}
HEADS = {"distilbert": ["pre_classifier", "classifier"], "bert": ["classifier"]}


def question(text: str, choices: list[str], answer: int, contexts: list[str] | None = None, id: str = "x") -> Example:
    gold: dict[str, Any] = {"answer": answer, "choices": choices}
    if contexts:
        gold["contexts"] = contexts
        return Example(id, contexts[answer], f" {text}", json.dumps(gold), {})
    return Example(id, text, f" {choices[answer]}", json.dumps(gold), {})


@pytest.fixture
def made_up(make: Callable[..., Cell]) -> Callable[..., Cell]:
    return lambda *overrides, **named: make("data.dir='${repo:examples/made_up}'", *overrides, **named)


# ---- tokens


def test_each_choice_stands_behind_its_context(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]))
    bert = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    row = encode_question(question("a b", ["c", "d d"], 1), bert, max_length=16)
    assert row.input_ids == [2, 4, 5, 3, 6, 3, 2, 4, 5, 3, 7, 7, 3]
    assert row.token_type_ids == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert (row.choices, row.labels, row.truncated) == ([6, 7], [1], False)
    cut = encode_question(question("a b a b", ["c", "d d"], 0), bert, max_length=6)
    assert (cut.choices, cut.truncated) == ([6, 6], True)
    assert cut.input_ids[:6] == [2, 4, 5, 3, 6, 3]  # the longer one loses its end

    batch = collate([row, encode_question(question("a", ["b", "c", "d"], 2), bert, max_length=16)], pad_id=0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape == (2, 3, 7)
    assert batch["input_ids"][0].tolist() == [[2, 4, 5, 3, 6, 3, 0], [2, 4, 5, 3, 7, 7, 3], [0] * 7]
    assert batch["attention_mask"][0].tolist() == [[1] * 6 + [0], [1] * 7, [1] + [0] * 6]
    assert batch["choice_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["labels"].tolist() == [[1], [2]]


def test_winogrande_puts_the_choice_into_the_context() -> None:
    example = question("it barks.", ["Tom", "Rex"], 1, contexts=["Tom said that Tom", "Tom said that Rex"])
    row = encode_question(example, models.byte_tokenizer(), max_length=64)
    assert bytes(row.input_ids) == b"Tom said that Tom it barks.Tom said that Rex it barks."
    assert (row.choices, row.labels) == ([27, 27], [1])
    assert row.token_type_ids is None


# ---- the loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_a_plain_loop(made_up: Callable[..., Cell], family: str) -> None:
    """Questions of 2, 3 and 4 choices in one batch; each choice alone through the network, in fp64."""
    cell = made_up(*FAMILIES[family], "method=none", "task=piqa_head")
    network, tokenizer = models.load(cell.config["model"], dtype=torch.float64, head=Head((), seed=0))
    network.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    examples = [
        question("who barks?", ["a cat", "dogs"], 1),
        question("which?", ["one", "the other one", "none"], 0),
        question("a long question, is it?", ["w", "xx", "yyy", "zzzz"], 3),
    ]
    rows = [encode_question(example, tokenizer, max_length=64) for example in examples]
    head = MultipleChoiceHead(network)
    batch = collate(rows, pad_id=tokenizer.pad_token_id)
    expected = []
    for row in rows:
        scores, at = [], 0
        for length in row.choices or ():
            ids = torch.tensor([[row.input_ids[at : at + length]]])
            scores.append(network(input_ids=ids).logits.item())
            at += length
        expected.append(math.log(sum(map(math.exp, scores))) - scores[int(row.labels[0])])
    assert max(expected) - min(expected) > 1e-2
    losses = head.losses(network, batch)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)
    scores = head.scores(network, batch)
    assert torch.isneginf(scores).tolist() == [[False] * 2 + [True] * 2, [False] * 3 + [True], [False] * 4]


# ---- from config to record


@pytest.mark.parametrize(
    ("family", "method", "task"),
    [("distilbert", "kron_lora", "arc_challenge"), ("distilbert", "none", "piqa"), ("bert", "lora", "winogrande")],
)
def test_from_config_to_record(made_up: Callable[..., Cell], family: str, method: str, task: str) -> None:
    # the made-up data have training sets of PIQA and ARC-Easy alone
    trained = "piqa" if task in ("piqa", "winogrande") else "arc_easy"
    more = [f"+eval@eval.{task}_head={task}_head"] if task != trained else []
    cell = made_up(*FAMILIES[family], f"method={method}", f"task={trained}_head", *more)
    record = run_cell(cell)
    assert record["status"] == "done"
    result = record["eval"][f"{task}_head"]
    assert list(result["metrics"]) == ["acc", "choice_nll"]
    store = Store(cell.config["results"]["dir"])
    rows = read_jsonl(store.folder(cell.scale, cell.id) / f"{task}_head" / "samples.jsonl")
    assert len(rows) == result["metrics"]["acc"]["n"] == 8
    assert all(len(row["scores"]) == len(json.loads(row["gold"])["choices"]) for row in rows)
    again, changed = regrade(store, record)
    assert again["eval"] == record["eval"]
    assert not any(changed.values())
    if method == "none":
        assert record["train"] is None
        return
    assert (record["train"]["steps"], record["train"]["supervised_tokens"]) == (4, 32)  # one loss for each question
    network, _ = models.load(cell.config["model"], dtype=torch.float32, head=Head((), seed=0))
    assert head_modules(network) == HEADS[family]
    adapted = methods.attach(network, cell.config["model"], cell.config["method"])
    in_head = {n for n, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert {name.split(".")[2] for name in in_head} == set(HEADS[family])
    assert record["parameters"]["trainable"] == models.count_parameters(adapted)[0]


def test_head_comes_from_the_seed(made_up: Callable[..., Cell]) -> None:
    cells = [made_up("model=tiny_distilbert", "method=lora", "task=piqa_head", f"seed={seed}") for seed in (0, 1)]
    heads = []
    for cell in cells:
        network, _ = models.load(cell.config["model"], dtype=torch.float32, head=_head(cell.config))
        heads.append(network.get_submodule("classifier").weight)
    assert not torch.equal(*heads)


def test_only_a_model_with_choices_is_graded(made_up: Callable[..., Cell]) -> None:
    with pytest.raises(ConfigError, match="eval piqa_head grades multiple_choice"):
        run_cell(made_up("model=tiny_llama", "task=piqa_head"))
    with pytest.raises(ConfigError, match="shots"):
        made_up("model=tiny_distilbert", "task=piqa_head", "+eval.piqa_head.shots={n: 1, split: train, separator: x}")


def test_verdict_of_scores_that_are_not_finite() -> None:
    gold = json.dumps({"answer": 0, "choices": ["a", "b"]})
    verdict = ChoiceHead().grade({"scores": [math.nan, 1.0], "gold": gold}, {})
    assert (verdict["correct"], verdict["reason"]) == (False, "not finite")
    fine = ChoiceHead().grade({"scores": [2.0, 1.0], "gold": gold}, {})
    assert fine["correct"] is True
    assert fine["choice_nll"] == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("grouped", [False, True])
def test_training_learns_and_is_the_same_in_pieces(made_up: Callable[..., Cell], tmp_path: Path, grouped: bool) -> None:
    """The right choice starts with a mark. Micro-batches of 2 and of 8 give the same losses without dropout."""
    calm = ["+model.config.dropout=0", "+model.config.attention_dropout=0", "+model.config.seq_classif_dropout=0"]
    losses = []
    for micro in (2, 8):
        config = made_up(
            "model=tiny_distilbert", "method=full", "task=piqa_head", *calm, "trainer.lr=3e-3", "trainer.max_steps=60",
            f"trainer.micro_batch_size={micro}", f"trainer.group_by_length={grouped}",
        ).config  # fmt: skip
        network, tokenizer = models.load(config["model"], dtype=torch.float32, head=Head((), seed=0))
        set_seed(0)
        network = methods.attach(network, config["model"], config["method"])
        examples = [
            question(
                f"number {i}", [f"{'!' if k == i % (2 + i % 3) else '.'}{k}" for k in range(2 + i % 3)], i % (2 + i % 3)
            )
            for i in range(48)
        ]
        rows = [encode_question(example, tokenizer, max_length=32) for example in examples]
        report = train(
            network, rows, config["trainer"], directory=tmp_path / str(micro), seed=0, pad_id=tokenizer.pad_token_id,
            objective=MultipleChoiceHead(network), runtime=config["runtime"],
        )  # fmt: skip
        losses.append([line["loss"] for line in read_jsonl(tmp_path / str(micro) / "loss.jsonl")])
    assert losses[0][:5] == pytest.approx(losses[1][:5], rel=1e-3)
    assert report.final_loss < 0.2 < losses[1][0]
    assert _accuracy(network, rows, tokenizer.pad_token_id) > 0.9


@torch.inference_mode()
def _accuracy(network: nn.Module, rows: list[Any], pad: int) -> float:
    network.eval()
    scores = MultipleChoiceHead(network).scores(network, collate(rows, pad_id=pad))
    return float((scores.argmax(-1) == torch.tensor([row.labels[0] for row in rows])).double().mean())
