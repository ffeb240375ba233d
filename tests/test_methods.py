"""What each method trains, counted by closed form on a tiny LLaMA; settings that do not fit are one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kronlab import methods, models
from kronlab.cell import CONFIG_DIR, compose_config, make_cell
from kronlab.errors import ConfigError, DimensionError

# (d_in, d_out) of the linear layers of tiny_llama: two blocks of q, k, v, o, gate, up, down; then the output layer.
BLOCK = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
LINEARS = 2 * BLOCK
HEAD = (32, 260)
ALL = sorted(path.stem for path in (CONFIG_DIR / "method").glob("*.yaml") if path.stem != "adapter")


def section(*overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config = compose_config(["scale=smoke", *overrides])
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return plain["model"], plain["method"]


def attached(*overrides: str) -> torch.nn.Module:
    model, method = section(*overrides)
    network, _ = models.load(model, dtype=torch.bfloat16)
    return methods.attach(network, model, method)


def lora(d_in: int, d_out: int, r: int = 8) -> int:
    return r * (d_in + d_out)


def cdka(d_in: int, d_out: int, r1: int = 2, r2: int = 8, r: int = 4) -> int:
    return r * (r1 * d_in // r2 + r2 * d_out // r1)


def kron_lora(d_in: int, d_out: int, r: int = 8, d_a1: int = 2, d_a2: int = 1) -> int:
    """A is d_a2 x d_a1; d_a2 = 1 is the divisor of the hidden size 32 nearest to 32/200."""
    return d_a1 * d_a2 + r * (d_in // d_a1 + d_out // d_a2)


def krona(d_in: int, d_out: int) -> int:
    """One Kronecker product of near-square factors."""

    def near_square(n: int) -> int:
        return max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n)

    r1, r2 = near_square(d_out), near_square(d_in)
    return cdka(d_in, d_out, r1, r2, 1)


def lokr(d_in: int, d_out: int, r: int = 8) -> int:
    """W1 of the smaller factors of the two dimensions; W2 of the larger ones, whole where r is at least half of one."""

    def halves(n: int) -> tuple[int, int]:
        small = max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n)
        return small, n // small

    (small_in, large_in), (small_out, large_out) = halves(d_in), halves(d_out)
    whole = r >= max(large_in, large_out) / 2
    return small_out * small_in + (large_out * large_in if whole else r * (large_out + large_in))


CLOSED_FORMS = {
    "lora": lora,
    "rslora": lora,
    "dora": lambda d_in, d_out: lora(d_in, d_out) + d_out,  # a magnitude for each output
    "cdka": cdka,
    "kron_lora": kron_lora,
    "krona": krona,
    "pissa": lora,
    "lora_plus": lora,
    "lora_ga": lora,
    "adalora": lambda d_in, d_out: lora(d_in, d_out, 12) + 12,  # twelve singular values
    "vera": lambda d_in, d_out: 256 + d_out,  # the vectors d and b
    "lokr": lokr,
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_trainable_parameters_by_closed_form(name: str) -> None:
    network = attached(f"method={name}")
    assert models.count_parameters(network)[0] == sum(CLOSED_FORMS[name](*shape) for shape in LINEARS)
    trained = [p for p in network.parameters() if p.requires_grad]
    # AdaLoRA's ranknum is a constant of the adapter, not a weight of the base
    frozen = [p for key, p in network.named_parameters() if not p.requires_grad and "ranknum" not in key]
    assert {p.dtype for p in trained} == {torch.float32}, "adapters in fp32 on a bf16 base"
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_lm_head_adds_the_output_layer(name: str) -> None:
    counted = models.count_parameters(attached(f"method={name}", "method.lm_head=true"))[0]
    assert counted == sum(CLOSED_FORMS[name](*shape) for shape in [*LINEARS, HEAD])


def test_full_trains_everything_and_none_nothing() -> None:
    total = models.count_parameters(models.build_on_meta(section("method=full")[0]))[1]
    assert models.count_parameters(attached("method=full")) == (total, total)
    assert models.count_parameters(attached("method=none")) == (0, total)


def test_a_target_list_and_a_saved_head_are_honoured() -> None:
    """DistilBERT: linears of the blocks by name, and the new head trained in full."""
    network = attached("model=tiny_distilbert", "method=lora")
    block = 4 * lora(32, 32) + lora(32, 64) + lora(64, 32)
    head = 32 * 32 + 32 + 32 + 1
    assert models.count_parameters(network)[0] == 2 * block + head


def test_every_method_config_keeps_the_function_at_the_start() -> None:
    """dW = 0 before the first step, whatever the method: the base model's logits come out."""
    model, _ = section("method=none")
    tokens = torch.arange(40).view(2, 20)
    base, _ = models.load(model, dtype=torch.float32)
    with torch.no_grad():
        expected = base.eval()(tokens).logits
        for name in ALL:
            model, method = section(f"method={name}")
            network, _ = models.load(model, dtype=torch.float32)
            got = methods.attach(network, model, method).eval()(tokens).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["method=lora", "+method.options.rank=3"], ConfigError, ["method lora", "'rank'", "method.options"]),
        (["method=cdka", "+method.options.r3=3"], ConfigError, ["method cdka", "'r3'", "method.options"]),
        (["method=lora", "+method.options.r=3"], ConfigError, ["method lora", "'r'", "method.options"]),
        (["method=lora", "method.target_modules=[nowhere]"], ConfigError, ["method lora", "nowhere"]),
        (["method=cdka", "method.target_modules=[nowhere]"], ConfigError, ["method cdka", "nowhere"]),
        (["method=cdka", "method.scaling=big"], ConfigError, ["scaling", "big", "cdka"]),
        (["method=cdka", "method.init=zeros"], ConfigError, ["zeros", "kaiming"]),
        (["method=kron_lora", "method.d_a1=5"], DimensionError, ["q_proj", "d_in=32", "d_a1=5", "4"]),
        (
            ["method=cdka", "method.r1=8", "method.lm_head=true"],
            DimensionError,
            ["lm_head", "r1=8", "d_out=260", "5 or 10"],
        ),
        (["method=lora", "method.lm_head=true", "model=tiny_deberta"], ConfigError, ["method.lm_head=true"]),
        (["method=pissa", "method.init=pizza"], ConfigError, ["method.init='pizza'", "pissa_niter_16", "lora_ga"]),
        (["method=adalora", "method.init_r=8"], ConfigError, ["method.init_r=8", "above method.r=8"]),
        (["method=adalora", "method.t_final=0.95"], ConfigError, ["method.t_final=0.95", "together below 1"]),
        (["method=vera", "+method.options.rank=3"], ConfigError, ["method vera", "'rank'", "method.options"]),
        (["method=lokr", "method.r=0"], ConfigError, ["method lokr", "`r`", "positive"]),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(
    overrides: list[str], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        attached(*overrides)
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_unknown_method_names_those_that_exist() -> None:
    model, method = section("method=lora")
    with pytest.raises(
        ConfigError, match=r"method.name='loraa' is not known; use one of none, adapter, full, lora, cdka, kron_lora"
    ):
        methods.attach(models.build_on_meta(model), model, method | {"name": "loraa"})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=cdka", "method.r1=4"], "CDKA (4,8,4)"),
        (["method=lora", "method.r=2"], "LoRA r=2"),
        (["method=rslora"], "rsLoRA r=8"),
        (["method=dora"], "DoRA r=8"),
        (["method=kron_lora"], "Kron-LoRA r=8"),
        (["method=krona"], "KronA"),
        (["method=pissa"], "PiSSA r=8"),
        (["method=lora_plus"], "LoRA+ r=8"),
        (["method=lora_ga", "method.r=4"], "LoRA-GA r=4"),
        (["method=adalora"], "AdaLoRA r=8"),
        (["method=vera"], "VeRA r=256"),
        (["method=lokr"], "LoKr r=8"),
        (["method=full"], "full fine-tuning"),
        (["method=none"], "base model"),
    ],
)
def test_label(overrides: list[str], expected: str) -> None:
    assert methods.label(section(*overrides)[1]) == expected


def test_variants_of_lora_reach_peft() -> None:
    assert attached("method=rslora").peft_config["default"].use_rslora  # type: ignore[union-attr,index]
    assert attached("method=dora").peft_config["default"].use_dora  # type: ignore[union-attr,index]


# --------------------------------------------------------------------------------------------------- the budget

LORA8 = sum(lora(*shape) for shape in LINEARS)


@pytest.mark.parametrize(
    ("overrides", "resolved"),
    [
        (["method=cdka", "method.budget=12.5%"], {"r1": 2, "r2": 2, "r": 1}),
        (["method=kron_lora", "method.budget=50%"], {"d_a1": 2, "d_a2": 1, "r": 5}),
        (["method=lora", "method.budget=50%"], {"r": 4}),
        (["method=rslora", "method.budget=lora:4"], {"r": 4}),
        (["method=dora", "method.budget=100%"], {"r": 7}),
        (["method=pissa", "method.budget=50%"], {"r": 4}),
        (["method=lora_plus", "method.budget=lora:4"], {"r": 4}),
        (["method=lora_ga", "method.budget=5000"], {"r": 4}),
        (["method=krona", "method.budget=lora:8"], {"r1": "near_square", "r2": "near_square", "r": 8}),
        (["method=lora", "method.budget=5000"], {"r": 4}),
    ],
)
def test_a_budget_is_the_best_design_within_it(overrides: list[str], resolved: dict[str, Any]) -> None:
    model, method = section(*overrides)
    got = methods.with_budget(model, method)
    assert {key: got[key] for key in resolved} == resolved
    assert got == method | resolved | {"budget": None}
    budget = {"12.5%": LORA8 // 8, "50%": LORA8 // 2, "lora:4": LORA8 // 2, 5000: 5000}.get(method["budget"], LORA8)
    counted = models.count_parameters(attached(*overrides))[0]
    assert 0.75 * budget < counted <= budget
    assert counted == methods.designs(model, method, method["budget"])[0].parameters, "as attached, so as planned"


def test_a_budget_counts_the_layers_that_the_method_adapts() -> None:
    """The output layer is in where it is adapted; a head trained in full is not."""
    with_head = models.count_parameters(attached("method=lora", "method.lm_head=true", "method.budget=100%"))[0]
    assert with_head == LORA8 + lora(*HEAD)
    network = attached("model=tiny_distilbert", "method=lora", "method.budget=50%")
    block = 4 * lora(32, 32, 4) + lora(32, 64, 4) + lora(64, 32, 4)
    assert models.count_parameters(network)[0] == 2 * block + 32 * 32 + 32 + 32 + 1


def test_a_share_of_the_model() -> None:
    total = models.count_parameters(models.build_on_meta(section("method=none")[0]))[1]
    assert models.count_parameters(attached("method=cdka", "method.budget=5%model"))[0] <= total // 20


def test_a_cell_is_the_same_whichever_way_its_sizes_are_written() -> None:
    overrides = ["scale=smoke", "method=cdka"]
    by_budget = make_cell(compose_config([*overrides, "method.budget=12.5%"]))
    by_size = make_cell(compose_config([*overrides, "method.r1=2", "method.r2=2", "method.r=1"]))
    assert (by_budget.id, by_budget.train_id) == (by_size.id, by_size.train_id)
    assert by_budget.name.startswith("CDKA (2,2,1)")
    assert {key: by_budget.science["method"][key] for key in ("r1", "r2", "r")} == {"r1": 2, "r2": 2, "r": 1}
    assert "budget" not in by_budget.science["method"], "ids of cells made before are kept"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=cdka", "method.budget=much"], "budget='much': write a number"),
        (["method=cdka", "method.budget=100"], "the smallest cdka has 1,"),
        (["method=full", "+method.budget=5%"], "method.budget is not known to method full"),
        (["method=vera", "+method.budget=5%"], "method.budget is not known to method vera"),
        (["method=krona", "method.r1=2", "method.budget=5%"], "near_square for both"),
        (["method=cdka", "+method.options.r_pattern={q_proj: 2}", "method.budget=50%"], "method.options.r_pattern"),
    ],
)
def test_a_budget_that_does_not_fit_is_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        methods.with_budget(*section(*overrides))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
