"""Handwritten digits, 8 by 8 pixels in grey, which scikit-learn carries (Alpaydin and Kaynak 1998, UCI): 1,797 images.

The package has no split of its own, so there is a fixed one: 500 images for ``test``, 200 for ``validation``, 1,097 for
``train``. It is the same whatever ``turned`` is: a model that has been pre-trained on upright train images has seen no
test image, however that is turned.

Settings:
    turned: by how many degrees, counterclockwise: 0 (the default), 90, 180 or 270.

The prompt holds the pixels as JSON, one channel of 8 rows, brightness 0 to 255; ``meta["label"]`` is the digit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import numpy as np

from kronlab.data import common
from kronlab.data.common import TEST_SEED, Example, LengthFn
from kronlab.errors import ConfigError

SIZES: Final = {"test": 500, "validation": 200, "train": 1097}
_TURNS: Final = (0, 90, 180, 270)
_BRIGHTEST: Final = 16  # as the package has it


def load(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None = None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """The first ``n`` images of a split (None: all); those of ``train`` in an order that ``seed`` decides.

    Raises:
        ConfigError: no such split, a turn that is none, or n larger than the split.
    """
    turned = _turned(source)
    common.check_split("digits", split, tuple(SIZES))
    members = _split()[split]
    if n is not None and n > len(members):
        raise ConfigError(f"data source 'digits': n={n} asked of split {split!r}, which has {len(members)}: lower n")
    if split == "train":
        members = [members[i] for i in common.seeded_order(len(members), seed)]
    images, labels = _images()
    return [_example(i, np.rot90(images[i], turned // 90), int(labels[i])) for i in members[:n]]


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`: scikit-learn is always installed."""
    _turned(source)
    common.check_split("digits", split, tuple(SIZES))
    return True, "digits: in scikit-learn"


def labels(source: Mapping[str, Any]) -> tuple[str, ...]:
    """See `kronlab.data.class_labels`."""
    return tuple(map(str, range(10)))


def _turned(source: Mapping[str, Any]) -> int:
    common.check_keys(source, ("turned",))
    turned = source.get("turned", 0)
    if turned not in _TURNS or isinstance(turned, bool):
        raise ConfigError(f"data source 'digits': turned={turned!r} must be one of {', '.join(map(str, _TURNS))}")
    return int(turned)


@cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) brightnesses from 0 to 255, and the digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images.astype(int) * 255 // _BRIGHTEST, found.target


@cache
def _split() -> dict[str, list[int]]:
    """Which images each split has."""
    order = common.seeded_order(sum(SIZES.values()), TEST_SEED)
    split, at = {}, 0
    for name, size in SIZES.items():
        split[name] = order[at : at + size]
        at += size
    return split


def _example(number: int, image: np.ndarray, label: int) -> Example:
    pixels = json.dumps([image.tolist()], separators=(",", ":"))
    return Example(f"digits/{number}", prompt=pixels, completion=str(label), gold=str(label), meta={"label": label})
