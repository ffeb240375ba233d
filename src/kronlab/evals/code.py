"""Evals by written programs: HumanEval and MBPP, pass@k. Completions first; they are run in a second stage.

Every program is run by `kronlab.evals.sandbox.run_tests`, so that no verdict is made where the program runs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, ClassVar, Final

from transformers import PreTrainedTokenizerBase

from kronlab.data import Example
from kronlab.errors import ConfigError
from kronlab.evals import sandbox
from kronlab.evals.harness import Harness, Row, Settings, Subject, positive
from kronlab.evals.statistics import mean_metric, pass_at_k
from kronlab.generate import generate

PROTOCOLS: Final = ("plain", "paper", "instruct")
_BLOCK: Final = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_DOCSTRINGS: Final = re.compile(r'""".*?"""|\'\'\'.*?\'\'\'', re.DOTALL)


class Code(Harness):
    """Settings: `protocol` (plain: the prompt goes on, cut at the first of `generation.stop_strings`; paper: the CDKA
    authors' post-processing; instruct: the tokenizer's chat template, code taken from the answer), `samples` of each
    problem, `k` (list; pass@k needs k <= samples), `timeout_s`, `memory_mb`, `allow_unsandboxed`, `generation`.
    """

    kind: ClassVar[str] = "code"
    version: ClassVar[str] = "1"
    grades_late: ClassVar[bool] = True

    def faults(self, name: str, settings: Settings) -> Iterator[str]:
        generation = settings["generation"]
        if settings["protocol"] not in PROTOCOLS:
            yield f"eval.{name}.protocol={settings['protocol']!r}: must be one of {', '.join(PROTOCOLS)}"
        for key, value in (
            *((f"generation.{key}", generation[key]) for key in ("max_new_tokens", "batch_size")),
            *((key, settings[key]) for key in ("samples", "memory_mb")),
        ):
            if not positive(value):
                yield f"eval.{name}.{key}={value!r}: must be a whole number of at least 1"
        k, samples = settings["k"], settings["samples"]
        if positive(samples) and not (k and all(positive(one) and one <= samples for one in k)):
            yield f"eval.{name}.k={list(k)}: must be a list of whole numbers from 1 to samples={samples}"
        if not isinstance(settings["timeout_s"], (int, float)) or not settings["timeout_s"] > 0:
            yield f"eval.{name}.timeout_s={settings['timeout_s']!r}: must be a number of seconds above 0"
        if positive(samples) and samples > 1 and not generation.get("sampling"):
            yield f"eval.{name}.samples={samples}: greedy samples are all the same; set generation.sampling"

    def samples_per_example(self, settings: Settings) -> int:
        return int(settings["samples"])

    def collect(self, subject: Subject, batch: Sequence[Example], settings: Settings) -> list[Row]:
        """One row for each sample: `completion`, and in `problem` what it takes to run it.

        Raises:
            SandboxError: it could not be run afterwards; said before the time is spent.
        """
        sandbox.require(allow_unsandboxed=settings["allow_unsandboxed"])
        several = settings["samples"] > 1
        rows: list[Row] = []
        prompts = []
        for example in batch:
            prompt = (
                chat_prompt(example.prompt, subject.tokenizer) if settings["protocol"] == "instruct" else example.prompt
            )
            for i in range(settings["samples"]):
                rows.append({"id": f"{example.id}#{i}" if several else example.id, "problem": dict(example.meta)})
                prompts.append(prompt)
        size = settings["generation"]["batch_size"]  # the samples of one batch of problems may be many batches
        for at in range(0, len(rows), size):
            completions = generate(
                subject.network,
                subject.tokenizer,
                prompts[at : at + size],
                settings["generation"],
                causal=subject.causal,
                seeds=[row["id"] for row in rows[at : at + size]],
            )
            for row, completion in zip(rows[at : at + size], completions, strict=True):
                row |= {"completion": completion.text, "tokens": completion.tokens, "finished": completion.finished}
        return rows

    def grade(self, row: Row, settings: Settings) -> Row:
        problem = row["problem"]
        program = assemble(
            row["completion"],
            protocol=settings["protocol"],
            stub=problem["stub"],
            entry_point=problem["entry_point"],
            stop_strings=settings["generation"]["stop_strings"],
        )
        if program is None:
            return {
                "answer": None,
                "correct": False,
                "reason": "no answer" if row["finished"] else "cut off",
                "detail": "",
            }
        result = sandbox.run_tests(
            program,
            row["gold"],
            exported=problem["exported"],
            setup=problem["setup"],
            modules=problem["modules"],
            timeout_s=settings["timeout_s"],
            limits=sandbox.Limits(memory_mb=settings["memory_mb"]),
            allow_unsandboxed=settings["allow_unsandboxed"],
        )
        words = {"passed": "right", "failed": "wrong answer", "error": "error" if row["finished"] else "cut off"}
        reason = words.get(result.status, result.status)
        return {"answer": program, "correct": result.passed, "reason": reason, "detail": result.detail}

    def grade_all(self, rows: Sequence[Row], settings: Settings) -> Iterable[tuple[Row, Row]]:
        """As many programs at once as there are cores, each with a half of its sandboxes waiting for the other."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            verdicts = {pool.submit(self.grade, row, settings): row for row in rows}
            try:
                for verdict in as_completed(verdicts):
                    yield verdicts[verdict], verdict.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def score(self, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
        """`pass@k` of every k, each the mean over the problems of `pass_at_k`; the first k is the headline."""
        problems: dict[str, list[bool]] = {}
        for row in rows:
            problems.setdefault(row["id"].partition("#")[0], []).append(bool(row["correct"]))
        metrics = {
            f"pass@{k}": mean_metric([pass_at_k(len(p), sum(p), k) for p in problems.values()]) for k in settings["k"]
        }
        return {
            "metrics": metrics | {"finished": mean_metric([float(row["finished"]) for row in rows])},
            "graders": {"code": self.version, "sandbox": sandbox.VERSION},
            "reasons": dict(sorted(Counter(row["reason"] for row in rows).items())),
            "completion_tokens": sum(row["tokens"] for row in rows),
            "samples": {"id": [row["id"] for row in rows], "correct": [int(row["correct"]) for row in rows]},
        }


def assemble(
    completion: str, *, protocol: str, stub: str, entry_point: str, stop_strings: Sequence[str] = ()
) -> str | None:
    """The program that a completion stands for, or None if it holds none.

    Args:
        stub: the head of the function that was to be completed ("" if there is none).
        entry_point: the function's name.
        stop_strings: where a plain completion ends.
    """
    if protocol == "plain":
        text = cut(completion, stop_strings)
        return stub + text if text.strip() else None
    if protocol == "paper":
        text = post_processed(completion)
        return stub + text if text.strip() else None
    code = code_block(completion, entry_point)
    if code is None:
        return None
    if not defines(code, entry_point):
        return stub + code  # a body only
    before = re.split(rf"^def\s+{re.escape(entry_point)}\b", stub, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{before}\n{code}"  # with the imports and helpers that stand before the function in the prompt


def cut(text: str, stop_strings: Sequence[str]) -> str:
    """`text` before the first of the stop strings."""
    return text[: min((at for stop in stop_strings if (at := text.find(stop)) >= 0), default=len(text))]


def code_block(text: str, entry_point: str) -> str | None:
    """The first fenced block that defines the function, else the first one; without fences, from its definition on."""
    blocks = _BLOCK.findall(text)
    for block in blocks:
        if defines(block, entry_point):
            return str(block)
    if blocks:
        return str(blocks[0])
    bare = re.search(
        rf"^(?:from|import|def|class|@)\b.*?\bdef\s+{re.escape(entry_point)}\b", text, re.DOTALL | re.MULTILINE
    )
    found = bare or re.search(rf"^def\s+{re.escape(entry_point)}\b", text, re.MULTILINE)
    return text[found.start() :] if found else None


def defines(code: str, name: str) -> bool:
    """Whether a line at the left margin defines the function or class `name`."""
    return re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", code, re.MULTILINE) is not None


def post_processed(text: str) -> str:
    """What the CDKA authors (and LoRA-GA) make of a completion before it follows the prompt.

    Fences, triple-quoted texts and blank lines go. Then lines are indented anew: the widths that occur are ranked,
    those up to the width of the first line with "def" in it count 0, the next 1, and so on, four blanks each. What
    follows the code stays in, so prose behind it is a syntax error, and a literal with three quotes is lost.
    """
    text = _DOCSTRINGS.sub("", text.replace("```", "").replace("\t", "    "))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    widths = [len(line) - len(line.lstrip(" ")) for line in lines]
    margin = next((width for line, width in zip(lines, widths, strict=True) if "def" in line), 0)
    deeper = sorted({width for width in widths if width > margin})
    level = {width: 1 + rank for rank, width in enumerate(deeper)}
    return "\n".join("    " * level.get(width, 0) + line.lstrip() for line, width in zip(lines, widths, strict=True))


def chat_prompt(request: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The request as the user's turn of the tokenizer's chat template, up to where the answer begins.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "protocol=instruct needs a tokenizer with a chat template, and this model has none; use protocol=plain"
        )
    turns = [{"role": "user", "content": request}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    # tokenizers that put BOS before every text would put a second one
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
