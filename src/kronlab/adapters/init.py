"""Starts of an adapter that look at the base weight or at the task's gradient, instead of drawing at random.

R(·) is Van Loan's rearrangement (:func:`kronlab.adapters.nearest.rearrange`): Σ B_i ⊗ A_i ↦ Σ vec(A_i) vec(B_i)ᵀ.
The authors' code names ``svd``, ``qr`` and ``gradient`` for CDKA; what it does under these names could not be read, so
the definitions are this package's:

``svd``       A_i and B_i from the r leading singular triplets of R(W), W the base weight, as PiSSA does for LoRA:
              the nearest CDKA adapter to W. That is not ΔW = 0, so the start is taken away again, below.
``qr``        vec(A_i) are r orthogonal vectors from a QR decomposition of R(W) with column pivoting: the blocks of W
              that are largest once their predecessors are projected out. B = 0.
``gradient``  vec(A_i) are the r leading left singular vectors of R(G), G the gradient of the loss with respect to W,
              in the manner of LoRA-GA. B = 0. Of all choices of A it aligns the first step best with G. For
              Kron-LoRA: A and B2 are those of the nearest Kron-LoRA adapter to G, B1 = 0.

Where B = 0 the norm of A_i is that of the Kaiming start, ‖A_i‖² = r1/3, so that λ means the same as there.

The start of ``svd`` is kept beside the factors, as the buffers A_start and B_start, and ΔW = λ·Σ (B_i ⊗ A_i -
B_start_i ⊗ A_start_i). It is the offset W - λ·Σ B_start ⊗ A_start of the base weight without touching that weight: the
base may be quantised or tied, disabling the adapter gives the base model, merging and several adapters work, and the
buffers are saved in the checkpoint, which thus reproduces the function on the original base whatever a decomposition
gives there. The price: 2r components in the forward pass and in the file. Everything that reads factors sees these 2r
components.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronlab.adapters import quantized_base
from kronlab.adapters.base import KronLinear, adapter_layers, init_factor_
from kronlab.adapters.nearest import cdka_factors, nearest_kron_lora, rearrange
from kronlab.errors import ConfigError

START = "_start"


def init_from_base_(layer: KronLinear, adapter_name: str, how: str) -> None:
    """Start a CDKA adapter from its base weight by ``svd`` or ``qr``; any other `how`, or a meta device: do nothing."""
    base = layer.get_base_layer()
    if how not in ("svd", "qr") or base.weight.is_meta:
        return
    c, scale = layer.components[adapter_name], layer.scaling[adapter_name]
    weight = base.weight.detach() if quantized_base.bits_of(base) is None else quantized_base.dequantise(base)
    arranged = rearrange((weight.T if layer.fan_in_fan_out else weight).double(), c.r1, c.d_in // c.r2)
    if how == "qr":
        _set(layer, adapter_name, _unscaled(pivoted_columns(arranged, c.r), c))
        return
    left, values, right = leading_triplets(arranged, c.r)
    factors = cdka_factors(left * values.sqrt(), values.sqrt()[:, None] * right, c.r1, c.r2, c.r, scale)
    _set(layer, adapter_name, factors)
    for name in factors:
        parameter = layer.factor(name)[adapter_name]
        # On the meta device (an adapter about to be loaded) the file brings the start too.
        start = factors[name].to(torch.float32) if parameter.is_meta else parameter.detach().clone()
        layer.factor(name + START)[adapter_name] = start
    layer.components[adapter_name] = dataclasses.replace(c, r=2 * c.r, start=True)


def with_start(factors: dict[str, Tensor], start: dict[str, Tensor], r: int) -> dict[str, Tensor]:
    """CDKA's stacked A and B (of r components) with the start as r further ones, of opposite sign."""
    a, a0 = (t.unflatten(0, (-1, r)) for t in (factors["A"], start["A"].to(factors["A"])))
    b, b0 = (t.unflatten(1, (-1, r)) for t in (factors["B"], start["B"].to(factors["B"])))
    return {"A": torch.cat([a, a0], dim=1).flatten(0, 1), "B": torch.cat([b, -b0], dim=2).flatten(1, 2)}


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets U (n, k), s (k), Vᵀ (k, m), k = min(rank, n, m), from the smaller Gram matrix.

    Good to about 1e-8 of the largest singular value in float64, which a start needs no better than; a full SVD of a
    large layer takes minutes.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = leading_triplets(matrix.T, rank)
        return left.T, values, right.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors.flip(1)[:, :rank]
    values = squares.flip(0)[:rank].clamp_min(0).sqrt()
    right = left.T @ matrix / values.clamp_min(torch.finfo(values.dtype).tiny)[:, None]
    return left, values, right


def pivoted_columns(matrix: Tensor, rank: int) -> Tensor:
    """Q (n, k) of the first k = min(rank, n, m) steps of a QR decomposition with column pivoting: QᵀQ = I.

    Step i takes the column that is longest after its part in the span of the earlier ones is taken away.
    """
    rest = matrix.clone()
    columns: list[Tensor] = []
    for _ in range(min(rank, *matrix.shape)):
        column = rest[:, rest.square().sum(0).argmax()]
        for earlier in columns:  # once more: subtraction leaves rounding errors along the earlier ones
            column = column - earlier * (earlier @ column)
        column = column / column.norm().clamp_min(torch.finfo(column.dtype).tiny)
        columns.append(column)
        rest = rest - torch.outer(column, column @ rest)
    return torch.stack(columns, dim=1)


def _unscaled(columns: Tensor, c: Any) -> dict[str, Tensor]:
    """A whose vec(A_i) are the given orthonormal columns times √(r1/3), the norm that the Kaiming start has."""
    nothing = columns.new_zeros(columns.shape[1], c.r2 * c.d_out // c.r1)
    return {"A": cdka_factors(columns * math.sqrt(c.r1 / 3), nothing, c.r1, c.r2, c.r)["A"]}


def _set(layer: KronLinear, adapter_name: str, factors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in factors.items():
            layer.factor(name)[adapter_name].copy_(value)


# ----------------------------------------------------------------------------------------------------- gradient


def gradient_init_(
    peft_model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    adapter_name: str = "default",
) -> dict[str, float]:
    """Start an adapter from the gradient of the task's loss with respect to the base weights, at the base model.

    The model is in evaluation mode meanwhile and without its adapters; no weight but the adapter's is changed. The
    gradients of all adapted layers are summed over the batches on the CPU in float32: as much memory as those layers'
    weights have in float32, and on the model's device one layer's gradient at a time.

    Args:
        peft_model: a PeftModel with a CDKA or Kron-LoRA adapter, most simply of ``init_weights="gradient"``.
        batches: what `loss_fn` takes; the authors use 8 batches of one example.
        loss_fn: (model, batch) -> the scalar loss.

    Returns:
        For each module, the cosine between the adapter's first gradient step on these batches and the full gradient.

    Raises:
        ConfigError: no such adapter, no batch, a quantised base, an adapter with an svd start, or a module that the
            loss does not depend on.
    """
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in adapter_layers(peft_model)
        if adapter_name in layer.components
    }
    if not layers:
        raise ConfigError(f"gradient_init_: the model has no CDKA or Kron-LoRA adapter {adapter_name!r}")
    for name, layer in layers.items():
        if f"cdka_A{START}.{adapter_name}" in dict(layer.named_buffers()):
            raise ConfigError(f"gradient_init_: {name} has an svd start; attach the adapter with another init_weights")
        if quantized_base.bits_of(layer.get_base_layer()) is not None:
            raise ConfigError(
                f"gradient_init_: {name} is quantised and has no gradient; load the base in 16 or 32 bits"
            )
    gradients = layer_gradients(peft_model, layers, batches, loss_fn)
    return {name: _start_from_gradient(layer, adapter_name, gradients[name]) for name, layer in layers.items()}


def _start_from_gradient(layer: KronLinear, adapter_name: str, gradient: Tensor) -> float:
    """Set the factors that are not zero from G (d_out, d_in); the cosine of the first step with G."""
    c, gradient = layer.components[adapter_name], gradient.double()
    total = float(gradient.square().sum())
    if "B2" not in layer.factor_names:
        arranged = rearrange(gradient, c.r1, c.d_in // c.r2)
        columns, values, _ = leading_triplets(arranged, c.r)
        _set(layer, adapter_name, _unscaled(columns, c))
        kept = float(values.square().sum())
    else:
        fit = nearest_kron_lora(gradient, c.d_a1, c.d_a2, c.r)
        rows = torch.empty_like(fit.factors["B2"], dtype=torch.float32)
        init_factor_(rows, "kaiming")  # stays where the gradient has a lower rank: a zero row would never train
        norms = fit.factors["B2"].norm(dim=1, keepdim=True)
        found = norms > torch.finfo(torch.float32).eps * norms.max()
        rows = torch.where(
            found, fit.factors["B2"] / norms.clamp_min(torch.finfo(norms.dtype).tiny) / math.sqrt(3), rows
        )
        a = fit.factors["A"] / fit.factors["A"].norm().clamp_min(torch.finfo(norms.dtype).tiny) * math.sqrt(c.d_a2 / 3)
        _set(layer, adapter_name, {"A": a, "B2": rows})
        kept = fit.total - fit.lost
    with torch.no_grad():
        layer.factor(layer.zero_factor)[adapter_name].zero_()
    return math.sqrt(kept / total) if total > 0 else 0.0


def layer_gradients(
    peft_model: Any,
    layers: Mapping[str, Any],
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """Sum over the batches of ∂loss/∂W at the base model: what full fine-tuning would follow in these layers.

    The model is in evaluation mode and its adapters are off meanwhile; nothing of it is changed.

    Args:
        layers: adapted layers of the model by name, ours or PEFT's.
        batches, loss_fn: as in :func:`gradient_init_`.

    Returns:
        (d_out, d_in) in float32 on the CPU, for each name.

    Raises:
        ConfigError: no batch, or a layer that the loss does not depend on or that has a non-finite gradient.
    """
    weights = {id(layer.get_base_layer().weight): layer.get_base_layer().weight for layer in layers.values()}
    sums: dict[int, Tensor] = {}

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.detach().to("cpu", torch.float32)
        sums[id(parameter)] = sums[id(parameter)].add_(gradient) if id(parameter) in sums else gradient.clone()
        parameter.grad = None

    seen = 0
    with _evaluating(peft_model), _requiring_grad(weights.values()), peft_model.disable_adapter():
        handles = [weight.register_post_accumulate_grad_hook(add) for weight in weights.values()]
        try:
            for batch in batches:
                loss_fn(peft_model, batch).backward()
                seen += 1
        finally:
            for handle in handles:
                handle.remove()
    if not seen:
        raise ConfigError("no batch was given; a gradient needs at least one")
    gradients = {}
    for name, layer in layers.items():
        gradient = sums.get(id(layer.get_base_layer().weight))
        if gradient is None or not torch.isfinite(gradient).all():
            what = "does not depend on" if gradient is None else "has a non-finite gradient with respect to"
            raise ConfigError(f"the loss {what} {name}; look at loss_fn, or exclude the module")
        gradients[name] = gradient.T if layer.fan_in_fan_out else gradient
    return gradients


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    """Every module in evaluation mode, and back in its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _requiring_grad(weights: Iterable[Tensor]) -> Any:
    weights = list(weights)
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)
