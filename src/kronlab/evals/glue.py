"""GLUE and other tasks with classes, by two protocols: a classification head (of sentences, or images), and label words
of a language model.

The metrics are GLUE's (Wang et al. 2018, arXiv 1804.07461, table 1), computed by scikit-learn and scipy: accuracy; F1
of class 1; Matthews' correlation; Pearson's and Spearman's correlation. Where one of them is undefined it is 0, e.g. a
correlation of constant predictions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kronlab.classification import ClassificationHead, encode_image, encode_sentences
from kronlab.data import Example, class_labels, glue
from kronlab.encode import Encoded, collate
from kronlab.errors import ConfigError, KronlabError
from kronlab.evals.harness import Harness, Row, Settings, Subject, positive
from kronlab.evals.statistics import bootstrap_metric, mean_metric, ratio_metric
from kronlab.generate import generate, left_padded, length_sorted_batches

UNREADABLE = -1
"""The class, or the score, of a generated answer that is none."""


def accuracy(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Share of equal entries."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(gold, predicted))


def f1(gold: np.ndarray, predicted: np.ndarray) -> float:
    """F1 of class 1; 0 where it is neither predicted nor there."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold == 1, predicted == 1, zero_division=0))


def matthews(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews' correlation coefficient, -1 to 1; 0 where all predictions are one class."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found")
        return float(matthews_corrcoef(gold, predicted))


def pearson(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation, -1 to 1; 0 where either side is constant."""
    from scipy.stats import pearsonr

    return float(pearsonr(gold, predicted).statistic) if _both_vary(gold, predicted) else 0.0


def spearman(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Spearman's rank correlation, -1 to 1; 0 where either side is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(gold, predicted).statistic) if _both_vary(gold, predicted) else 0.0


def _both_vary(*arrays: np.ndarray) -> bool:
    # the library leaves a correlation undefined where a spread is lost to rounding, too
    return all(len(a) > 1 and np.ptp(a) > 1e-12 * max(1.0, float(np.abs(a).max())) for a in arrays)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
_OF_SCORES = ("pearson", "spearman")


def metric(name: str, gold: Sequence[float], predicted: Sequence[float]) -> dict[str, Any]:
    """One of `METRICS` with its uncertainty."""
    if name == "accuracy":  # a mean: its interval needs no resampling of the library's function
        return mean_metric([float(a == b) for a, b in zip(gold, predicted, strict=True)])
    value = METRICS[name](np.asarray(gold), np.asarray(predicted))
    return bootstrap_metric(_RESAMPLED.get(name, METRICS[name]), gold, predicted) | {"value": value}


def _fast_f1(gold: np.ndarray, predicted: np.ndarray) -> float:
    both, either = np.count_nonzero((gold == 1) & (predicted == 1)), (gold == 1).sum() + (predicted == 1).sum()
    return 2 * both / either if either else 0.0


def _fast_matthews(gold: np.ndarray, predicted: np.ndarray) -> float:
    """R_K of Gorodkin (2004), from the table of counts; UNREADABLE is a class like any other."""
    classes = int(max(gold.max(), predicted.max())) + 2
    table = np.bincount((gold + 1) * classes + predicted + 1, minlength=classes**2).reshape(classes, classes)
    there, said, n = table.sum(1), table.sum(0), len(gold)
    spread = float(n**2 - there @ there) * float(n**2 - said @ said)
    return float(np.trace(table) * n - there @ said) / math.sqrt(spread) if spread else 0.0


# The library takes 1 ms a call, most of it to check its arguments; 2,000 resamples should not take seconds.
_RESAMPLED = {"f1": _fast_f1, "matthews": _fast_matthews}


class _Classes(Harness):
    """What the protocols share: `source` names the classes, `metrics` lists what is computed, the headline first."""

    sizes: ClassVar[tuple[str, ...]] = ("batch_size", "max_length")

    def faults(self, name: str, settings: Settings) -> Iterator[str]:
        try:
            regression = not class_labels(settings["source"])
        except KronlabError as error:
            yield f"eval.{name}.source: {error}"
            return
        allowed = [m for m in METRICS if (m in _OF_SCORES) == regression]
        chosen = list(settings.get("metrics") or ())
        if not chosen or set(chosen) - set(allowed):
            yield f"eval.{name}.metrics={chosen}: must be a list of {', '.join(allowed)}"
        for key in self.sizes:
            if not positive(self._sizes(settings).get(key)):
                yield f"eval.{name}.{key}={self._sizes(settings).get(key)!r}: must be a whole number of at least 1"

    def _sizes(self, settings: Settings) -> Settings:
        return settings


class Classification(_Classes):
    """A model with a classification head: `batch_size`, and `max_length` of the sentences in tokens.

    A row holds `label` (class index, or score) and `logits`, the head's outputs in fp32.
    """

    kind: ClassVar[str] = "classification"
    version: ClassVar[str] = "1"
    architectures: ClassVar[tuple[str, ...]] = ("sequence_classification",)

    def faults(self, name: str, settings: Settings) -> Iterator[str]:
        yield from super().faults(name, settings)
        if settings.get("shots"):
            yield f"eval.{name}.shots={settings['shots']}: must be null, a classification head reads one example"

    def batches(self, examples: Sequence[Example], settings: Settings) -> Iterator[list[Example]]:
        yield from length_sorted_batches(examples, settings["batch_size"])

    @torch.inference_mode()
    def collect(self, subject: Subject, batch: Sequence[Example], settings: Settings) -> list[Row]:
        rows = [self._read(example, subject, settings) for example in batch]
        inputs = collate(rows, pad_id=subject.tokenizer.pad_token_id)  # type: ignore[arg-type]
        head = ClassificationHead(subject.network, regression=not class_labels(settings["source"]))
        logits = head.logits(subject.network, {name: ids.to(subject.device) for name, ids in inputs.items()}).tolist()
        return [
            {"id": example.id, "gold": example.gold, "label": example.meta["label"], "logits": outputs,
             "tokens": len(row), "truncated": row.truncated}
            for example, row, outputs in zip(batch, rows, logits, strict=True)
        ]  # fmt: skip

    def _read(self, example: Example, subject: Subject, settings: Settings) -> Encoded:
        return encode_sentences(example, subject.tokenizer, max_length=settings["max_length"])

    def grade(self, row: Row, settings: Settings) -> Row:
        """`answer` is the class of the largest output, or the score; a score is right within 0.5."""
        labels = class_labels(settings["source"])
        if not labels:
            (score,) = row["logits"]
            right = abs(score - row["label"]) <= 0.5
            return {"predicted": score, "answer": f"{score:.2f}", "correct": right, "reason": _reason(right)}
        predicted = max(range(len(labels)), key=row["logits"].__getitem__)
        right = predicted == row["label"]
        return {"predicted": predicted, "answer": labels[predicted], "correct": right, "reason": _reason(right)}

    def score(self, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
        """GLUE's metrics, and the mean held-out loss: `nll` (cross entropy, nats per example), or `mse`."""
        regression = not class_labels(settings["source"])
        losses = [_squared_error(row) if regression else _cross_entropy(row) for row in rows]
        gold, predicted = [row["label"] for row in rows], [row["predicted"] for row in rows]
        metrics = {name: metric(name, gold, predicted) for name in settings["metrics"]}
        metrics["mse" if regression else "nll"] = mean_metric(losses)
        return {
            "metrics": metrics,
            "graders": {self.kind: self.version},
            "samples": _samples(rows) | {"nll": [round(x, 4) for x in losses], "nll_tokens": [1] * len(rows)},
        }


def _cross_entropy(row: Row) -> float:
    """Cross entropy of the head's outputs, in nats."""
    largest = max(row["logits"])
    return largest + math.log(math.fsum(math.exp(x - largest) for x in row["logits"])) - row["logits"][row["label"]]


def _squared_error(row: Row) -> float:
    return (row["logits"][0] - row["label"]) ** 2


class ImageClassification(Classification):
    """The same of images (`kronlab.classification.encode_image`): `batch_size`. A row's `tokens` are its pixels."""

    kind: ClassVar[str] = "image_classification"
    version: ClassVar[str] = "1"
    architectures: ClassVar[tuple[str, ...]] = ("image_classification",)
    sizes: ClassVar[tuple[str, ...]] = ("batch_size",)

    def _read(self, example: Example, subject: Subject, settings: Settings) -> Encoded:
        return encode_image(example)


class LabelWords(_Classes):
    """A language model that answers with the word of a class (`kronlab.data.glue.words`).

    *Ranked*: the word of the largest summed log-likelihood, EOS included, so that no word wins by being the beginning
    of another. *Generated*: the greedy completion, which must be a word exactly, blanks around it aside; an answer that
    is no word counts as a class of its own, or as the score -1, as T5's evaluation has it. `also: [paper]` adds the
    rule of CDKA's authors: the most likely first token, out of the whole vocabulary, is that of the right word.

    Settings: `generation`, `max_length` of prompt and word in tokens.
    """

    kind: ClassVar[str] = "label_words"
    version: ClassVar[str] = "1"

    def faults(self, name: str, settings: Settings) -> Iterator[str]:
        yield from super().faults(name, settings)
        for other in settings["also"]:
            if other != "paper":
                yield f"eval.{name}.also={other!r}: must be paper"

    def _sizes(self, settings: Settings) -> Settings:
        return {"batch_size": settings["generation"]["batch_size"], "max_length": settings["max_length"]}

    def collect(self, subject: Subject, batch: Sequence[Example], settings: Settings) -> list[Row]:
        words = glue.words(settings["source"])
        prompts = [example.prompt for example in batch]
        likelihoods = [self._likelihoods(subject, batch, word, settings) for word in words]
        completions = generate(
            subject.network, subject.tokenizer, prompts, settings["generation"], causal=subject.causal
        )
        rows = []
        for i, (example, completion) in enumerate(zip(batch, completions, strict=True)):
            nll, count = likelihoods[words.index(example.completion)][i]
            rows.append({
                "id": example.id,
                "gold": example.gold,
                "label": example.meta["label"],
                "word": example.completion,
                "word_nll": [of_word[i][0] for of_word in likelihoods],  # nats, in the order of the words
                "completion": completion.text,
                "tokens": completion.tokens,
                "finished": completion.finished,
                "nll": nll,  # of the right word and EOS
                "nll_tokens": count,
            })  # fmt: skip
        if "paper" in settings["also"]:
            for row, token in zip(rows, first_tokens(subject, prompts), strict=True):
                row["first_token"] = token
                row["word_first_token"] = _word_ids(row["word"], subject.tokenizer)[0]
        return rows

    @staticmethod
    def _likelihoods(
        subject: Subject, batch: Sequence[Example], word: str, settings: Settings
    ) -> list[tuple[float, int]]:
        answers = [replace(example, completion=word) for example in batch]
        scored = subject.scorer.score(answers, max_length=settings["max_length"])
        whole = len(_word_ids(word, subject.tokenizer)) + 1
        for example, (_, count) in zip(batch, scored, strict=True):
            if count != whole:  # a word that is cut off would win for want of tokens
                raise ConfigError(
                    f"eval {settings['name']}: max_length={settings['max_length']} cuts off the answer {word!r} of "
                    f"{example.id}; raise it"
                )
        return scored

    def grade(self, row: Row, settings: Settings) -> Row:
        words, labels = glue.words(settings["source"]), class_labels(settings["source"])
        best = min(range(len(words)), key=row["word_nll"].__getitem__)
        text = row["completion"].strip()
        if labels:
            ranked: float = best
            generated: float = words.index(text) if text in words else UNREADABLE
        else:
            ranked, generated = float(words[best]), _score_in(text)
        right = words[best] == row["word"]
        also = {"generated": text == row["word"]}
        if "paper" in settings["also"]:
            also["paper"] = row["first_token"] == row["word_first_token"]
        return {
            "predicted": ranked,
            "generated": generated,
            "answer": words[best],
            "correct": right,
            "reason": _reason(right),
            "also": also,
        }

    def score(self, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
        """`<metric>_ranked` and `<metric>_generated`, `exact_match` of the generated word, `first_token_paper` if asked
        for, `nll_per_token` of the right words."""
        gold = [row["label"] for row in rows]
        metrics = {}
        for way, key in (("ranked", "predicted"), ("generated", "generated")):
            for name in settings["metrics"]:
                metrics[f"{name}_{way}"] = metric(name, gold, [row[key] for row in rows])
        metrics["exact_match"] = mean_metric([float(row["also"]["generated"]) for row in rows])
        if "paper" in settings["also"]:
            metrics["first_token_paper"] = mean_metric([float(row["also"]["paper"]) for row in rows])
        nll, counts = [row["nll"] for row in rows], [row["nll_tokens"] for row in rows]
        broken = {"value": math.nan, "n": len(rows), "stderr": None, "ci95": None}
        per_token = ratio_metric(nll, counts) if all(map(math.isfinite, nll)) else broken
        metrics["nll_per_token"] = per_token | {"tokens": sum(counts)}
        metrics["finished"] = mean_metric([float(row["finished"]) for row in rows])
        return {
            "metrics": metrics,
            "graders": {self.kind: self.version},
            "completion_tokens": sum(row["tokens"] for row in rows),
            "samples": _samples(rows) | {"nll": [round(x, 4) for x in nll], "nll_tokens": counts},
        }


@torch.inference_mode()
def first_tokens(subject: Subject, prompts: Sequence[str]) -> list[int]:
    """The most likely first token of each answer, out of the whole vocabulary."""
    batch = left_padded(prompts, subject.tokenizer, causal=subject.causal)
    if subject.causal:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    else:
        start: Any = subject.network.config.decoder_start_token_id  # type: ignore[union-attr]
        batch["decoder_input_ids"] = torch.full((len(prompts), 1), start)
    logits = subject.network(**{name: ids.to(subject.device) for name, ids in batch.items()}).logits
    return logits[:, -1].argmax(-1).tolist()


def _word_ids(word: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(word, add_special_tokens=False)["input_ids"])


def _score_in(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return UNREADABLE
    return value if math.isfinite(value) else UNREADABLE


def _reason(right: bool) -> str:
    return "right" if right else "wrong answer"


def _samples(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {
        "id": [row["id"] for row in rows],
        "correct": [int(row["correct"]) for row in rows],
        "predicted": [row["predicted"] for row in rows],
    }
