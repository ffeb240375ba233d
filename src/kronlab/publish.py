"""A trained adapter with a model card, in the layout of the Hugging Face hub: `publish.dir=...` of scripts/train.py.

<publish.dir>/<name>-<id>/
    README.md                    the card: what it is, its scores, how to load it; YAML front matter as the hub reads it
    adapter_config.json, adapter_model.safetensors
    record.json                  the cell's record, with every setting
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kronlab import methods, models, runs
from kronlab.adapters.convert import convert
from kronlab.cell import Cell
from kronlab.errors import CheckpointError, ConfigError
from kronlab.runs import Store, write_json

log = logging.getLogger(__name__)
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = ("cdka", "kron_lora")  # PEFT knows these kinds once kronlab is imported
_LICENCES = {"apache-2.0": "apache-2.0", "apache 2.0": "apache-2.0", "mit": "mit"}
_PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "image_classification": "image-classification",
}


def wanted(config: Mapping[str, Any]) -> bool:
    """Whether a cell is to be published when it is done.

    Raises:
        ConfigError: it cannot be.
    """
    settings, method = config["publish"], config["method"]["name"]
    if settings["dir"] is None:
        for key in ("hub", "as_lora"):
            if settings[key]:
                raise ConfigError(f"publish.{key}={settings[key]!r}: needs publish.dir, the folder for the adapter")
        return False
    if not methods.trains(config["method"]) or method == "full":
        raise ConfigError(f"publish.dir: method={method} makes no adapter to publish")
    if config["adapter_storage"]:
        raise ConfigError("publish.dir: scores of an adapter_storage are not those of the weights; publish without it")
    if settings["as_lora"] and method not in _OURS:
        raise ConfigError(f"publish.as_lora=true: method={method} is no CDKA or Kron-LoRA; publish it as it is")
    return True


def publish(cell: Cell, record: Mapping[str, Any]) -> Path | None:
    """Write the folder of a cell that is done, whole or not at all, and send it to the hub if `publish.hub` says so.

    Returns:
        The folder; None if the cell has diverged, which is said.

    Raises:
        ConfigError: there is no token for the hub, or the hub refuses.
        CheckpointError: its weights are not there.
    """
    settings = cell.config["publish"]
    if record["status"] != runs.DONE:
        log.info("%s: %s, not published", cell.name, record["status"])
        return None
    store = Store(cell.config["results"]["dir"])
    final = store.final(cell.train_id)
    if not (final / _WEIGHTS).is_file():
        raise CheckpointError(f"{final / _WEIGHTS} is not there; force=true trains the cell again")
    folder = Path(settings["dir"]) / _slug(cell, as_lora=settings["as_lora"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        scratch = Path(made) / folder.name
        scratch.mkdir()
        if settings["as_lora"]:
            convert(final, "lora", scratch)
        else:
            for name in (_CONFIG, _WEIGHTS):
                shutil.copyfile(final / name, scratch / name)
        adapter = json.loads((scratch / _CONFIG).read_text())
        adapter["base_model_name_or_path"] = cell.config["model"].get("hub")
        write_json(scratch / _CONFIG, adapter)
        write_json(scratch / "record.json", record)
        (scratch / "README.md").write_text(card(cell, record, _other_seeds(cell, store), as_lora=settings["as_lora"]))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    log.info("%s: published in %s", cell.name, folder)
    if settings["hub"]:
        _upload(folder, f"{settings['hub']}/{folder.name}", private=bool(settings["private"]))
    return folder


def _slug(cell: Cell, *, as_lora: bool) -> str:
    method, model, task = (cell.config[section]["name"] for section in ("method", "model", "task"))
    words = [method, "as_lora" if as_lora else "", model, task, f"seed{cell.config['seed']}", cell.id]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(word for word in words if word))


def _other_seeds(cell: Cell, store: Store) -> list[dict[str, Any]]:
    """Records of cells that differ from this one in the seed alone."""

    def but_seed(science: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in science.items() if key != "seed"}

    ours = but_seed(cell.science)
    return [
        record
        for record in store.records(cell.scale, corrupt="skip")
        if record["id"] != cell.id and record["status"] == runs.DONE and but_seed(record["config"]) == ours
    ]


def card(cell: Cell, record: Mapping[str, Any], others: list[dict[str, Any]], *, as_lora: bool = False) -> str:
    """The model card of an adapter.

    Args:
        others: records of the same cell at other seeds, to be told beside its own.
    """
    config = cell.config
    model, method = config["model"], config["method"]
    title = f"{record['label']} on {model['name']}, trained on {config['task']['name']}"
    base = model.get("hub") or f"{model['name']} ({model['source']} weights)"
    train, parameters = record["train"], record["parameters"]
    settings = {key: value for key, value in method.items() if key not in ("label", "path") and value is not None}
    front = yaml.safe_dump(_front_matter(cell, record, title), sort_keys=False, allow_unicode=True)
    rows = "\n".join(_score_rows([record, *others]))
    form = ", written as a plain LoRA with the same function" if as_lora else ""
    return f"""---
{front}---

# {title}

- Base model: {base}; its licence: {model.get("licence") or "not known"}
- Method: {record["label"]}{form} (`{json.dumps(settings)}`)
- Trainable parameters: {parameters["trainable"]:,} of {parameters["total"]:,}
- Training: {train["steps"]} steps, {train["examples"]} examples, {train["tokens"]:,} tokens,
  learning rate {config["trainer"]["lr"]:g}, seed {config["seed"]}
- Made by kronlab {record["versions"]["kronlab"]}, commit {record["git"]["commit"]}: `{record["command"]}`

## Scores

n: graded examples; the interval is one over examples, at 95 %.

| eval | metric | seed | n | value | interval |
|---|---|---:|---:|---:|---|
{rows}

## How to load it

```python
{_loading(cell, as_lora=as_lora)}
```

`record.json` holds every setting, and what was measured.
"""


def _front_matter(cell: Cell, record: Mapping[str, Any], title: str) -> dict[str, Any]:
    """What the hub reads of a card."""
    model, method = cell.config["model"], cell.config["method"]["name"]
    licence = str(model.get("licence") or "not known")
    known = _LICENCES.get(licence.lower())
    seed = cell.config["seed"]
    results = [
        {
            "task": {"type": _PIPELINES.get(model["architecture"], "other")},
            "dataset": {"name": name, "type": name, "split": cell.config["eval"][name].get("split")},
            "metrics": [
                {"type": metric, "value": found["value"], "name": f"{metric} (n={found['n']}, seed {seed})"}
                for metric, found in section["metrics"].items()
            ],
        }
        for name, section in record["eval"].items()
    ]
    front: dict[str, Any] = {"library_name": "peft"}
    if model.get("hub"):
        front |= {"base_model": model["hub"], "base_model_relation": "adapter"}
    front |= {"license": known} if known else {"license": "other", "license_name": licence}
    if model["architecture"] in _PIPELINES:
        front["pipeline_tag"] = _PIPELINES[model["architecture"]]
    front["tags"] = ["kronlab", method, "peft"]
    front["model-index"] = [{"name": title, "results": results}]
    return front


def _score_rows(records: list[Mapping[str, Any]]) -> list[str]:
    rows = []
    for name, section in records[0]["eval"].items():
        for metric in section["metrics"]:
            for record in records:
                found = record["eval"][name]["metrics"][metric]
                interval = " to ".join(f"{end:.4f}" for end in found.get("ci95") or [])
                seed, value = record["config"]["seed"], f"{found['value']:.4f}"
                rows.append(f"| {name} | {metric} | {seed} | {found['n']} | {value} | {interval} |")
    return rows


def _loading(cell: Cell, *, as_lora: bool) -> str:
    model = cell.config["model"]
    auto = models.AUTO_CLASSES[model["architecture"]]
    lines = [f"from transformers import {auto}", "from peft import PeftModel"]
    if cell.config["method"]["name"] in _OURS and not as_lora:
        lines.insert(0, "import kronlab  # makes the kind of adapter known to PEFT")
    if model.get("hub"):
        lines += ["", f'base = {auto}.from_pretrained("{model["hub"]}")']
    else:
        lines += ["", f"base = ...  # kronlab's model={model['name']}"]
    return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "path/of/this/folder")'])


def _upload(folder: Path, repo: str, *, private: bool) -> None:
    """Send a folder to the hub.

    Raises:
        ConfigError: no token, or the hub says no.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ConfigError(
            f"publish.hub: no token for the hub; `hf auth login` or HF_TOKEN gives one. The folder is made: {folder}"
        )
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(f"publish.hub: HF_HUB_OFFLINE is set; the folder is made: {folder}")
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"kronlab {folder.name}")
    except Exception as error:  # of many kinds: what the hub refuses, and whatever the network does
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"publish.hub={repo}: {reason}; the folder is made: {folder}") from error
    log.info("uploaded: %s", done)
