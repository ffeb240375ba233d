"""The two Kronecker operators on plain tensors: apply ΔW to activations without forming it, or form it.

Legend: T tokens (all leading dimensions of x, flattened) · d_in, d_out layer dimensions · λ the scale.
Conventions are those of ``torch.kron``: in P ⊗ Q, P indexes blocks and Q the position inside a block.

CDKA (arXiv 2602.01267):  ΔW = λ · Σ_{i<r} B_i ⊗ A_i,   A_i (r1, d_in/r2),  B_i (d_out/r1, r2)
    row of ΔW    = (row of B_i) · r1         + (row of A_i)
    column of ΔW = (column of B_i) · d_in/r2 + (column of A_i)
Kron-LoRA (arXiv 2508.01961):  ΔW = λ · A ⊗ (B1 · B2),   A (d_a2, d_a1),  B1 (d_b2, r),  B2 (r, d_b1)
    with d_out = d_a2 · d_b2 and d_in = d_a1 · d_b1

CDKA's r components are kept in one matrix per side, in the layout of its authors' checkpoints: ``A`` (r1·r,
d_in/r2) holds A_i in rows ``[i::r]`` and ``B`` (d_out/r1, r2·r) holds B_i in columns ``[:, i::r]``. The
component index is thus the fastest one on both, so each side is a single GEMM and the sum over i happens
inside the second.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cdka_apply", "cdka_delta", "kron_lora_apply", "kron_lora_delta"]


def cdka_apply(x: Tensor, A: Tensor, B: Tensor, r: int, scale: float = 1.0, base: Tensor | None = None) -> Tensor:
    """``base + x · ΔWᵀ`` with ΔW = scale · Σᵢ B_i ⊗ A_i, without forming ΔW.

    Cost: T·r1·r·d_in + T·r2·r·d_out multiply-adds, in two GEMMs, (T·r2, d_in/r2)(d_in/r2, r1·r) and
    (T·r1, r2·r)(r2·r, d_out/r1). Only the (T, r1·r2·r) tensor between them is permuted in memory, and λ is
    applied to it. The second GEMM gives (T, r1, d_out/r1) where the layer wants (T, d_out/r1, r1): that
    transposition rides on the addition of ``base`` as a strided read (a copy where there is no base).
    Backward, the output's gradient is read strided once in the same way.

    Args:
        x: (..., d_in).
        A: (r1·r, d_in/r2), component i in rows [i::r].
        B: (d_out/r1, r2·r), component i in columns [:, i::r].
        r: number of components.
        scale: λ.
        base: (..., d_out), added to the result; None for x · ΔWᵀ alone.

    Returns:
        (..., d_out).

    Raises:
        ValueError: the shapes do not belong together.
    """
    r1, r2 = _cdka_dims(A, B, r)
    p, q = A.shape[1], B.shape[0]
    lead, d_in = x.shape[:-1], x.shape[-1]
    if d_in != r2 * p:
        raise ValueError(
            f"cdka_apply: x has {d_in} features and A, B with r={r} want r2·(d_in/r2) = {r2}·{p} = {r2 * p}"
        )
    tokens = math.prod(lead)

    h = F.linear(x.reshape(tokens * r2, p), A)  # (T·r2, p) -> (T·r2, r1·r)
    h = h.view(tokens, r2, r1, r).transpose(1, 2).reshape(tokens * r1, r2 * r)  # the small permute: r2 <-> r1
    y = F.linear(h * scale, B)  # (T·r1, r2·r) -> (T·r1, q)
    y = y.view(tokens, r1, q).transpose(1, 2)  # (T, q, r1), a view: ΔW's row is (row of B)·r1 + (row of A)
    if base is not None:
        y = base.reshape(tokens, q, r1) + y
    return y.reshape(*lead, q * r1)


def cdka_delta(A: Tensor, B: Tensor, r: int, scale: float = 1.0) -> Tensor:
    """ΔW = scale · Σᵢ B_i ⊗ A_i, dense (d_out, d_in). Cost: r · d_out · d_in multiply-adds.

    Shapes of A and B as in :func:`cdka_apply`. Raises ValueError where they do not belong together.
    """
    r1, r2 = _cdka_dims(A, B, r)
    p, q = A.shape[1], B.shape[0]
    a = A.view(r1, r, p)
    b = B.view(q, r2, r)
    return torch.einsum("bvi,aic->bavc", b * scale, a).reshape(q * r1, r2 * p)


def kron_lora_apply(
    x: Tensor, A: Tensor, B1: Tensor, B2: Tensor, scale: float = 1.0, base: Tensor | None = None
) -> Tensor:
    """``base + x · ΔWᵀ`` with ΔW = scale · A ⊗ (B1 · B2), without forming ΔW.

    Order: B2 on the reshaped input, A on the block axis of the small tensor, B1.
    Cost: T·r·(d_in + d_a1·d_a2 + d_out) multiply-adds. Only the small tensors between the
    GEMMs are permuted; the last GEMM's result is laid out as the layer wants it.

    Args:
        x: (..., d_in), d_in = d_a1·d_b1.
        A: (d_a2, d_a1). B1: (d_b2, r). B2: (r, d_b1).
        scale: λ, folded into A, the smallest factor.
        base: (..., d_out), added to the result; None for x · ΔWᵀ alone.

    Returns:
        (..., d_out), d_out = d_a2·d_b2.

    Raises:
        ValueError: the shapes do not belong together.
    """
    d_a2, d_a1, d_b2, r, d_b1 = _kron_lora_dims(A, B1, B2)
    lead, d_in = x.shape[:-1], x.shape[-1]
    if d_in != d_a1 * d_b1:
        raise ValueError(f"kron_lora_apply: x has {d_in} features and A, B2 want d_a1·d_b1 = {d_a1}·{d_b1}")
    tokens = math.prod(lead)

    h = F.linear(x.reshape(tokens * d_a1, d_b1), B2).view(tokens, d_a1, r)  # (T·d_a1, d_b1) -> (T, d_a1, r)
    # A acts on the middle axis. Spelled out as one GEMM: torch.matmul would choose its kernel by
    # requires_grad, and a trained and a reloaded adapter would differ in rounding.
    h = F.linear(h.transpose(1, 2).reshape(tokens * r, d_a1), A * scale)  # (T·r, d_a1) -> (T·r, d_a2)
    h = h.view(tokens, r, d_a2).transpose(1, 2).reshape(tokens * d_a2, r)
    y = F.linear(h, B1).view(*lead, d_a2 * d_b2)  # (T·d_a2, r) -> (T·d_a2, d_b2)
    return y if base is None else base + y


def kron_lora_delta(A: Tensor, B1: Tensor, B2: Tensor, scale: float = 1.0) -> Tensor:
    """ΔW = scale · A ⊗ (B1 · B2), dense (d_out, d_in). Cost: r · d_b2 · d_b1 + d_out · d_in multiply-adds.

    Shapes as in :func:`kron_lora_apply`. Raises ValueError where they do not belong together.
    """
    _kron_lora_dims(A, B1, B2)
    return torch.kron((A * scale).contiguous(), B1 @ B2)


def _cdka_dims(A: Tensor, B: Tensor, r: int) -> tuple[int, int]:
    """(r1, r2) of stacked factors."""
    if A.ndim != 2 or B.ndim != 2 or r < 1 or A.shape[0] % r or B.shape[1] % r:
        raise ValueError(
            f"CDKA factors want A (r1·r, d_in/r2) and B (d_out/r1, r2·r) with r={r}, "
            f"got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    return A.shape[0] // r, B.shape[1] // r


def _kron_lora_dims(A: Tensor, B1: Tensor, B2: Tensor) -> tuple[int, int, int, int, int]:
    """(d_a2, d_a1, d_b2, r, d_b1)."""
    if A.ndim != 2 or B1.ndim != 2 or B2.ndim != 2 or B1.shape[1] != B2.shape[0]:
        raise ValueError(
            f"Kron-LoRA factors want A (d_a2, d_a1), B1 (d_b2, r) and B2 (r, d_b1), "
            f"got {tuple(A.shape)}, {tuple(B1.shape)} and {tuple(B2.shape)}"
        )
    return A.shape[0], A.shape[1], B1.shape[0], B1.shape[1], B2.shape[1]
