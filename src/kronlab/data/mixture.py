"""A mixture of other sources, each with its share: what a base model is pre-trained on.

Settings:
    parts: name of the part -> ``{share: <a number above 0>, source: <a source like any other>}``.

The parts alternate in an order that depends on the shares alone, so a smaller n gives a prefix of a larger one. Whether
train and test share an item is each part's own matter; two parts should not ask the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kronlab import data
from kronlab.data import common
from kronlab.data.common import Example, LengthFn
from kronlab.errors import ConfigError


def load(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None = None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """``n`` examples of all parts together; id and meta say the part: ``sums/chain_sum/train/0``.

    Raises:
        ConfigError: no parts, a share that is none, n=null; and what the parts raise.
    """
    parts = _parts(source)
    if n is None:
        raise ConfigError("data source 'mixture': n=null; say how many examples to take of all parts together")
    names = _turns({name: part["share"] for name, part in parts.items()}, n)
    drawn = {
        name: iter(
            data.load_examples(
                part["source"], split=split, n=names.count(name), seed=seed, data_dir=data_dir, length_fn=length_fn
            )
        )
        for name, part in parts.items()
        if name in names
    }
    turns = ((name, next(drawn[name])) for name in names)
    return [replace(example, id=f"{name}/{example.id}", meta={**example.meta, "part": name}) for name, example in turns]


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`: every part must be there."""
    found = [data.available(part["source"], split, data_dir) for part in _parts(source).values()]
    return next((answer for answer in found if not answer[0]), (True, f"mixture of {len(found)} sources"))


def origins(source: Mapping[str, Any], split: str, data_dir: str | None) -> dict[str, bool]:
    """See `kronlab.data.origins`: those of all parts."""
    found = [data.origins(part["source"], split, data_dir) for part in source["parts"].values()]
    return {place: local for places in found for place, local in places.items()}


def _parts(source: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    common.check_keys(source, ("parts",))
    parts = source.get("parts")
    if not isinstance(parts, Mapping) or not parts:
        raise ConfigError(
            f"data source 'mixture': parts={parts!r}; give name: {{share: ..., source: ...}} for each part"
        )
    for name, part in parts.items():
        if not isinstance(part, Mapping) or set(part) != {"share", "source"}:
            raise ConfigError(
                f"data source 'mixture': parts.{name}={part!r}; it needs share and source, and nothing else"
            )
        share = part["share"]
        if isinstance(share, bool) or not isinstance(share, int | float) or not share > 0:
            raise ConfigError(f"data source 'mixture': parts.{name}.share={share!r}; it must be a number above 0")
    return dict(parts)


def _turns(shares: Mapping[str, float], n: int) -> Sequence[str]:
    """Which part each of ``n`` examples is of: always the one that is furthest behind its share."""
    total = sum(shares.values())
    taken = dict.fromkeys(shares, 0)
    names = []
    for i in range(1, n + 1):
        name = max(shares, key=lambda part: shares[part] / total * i - taken[part])
        taken[name] += 1
        names.append(name)
    return names
