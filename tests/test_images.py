"""Image classification from config to record: pixels, the vision transformer's adapters and head, its graders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kronlab import methods, models
from kronlab.adapters import adapter_layers
from kronlab.cell import Cell
from kronlab.classification import ClassificationHead, encode_image
from kronlab.data import Example, class_labels, load_examples
from kronlab.data.digits import SIZES
from kronlab.encode import collate
from kronlab.errors import ConfigError
from kronlab.evaluate import regrade
from kronlab.experiment import run_cell
from kronlab.runs import Store

VIT = ["model=vit_digits", "task=digits_turned"]


def digits(split: str = "test", n: int | None = None, seed: int = 0, **source: Any) -> list[Example]:
    return load_examples({"name": "digits", **source}, split=split, n=n, seed=seed, data_dir=None)


# ---- data


def test_splits_share_no_image_and_hold_all_of_them() -> None:
    ids = {split: {example.id for example in digits(split)} for split in SIZES}
    assert {split: len(found) for split, found in ids.items()} == SIZES
    assert len(set.union(*ids.values())) == sum(SIZES.values()) == 1797


def test_seed_orders_the_training_images_alone() -> None:
    assert digits("test", 20, seed=0) == digits("test", 20, seed=1)
    one, other = (digits("train", seed=seed) for seed in (0, 1))
    assert one != other
    assert sorted(e.id for e in one) == sorted(e.id for e in other)
    assert digits("train", 7) == digits("train")[:7]


def test_turned_images_are_the_same_images_counterclockwise() -> None:
    for upright, turned in zip(digits(n=5), digits(n=5, turned=90), strict=True):
        before, after = (np.array(json.loads(e.prompt)) for e in (upright, turned))
        assert before.shape == (1, 8, 8)
        assert 0 <= before.min() < before.max() <= 255
        # the pixel at row y, column x goes to row 7 - x, column y
        assert all(after[0, 7 - x, y] == before[0, y, x] for x in range(8) for y in range(8))
        assert (upright.id, upright.gold, upright.meta) == (turned.id, turned.gold, turned.meta)


def test_the_labels_are_the_packages_own() -> None:
    from sklearn.datasets import load_digits

    package = load_digits()
    for example in digits(n=30):
        number = int(example.id.removeprefix("digits/"))
        assert example.meta["label"] == int(example.gold) == package.target[number]
        assert np.array_equal(np.array(json.loads(example.prompt))[0], package.images[number].astype(int) * 255 // 16)
    assert class_labels({"name": "digits"}) == tuple("0123456789")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"turned": 45}, "turned=45 must be one of 0, 90, 180, 270"),
        ({"turn": 90}, "unknown key 'turn'"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"n": 501}, "n=501 asked of split 'test', which has 500"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        digits(**arguments)
    assert "\n" not in str(caught.value)


# ---- batches


def test_a_batch_holds_the_pixels_between_minus_one_and_one() -> None:
    image = [[[0, 51, 102], [153, 204, 255]], [[255, 0, 255], [0, 255, 0]]]  # 2 channels, 2 rows, 3 columns
    rows = [encode_image(Example("a", json.dumps(image), "1", "1", {"label": label})) for label in (1, 4)]
    batch = collate(rows, pad_id=0)
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["labels"].tolist() == [[1], [4]]
    assert batch["pixel_values"].shape == (2, 2, 2, 3)
    expected = torch.tensor(image, dtype=torch.float64) / 127.5 - 1
    torch.testing.assert_close(batch["pixel_values"][1].double(), expected, atol=1e-6, rtol=0)  # fp32
    assert batch["pixel_values"].min() == -1
    assert batch["pixel_values"].max() == 1


# ---- model


@pytest.mark.parametrize("method", ["lora", "cdka", "kron_lora", "dora", "krona"])
def test_every_linear_layer_of_the_blocks_is_adapted_and_the_head_trained(
    build: Callable[..., tuple[nn.Module, Any]], method: str
) -> None:
    network, _ = build(*VIT, f"method={method}")
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    found = {next((part for part in name.split(".") if part in linears), "") for name in trained}
    assert found == linears | {""}
    rest = {name for name in trained if not linears & set(name.split("."))}
    assert all("classifier.modules_to_save" in name for name in rest)
    assert len(rest) == 2
    assert not any("projection" in name for name in trained), "the patch embedding is a convolution and stays"
    if method in ("cdka", "kron_lora"):
        assert len(list(adapter_layers(network))) == 4 * len(linears)


def test_an_adapted_transformer_starts_as_the_base_model(make: Callable[..., Cell]) -> None:
    cell = make(*VIT, "method=cdka")
    batch = collate([encode_image(example) for example in digits(n=4)], pad_id=0)
    network, _ = models.load(cell.config["model"], dtype=torch.float32, head=models.Head(tuple("0123456789")))
    network.eval()
    with torch.no_grad():
        before = ClassificationHead(network, regression=False).logits(network, batch)
        adapted = methods.attach(network, cell.config["model"], cell.config["method"]).eval()
        after = ClassificationHead(adapted, regression=False).logits(adapted, batch)
    assert before.shape == (4, 10)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)  # one more fp32 sum with zeros
    assert adapted.get_base_model().config.id2label[3] == "3"  # type: ignore[operator]


# ---- from config to record


@pytest.mark.parametrize(
    "overrides",
    [["method=cdka"], ["method=kron_lora", "trainer.precision=bf16"], ["method=full"], ["method=none"]],
    ids=["cdka", "kron_lora-bf16", "full", "base"],
)
def test_from_config_to_record(make: Callable[..., Cell], overrides: list[str]) -> None:
    cell = make(*VIT, *overrides)
    record = run_cell(cell)
    assert record["status"] == "done"
    result = record["eval"]["digits_turned"]
    assert list(result["metrics"]) == ["accuracy", "nll"]
    assert result["graders"] == {"image_classification": "1"}
    assert len(result["samples"]["id"]) == 8
    again, changed = regrade(Store(cell.config["results"]["dir"]), record)
    assert (again["eval"], changed) == (record["eval"], {"digits_turned": []})
    if overrides == ["method=none"]:
        assert record["train"] is None
    else:
        assert (record["train"]["steps"], record["train"]["examples"]) == (4, 32)
        assert record["train"]["truncated_examples"] == 0


def test_training_lowers_the_loss(make: Callable[..., Cell]) -> None:
    cell = make(*VIT, "method=full", "task.n=8", "trainer.lr=3e-3", "trainer.max_steps=30")
    run_cell(cell)
    losses = [json.loads(line)["loss"] for line in _losses(cell).read_text().splitlines()]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def _losses(cell: Cell) -> Path:
    return Store(cell.config["results"]["dir"]).checkpoints(cell.train_id) / "loss.jsonl"


def test_a_model_pretrained_by_a_cell_keeps_its_head(make: Callable[..., Cell], tmp_path: Path) -> None:
    """The head of the ten digits is the checkpoint's, not drawn anew."""
    maker = make("model=vit_digits", "task=digits", "method=full")
    run_cell(maker)
    final = Store(tmp_path).final(maker.train_id)
    section = maker.config["model"] | {"source": "directory", "directory": str(final)}
    heads = [models.Head(tuple("0123456789"), seed=seed) for seed in (0, 1)]
    one, other = (models.load(section, dtype=torch.float32, head=head)[0] for head in heads)
    assert torch.equal(one.classifier.weight, other.classifier.weight)


def test_a_whole_transformer_is_resumed_and_loaded_under_the_names_that_it_has(make: Callable[..., Cell]) -> None:
    """transformers saves a ViT under older names, and a resumed training would go on from fresh weights."""
    cell = make("model=vit_digits", "task=digits", "method=full", "runtime.save_every=2")
    record = run_cell(cell)
    store = Store(cell.config["results"]["dir"])
    whole = load_file(store.final(cell.train_id) / "model.safetensors")
    store.record_path(cell.scale, cell.id).unlink()
    again = run_cell(cell)  # graded on the weights that are there
    assert again["eval"]["digits"]["metrics"] == record["eval"]["digits"]["metrics"]
    for gone in (store.final(cell.train_id), store.checkpoints(cell.train_id) / "checkpoint-4"):
        shutil.rmtree(gone)
    store.record_path(cell.scale, cell.id).unlink()
    run_cell(cell)
    resumed = load_file(store.final(cell.train_id) / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_text_is_not_graded_by_an_image_model(make: Callable[..., Cell]) -> None:
    with pytest.raises(ConfigError, match=r"vit_digits is a image_classification model; eval chain_sum grades"):
        run_cell(make("model=vit_digits", "task=chain_sum", "method=none"))
