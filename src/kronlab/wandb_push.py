"""`make wandb-push`: choose records, mirror them to W&B, save the dashboards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kronlab.cell import CONFIG_DIR, SCALES
from kronlab.data.common import did_you_mean
from kronlab.errors import ConfigError
from kronlab.methods import METHODS
from kronlab.report.wandb_dashboard import save
from kronlab.report.wandb_mirror import Record, Target, push, require_server, view
from kronlab.reproduce import load_rows
from kronlab.runs import Store

log = logging.getLogger(__name__)


def wandb_push(config: Mapping[str, Any]) -> None:
    """Do what `config` (configs/wandb.yaml) asks for.

    Raises:
        ConfigError: a setting is wrong, there is no such record, nobody is logged in, or the server does not answer.
    """
    target = Target(config["project"], config["entity"], config["mode"], Path(config["results"]["dir"]))
    if config["dashboard"] and target.mode != "online":
        raise ConfigError("dashboard=true: a dashboard is saved on the server; add mode=online")
    only, store = config["only"], Store(target.results)
    found = chosen(store, only)
    if not found:
        raise ConfigError(f"no such record under {store.results / 'runs'}; look at only.scale, only.table, only.method")
    if config["dry_run"]:
        for record in found:
            told = view(record, group=only["table"])
            log.info("%s  %-10s %s", told.id, told.group, told.name)
        return
    if target.mode == "online":
        require_server()
    pushed, unchanged = push(store, found, target, group=only["table"], link=config["link"], force=config["force"])
    log.info("%d runs pushed, %d unchanged (%s)", len(pushed), len(unchanged), target.name)
    if target.mode == "offline" and pushed:
        log.info("upload them with: wandb sync %s", target.folder)
    if config["dashboard"]:
        for address in save(found, target):
            log.info("dashboard: %s", address)


def chosen(store: Store, only: Mapping[str, Any]) -> list[Record]:
    """The records that scale, table and method pick, each once, in the order of scales and ids.

    Raises:
        ConfigError: there is no such scale, table or method.
    """
    for key, known in (("scale", SCALES), ("table", _tables()), ("method", METHODS)):
        if only[key] is not None and only[key] not in known:
            raise ConfigError(f"only.{key}={only[key]}: no such {key}{did_you_mean(only[key], known)}")
    found = {}
    for scale in [only["scale"]] if only["scale"] else SCALES:
        for record in _records(store, scale, only["table"]):
            if only["method"] in (None, record["config"]["method"]["name"]):
                found[record["scale"], record["id"]] = record
    return list(found.values())


def _records(store: Store, scale: str, table: str | None) -> Iterator[Record]:
    if table is None:
        yield from store.records(scale)
        return
    loaded = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "table" / f"{table}.yaml"), resolve=True)
    assert isinstance(loaded, dict)
    spec = {str(key): value for key, value in loaded.items()}
    if scale in spec["scales"]:
        for row in load_rows(spec, scale, store.results):
            yield from (record for record in row.records if record is not None)


def _tables() -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / "table").glob("*.yaml"))
