"""What the tests of the pipeline share: tiny cells and models made from the shipped configs, and toy examples."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from kronlab import methods, models
from kronlab.cell import Cell, compose_config, make_cell
from kronlab.data import Example
from kronlab.experiment import DTYPES

LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"

# Every training run collects garbage over all that is imported, 0.3 s each time; what is there now stays anyway.
gc.freeze()


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    return compose_config(["scale=smoke", "runtime.threads=1", "runtime.progress=false", *overrides])


def smoke_cell(*overrides: str, results: Path) -> Cell:
    """A cell of a tiny model, a few steps and a few graded examples."""
    config = _composed(overrides).copy()
    config.results.dir = str(results)
    return make_cell(config)


def toy_examples(n: int, *, seed: int = 0, longest: int = 24) -> list[Example]:
    """Examples of random letters whose prompts and completions differ in length."""
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choices(LETTERS, k=draw.randint(1, longest)))

    return [Example(id=f"toy/{i}", prompt=f"{text()}: ", completion=text(), gold=str(i)) for i in range(n)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums depend on the thread count in the last bit; and one thread is fastest at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Cell]:
    """A smoke cell from overrides; its results lie in the test's own folder unless the test says otherwise."""

    def make(*overrides: str, results: Path | None = None) -> Cell:
        return smoke_cell(*overrides, results=results or tmp_path)

    return make


@pytest.fixture
def build(make: Callable[..., Cell]) -> Callable[..., tuple[nn.Module, PreTrainedTokenizerBase]]:
    """A tiny model with a method attached, made as a cell makes it, and its tokenizer."""

    def build(
        *overrides: str, seed: int = 0, precision: str = "fp32", randomise: float | None = None
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """`randomise`: give every weight this standard deviation, so that logits differ widely from token to token."""
        config = make(*overrides).config
        network, tokenizer = models.load(config["model"], dtype=DTYPES[precision])
        torch.manual_seed(seed)
        network = methods.attach(network, config["model"], config["method"])
        if randomise is not None:
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=randomise)
        return network, tokenizer

    return build


@pytest.fixture(scope="session")
def toys() -> Callable[..., list[Example]]:
    """`toy_examples`: n examples whose rows differ in length."""
    return toy_examples
