"""The user's own data: a JSON Lines file (or a file with one JSON array) of objects.

Settings:
    path: the file, ``{split}`` in it standing for the split's name; or one path for each split,
        ``{train: a.jsonl, test: b.jsonl}``. A relative path is taken from the data directory if the file is
        there, else from the working directory.
    prompt, completion, gold: templates over the row's own fields, by default ``{prompt}``, ``{completion}``
        and ``{gold}``; rows of a train split may lack ``gold``.
    meta: names of fields to keep in `Example.meta`.
    subset (seeded | first), test_seed: see `kronlab.data.common.subset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kronlab.data import common
from kronlab.data.common import Example, LengthFn, Template
from kronlab.errors import ConfigError, DataError

_KEYS = ("path", "prompt", "completion", "gold", "meta", "subset", "test_seed")
_SCALAR = (str, int, float)


def load(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """Examples of the user's file. Each field a template names must be text or a number in every row.

    Raises:
        DataError: the file is missing, or a row is malformed (file, line, field).
        ConfigError: no path for this split.
    """
    path, tried = _find(source, split, data_dir)
    if path is None:
        raise DataError(_missing(split, tried))
    prompt, completion, gold = (
        Template(source.get(key, "{" + key + "}"), f"jsonl {key}") for key in ("prompt", "completion", "gold")
    )
    meta = list(source.get("meta") or ())
    # Only the default gold may be absent, and only in training: a test without gold could not be graded.
    gold_optional = split == "train" and "gold" not in source
    needed = prompt.fields | completion.fields | (set() if gold_optional else gold.fields)
    rows = common.read_jsonl(path, dict.fromkeys(sorted(needed), _SCALAR))
    examples = []
    for i in common.subset(source, len(rows), split=split, n=n, seed=seed):
        row = rows[i]
        answer = "" if gold_optional and "gold" not in row else gold(row)
        kept = {key: row.get(key) for key in meta}
        examples.append(Example(f"{path.stem}/{split}/{i}", prompt(row), completion(row), answer, kept))
    return examples


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`."""
    path, tried = _find(source, split, data_dir)
    return (True, f"local file {path}") if path else (False, _missing(split, tried))


def _find(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[Path | None, list[Path]]:
    common.check_keys(source, _KEYS)
    given = source.get("path")
    if isinstance(given, Mapping):
        common.check_split("jsonl", split, tuple(str(k) for k in given), " (the keys of path)")
        given = given[split]
    if not given:
        raise ConfigError("data source 'jsonl' has no path: set path to a .jsonl file, or to one for each split")
    relative = Path(str(given).replace("{split}", split)).expanduser()
    tried = [Path(data_dir) / relative] if data_dir else []
    tried.append(relative)
    if relative.is_absolute():
        tried = [relative]
    return next((p for p in tried if p.is_file()), None), tried


def _missing(split: str, tried: list[Path]) -> str:
    looked = " and ".join(str(p.absolute()) for p in tried)
    return f"data source 'jsonl', split {split!r}: no file at {looked}: set path, or put the file there"
