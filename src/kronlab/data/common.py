"""What every data loader shares: `Example`, templates, JSON Lines files, seeded order, the way to the hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import string
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from kronlab.errors import ConfigError, DataError

TEST_SEED: Final = 20_000_003
"""Seed of every test set, unless its source sets test_seed: fixed, so that all runs meet the same items."""
VALIDATION_SEED: Final = 20_000_017
"""Chooses the training rows that ``validation_rows`` keeps back: fixed, so that no run trains on them."""
DEFAULT_PROMPT: Final = "Q: {question}\nA: "
HUB_TIMEOUT_S: Final = 10.0
HUB_KEYS: Final = ("hub", "hub_config", "hub_revision")
"""Settings that `Place.of` reads from a source."""

KEPT_FILE_BYTES: Final = 32 << 20
"""Local files up to this size stay in memory once read, the last few of them."""

LengthFn = Callable[[str], int]
Fields = Mapping[str, type | tuple[type, ...]]
"""Fields that every row must have, with their types."""


@dataclass(frozen=True)
class Example:
    """One item: what the model is given, what it learns, and what the grader compares with.

    Attributes:
        id: stable and unique within (source, split), e.g. ``"gsm8k/test/17"`` (its row in the whole split).
        prompt: exactly the text given to the model.
        completion: exactly the text learned, without EOS.
        gold: what the grader compares with.
        meta: what a table may group by, e.g. subject and level.
    """

    id: str
    prompt: str
    completion: str
    gold: str
    meta: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(examples: Iterable[Example]) -> str:
    """The data's identity in a record: SHA-256 over (id, prompt, completion, gold) of each, in order."""
    digest = hashlib.sha256()
    for e in examples:
        # JSON keeps the fields apart: no two different lists give the same bytes.
        digest.update(json.dumps([e.id, e.prompt, e.completion, e.gold], ensure_ascii=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


# ---- settings ----


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or the list of what is known if nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; known: " + ", ".join(known) if len(known) <= 30 else f"; {len(known)} are known"


def check_keys(source: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Refuse a key that no loader reads, so that a mistyped setting cannot be silently ignored.

    Raises:
        ConfigError: naming the key and the nearest allowed one.
    """
    allowed = {"name", *allowed}
    for key in source:
        if key not in allowed:
            raise ConfigError(f"data source {source.get('name')!r}: unknown key {key!r}{did_you_mean(key, allowed)}")


def choose(source: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str:
    """``source[key]``, one of ``allowed``; the first of them if it is not set."""
    value = source.get(key, allowed[0])
    if value not in allowed:
        raise ConfigError(f"data source {source.get('name')!r}: {key}={value!r} must be one of {', '.join(allowed)}")
    return str(value)


def check_split(name: str, split: str, allowed: Sequence[str], hint: str = "") -> None:
    """Raise ConfigError if the source ``name`` has no such split."""
    if split not in allowed:
        raise ConfigError(f"data source {name!r} has no split {split!r}: it has {', '.join(allowed)}{hint}")


def check_n(name: str, n: int | None) -> None:
    """Raise ConfigError unless ``n`` is None (all) or a positive integer."""
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ConfigError(f"data source {name!r}: n={n!r} must be a positive integer, or null for all")


class Template:
    """A text with ``{field}`` places, filled from a row; ``{{`` and ``}}`` are literal braces.

    Raises:
        ConfigError: at once if the text is not a template, or holds anything but plain field names.
    """

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self._parts: list[tuple[str, str | None]] = []
        try:
            for literal, name, spec, conversion in string.Formatter().parse(text):
                if name is not None and (not name.isidentifier() or spec or conversion):
                    raise ValueError(f"{{{name}}} is not a plain field name")
                self._parts.append((literal, name))
        except (ValueError, TypeError) as e:
            raise ConfigError(f"{where}: bad template {text!r}: {e}; write {{field}}, and {{{{ for a brace") from None

    @property
    def fields(self) -> set[str]:
        return {name for _, name in self._parts if name is not None}

    def __call__(self, row: Mapping[str, Any]) -> str:
        out = []
        for literal, name in self._parts:
            out.append(literal)
            if name is not None:
                if name not in row:
                    raise ConfigError(
                        f"{self.where}: template field {{{name}}} is not in the data{did_you_mean(name, row)}"
                    )
                out.append(str(row[name]))
        return "".join(out)


# ---- order and subsets ----


def seeded_order(count: int, seed: int) -> list[int]:
    """A permutation of ``range(count)`` fixed by ``seed``: sorted by SHA-256 of (seed, index).

    Needs no random generator, so it is the same on every platform and version.
    """

    def key(i: int) -> bytes:
        return hashlib.sha256(f"{seed}:{i}".encode()).digest()

    return sorted(range(count), key=key)


def subset(source: Mapping[str, Any], count: int, *, split: str, n: int | None, seed: int) -> list[int]:
    """Which rows of a split of ``count`` rows to take, in which order.

    Train: ``subset: seeded`` (default) the first n of a shuffle by ``seed``; ``subset: first`` the first n in
    file order. Test: the first n of a shuffle by the fixed ``test_seed``, whatever ``seed`` is, so that every
    method and seed is graded on the same items. Either way a smaller n is a prefix of a larger one.
    ``n=None`` takes every row in the same order.

    Validation: the ``validation_rows`` rows that are kept back from train, chosen by a fixed seed out of the training
    rows, so ``count`` is theirs; without that setting there are none.

    Raises:
        ConfigError: if ``n`` is more than the split has.
    """
    mode = choose(source, "subset", ("seeded", "first"))
    size = int(source.get("validation_rows") or 0)
    kept_back = seeded_order(count, VALIDATION_SEED)[:size] if split != "test" else []
    if split == "test":
        order = seeded_order(count, int(source.get("test_seed", TEST_SEED)))
    elif split == "validation" and size:
        order = kept_back
    else:
        order = list(range(count)) if mode == "first" else seeded_order(count, seed)
        held = set(kept_back)
        order = [i for i in order if i not in held]
    if n is not None and n > len(order):
        raise ConfigError(
            f"data source {source.get('name')!r}: n={n} asked of split {split!r}, which has {len(order)}: "
            "lower n, or set it to null for all"
        )
    return order[:n]


def rows_split(source: Mapping[str, Any], split: str) -> str:
    """The split whose rows hold ``split``: those of validation are training rows.

    Raises:
        ConfigError: validation is asked for, and no ``validation_rows`` are kept back.
    """
    if split != "validation":
        return split
    kept_back = source.get("validation_rows")
    if isinstance(kept_back, bool) or not isinstance(kept_back, int) or kept_back < 1:
        raise ConfigError(
            f"data source {source.get('name')!r}: split 'validation' with validation_rows={kept_back!r}; "
            "say there how many training rows to keep back"
        )
    return "train"


# ---- local files ----


def read_jsonl(path: Path, required: Fields) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file (UTF-8), or of a file that holds one JSON array; blank lines are skipped.

    ``required`` names the fields that every row must have, and their types.

    Raises:
        DataError: naming file, line (or item of the array) and field.
    """
    try:
        stat = path.stat()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}): check the path and its permissions") from None
    fields = tuple(required.items())
    if stat.st_size > KEPT_FILE_BYTES:
        return list(_read_rows(path, fields))
    return list(_kept_rows(path, fields, (stat.st_mtime_ns, stat.st_size, stat.st_ino)))


@lru_cache(maxsize=8)
def _kept_rows(
    path: Path, required: tuple[tuple[str, type | tuple[type, ...]], ...], state: tuple[int, int, int]
) -> tuple[dict[str, Any], ...]:
    """The rows of a file in this state (time, size, inode), not to be written to: the next cell is given the same."""
    return _read_rows(path, required)


def _read_rows(path: Path, required: tuple[tuple[str, type | tuple[type, ...]], ...]) -> tuple[dict[str, Any], ...]:
    rows = []
    for where, row in _json_items(path):
        check_row(row, dict(required), where)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows: the file is empty, replace it")
    return tuple(rows)


def check_row(row: Any, required: Fields, where: str) -> None:
    """Raise DataError unless ``row`` is an object with every required field of its type."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}: fix or remove it")
    for name, kind in required.items():
        if name not in row:
            raise DataError(f"{where}: field {name!r} is missing (has: {', '.join(map(str, row)) or 'none'}): add it")
        if not isinstance(row[name], kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(k.__name__ for k in kinds)
            raise DataError(f"{where}: field {name!r} must be {names}, is {type(row[name]).__name__}: fix it")


def _json_items(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}): check the path and its permissions") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        bad_line = raw[: e.start].count(b"\n") + 1
        raise DataError(f"{path}:{bad_line}: not UTF-8 text: convert the file") from None
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as e:
            raise DataError(f"{path}:{e.lineno}: not JSON ({e.msg}): fix the file") from None
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(items))
        return
    # split on "\n" alone: str.splitlines also breaks at U+2028, which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as e:
                raise DataError(
                    f"{path}:{number}: not JSON ({e.msg} at column {e.colno}): fix or remove the line"
                ) from None


def find_local(data_dir: str | None, candidates: Sequence[str]) -> Path | None:
    """The first of ``candidates`` (paths or globs under ``data_dir``, in order of preference) that is a file.

    Raises:
        DataError: if a pattern fits several files: which one is meant must not depend on their names.
    """
    if data_dir is None:
        return None
    for candidate in candidates:
        found = sorted(p for p in Path(data_dir).glob(candidate) if p.is_file())
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise DataError(f"{data_dir}/{candidate} fits {len(found)} files ({names}): leave one there")
        if found:
            return found[0]
    return None


# ---- the hub ----


@dataclass(frozen=True)
class Place:
    """Where one split of a dataset is to be had: local files (in order of preference), then a hub dataset.

    ``hub`` may be the path of a local dataset directory; None where no hub dataset has this split.
    """

    name: str
    split: str
    local: tuple[str, ...]
    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None

    @classmethod
    def of(
        cls,
        source: Mapping[str, Any],
        split: str,
        local: Sequence[str],
        hub: str | None,
        hub_config: str | None = None,
    ) -> Place:
        """The place, with the `HUB_KEYS` that ``source`` sets; ``hub=None`` (not on the hub) stays None."""
        return cls(
            name=str(source["name"]),
            split=split,
            local=tuple(local),
            hub=hub and str(source.get("hub") or hub),
            hub_config=source.get("hub_config", hub_config),
            hub_revision=source.get("hub_revision"),
        )

    def rows(self, data_dir: str | None, required: Fields) -> list[dict[str, Any]]:
        """The rows: of the local file if there is one, else of the hub dataset, else of its cached copy.

        Raises:
            DataError: one line that says what is missing, where it was looked for and how to mend it.
        """
        path = find_local(data_dir, self.local)
        if path is not None:
            return read_jsonl(path, required)
        if self.hub is None:
            raise DataError(self._missing(data_dir, None))
        try:
            rows = load_hub(self.hub, self.hub_config, self.split, self.hub_revision)
        except DataError as e:
            raise DataError(self._missing(data_dir, str(e))) from e
        for i, row in enumerate(rows):
            check_row(row, required, f"{self.hub}/{self.split}[{i}]")
        return rows

    def probe(self, data_dir: str | None) -> tuple[bool, str]:
        """Whether `rows` would find something, without loading it; see `kronlab.data.available`."""
        path = find_local(data_dir, self.local)
        if path is not None:
            return True, f"local file {path}"
        if self.hub is None:
            return False, self._missing(data_dir, None)
        if Path(self.hub).is_dir():
            return True, f"local dataset directory {self.hub}"
        if hub_cached(self.hub):
            return True, f"cached copy of hub {self.hub}"
        reason = hub_unreachable(self.hub)
        if reason is None:
            return True, f"hub {self.hub}"
        return False, self._missing(data_dir, f"hub {self.hub} ({reason})")

    def _missing(self, data_dir: str | None, hub: str | None) -> str:
        looked = (
            f"{data_dir}/{self.local[0]}" if data_dir else "no data directory (KRONLAB_DATA and data.dir are unset)"
        )
        mend = f"set KRONLAB_DATA (or data.dir) to a folder that holds {self.local[0]}"
        return f"dataset {self.name!r} split {self.split!r} cannot be loaded: looked in {looked}" + (
            f" and at {hub}; {mend}, or connect to the hub" if hub else f"; {mend}"
        )


def load_hub(hub: str, config: str | None, split: str, revision: str | None = None) -> list[dict[str, Any]]:
    """Rows of a hub dataset, from the network, else from the local cache of an earlier download.

    Raises:
        DataError: ``"hub NAME (reason)"``, within about `HUB_TIMEOUT_S` seconds where the hub cannot be
        reached.
    """
    import datasets  # takes a second to import, and is not needed where files are local

    unreachable = None if Path(hub).is_dir() else hub_unreachable(hub)
    try:
        with offline(unreachable is not None):
            loaded = datasets.load_dataset(hub, config, split=split, revision=revision)
    except Exception as e:  # the library raises a dozen types here; each means that the dataset cannot be had
        raise DataError(f"hub {hub} ({unreachable or _first_line(e)})") from e
    return [dict(row) for row in loaded]


def hub_cached(hub: str) -> bool:
    """Whether `datasets` has a prepared copy of ``hub`` (any configuration) on this machine."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *namespace, name = hub.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*namespace, camelcase_to_snakecase(name)])
    return any(folder.glob("*/*/*/*.arrow"))


def hub_unreachable(hub: str) -> str | None:
    """Why dataset ``hub`` cannot be asked for just now, or None if it answers. Takes at most `HUB_TIMEOUT_S`
    seconds.

    Asked before `datasets` is, because that retries for 25 s and more where there is no network.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in {
        "1",
        "ON",
        "YES",
        "TRUE",
    }:
        return "offline mode is set in the environment, and there is no cached copy"
    outcome: list[str | None] = [f"no answer within {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            huggingface_hub.HfApi().dataset_info(hub, timeout=HUB_TIMEOUT_S)
            outcome[0] = None
        except Exception as e:  # whatever it is, it is the reason
            outcome[0] = _first_line(e)

    # In a thread, because name resolution does not heed the timeout.
    thread = threading.Thread(target=ask, daemon=True, name="kronlab-hub-probe")
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return outcome[0]


@contextmanager
def offline(active: bool) -> Iterator[None]:
    """Within the block the Hugging Face libraries read their caches only; they have no per-call switch for
    it."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if active:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # "an error occurred while generating the dataset" helps nobody
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
