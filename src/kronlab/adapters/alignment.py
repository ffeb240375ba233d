"""An adapter's first step as an update of the weight, and its cosine with the full gradient.

At the start one factor is zero, so ΔW = 0 and the other factors have no gradient: the first step moves the zero factor
alone. With the entries of G = ∂loss/∂W moved to R(G) (n, m), both methods' ΔW reads V·U there:

                n             m             V (n, r), from the factors that stay    U (r, m), the zero factor
    CDKA        r1·d_in/r2    r2·d_out/r1   column i is vec(A_i)                    row i is vec(B_i)
    Kron-LoRA   d_a2·d_in     d_b2          column k is vec(A ⊗ row k of B2)        B1ᵀ

LoRA of rank r is CDKA (1, 1, r). By the chain rule the zero factor's gradient is λ·S, S = Vᵀ R(G), so one step gives

    plain gradient descent    U ∝ -S          R(ΔW) ∝ -V Vᵀ R(G)
    AdamW                     U ∝ -sign(S)    g/(|g| + ε) with ε → 0; its weight decay scales ΔW and does not turn it

and neither learning rate nor λ has a part in the cosine ⟨V·U, R(G)⟩ / (‖V·U‖ ‖G‖) with the descent direction.

For A of independent entries the expected square of S is r/n of the gradient's, whatever the gradient: that gives the
predicted cosines √(r/n) for n much larger than r and the components' ``predicted_alignment()`` for any n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlab.adapters.base import init_factor_
from kronlab.adapters.cdka import CdkaComponents
from kronlab.adapters.kron_lora import KronLoraComponents
from kronlab.adapters.nearest import rearrange

AlignedComponents = CdkaComponents | KronLoraComponents


@dataclass(frozen=True)
class FirstStep:
    """Cosines of the first step's -ΔW with the gradient, by plain gradient descent and by AdamW; 0 where G = 0."""

    sgd: float
    adamw: float


def asymptotic_alignment(c: AlignedComponents) -> float:
    """√(r/n): √(r·r2/(r1·d_in)) for CDKA and LoRA, √(r/(d_a2·d_in)) for Kron-LoRA. Above 1 where r exceeds n."""
    rows = c.r1 * c.d_in / c.r2 if isinstance(c, CdkaComponents) else c.d_a2 * c.d_in
    return math.sqrt(c.r / rows)


def arrange(gradient: Tensor, c: AlignedComponents) -> Tensor:
    """R(G) (n, m) of a gradient (d_out, d_in)."""
    if isinstance(c, CdkaComponents):
        return rearrange(gradient, c.r1, c.d_in // c.r2)
    return gradient.reshape(c.d_a2, c.d_b2, c.d_in).transpose(1, 2).reshape(c.d_a2 * c.d_in, c.d_b2)


def spanned(factors: dict[str, Tensor], c: AlignedComponents) -> Tensor:
    """V (n, r) of an adapter's factors, in the adapter's layout; the zero factor need not be among them."""
    if isinstance(c, CdkaComponents):
        a = factors["A"].reshape(c.r1, c.r, -1)  # component i in rows [i::r]
        return a.transpose(1, 2).reshape(-1, c.r)  # (a, c), i
    return torch.einsum("ij,kb->ijbk", factors["A"], factors["B2"]).reshape(-1, c.r)


def random_factors(c: AlignedComponents, seed: int) -> dict[str, Tensor]:
    """The factors that stay, drawn as an adapter draws them (Kaiming), in its layout; the global generator is kept."""
    if isinstance(c, CdkaComponents):
        shapes = {"A": (c.r1 * c.r, c.d_in // c.r2)}
    else:
        shapes = {"A": (c.d_a2, c.d_a1), "B2": (c.r, c.d_b1)}
    factors = {name: torch.empty(shape) for name, shape in shapes.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for factor in factors.values():
            init_factor_(factor, "kaiming")
    return factors


def first_step(arranged: Tensor, v: Tensor) -> FirstStep:
    """The cosines for R(G) (n, m) and V (n, r); 2·r·n·m multiply-adds, ΔW is not formed."""
    s = (v.T @ arranged).double()
    gram = v.double().T @ v.double()
    total = float(torch.linalg.vector_norm(arranged, dtype=torch.float64))

    def cosine(u: Tensor) -> float:
        moved = math.sqrt(max(float((u * (gram @ u)).sum()), 0.0))  # ‖V·U‖
        return float((s * u).sum()) / (moved * total) if moved > 0 and total > 0 else 0.0

    return FirstStep(cosine(s), cosine(s.sign()))
