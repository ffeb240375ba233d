"""The kinds of eval. A new kind is a subclass of `Harness` and one line here."""

from __future__ import annotations

from kronlab.evals.choice import Choice
from kronlab.evals.choice_head import ChoiceHead
from kronlab.evals.code import Code
from kronlab.evals.generation import Generation
from kronlab.evals.glue import Classification, ImageClassification, LabelWords
from kronlab.evals.harness import Harness, Settings
from kronlab.evals.lm_eval import LmEval

HARNESSES: dict[str, Harness] = {
    harness.kind: harness
    for harness in (
        *(Generation(), Classification(), ImageClassification(), LabelWords(), Choice(), ChoiceHead()),
        *(LmEval(), Code()),
    )
}
"""Kind -> harness; an eval section without `kind` is "generation"."""


def kind_of(settings: Settings) -> str:
    """The kind that an eval section names."""
    return str(settings.get("kind", Generation.kind))


def harness_of(settings: Settings) -> Harness:
    """The harness of an eval section that `kronlab.cell.validate` has let pass."""
    return HARNESSES[kind_of(settings)]
