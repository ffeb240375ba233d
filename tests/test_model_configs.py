"""The model configurations build the exact published architectures on the meta device, with no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

FOLDER = Path(__file__).resolve().parents[1] / "configs/model"
AUTO = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "multiple_choice": transformers.AutoModelForMultipleChoice,
}
KEYS = {
    *("name", "architecture", "hub", "revision", "directory", "pypi", "gated", "licence", "config"),
    *("target_modules", "modules_to_save"),
}
# Total parameters with the published head, and of the encoder alone where the head is new.
PUBLISHED = {
    "llama2_7b": (6_738_415_616, None),
    "llama3_8b": (8_030_261_248, None),
    "llama3_1_8b": (8_030_261_248, None),
    "mistral_7b": (7_241_732_096, None),
    "t5_base": (222_903_552, None),
    "deberta_v3_base": (183_831_552 + 592_130, 183_831_552),  # pooler 768² + 768, two classes 2·768 + 2
    "distilbert": (66_362_880 + 591_361, 66_362_880),  # pre_classifier 768² + 768, one score 768 + 1
}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def build_config(name: str) -> transformers.PretrainedConfig:
    arguments = dict(load(name)["config"])
    return transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)


def build(name: str) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return AUTO[load(name)["architecture"]].from_config(build_config(name))


@pytest.fixture(scope="module", params=PUBLISHED)
def built(request: pytest.FixtureRequest) -> tuple[str, transformers.PreTrainedModel]:
    return request.param, build(request.param)


def test_parameter_counts_are_the_published_ones(built: tuple[str, transformers.PreTrainedModel]) -> None:
    name, model = built
    total, encoder = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == total
    if encoder is not None:
        assert sum(p.numel() for p in model.base_model.parameters()) == encoder


def test_target_modules_name_every_linear_once(built: tuple[str, transformers.PreTrainedModel]) -> None:
    """Each entry of a list finds layers, and what neither targets nor modules_to_save cover is nothing."""
    name, model = built
    settings = load(name)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    saved = settings["modules_to_save"] or []
    left = [n for n in linears if not any(part in saved for part in n.split("."))]
    assert all(any(part == s for n in linears for part in n.split(".")) for s in saved)
    if settings["target_modules"] == "all-linear":
        return
    for target in settings["target_modules"]:
        assert any(n == target or n.endswith(f".{target}") for n in left), f"{target} names no layer"
    uncovered = [n for n in left if not any(n.endswith(f".{t}") for t in settings["target_modules"])]
    assert uncovered == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_schema(name: str) -> None:
    settings = load(name)
    assert set(settings) == KEYS
    assert settings["name"] == name
    assert settings["architecture"] in AUTO
    assert isinstance(settings["gated"], bool)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_setting_arrives_in_the_config(name: str) -> None:
    """No key is misspelt (it would be kept, and read by nothing), and no value is lost."""
    given = dict(load(name)["config"])
    config = build_config(name)
    # DeBERTa-v2 and T5 read these from the config without declaring them.
    undeclared = {"position_buckets", "norm_rel_ebd", "share_att_key", "decoder_start_token_id"}
    rope = {"rope_theta", "rope_scaling"}  # transformers 5 keeps both in rope_parameters
    declared = set(type(config)().to_dict()) | set(type(config).attribute_map) | undeclared | rope
    assert sorted(set(given) - declared) == []
    for key, value in given.items():
        if key == "rope_theta":
            assert config.rope_parameters["rope_theta"] == value
        elif key == "rope_scaling":
            assert value.items() <= config.rope_parameters.items()
        else:
            assert getattr(config, key) == value, key


def test_only_llama_3_1_rescales_its_positions() -> None:
    kinds = {
        n: build_config(n).rope_parameters["rope_type"] for n in ("llama2_7b", "llama3_8b", "llama3_1_8b", "mistral_7b")
    }
    assert kinds == {
        "llama2_7b": "default",
        "llama3_8b": "default",
        "llama3_1_8b": "llama3",
        "mistral_7b": "default",
    }


def test_t5_ties_its_embeddings_and_deberta_shares_its_attention_keys() -> None:
    t5 = build("t5_base")
    assert t5.lm_head.weight is t5.shared.weight
    attention = build("deberta_v3_base").deberta.encoder.layer[0].attention.self
    assert not hasattr(attention, "pos_key_proj"), "share_att_key=true: positions have no projections of their own"
    assert attention.position_buckets == 256
