"""The one shared trainer. Read it top to bottom: plan the steps, order the batches, train, save, resume.

`transformers.Trainer` gives the loop, mixed precision, DDP and FSDP; ours are the loss (supervised positions only,
weighted by tokens), the batch order (a function of seed and epoch alone) and checkpoints that a kill cannot break.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kronlab import interrupt, processes
from kronlab.encode import IGNORED, Encoded, Objective, collate
from kronlab.errors import CheckpointError, ConfigError, KronlabError
from kronlab.hooks import Hooks
from kronlab.progress import Bar, bar
from kronlab.runs import json_line, read_jsonl, write_jsonl

log = logging.getLogger(__name__)

COMPILE_BACKEND = "inductor"
METHOD_STATE = "method.pt"  # of a method that has a state of its own
BLANK = "blank"  # marks a micro-batch whose loss does not count
COMPLETE = "COMPLETE"  # written last into a checkpoint: without it, the checkpoint is a fragment

OnStep = Callable[[Mapping[str, Any]], None]  # is told the line of every step


class Diverged(Exception):
    """The training loss became nan or infinite at `step`, or the held-out loss after it."""

    def __init__(self, step: int, which: str = "training") -> None:
        super().__init__(f"the {which} loss is not finite at step {step}; lower trainer.lr or method.alpha")
        self.step = step


@dataclass(frozen=True)
class TrainReport:
    """What training cost and where it ended; sums run over all sittings of a resumed run."""

    steps: int
    seconds: float  # in optimizer steps alone: no loading, no checkpoint writing
    tokens: int  # non-padding tokens read
    supervised_tokens: int  # tokens that carried loss
    examples: int
    final_loss: float  # mean over the last tenth of the steps, nats per supervised token
    truncated_examples: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class EpochSampler(Sampler[int]):
    """Batch order as a function of (seed, epoch) alone, so that it is the same for every method and after a resume.

    With `group_by_length`, examples are shuffled, cut into pools of 50 batches, sorted by length inside a pool, cut
    into batches, and the batches are shuffled: little padding, and no drift of length over the run.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, group_by_length: bool) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.group_by_length, self.epoch = group_by_length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch in the order in which they are trained on."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group_by_length:
            return order
        pool = 50 * self.batch_size
        order = [
            i for at in range(0, len(order), pool) for i in sorted(order[at : at + pool], key=self.lengths.__getitem__)
        ]
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        # The short batch, if any, stays last: the loop cuts the order into batches by position.
        tail = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return [i for batch in shuffled + tail for i in batch]


class Deal(Sampler[list[int]]):
    """The micro-batches of every step in turn, for accelerate to deal out, one to each process, round after round.

    They are those that one process would go through. Where a short step has too few for the last round, blank ones
    fill it up, for every process must take part in every step: `~i` stands for example i, whose loss does not count.
    """

    def __init__(self, sampler: EpochSampler, *, micro_batch_size: int, hands: int) -> None:
        self.sampler, self.micro, self.hands = sampler, micro_batch_size, hands

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for at in range(0, len(order), self.sampler.batch_size):
            step = order[at : at + self.sampler.batch_size]
            yield from (step[i : i + self.micro] for i in range(0, len(step), self.micro))
            for _ in range(-math.ceil(len(step) / self.micro) % self.hands):
                yield [~step[0]]

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.sampler.batch_size)
        return sum(
            math.ceil(math.ceil(size / self.micro) / self.hands) * self.hands * times
            for size, times in ((self.sampler.batch_size, full), (rest, 1))
        )


class _Rows(Dataset[tuple[Encoded, bool]]):
    """A data set of (row, whether its loss counts); see `Deal` for the numbers."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Encoded, bool]:
        return (self.rows[number], True) if number >= 0 else (self.rows[~number], False)


class KronTrainer(Trainer):
    """`transformers.Trainer` with our loss, sampler and checkpoint marker, and what the method adds (`hooks`)."""

    optimizer: Any  # None until training starts

    def __init__(
        self, *arguments: Any, sampler: EpochSampler, objective: Objective, hooks: Hooks, keep: int, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the supervised tokens of the whole step
        self._sampler = sampler
        self._objective = objective
        self._hooks = hooks
        self._keep = keep
        self.step_loss = 0.0

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self._sampler

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        processes.shard_on_cpus(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        size = self.args.per_device_train_batch_size
        deal = Deal(self._sampler, micro_batch_size=size, hands=self.args.world_size)
        loader: DataLoader[Any] = DataLoader(
            _Rows(self.train_dataset),
            batch_sampler=deal,
            collate_fn=self._collate_dealt,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def _collate_dealt(self, dealt: list[tuple[Encoded, bool]]) -> dict[str, Tensor]:
        batch = self.data_collator([row for row, _ in dealt])
        return batch if dealt[0][1] else batch | {BLANK: torch.ones(1)}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        counted = [
            batch | {"labels": torch.full_like(batch["labels"], IGNORED)} if BLANK in batch else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def create_optimizer(self, model: Any = None) -> Any:
        """The method's own optimizer, if it has one; else the one of the recipe."""
        if self.optimizer is None:
            network = self.model if model is None else model
            kind, keywords = self.get_optimizer_cls_and_kwargs(self.args, network)
            self.optimizer = self._hooks.optimizer(network, kind, self.args.weight_decay, keywords)
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss over the supervised items (tokens) of the whole optimizer step: every item weighs the same."""
        blank = inputs.pop(BLANK, None) is not None
        losses = self._objective.losses(model, inputs)
        if blank:
            losses = losses * 0
        count = num_items_in_batch if num_items_in_batch is not None else losses.numel()
        loss = losses.sum() / max(count, 1)  # 0: every completion of the step was cut off by max_length
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            loss = loss * self.args.world_size  # DDP averages gradients over processes; count is over all of them
        return (loss, None) if return_outputs else loss

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().training_step(*arguments, **keywords)
        penalty = self._hooks.penalty()
        if penalty is not None:  # apart from the loss, so that the losses of all methods mean the same
            (penalty / self.current_gradient_accumulation_steps).backward()
        self.step_loss += float(loss)
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        processes.barrier()  # each writes the state of its random numbers
        if not processes.is_first():
            return
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        state = self._hooks.state()
        if state is not None:
            torch.save(state, checkpoint / METHOD_STATE)
        mark_whole(checkpoint)
        # by their steps; transformers would go by file times, and after a clock was set back remove the one just made
        for old in sorted(checkpoint.parent.glob("checkpoint-*"), key=_step_of)[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def restore_method(self, checkpoint: Path) -> None:
        """The method's own state, if its checkpoints have one."""
        if self._hooks.state() is not None:
            self._hooks.restore(torch.load(checkpoint / METHOD_STATE, map_location="cpu", weights_only=True))

    def take_weights(self, checkpoint: Path) -> None:
        """Only the weights: for a run whose last step is done."""
        self._load_from_checkpoint(str(checkpoint))


class MethodSteps(TrainerCallback):
    """Tells the method's hooks when training begins, and of every step while its gradients are there."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.hooks.begin(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.hooks.after_step(state.global_step + 1)  # transformers counts the step after this call


class Journal(TrainerCallback):
    """Writes `loss.jsonl`, one line a step, and shows the bar. Stops the run when the loss is no longer finite.

    `on_step` is told every line of the file in order: those that an earlier sitting has left, then each as it is made.
    """

    def __init__(
        self, path: Path, trainer: KronTrainer, rows: Sequence[Encoded], *, progress: bool, on_step: OnStep | None
    ) -> None:
        self.path, self.trainer, self.rows, self.progress = path, trainer, rows, progress
        self.on_step = on_step
        self.bar: Bar | None = None
        self.started = 0.0  # 0: no step yet
        self._tokens: list[tuple[int, int, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if processes.is_first():
            kept = [line for line in read_jsonl(self.path) if line["step"] <= state.global_step]
            write_jsonl(self.path, kept)  # steps after the checkpoint are done again
            for line in kept:
                self._tell(line)
        if self.progress and state.is_world_process_zero:
            self.bar = bar(total=state.max_steps, done=state.global_step, what="train", unit="step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()
        self.trainer.step_loss = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self.started
        examples, tokens, supervised = self._batch(state.global_step - 1)
        line = {
            "step": state.global_step,
            "loss": processes.mean(self.trainer.step_loss),  # each has its share of the batch, times their number
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 4),
            "examples": examples,
            "tokens": tokens,
            "supervised_tokens": supervised,
        }
        if state.is_world_process_zero:
            with self.path.open("a") as handle:
                handle.write(json_line(line))
        self._tell(line)
        if self.bar is not None:
            self.bar.update(1, note=f"loss {line['loss']:.4f}, {tokens / seconds:.0f} tokens/s")
        if not math.isfinite(line["loss"]):
            raise Diverged(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _tell(self, line: Mapping[str, Any]) -> None:
        if self.on_step is not None and self.trainer.is_world_process_zero():
            self.on_step(line)

    def _batch(self, step: int) -> tuple[int, int, int]:
        """(examples, tokens, supervised tokens) of an optimizer step, from the batch order."""
        if not self._tokens:
            sampler = self.trainer._sampler
            for epoch in itertools.count():
                order = sampler.order(epoch)
                for at in range(0, len(order), sampler.batch_size):
                    rows = [self.rows[i] for i in order[at : at + sampler.batch_size]]
                    supervised = sum(label != IGNORED for row in rows for label in row.labels)
                    self._tokens.append((len(rows), sum(map(len, rows)), supervised))
                if len(self._tokens) >= self.trainer.state.max_steps:
                    break
        return self._tokens[step]


class Halt(TrainerCallback):
    """Tells where training is, and ends it behind a checkpoint once a signal has asked for it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        interrupt.at(f"train {state.global_step}/{state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        interrupt.at(f"train {state.global_step}/{state.max_steps}")
        if processes.any_of(interrupt.pending()):  # all stop at the same step
            interrupt.ask(signal.SIGTERM)
            control.should_save = control.should_training_stop = True


class Trail(TrainerCallback):
    """Keeps the trained weights of the steps of `trail_steps` in `trail_file`, for looks back along the way.

    A step that is done again after a kill writes its file again, to the same weights.
    """

    def __init__(self, directory: Path, network: nn.Module) -> None:
        self.directory, self.network = directory, network

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in trail_steps(state.max_steps):
            return
        weights = processes.whole_trained(self.network)
        if processes.is_first():
            path = trail_file(self.directory, state.global_step)
            path.parent.mkdir(exist_ok=True)
            scratch = path.with_suffix(".part")
            save_file(weights, scratch)
            scratch.replace(path)


def trail_steps(last: int) -> list[int]:
    """1, 2, 4, 8, ... and the last step."""
    return [2**i for i in range(last.bit_length()) if 2**i < last] + [last]


def trail_file(directory: Path, step: int) -> Path:
    """Where the trained weights of a step are kept (`runtime.trail`), by the names of the network's parameters."""
    return directory / "trail" / f"{step}.safetensors"


def train(
    network: nn.Module,
    rows: Sequence[Encoded],
    recipe: Mapping[str, Any],
    *,
    directory: Path,
    seed: int,
    pad_id: int,
    objective: Objective,
    runtime: Mapping[str, Any],
    hooks: Hooks | None = None,
    on_step: OnStep | None = None,
    run_name: str | None = None,
) -> TrainReport:
    """Fine-tune the trainable parameters of `network` on `rows`; go on from the newest whole checkpoint in `directory`.

    Args:
        network: base model with a method attached, on the CPU.
        rows: encoded examples; their order together with `seed` fixes every batch.
        recipe: the `trainer` config section.
        objective: the loss of a batch; language models: `kronlab.encode.SupervisedHead(network, causal=...)`.
        directory: receives `loss.jsonl`, `checkpoint-<step>/` and, where the runtime asks for it, `trail/`.
        hooks: what the method adds (`kronlab.methods.hooks`); None: nothing.
        on_step: is told the line of every step, as `loss.jsonl` has it, also of those that an earlier sitting did.

    Raises:
        ConfigError: a recipe that cannot be run.
        CheckpointError: a checkpoint that is marked whole and cannot be read.
        Diverged: the loss became nan or infinite.
        Interrupted: a signal asked for it; there is a checkpoint of the last step.
    """
    if not rows:
        raise ConfigError("no training examples; raise task.n or look at the data source")
    if all(label == IGNORED for row in rows for label in row.labels):
        raise ConfigError("every completion is cut off, the prompts alone are too long; raise task.max_length")
    directory.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(recipe, directory, seed, runtime, run_name)
    sampler = EpochSampler(
        [len(row) for row in rows],
        batch_size=recipe["batch_size"],
        seed=seed,
        group_by_length=recipe["group_by_length"],
    )
    if recipe["gradient_checkpointing"]:
        network.enable_input_require_grads()  # type: ignore[operator]
    hooks = hooks or Hooks()
    trainer = KronTrainer(
        model=network,
        args=arguments,
        train_dataset=list(rows),
        data_collator=partial(collate, pad_id=pad_id),
        sampler=sampler,
        objective=objective,
        hooks=hooks,
        keep=max(2, runtime["keep_checkpoints"]),  # the newest may be damaged by what has stopped the run
    )
    for silent in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(silent)
    journal = Journal(directory / "loss.jsonl", trainer, rows, progress=bool(runtime["progress"]), on_step=on_step)
    trainer.add_callback(journal)
    trainer.add_callback(MethodSteps(hooks))
    trainer.add_callback(Halt())
    if runtime["trail"]:
        trainer.add_callback(Trail(directory, network))
    checkpoint = processes.agree(partial(_newest_with_losses, directory))
    if checkpoint is not None:
        _check_layout(checkpoint)
    blocks = compile_blocks(network) if recipe["compile"] else []
    processes.own_random_numbers(seed)
    try:
        if checkpoint is None:
            trainer.train()
        elif _is_last(checkpoint):
            # transformers would take one step more where the last one lies inside an epoch
            trainer.take_weights(checkpoint)
        else:
            log.info("resuming from %s", checkpoint.name)
            trainer.restore_method(checkpoint)
            trainer.train(resume_from_checkpoint=str(checkpoint))
        interrupt.check()
    except KronlabError:
        raise
    except Exception as error:  # safetensors, pickle, json and PEFT each have types of their own
        if checkpoint is not None and not journal.started:
            raise _unreadable(checkpoint, str(error) or type(error).__name__) from error
        raise
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # grading has other shapes, and no gradients
        if journal.bar is not None:
            journal.bar.close()
    return processes.agree(lambda: summarise(directory, truncated=sum(row.truncated for row in rows)))


def training_arguments(
    recipe: Mapping[str, Any],
    directory: Path,
    seed: int,
    runtime: Mapping[str, Any],
    run_name: str | None = None,
) -> TrainingArguments:
    """A recipe in the words of transformers.

    Raises:
        ConfigError: a recipe that cannot be run.
    """
    batch, hands = recipe["batch_size"], processes.count()
    if batch % hands:
        raise ConfigError(f"trainer.batch_size={batch} cannot be shared by {hands} processes; use one of its divisors")
    micro = min(recipe["micro_batch_size"], batch // hands)
    if batch % (micro * hands):
        raise ConfigError(
            f"trainer.batch_size={batch} is not a multiple of trainer.micro_batch_size={micro} x {hands} processes"
        )
    rows = recipe["loss_rows"]
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ConfigError(f"trainer.loss_rows={rows!r}; use a whole number of at least 1, or null for all at once")
    if not isinstance(recipe["compile"], bool):
        raise ConfigError(f"trainer.compile={recipe['compile']!r}; use true or false")
    if recipe["precision"] not in ("bf16", "fp32"):
        raise ConfigError(f"trainer.precision={recipe['precision']!r}; use bf16 or fp32")
    # of `accelerate launch`: the recipe decides, or the same cell would be another one under another launcher
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return TrainingArguments(
        output_dir=str(directory),
        run_name=run_name,
        seed=seed,
        data_seed=seed,
        optim=recipe["optimizer"],
        learning_rate=recipe["lr"],
        lr_scheduler_type=recipe["schedule"],
        # transformers reads a value below 1 as a share of the steps
        warmup_steps=recipe["warmup_ratio"],
        weight_decay=recipe["weight_decay"],
        adam_beta1=float(recipe["betas"][0]),  # torch refuses 0 beside 0.9
        adam_beta2=float(recipe["betas"][1]),
        max_grad_norm=recipe["max_grad_norm"],
        num_train_epochs=recipe["epochs"],
        max_steps=recipe["max_steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // (micro * hands),
        activation_checkpointing=recipe["gradient_checkpointing"],
        bf16=recipe["precision"] == "bf16",
        use_cpu=runtime["device"] == "cpu",
        save_strategy="steps",
        save_steps=runtime["save_every"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=runtime["device"] != "cpu",
        label_names=["labels"],
    )


def compile_blocks(network: nn.Module) -> list[nn.Module]:
    """Compile each of the network's repeated blocks in place, and return them.

    The blocks share one class, so they share their compiled code too: a whole network would take many times as long.
    Lengths are dynamic from the start, for every batch has its own.

    Raises:
        ConfigError: there is no C++ compiler, or no block that is repeated.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"trainer.compile=true needs a C++ compiler, {compiler} is not there; install it or set CXX")
    blocks = [
        block
        for stack in network.modules()
        if isinstance(stack, nn.ModuleList) and len(stack) > 1 and len({type(block) for block in stack}) == 1
        for block in stack
    ]
    if not blocks:
        raise ConfigError("trainer.compile=true: this model has no repeated blocks; leave it false")
    for block in blocks:
        block.compile(dynamic=True, backend=COMPILE_BACKEND)
    return blocks


def newest_checkpoint(directory: Path) -> Path | None:
    """The whole checkpoint with the most steps; fragments that a kill left behind are removed."""
    whole = []
    for folder in directory.glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            whole.append(folder)
        else:
            log.info("removing %s: it was not finished", folder.name)
            shutil.rmtree(folder, ignore_errors=True)
    return max(whole, key=_step_of, default=None)


def _newest_with_losses(directory: Path) -> Path | None:
    """The newest whole checkpoint all of whose steps have their line in `loss.jsonl`; later ones are removed.

    A damaged journal costs steps that are done again, to the same weights; a gap would be a wrong sum in the record.
    """
    steps = [line.get("step") for line in read_jsonl(directory / "loss.jsonl")]
    covered = next((i for i, step in enumerate(steps) if step != i + 1), len(steps))
    while (newest := newest_checkpoint(directory)) is not None and _step_of(newest) > covered:
        log.warning("removing %s: loss.jsonl is damaged behind step %d", newest.name, covered)
        shutil.rmtree(newest)
    return newest


def mark_whole(folder: Path) -> None:
    """Write the marker last: hash, size and name of every file, which a reader checks before it reads them.

    SHA-256 costs 0.6 s a GB where the processor has instructions for it, about what writing the file has cost.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
    lines = [f"{_sha256(path)} {path.stat().st_size} {path.relative_to(folder)}\n" for path in files]
    scratch = folder / f".{COMPLETE}"
    scratch.write_text("".join([f"{_HASHED} {len(lines)}\n", *lines]))  # beside it first: never half a list
    scratch.replace(folder / COMPLETE)


_HASHED = "sha256"  # and the number of files: the first line of a marker; older ones have sizes and names alone


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a folder that `mark_whole` has marked; None: they are as they were written."""
    try:
        lines = (folder / COMPLETE).read_text().removesuffix("\n").split("\n")
        hashed = lines[0].startswith(f"{_HASHED} ")
        if hashed and int(lines.pop(0).partition(" ")[2]) != len(lines):
            return f"{COMPLETE} was cut"
        for line in lines:
            digest, _, rest = line.partition(" ") if hashed else ("", "", line)
            size, _, name = rest.partition(" ")
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != int(size):
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if hashed and _sha256(path) != digest:
                return f"{name} is not as it was written: its hash differs"
    except ValueError:
        return f"{COMPLETE} is no list of files"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_layout(checkpoint: Path) -> None:
    """Raise CheckpointError where parameters were split between processes then and are not now, or the reverse."""
    then = (checkpoint / "pytorch_model_fsdp.bin").is_file()
    if then is not processes.sharded():
        raise CheckpointError(
            f"checkpoint {checkpoint} was made {'under' if then else 'without'} FSDP; "
            f"go on {'under' if then else 'without'} it, or start the cell again with force=true"
        )


def _is_last(checkpoint: Path) -> bool:
    # transformers goes on without a word where the state of optimizer, schedule or random numbers is missing
    found = damage(checkpoint)
    if found is not None:
        raise _unreadable(checkpoint, found)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def _unreadable(checkpoint: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint} cannot be read ({reason.splitlines()[0][:160]}); "
        "delete it and start again: training goes on from the one before"
    )


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def summarise(directory: Path, *, truncated: int) -> TrainReport:
    """Read `loss.jsonl` back into a report."""
    lines = read_jsonl(directory / "loss.jsonl")
    tail = lines[-max(1, len(lines) // 10) :]
    return TrainReport(
        steps=len(lines),
        seconds=sum(line["seconds"] for line in lines),
        tokens=sum(line["tokens"] for line in lines),
        supervised_tokens=sum(line["supervised_tokens"] for line in lines),
        examples=sum(line["examples"] for line in lines),
        final_loss=sum(line["loss"] for line in tail) / len(tail),
        truncated_examples=truncated,
    )
