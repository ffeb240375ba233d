r"""Eight commonsense tasks and commonsense-170k, in the format of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933).

Read from ``{data_dir}/commonsense/{folder}/{train,test}.json`` (rows of ``instruction``, ``output``, ``answer``;
folders ARC-Easy, ARC-Challenge, boolq, openbookqa, piqa, social_i_qa, winogrande, hellaswag) and
``{data_dir}/commonsense/commonsense_170k.json``, else from the tasks' own hub datasets, whose rows are put into the
same format. A task's test split is the test set of ARC and OpenBookQA and the validation set of the others.

Settings:
    dataset: arc_easy | arc_challenge | boolq | openbookqa | piqa | social_i_qa | winogrande | hellaswag |
        commonsense_170k (train only, instruction only).
    format: ``instruction`` (default): the generation protocol. Prompt: ``prompt``, by default `ALPACA`; completion:
        "the correct answer is answer2"; gold: "answer2".
        ``choices``: the log-likelihood protocol, with the prompts of lm-evaluation-harness' tasks of the same names;
        gold is JSON, see `Question.gold`.
    prompt: template of the instruction format, fields instruction and question.
    hub, hub_config, hub_revision: the hub dataset.
    subset (seeded | first), test_seed, validation_rows: see `kronlab.data.common.subset`.

Local rows have no BoolQ passages, which lm-evaluation-harness' prompt begins with: there the question is asked alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kronlab.data import common
from kronlab.data.common import Example, LengthFn, Template
from kronlab.errors import ConfigError, DataError

ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_KEYS = (*common.HUB_KEYS, "dataset", "format", "prompt", "subset", "test_seed", "validation_rows")
_FORMATS = ("instruction", "choices")
_EVERYTHING = "commonsense_170k"
_BOOL_WORDS = ("false", "true")


@dataclass(frozen=True)
class Question:
    """A question with its choices; `answer` counts them from 0. Of WinoGrande, `text` has a ``_`` for the choice."""

    text: str
    choices: tuple[str, ...]
    answer: int
    passage: str = ""


@dataclass(frozen=True)
class _Task:
    """A task's folder, word (``answer`` in answer1), hub dataset, its test split there, and how a hub row is read."""

    folder: str
    word: str
    hub: str
    hub_config: str | None
    test: str
    read: Callable[[Mapping[str, Any]], Question]
    fields: tuple[str, ...]


def _read_labelled(row: Mapping[str, Any]) -> Question:  # ARC, OpenBookQA
    choices = row["choices"]
    text = row["question"] if "question" in row else row["question_stem"]
    return Question(text, tuple(choices["text"]), choices["label"].index(row["answerKey"].strip()))


def _read_boolq(row: Mapping[str, Any]) -> Question:
    return Question(row["question"], ("no", "yes"), int(row["label"]), row["passage"])


def _read_piqa(row: Mapping[str, Any]) -> Question:
    return Question(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def _read_siqa(row: Mapping[str, Any]) -> Question:
    choices = (row["answerA"], row["answerB"], row["answerC"])
    return Question(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _read_winogrande(row: Mapping[str, Any]) -> Question:
    return Question(row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)


def _read_hellaswag(row: Mapping[str, Any]) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(_clean_wikihow(context), tuple(map(_clean_wikihow, row["endings"])), int(row["label"]))


def _clean_wikihow(text: str) -> str:
    """HellaSwag's text without WikiHow's bracketed marks, as lm-evaluation-harness cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


TASKS: Final[dict[str, _Task]] = {
    "arc_easy": _Task(
        "ARC-Easy", "answer", "allenai/ai2_arc", "ARC-Easy", "test", _read_labelled,
        ("question", "choices", "answerKey"),
    ),
    "arc_challenge": _Task(
        "ARC-Challenge", "answer", "allenai/ai2_arc", "ARC-Challenge", "test", _read_labelled,
        ("question", "choices", "answerKey"),
    ),
    "boolq": _Task(
        "boolq", "", "aps/super_glue", "boolq", "validation", _read_boolq, ("question", "passage", "label")
    ),
    "openbookqa": _Task(
        "openbookqa", "answer", "allenai/openbookqa", "main", "test", _read_labelled,
        ("question_stem", "choices", "answerKey"),
    ),
    "piqa": _Task("piqa", "solution", "baber/piqa", None, "validation", _read_piqa, ("goal", "sol1", "sol2", "label")),
    "social_i_qa": _Task(
        "social_i_qa", "answer", "lighteval/siqa", None, "validation", _read_siqa, ("context", "question", "label")
    ),
    "winogrande": _Task(
        "winogrande", "option", "allenai/winogrande", "winogrande_xl", "validation", _read_winogrande,
        ("sentence", "option1", "option2", "answer"),
    ),
    "hellaswag": _Task(
        "hellaswag", "ending", "Rowan/hellaswag", None, "validation", _read_hellaswag,
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
}  # fmt: skip
_LEADS: Final = {
    "answer": "Please choose the correct answer to the question: ",
    "solution": "Please choose the correct solution to the question: ",
    "option": "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    "ending": "Please choose the correct ending to complete the given sentence: ",
    "": "Please answer the following question with true or false, question: ",
}
_LOCAL_FIELDS: Final = {"instruction": str, "output": str, "answer": str}


def load(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """Examples in the format that ``source`` asks for; ``meta`` has the task's name (of commonsense-170k: none).

    Raises:
        DataError: an instruction that is not in LLM-Adapters' format, or what `common.Place.rows` raises.
    """
    name, form = _dataset(source, split)
    held_by = common.rows_split(source, split)
    place = _place(source, held_by)
    path = common.find_local(data_dir, place.local)
    local = path is not None or name == _EVERYTHING
    required = _LOCAL_FIELDS if local else dict.fromkeys(TASKS[name].fields, object)
    rows = place.rows(data_dir, required)
    template = Template(source.get("prompt", ALPACA), "commonsense prompt")
    examples = []
    for i in common.subset(source, len(rows), split=split, n=n, seed=seed):
        id, row, where = f"{name}/{held_by}/{i}", rows[i], f"{path or place.hub} row {i}"
        if form == "choices":
            question = parse(row["instruction"], row["answer"], name, where) if local else TASKS[name].read(row)
            examples.append(_choices(id, question, name))
            continue
        if not local:
            row = write(TASKS[name].read(row), name)
        fields = {"instruction": row["instruction"], "question": row["instruction"]}
        examples.append(Example(id, template(fields), row["output"], row["answer"], {"task": name}))
    return examples


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`."""
    _dataset(source, split)
    return _place(source, common.rows_split(source, split)).probe(data_dir)


def parse(instruction: str, answer: str, name: str, where: str) -> Question:
    """The question and choices of an instruction in LLM-Adapters' format.

    Raises:
        DataError: it is not in that format, or the answer is none of its choices.
    """
    word = TASKS[name].word
    lead, marks = _LEADS[word], re.search(r"(?:\n\n| )Answer format: \S+\s*$", instruction)
    fault = DataError(f"{where}: field 'instruction' is not in LLM-Adapters' format of {name}: fix the row")
    if not instruction.startswith(lead) or marks is None:
        raise fault
    body = instruction[len(lead) : marks.start()]
    if not word:
        if answer not in _BOOL_WORDS:
            raise fault
        return Question(body.removesuffix("?"), ("no", "yes"), _BOOL_WORDS.index(answer))
    text, *pieces = re.split(rf"(?:\n\n| ){word.capitalize()}(\d): ?", body)
    labels = [f"{word}{number}" for number in pieces[::2]]
    if not labels or labels != [f"{word}{i + 1}" for i in range(len(labels))] or answer not in labels:
        raise fault
    return Question(text, tuple(pieces[1::2]), labels.index(answer))


def write(question: Question, name: str) -> dict[str, str]:
    """A row in LLM-Adapters' format: ``instruction``, ``output`` and ``answer``; `parse` reads it back."""
    word = TASKS[name].word
    if not word:
        answer, labels, body = _BOOL_WORDS[question.answer], ["true", "false"], f"{question.text}?\n\n"
    else:
        labels = [f"{word}{i + 1}" for i in range(len(question.choices))]
        answer = labels[question.answer]
        between = "\n\n" if word == "solution" else " "
        listed = between.join(f"{x.capitalize()}: {c}" for x, c in zip(labels, question.choices, strict=True))
        body = f"{question.text}\n\n{listed}" + (" " if word == "option" else "\n\n")
    instruction = f"{_LEADS[word]}{body}Answer format: {'/'.join(labels)}"
    return {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}


def _choices(id: str, question: Question, name: str) -> Example:
    """The log-likelihood protocol. Prompt + completion is the text with the right choice.

    gold: JSON of ``answer`` (index), ``choices`` (the texts whose length acc_norm divides by) and, where a choice
    stands before what is scored (WinoGrande), ``contexts`` (one for each choice): so the data's
    fingerprint covers all of it.
    """
    gold: dict[str, Any] = {"answer": question.answer, "choices": question.choices}
    if name == "winogrande":
        before, _, after = question.text.partition("_")
        contexts = [before + choice for choice in question.choices]
        gold |= {"choices": contexts, "contexts": contexts}
        prompt, completion = contexts[question.answer], " " + after.strip()
    else:
        prompt, completion = _context(question, name), " " + question.choices[question.answer]
    return Example(id, prompt, completion, json.dumps(gold), {"task": name})


def _context(question: Question, name: str) -> str:
    if name in ("openbookqa", "hellaswag"):
        return question.text
    if name == "social_i_qa":
        return f"Q: {question.text}\nA:"
    if name == "boolq":
        passage = f"{question.passage}\n" if question.passage else ""
        return f"{passage}Question: {question.text}?\nAnswer:"
    return f"Question: {question.text}\nAnswer:"


def _dataset(source: Mapping[str, Any], split: str) -> tuple[str, str]:
    common.check_keys(source, _KEYS)
    common.check_split("commonsense", split, ("train", "validation", "test"))
    name, form = source.get("dataset"), common.choose(source, "format", _FORMATS)
    known = (*TASKS, _EVERYTHING)
    if name not in known:
        raise ConfigError(f"data source 'commonsense': dataset={name!r}{common.did_you_mean(str(name), known)}")
    if name == _EVERYTHING and (split != "train" or form != "instruction"):
        raise ConfigError(f"data source 'commonsense': {_EVERYTHING} has train rows in the instruction format only")
    return str(name), form


def _place(source: Mapping[str, Any], split: str) -> common.Place:
    name = str(source["dataset"])
    if name == _EVERYTHING:
        return common.Place.of(source, split, (f"commonsense/{name}.json",), "zwhe99/commonsense_170k")
    task = TASKS[name]
    where = task.test if split == "test" else "train"
    return common.Place.of(source, where, (f"commonsense/{task.folder}/{split}.json",), task.hub, task.hub_config)
