"""Records in Weights & Biases: one run per cell, its id the cell's id. The local files are the truth, W&B is a mirror.

What a run says is a function of the record and of its loss curve alone (`view`, `summary`, `point`), so that a run that
was logged live and one that is made from the record later (`push`) are the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import requests

from kronlab.cell import digest
from kronlab.errors import ConfigError
from kronlab.progress import bar
from kronlab.runs import FAILED, Store, read_jsonl, write_json

MODES: Final = ("offline", "online")
ANSWER_TIMEOUT_S: Final = 10.0
INIT_TIMEOUT_S: Final = 30.0  # W&B's own 90 s are long for a cell
FINISH_TIMEOUT_S: Final = 120.0  # what is not uploaded by then stays on disk for `wandb sync`
_PAPERS: Final = {"cdka": "CDKA", "kron_lora": "Kron-LoRA"}
_LONGEST_TAG: Final = 64  # W&B refuses longer ones
_LEDGER: Final = "pushed.json"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """Where runs go: a W&B project, or files that `wandb sync` uploads to it."""

    project: str
    entity: str | None
    mode: str
    results: Path

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r}: must be one of {', '.join(MODES)}")

    @property
    def folder(self) -> Path:
        """Where W&B keeps its files: below WANDB_DIR if that is set, else below the results."""
        return Path(os.environ.get("WANDB_DIR") or self.results).resolve() / "wandb"

    @property
    def name(self) -> str:
        return f"{self.mode}:{self.entity or ''}/{self.project}"


@dataclass(frozen=True)
class View:
    """What W&B is told of a cell before anything runs."""

    id: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: dict[str, Any] = field(hash=False)


def view(record: Record, *, group: str | None = None) -> View:
    """A record, or its frame before anything runs, as a W&B run.

    Args:
        group: by default the table that the cell was made for, as its command says; else the task.
    """
    science = record["config"]
    trained = "task" in science
    method, model = science["method"]["name"], science["model"]["name"]
    tasks = [task["name"] for task in [*(science.get("after") or []), science["task"]]] if trained else []
    about = {key: record[key] for key in ("id", "train_id", "scale", "name", "label", "command", "started")}
    tags = [f"paper:{_PAPERS[method]}"] if method in _PAPERS else ["baseline"]
    tags += [f"method:{method}", f"model:{model}", f"scale:{record['scale']}", *(f"task:{task}" for task in tasks)]
    tags += [f"seed:{science['seed']}"] if trained else []
    return View(
        id=record["id"],
        name=record["name"],
        group=group or _table(record["command"]) or " then ".join(tasks) or next(iter(science["eval"])),
        job_type="train" if trained else "grade",
        tags=tuple(tag[:_LONGEST_TAG] for tag in dict.fromkeys(tags)),
        config={**science, "cell": about | {key: record[key] for key in ("versions", "git", "machine")}},
    )


def _table(command: str) -> str | None:
    found = re.search(r"(?:^|\s)table=([\w-]+)", command)
    return found[1] if found else None


def summary(record: Record, *, link: str | None = None) -> dict[str, Any]:
    """State, scores, cost and links of a record, flat: `gsm8k/exact_match`, `parameters/trainable`, `training/seconds`.

    Args:
        link: what stands before `runs/<scale>/...` in the links to the record and its samples; None: nothing.
    """
    where = f"{link.rstrip('/')}/" if link else ""
    folder = f"{where}runs/{record['scale']}/{record['id']}"
    told: dict[str, Any] = {"status": record["status"], "record": f"{folder}.json"}
    if record["error"]:
        told["error"] = str(record["error"]).strip().splitlines()[-1]
    sections = {"parameters": "parameters", "storage": "storage", "train": "training"}  # train/ is what a step logs
    for section, shown in sections.items():
        told |= {f"{shown}/{key}": value for key, value in (record.get(section) or {}).items() if _plain(value)}
    if record.get("eval_peak_memory_bytes") is not None:
        told["eval_peak_memory_bytes"] = record["eval_peak_memory_bytes"]
    for name, result in (record.get("eval") or {}).items():
        for metric, score in result["metrics"].items():
            told[f"{name}/{metric}"] = score["value"]
            if score.get("stderr") is not None:
                told[f"{name}/{metric}_stderr"] = score["stderr"]
            told[f"{name}/n"] = score["n"]
        told[f"{name}/seconds"] = result["seconds"]
        told[f"{name}/samples"] = f"{folder}/{name}/samples.jsonl"
    return told


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def point(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of `loss.jsonl` as it is logged at its step."""
    rate = line["tokens"] / line["seconds"] if line["seconds"] else math.nan
    return {"train/loss": line["loss"], "train/lr": line["lr"], "train/tokens_per_s": rate}


def headlines(records: Iterable[Record]) -> list[str]:
    """`<eval>/<metric>` of every eval's headline metric, in the order in which they are met."""
    found: dict[str, None] = {}
    for record in records:
        for name, result in (record.get("eval") or {}).items():
            found[f"{name}/{next(iter(result['metrics']))}"] = None
    return list(found)


# ------------------------------------------------------------------------------------------------- talking to W&B


def open_run(shown: View, target: Target, *, resume: bool, live: bool) -> Any:
    """A W&B run beside all that are open already.

    An offline run cannot be appended to: `wandb sync` writes the files of a run one over the other, each from its first
    line. So an offline run is always told its whole history, and takes the place of the files of earlier sittings.

    Args:
        resume: go on in the run where the server has one of this id; else it is written anew from its first step.
        live: the cell runs here and now, so this machine's state belongs to it.

    Raises:
        Exception: whatever W&B raises: it is not installed, nobody is logged in, the server cannot be reached.
    """
    import wandb

    online = target.mode == "online"
    if not online:
        for earlier in target.folder.glob(f"offline-run-*-{shown.id}"):
            shutil.rmtree(earlier, ignore_errors=True)
    target.folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True,
        console="off",
        reinit="create_new",
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        disable_git=True,  # the record has the commit that it was made with
        save_code=False,
        x_disable_stats=not live,
        x_disable_meta=not live,
        x_disable_machine_info=not live,
        x_save_requirements=False,
    )
    return wandb.init(
        id=shown.id,
        name=shown.name,
        project=target.project,
        entity=target.entity,
        group=shown.group,
        job_type=shown.job_type,
        tags=shown.tags,
        config=shown.config,
        dir=str(target.folder.parent),
        mode="online" if online else "offline",
        resume="allow" if online and resume else None,
        settings=settings,
    )


def close_run(run: Any, record: Record, *, link: str | None) -> None:
    """Tell the outcome; a cell that failed is a failed run, one that diverged has finished with that outcome."""
    for key, value in summary(record, link=link).items():
        run.summary[key] = value
    run.finish(exit_code=1 if record["status"] == FAILED else 0)


def require_server() -> None:
    """Make sure that a run can be opened online, without ever asking for a key: a sweep would wait all night.

    Raises:
        ConfigError: no credentials are known, or the server does not answer.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    if not wbauth.authenticate_session(host=host, source="kronlab", prompt=False):
        raise ConfigError(f"not logged in to {host}; run `wandb login`, set WANDB_API_KEY, or use mode=offline")
    try:
        requests.get(host, timeout=ANSWER_TIMEOUT_S)
    except requests.RequestException as error:
        raise ConfigError(f"{host} does not answer ({type(error).__name__})") from error


def default_entity() -> str:
    """The entity of whoever is logged in."""
    import wandb

    return str(wandb.Api().default_entity)


# ------------------------------------------------------------------------------------------------- records to runs


def push(
    store: Store,
    records: Sequence[Record],
    target: Target,
    *,
    group: str | None = None,
    link: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> tuple[list[str], list[str]]:
    """Make the run of every record that has changed since it was last pushed there.

    A run is written from its first step, over what W&B has under its id; a list of what was pushed lies beside W&B's
    files, so that a push that is stopped goes on, and one that is typed again does nothing.

    Args:
        group, link: see `view` and `summary`.

    Returns:
        the ids that were pushed, and those that W&B has as they are.
    """
    ledger = target.folder / _LEDGER
    known: dict[str, dict[str, str]] = json.loads(ledger.read_text()) if ledger.is_file() else {}
    there = known.setdefault(target.name, {})
    pushed: list[str] = []
    unchanged: list[str] = []
    with bar(total=len(records), done=0, what="W&B", unit="run", show=progress) as shown:
        for record in records:
            told = view(record, group=group)
            points = [
                (line["step"], point(line))
                for line in read_jsonl(store.folder(record["scale"], record["id"]) / "loss.jsonl")
            ]
            content = digest([told.config, told.group, told.tags, summary(record, link=link), points])
            fresh = force or there.get(record["id"]) != content
            if fresh:
                run = open_run(told, target, resume=False, live=False)
                for step, values in points:
                    run.log(values, step=step, commit=True)
                close_run(run, record, link=link)
                there[record["id"]] = content
                write_json(ledger, known)
            (pushed if fresh else unchanged).append(record["id"])
            shown.update(skipped=not fresh)
    return pushed, unchanged
