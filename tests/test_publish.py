"""Publishing: the folder loads like any adapter of the hub, the hub's own reader reads its card, nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn

from kronlab import models
from kronlab.cell import Cell
from kronlab.errors import ConfigError
from kronlab.experiment import DTYPES, run_cell
from kronlab.publish import publish, wanted

LORA_ALIKE = ("method=cdka", "method.r2=8", "trainer.lr=0.1")


def base(cell: Cell) -> nn.Module:
    network, _ = models.load(cell.config["model"], dtype=DTYPES["fp32"])
    return network.eval()


@torch.no_grad()
def logits(network: nn.Module) -> torch.Tensor:
    return network(input_ids=torch.arange(40).reshape(2, 20)).logits


def test_what_is_published_loads_and_its_card_is_read(make: Callable[..., Cell], tmp_path: Path) -> None:
    """As it was trained, and as a LoRA of the same function; a second seed is told beside the first."""
    out = tmp_path / "out"
    cell = make(*LORA_ALIKE, f"publish.dir={out}")
    record = run_cell(cell)
    run_cell(make(*LORA_ALIKE, "seed=1"))
    ours = publish(cell, record)
    as_lora_cell = make(*LORA_ALIKE, f"publish.dir={out}", "publish.as_lora=true")
    assert as_lora_cell.id == cell.id
    plain = publish(as_lora_cell, record)
    assert ours is not None
    assert plain is not None
    assert {p.name for p in ours.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "record.json",
    }  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == sorted([ours.name, plain.name])
    untrained = logits(base(cell))
    trained = logits(PeftModel.from_pretrained(base(cell), ours).eval())
    assert (trained - untrained).abs().max() > 1e-3
    assert json.loads((plain / "adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(cell), plain).eval()), trained)
    card = ModelCard.load(ours / "README.md")
    told = card.data.to_dict()
    assert told["library_name"] == "peft"
    assert told["license"] == "other"
    assert "base_model" not in told, "random weights are on no hub"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: m["value"] for name, m in record["eval"]["chain_sum"]["metrics"].items()}
    assert "import kronlab" in card.text
    assert "import kronlab" not in ModelCard.load(plain / "README.md").text
    assert [line.split(" | ")[2] for line in card.text.splitlines() if line.startswith("| chain_sum | nll")] == [
        "0",
        "1",
    ]
    assert json.loads((ours / "record.json").read_text()) == record


def test_the_base_model_is_named_as_the_hub_does(make: Callable[..., Cell], tmp_path: Path) -> None:
    cell = make("method=lora", f"publish.dir={tmp_path / 'out'}")
    record = run_cell(cell)
    cell.config["model"] |= {"hub": "somebody/a-model", "licence": "Apache-2.0"}
    folder = publish(cell, record)
    assert folder is not None
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/a-model"
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.license) == ("somebody/a-model", "apache-2.0")
    assert 'AutoModelForCausalLM.from_pretrained("somebody/a-model")' in card.text


def test_without_a_token_the_folder_is_made_and_the_hub_is_not_asked(
    make: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    cell = make("method=lora", f"publish.dir={tmp_path / 'out'}", "publish.hub=somebody")
    record = run_cell(cell)
    with pytest.raises(ConfigError, match=r"publish\.hub: no token for the hub; .* The folder is made: "):
        publish(cell, record)
    assert len(list((tmp_path / "out").glob("*/README.md"))) == 1


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method=full", "publish.dir=x"], "publish.dir: method=full makes no adapter"),
        (["method=none", "publish.dir=x"], "publish.dir: method=none makes no adapter"),
        (["method=lora", "publish.dir=x", "publish.as_lora=true"], "publish.as_lora=true: method=lora is no CDKA"),
        (["method=lora", "publish.hub=me"], "publish.hub='me': needs publish.dir"),
        (["method=lora", "publish.dir=x", "adapter_storage.bits=4"], "publish.dir: scores of an adapter_storage"),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_runs(
    make: Callable[..., Cell], overrides: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        wanted(make(*overrides).config)
    assert not wanted(make("method=lora").config)
