"""Data: rows -> prompt, completion, gold. One module per family; `load_examples` is the door.

A *source* is a config section: ``name`` says which loader reads it (`LOADERS`), the other keys are that
loader's settings. The loader's module documents them; a key it does not know is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kronlab.data import (
    codefeedback,
    commonsense,
    digits,
    glue,
    gsm8k,
    humaneval,
    jsonl,
    lm_eval,
    math,
    mbpp,
    metamathqa,
    mixture,
    reasoning_gym,
    retrieve_sum,
)
from kronlab.data.common import Example, LengthFn, check_n, did_you_mean, find_local, fingerprint
from kronlab.errors import ConfigError, KronlabError

__all__ = [
    "LOADERS",
    "Example",
    "available",
    "class_labels",
    "few_shot",
    "fingerprint",
    "load_examples",
    "origins",
]

LOADERS = {
    "reasoning_gym": reasoning_gym,
    "gsm8k": gsm8k,
    "metamathqa": metamathqa,
    "math": math,
    "jsonl": jsonl,
    "glue": glue,
    "commonsense": commonsense,
    "lm_eval": lm_eval,
    "humaneval": humaneval,
    "mbpp": mbpp,
    "codefeedback": codefeedback,
    "mixture": mixture,
    "digits": digits,
    "retrieve_sum": retrieve_sum,
}
"""Source name -> module with ``load`` and ``probe``, which `load_examples` and `available` call."""


def load_examples(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """Exactly ``n`` examples (None: all) of one split of a source, in a fixed order.

    Args:
        source: config section with ``name`` and that loader's settings.
        split: "train" or "test"; generated tasks with a ``validation_seed`` have "validation" too.
        n: how many; a smaller n gives a prefix of a larger one.
        seed: chooses (or generates) the train examples; test examples do not depend on it.
        data_dir: folder of local datasets, which win over the hub; None to use the hub only.
        length_fn: tokens in a text, for sources that drop rows by length (metamathqa); None drops none.

    Raises:
        ConfigError: unknown source, key or split, or ``n`` more than there is.
        DataError: dataset missing or malformed.
    """
    module = _loader(source)
    check_n(str(source["name"]), n)
    return module.load(source, split=split, n=n, seed=seed, data_dir=data_dir, length_fn=length_fn)


def available(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """Whether `load_examples` can get this split now, and in one line why (not); never raises a KronlabError.

    Loads nothing and downloads nothing: it looks for local files, then for a cached copy, then asks the hub
    (which gives up within about ten seconds where there is no network, and at once under HF_HUB_OFFLINE=1).
    """
    try:
        return _loader(source).probe(source, split, data_dir)
    except KronlabError as e:
        return False, str(e)


def origins(source: Mapping[str, Any], split: str, data_dir: str | None) -> dict[str, bool]:
    """What a split is read from -> whether it is there as a local file. Asks no network.

    A hub dataset's name, or where no hub dataset has the split, the path of the local file that it needs. Empty for
    what is generated, lies in a user's file, or is fetched by lm-eval.
    """
    module = _loader(source)
    if hasattr(module, "origins"):
        return dict(module.origins(source, split, data_dir))
    if hasattr(module, "_places"):
        places = module._places(source, split)
    elif hasattr(module, "_place"):
        places = [module._place(source, split)]
    else:
        return {}
    return {place.hub or place.local[0]: find_local(data_dir, place.local) is not None for place in places}


def class_labels(source: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes of a source, in the order of their indices; empty: a score is to be predicted.

    Raises:
        ConfigError: the source has free text for an answer.
    """
    module = _loader(source)
    if not hasattr(module, "labels"):
        raise ConfigError(
            f"data source {source['name']!r} has no classes; a classification head needs one that has: glue, digits"
        )
    return tuple(module.labels(source))


def few_shot(examples: Sequence[Example], solved: Sequence[Example], *, separator: str) -> list[Example]:
    """Every prompt behind the same solved examples, each followed by `separator`.

    Raises:
        ConfigError: a solved example is also to be graded.
    """
    both = {example.id for example in examples} & {example.id for example in solved}
    if both:
        raise ConfigError(f"{min(both)} is shown with its solution and graded; take shots from another split")
    shown = "".join(example.prompt + example.completion + separator for example in solved)
    return [replace(example, prompt=shown + example.prompt) for example in examples]


def _loader(source: Mapping[str, Any]) -> Any:
    name = source.get("name")
    if not name:
        raise ConfigError(f"data source has no name: set name to one of {', '.join(sorted(LOADERS))}")
    if name not in LOADERS:
        raise ConfigError(f"unknown data source {name!r}{did_you_mean(str(name), LOADERS)}")
    return LOADERS[name]
