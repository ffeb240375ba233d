"""The adapter bank: what goes in comes out, one at a time and mixed; what does not fit is refused, nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from kronlab.adapters.quantize import PACKED_FILE
from kronlab.bank import AdapterBank
from kronlab.errors import CheckpointError, ConfigError

MakeConfig = Callable[..., Any]
Fill = Callable[..., nn.Module]
# A bank, and by name the model that each of its adapters was saved from.
Filled = tuple[AdapterBank, dict[str | None, Any]]
DOUBLE = torch.float64
NAMES = ("sums", "poems", "v1.2-b", "base_model")  # the last one is part of every tensor's name


def lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **settings})


def shake(model: nn.Module, seed: int) -> nn.Module:
    """Random values for everything that an adapter of any method trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "cdka_", "ia3_", "modules_to_save.")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(params=["lora", "cdka", "kron_lora"])
def config_of(request: pytest.FixtureRequest) -> MakeConfig:
    """LoRA and both of our methods, as a function of further settings."""
    from kronlab.adapters import CdkaConfig, KronLoraConfig

    return {
        "lora": lora_config,
        "cdka": lambda **kw: CdkaConfig(**{"r1": 2, "r2": 4, "r": 3, "alpha": 8, **kw}),
        "kron_lora": lambda **kw: KronLoraConfig(**{"r": 3, "d_a2": 4, "alpha": 8, **kw}),
    }[request.param]


def trained(tiny: Any, config: Any, seed: int, folder: Path) -> PeftModel:
    """A PEFT model whose adapter has random values, saved to a folder."""
    config.task_type = tiny.task
    model: Any = shake(get_peft_model(tiny.model(dtype=DOUBLE), config), seed)
    model.to(DOUBLE).eval().save_pretrained(str(folder))
    return model


def settings_of(i: int) -> dict[str, Any]:
    """The third adapter has another size."""
    return {"r": 2} if i == 2 else {}


@pytest.fixture
def filled(llama: Any, config_of: MakeConfig, tmp_path: Path) -> Filled:
    """A bank of four adapters and two places, and what each adapter's own model does."""
    bank = AdapterBank(llama.model(dtype=DOUBLE), tmp_path / "bank", max_loaded=2)
    own: dict[str | None, Any] = {None: llama.model(dtype=DOUBLE)}
    for i, name in enumerate(NAMES):
        own[name] = trained(llama, config_of(**settings_of(i)), i, tmp_path / f"source{i}")
        bank.add(name, tmp_path / f"source{i}")
    return bank, own


def batch_of(rows: int) -> dict[str, Tensor]:
    """Rows of different length, padded on the left."""
    ids = torch.arange(rows * 6).view(rows, 6) % 37 + 3
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any) -> Tensor:
    return model(**batch_of(3)).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@torch.no_grad()
def test_what_goes_in_comes_out_whatever_is_in_memory(filled: Filled) -> None:
    bank, own = filled
    assert (bank.names, len(bank), len(bank.loaded)) == (NAMES, 4, 2)
    for name in (*NAMES, None, "sums", "poems", "sums", None, "v1.2-b", "base_model", "sums"):
        with bank.use(name) as model:
            close(logits(model), logits(own[name]))
        assert len(bank.loaded) <= 2
        assert name is None or bank.loaded[-1] == name
        close(logits(bank.model), logits(own[None]))
    assert all(not p.requires_grad for p in bank.model.parameters())


@torch.no_grad()
def test_use_within_use(filled: Filled) -> None:
    bank, own = filled
    with bank.use("sums") as outer:
        with bank.use("v1.2-b") as inner:
            close(logits(inner), logits(own["v1.2-b"]))
            with pytest.raises(ConfigError, match="3 adapters at a time, and max_loaded=2"), bank.use("poems"):
                pass
            with bank.use(None) as base:
                close(logits(base), logits(own[None]))
            close(logits(inner), logits(own["v1.2-b"]))
        close(logits(outer), logits(own["sums"]))
        for change in (lambda: bank.remove("sums"), lambda: bank.add("sums", "anything", replace=True)):
            with pytest.raises(ConfigError, match="'sums' is in use"):
                change()
        with bank.use("base_model") as other:  # takes the place of the one that is not in use
            close(logits(other), logits(own["base_model"]))
        close(logits(outer), logits(own["sums"]))


@torch.no_grad()
def test_a_mixed_batch_is_one_at_a_time(filled: Filled) -> None:
    bank, own = filled
    for names in (
        ["sums", None, "v1.2-b", "sums"],
        ["poems", "poems", None, None],
        [None] * 4,
        ["base_model"] * 4,
        ["v1.2-b", "base_model", "v1.2-b", "base_model"],
    ):
        batch = batch_of(4)
        mixed = bank.forward(batch, names).logits
        for i, name in enumerate(names):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            close(mixed[i : i + 1], own[name](**row).logits)
            close(mixed[i : i + 1], bank.forward(row, [name]).logits)
    close(logits(bank.model), logits(own[None]))


def test_mixed_generation_is_one_at_a_time(filled: Filled) -> None:
    bank, own = filled
    names = ["sums", None, "v1.2-b", "sums"]
    batch, how = batch_of(4), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mixed = bank.generate(batch, names, **how)
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        assert torch.equal(mixed[i : i + 1], own[name].generate(**row, **how)), name


@torch.no_grad()
def test_a_bank_opened_again_reads_when_asked(filled: Filled, llama: Any, tmp_path: Path) -> None:
    first, own = filled
    again = AdapterBank(llama.model(dtype=DOUBLE), tmp_path / "bank", max_loaded=3)
    assert (again.names, again.loaded, again.loaded_bytes, again.method) == (NAMES, (), 0, first.method)
    close(again.forward(batch_of(3), ["sums"] * 3).logits, logits(own["sums"]))
    assert again.loaded == ("sums",)
    entry = again.entry("sums")
    files = list((tmp_path / "bank" / entry.folder).iterdir())
    assert entry.bytes == sum(file.stat().st_size for file in files)
    assert again.loaded_bytes == entry.parameters * again._slots["sums"].tensors.popitem()[1].element_size()
    plain = PeftModel.from_pretrained(llama.model(dtype=DOUBLE), str(tmp_path / "bank" / entry.folder)).eval()
    close(logits(plain.to(DOUBLE)), logits(own["sums"]))
    again.remove("sums")
    assert "sums" not in again
    assert not (tmp_path / "bank" / entry.folder).exists()
    assert AdapterBank(llama.model(dtype=DOUBLE), tmp_path / "bank").names == NAMES[1:]
    # A model of the same weights in 16 bits is the same base.
    assert AdapterBank(llama.model(dtype=DOUBLE).float().bfloat16(), tmp_path / "bank").names == NAMES[1:]


@torch.no_grad()
def test_packed_adapters_and_peft_models(llama: Any, config_of: MakeConfig, tmp_path: Path) -> None:
    model = trained(llama, config_of(), 1, tmp_path / "source")
    bank = AdapterBank(llama.model(dtype=DOUBLE), tmp_path / "bank")
    plain, packed = bank.add("plain", model), bank.add("packed", tmp_path / "source", bits=8)
    coarse = bank.add("coarse", model, kind="int4", group_size=16)
    assert (plain.kind, packed.kind, coarse.kind) == (None, "int8", "int4")
    assert plain.parameters == packed.parameters == coarse.parameters
    exact = logits(model)
    close(bank.forward(batch_of(3), ["plain"] * 3).logits, exact)
    errors = [float((bank.forward(batch_of(3), [n] * 3).logits - exact).norm()) for n in ("packed", "coarse")]
    assert 0 < errors[0] < 0.2 * errors[1]
    again = bank.add("again", tmp_path / "bank" / packed.folder)  # a packed folder is a source too
    assert again.sha256 == packed.sha256
    # Plain and packed ones in one batch; and PEFT loads the packed folder by itself.
    mixed = bank.forward(batch_of(3), ["plain", "packed", None]).logits
    close(mixed[1], bank.forward(batch_of(3), ["packed"] * 3).logits[1])


@torch.no_grad()
def test_replacing_an_adapter(filled: Filled, tmp_path: Path) -> None:
    bank, own = filled
    old = bank.entry("sums").folder
    with pytest.raises(ConfigError, match="already; remove it first, or give replace=True"):
        bank.add("sums", tmp_path / "source1")
    bank.add("sums", tmp_path / "source1", replace=True)
    close(bank.forward(batch_of(3), ["sums"] * 3).logits, logits(own["poems"]))
    assert not (tmp_path / "bank" / old).exists()


@torch.no_grad()
def test_every_adapter_as_lora(filled: Filled, llama: Any, tmp_path: Path) -> None:
    bank, own = filled
    errors = bank.export_lora(tmp_path / "exported")
    assert list(errors) == list(NAMES)
    for name in NAMES:
        config = json.loads((tmp_path / "exported" / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        loaded = PeftModel.from_pretrained(llama.model(dtype=DOUBLE), str(tmp_path / "exported" / name))
        torch.testing.assert_close(logits(loaded.to(DOUBLE).eval()), logits(own[name]), rtol=0, atol=1e-4)


# ---- what is wrong is said in one line, and nothing is lost


@torch.no_grad()
def test_what_does_not_fit_is_not_added(filled: Filled, llama: Any, config_of: MakeConfig, tmp_path: Path) -> None:
    bank, own = filled
    before = sorted(path.name for path in (tmp_path / "bank").iterdir())

    other = llama.build(hidden_size=64).eval()
    shake(get_peft_model(other, config_of(task_type=llama.task)), 0).save_pretrained(str(tmp_path / "wide"))
    deep = llama.build(num_hidden_layers=3).eval()
    shake(get_peft_model(deep, config_of(task_type=llama.task)), 0).save_pretrained(str(tmp_path / "deep"))
    broken = tmp_path / "broken"
    trained(llama, config_of(), 7, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    ia3 = tmp_path / "ia3"
    get_peft_model(llama.model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        str(ia3)
    )
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "wide", "shape .* wants .*model of other sizes"),
        (tmp_path / "deep", "has unknown .* another base model"),
        (broken, "cannot be read as safetensors"),
        (ia3, "holds (lora|cdka|kron_lora) adapters, and 'new' is ia3"),
        (tmp_path / "empty", "adapter_config.json is not there"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
            bank.add("new", source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"adapter name '\.\./up': use letters"):
        bank.add("../up", tmp_path / "source0")
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        bank.add("new", own["sums"], adapter_name="other")
    assert bank.names == NAMES
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == before
    for name in (*NAMES, None):
        close(bank.forward(batch_of(3), [name] * 3).logits, logits(own[name]))


@torch.no_grad()
def test_the_first_one_that_does_not_fit_leaves_the_model_as_it_was(
    llama: Any, config_of: MakeConfig, tmp_path: Path
) -> None:
    trained(llama, config_of(modules_to_save=["norm"]), 0, tmp_path / "good")
    wide = get_peft_model(llama.build(hidden_size=64), config_of(task_type=llama.task, modules_to_save=["norm"]))
    wide.save_pretrained(str(tmp_path / "wide"))
    model = llama.model(dtype=DOUBLE)
    modules = {name: type(module) for name, module in model.named_modules()}
    bank = AdapterBank(model, tmp_path / "bank")
    with pytest.raises(CheckpointError, match="model of other sizes"):
        bank.add("new", tmp_path / "wide")
    assert {name: type(module) for name, module in model.named_modules()} == modules
    bank.add("new", tmp_path / "good")
    bank.remove("new")
    assert {name: type(module) for name, module in model.named_modules()} == modules
    close(logits(model), logits(llama.model(dtype=DOUBLE)))


@torch.no_grad()
def test_damage_on_the_disk_is_noticed(filled: Filled, llama: Any, tmp_path: Path) -> None:
    bank, own = filled
    folder = tmp_path / "bank" / bank.entry("poems").folder
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # one bit of one value
    weights.write_bytes(content)
    again = AdapterBank(llama.model(dtype=DOUBLE), tmp_path / "bank")
    with pytest.raises(CheckpointError, match=r"'poems': .* is not the file that was added"):
        again.load(["poems"])
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"'poems': .*adapter_config\.json is missing"):
        again.forward(batch_of(2), ["sums", "poems"])
    close(again.forward(batch_of(3), ["sums"] * 3).logits, logits(own["sums"]))
    bank.add("poems", tmp_path / "source1", replace=True)
    mended = AdapterBank(llama.model(dtype=DOUBLE), tmp_path / "bank")
    close(mended.forward(batch_of(3), ["poems"] * 3).logits, logits(own["poems"]))

    (tmp_path / "bank" / "index.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="no index of an adapter bank"):
        AdapterBank(llama.model(dtype=DOUBLE), tmp_path / "bank")


@pytest.mark.usefixtures("filled")
def test_another_base_model_is_refused(llama: Any, gpt2: Any, tmp_path: Path) -> None:
    changed = llama.model(dtype=DOUBLE)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    for model, part in (
        (llama.model(seed=1, dtype=DOUBLE), "embeddings and norms"),
        (changed, "linear layers"),
        (llama.model(num_hidden_layers=3), "shapes"),
        (gpt2.model(), "class"),
    ):
        with pytest.raises(CheckpointError, match=f"another base model .LlamaForCausalLM.: its {part} is not"):
            AdapterBank(model, tmp_path / "bank")
    with pytest.raises(ConfigError, match="the model has adapters"):
        AdapterBank(get_peft_model(llama.model(), lora_config()), tmp_path / "bank")
    with pytest.raises(ConfigError, match="max_loaded=0"):
        AdapterBank(llama.model(), tmp_path / "bank", max_loaded=0)


def test_wrong_requests(filled: Filled) -> None:
    bank, own = filled
    with pytest.raises(ConfigError, match=r"no adapter 'sum'; it has sums, poems, v1\.2-b, base_model"):
        bank.forward(batch_of(1), ["sum"])
    with pytest.raises(ConfigError, match="2 names for a batch of 3 rows"):
        bank.forward(batch_of(3), ["sums", "poems"])
    with pytest.raises(ConfigError, match="3 adapters at a time, and max_loaded=2"):
        bank.forward(batch_of(3), ["sums", "poems", "v1.2-b"])
    close(logits(bank.model), logits(own[None]))


def test_methods_that_peft_cannot_mix_work_one_at_a_time(llama: Any, tmp_path: Path) -> None:
    for kind, config in (
        ("dora", lambda: lora_config(use_dora=True)),
        ("ia3", lambda: IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[])),
    ):
        bank = AdapterBank(llama.model(dtype=DOUBLE), tmp_path / kind)
        own = {name: trained(llama, config(), seed, tmp_path / f"{kind}{seed}") for seed, name in enumerate(["x", "y"])}
        for seed, name in enumerate(own):
            bank.add(name, tmp_path / f"{kind}{seed}")
        for name, model in own.items():
            with torch.no_grad():
                torch.testing.assert_close(
                    bank.forward(batch_of(3), [name] * 3).logits, logits(model), rtol=0, atol=1e-5
                )
        with pytest.raises(ConfigError, match=f"adapters of {kind} cannot be mixed"):
            bank.forward(batch_of(2), ["x", "y"])


def test_an_adapter_that_starts_inside_the_base_is_refused(llama: Any, tmp_path: Path) -> None:
    get_peft_model(llama.model(), lora_config(init_lora_weights="pissa")).save_pretrained(str(tmp_path / "pissa"))
    with pytest.raises(ConfigError, match="starts inside the base weight"):
        AdapterBank(llama.model(), tmp_path / "bank").add("new", tmp_path / "pissa")


@torch.no_grad()
def test_heads_trained_in_full_are_switched_too(distilbert: Any, config_of: MakeConfig, tmp_path: Path) -> None:
    bank = AdapterBank(distilbert.model(dtype=DOUBLE), tmp_path / "bank", max_loaded=2)
    own = {}
    for seed, name in enumerate(["x", "y", "z"]):
        config = config_of(target_modules=["q_lin", "lin2"], modules_to_save=["pre_classifier", "classifier"])
        own[name] = trained(distilbert, config, seed, tmp_path / name)
        bank.add(name, tmp_path / name)
    for name in ("x", "y", "z", "x"):
        close(bank.forward(batch_of(3), [name] * 3).logits, logits(own[name]))
    mixed = bank.forward(batch_of(3), ["x", "z", "x"]).logits
    close(mixed, torch.stack([logits(own[name])[i] for i, name in enumerate(["x", "z", "x"])]))


def test_packed_folder_has_no_file_that_peft_would_take_for_its_own(llama: Any, tmp_path: Path) -> None:
    trained(llama, lora_config(), 0, tmp_path / "source")
    bank = AdapterBank(llama.model(dtype=DOUBLE), tmp_path / "bank")
    folder = tmp_path / "bank" / bank.add("new", tmp_path / "source", bits=4).folder
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", PACKED_FILE]
