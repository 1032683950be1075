"""The stage `train`: recipe -> SFTConfig + LoraConfig -> SFTTrainer -> adapter.

train/adapter/        adapter_model.safetensors, adapter_config.json, and qkit.json: the base it belongs to
train/model/          in its place where all weights are trained: a model folder in fp32, and qkit.json
train/metrics.jsonl   one line per logged step
train/sums.json       label counts: in the ledger, in the batches, and as the divisor of the loss
train/packing.json    whether packed documents attend only to themselves (with data.packing)
train/losses.parquet  each row's loss before and after (with ledger.losses)
train/reference*.parquet, pairs.json   of tasks that compare answers with a reference: its log-probabilities, and how a pair is computed
train/memory.json     memory planned and measured, by line
train/decided.json    the value chosen for train.gradient_checkpointing=auto
train/trackers.json   the ids of the runs in the trackers of train.report_to
train/checkpoints/    the last train.save_total_limit; a killed run resumes from the newest complete one
"""

from __future__ import annotations

import contextlib
import difflib
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core import memory_watch
from qkit.core.device import Device, detect, limit_kernel_cache, out_of_memory
from qkit.core.errors import MissingArtifact, ModelError, OutOfMemory, RecipeError, StageFailed, short
from qkit.core.files import need_disk, read_json, write_json
from qkit.core.memory_meter import PeakMeter
from qkit.model import provenance, source
from qkit.model.adapters import rates, starts, targets
from qkit.model.config import shape_of
from qkit.plan import deployable, fit, solve
from qkit.plan import plan as plan_plan
from qkit.plan import speed as plan_speed
from qkit.plan._known import Known
from qkit.plan._subject import subject_of
from qkit.plugins.task import LABELS, open_task, read_labels
from qkit.recipe import optimizers, schedule
from qkit.recipe.schema import WHOLE, Recipe
from qkit.run.directory import DECIDED, Peak, Run, decisions
from qkit.tensors.companions import copy_companions, copy_tokenizer
from qkit.tracking import trackers
from qkit.tracking.reporting import Reports
from qkit.train import (
    _earlier_adapter,
    _metrics,
    best_step,
    checkpoints,
    memory_report,
    optimization,
    row_losses,
    validation,
)
from qkit.train.label_sums import Sums
from qkit.train.trainers import open_trainer

if TYPE_CHECKING:
    from transformers import Trainer


COUNTS = "Counts"  # the name, in a checkpoint, of the callback that stores the label counts


def run(run: Run, out: Path) -> Peak:
    """Train the adapter, resuming from the last checkpoint in `out` if there is one. Returns planned and measured peak memory.

    Raises:
        NotDeployable: an export format of the recipe does not support the model, or does not load in its runtime.
        StageFailed: the labels in the batches differ from those in the ledger, or training diverged.
    """
    limit_kernel_cache()
    device = detect()
    evaluates = _check(run, device)
    run = Run(run.root, _decided(run, device, out), run.progress)
    recipe = run.recipe
    meter = PeakMeter(device)
    _warn_of_memory(run, device)
    folder = source.resolve(recipe.model)
    _earlier_adapter.check(recipe.lora, folder, run.folder("data"), run.progress.notify)
    with targets.patterns_of_parameters():
        trainer = open_trainer(run.recipe.task).build_trainer(run, folder, device, out)
    _need_disk_for_checkpoints(trainer, recipe, evaluates, out)
    if recipe.data.packing:
        _pack_if_isolated(run, trainer, out)
    _check_steps(run, trainer)
    if evaluates:
        validation.attach(trainer, run, meter)
        optimization.follow_metric(trainer, recipe.train)
    if recipe.ledger.losses:
        row_losses.write_before(out / "losses.parquet", trainer, run.progress)
    watcher = _train(run, trainer, meter, out)
    if evaluates:
        validation.finish(trainer, out, _total_steps(trainer))
    if recipe.ledger.losses:
        row_losses.write_after(out / "losses.parquet", trainer, run.progress)
    _save(trainer, folder, run, out)
    memory = memory_report.measured(recipe, device, meter, watcher, _known(run, trainer))
    write_json(out / "memory.json", memory.to_dict())
    return memory.peak()


def _check(run: Run, device: Device) -> bool:
    """Raise an error for what cannot be trained, before anything is loaded. Returns whether training evaluates."""
    fit.check(run.recipe, device)
    deployable.check(run.recipe)
    _check_targets(run.recipe)
    _check_names(run.recipe)
    optimization.check(run, device)
    return validation.check(run)


def _decided(run: Run, device: Device, out: Path) -> Recipe:
    """The recipe with gradient checkpointing on or off. A resumed run keeps its earlier value."""
    if run.recipe.train.gradient_checkpointing != "auto":
        return run.recipe
    lengths = read_json(run.need("data", "summary.json")).get("lengths", [])
    chosen = plan_plan.checkpointing(
        run.recipe, device, solve.known_of(lengths, run.recipe, len(read_labels(run.folder("data"))))
    )
    before = decisions(out).get(fit.CHECKPOINTING)
    if before is not None and before != chosen.on:
        chosen = plan_plan.Checkpointing(before, "as when this run started")
    write_json(out / DECIDED, {fit.CHECKPOINTING: chosen.on, "why": chosen.why})
    run.progress.notify(f"train: gradient checkpointing is {'on' if chosen.on else 'off'}: {chosen.why}")
    train = run.recipe.train.model_copy(update={"gradient_checkpointing": chosen.on})
    return run.recipe.model_copy(update={"train": train})


def _known(run: Run, trainer: Any) -> Known:
    return memory_report.known_of(trainer, len(read_labels(run.folder("data"))))


def _check_steps(run: Run, trainer: Any) -> None:
    """Check the recipe against the number of steps, which is known only after the trainer is built.

    Raises:
        RecipeError: training is too short for its schedule, or nothing is trained that a rate is set for.
    """
    total, section = _total_steps(trainer), run.recipe.train
    schedule.check(section, total)
    if trainer.rates.differ:
        rates.grouped(trainer.model, trainer.rates)
    if section.save_steps >= total:
        run.progress.notify(
            f"train: no checkpoint before the end: train.save_steps={section.save_steps}, {total} steps"
        )


def _train(run: Run, trainer: Any, meter: PeakMeter, out: Path) -> Any:
    """Run the remaining steps. Returns the watcher of the second of them."""
    checkpoint = _resume_point(run, out / "checkpoints")
    done, ledger = checkpoints.step_of(checkpoint), read_json(run.need("data", "summary.json"))["splits"]["train"]
    best_step.drop_after(out / "checkpoints", done)
    if checkpoint:
        state = read_json(checkpoint / "trainer_state.json")
        trainer.sums = Sums(**state["stateful_callbacks"][COUNTS]["attributes"])
    trainer.add_callback(_counts(run, trainer, ledger["labelled_tokens"]))
    reports = Reports(run, out, done)
    with run.progress.bar("train", _total_steps(trainer), start=done) as bar:
        trainer.add_callback(_metrics.recorder(out / "metrics.jsonl", bar, meter, trainer, done))
        reports.attach(trainer)
        watcher = _watched(run, trainer, meter, checkpoint)
    reports.close(trainer.state.global_step)
    _write_sums(run, trainer, ledger, out)
    return watcher


def _resume_point(run: Run, folder: Path) -> Path | None:
    """The checkpoint to resume from, reported if an earlier attempt left any. Damaged checkpoints are deleted."""
    newest = checkpoints.newest_whole(folder, lambda text: run.progress.notify(f"train: warning: {text}"))
    if any(folder.glob("checkpoint-*")):
        run.progress.notify(f"train: resuming from {newest.name}" if newest else "train: starting from the beginning")
    checkpoints.drop_after(folder, newest)
    return newest


def _watched(run: Run, trainer: Any, meter: PeakMeter, checkpoint: Path | None) -> Any:
    """Train from a checkpoint or from the start, with the memory of the second step watched. Stores the speed for later plans.

    Raises:
        OutOfMemory: with the item that exceeded its plan.
    """
    watcher = memory_watch.step_watcher(checkpoints.step_of(checkpoint) + 1)
    if checkpoint and _is_finished(trainer, checkpoint):
        _load_finished(trainer, checkpoint)
        return watcher
    if not optimizers.is_compiled(run.recipe.train.optim):  # torch compiles nothing while tensors are watched
        trainer.add_callback(watcher)
    begin = time.perf_counter()
    if run.recipe.train.eval_on_start and trainer.validation and not checkpoint:
        trainer.evaluate()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if not out_of_memory(error):
            raise
        why = memory_report.shortage(run.recipe, meter.device, meter, trainer, _known(run, trainer))
        raise OutOfMemory("train", run.root, run.log("train"), f"out of memory: {_first_line(error)}; {why}") from error
    finally:
        watcher.close()
    _remember(
        run, trainer, meter.device, time.perf_counter() - begin - watcher.seconds, checkpoints.step_of(checkpoint)
    )
    return watcher


def _is_finished(trainer: Any, checkpoint: Path) -> bool:
    """Whether no step follows a checkpoint: it is that of the last, or early stopping had stopped there."""
    had_stopped = validation.resume(trainer, read_json(checkpoint / "trainer_state.json"))
    return had_stopped or checkpoints.step_of(checkpoint) >= _total_steps(trainer)


def _load_finished(trainer: Any, checkpoint: Path) -> None:
    """Restore the state after the last step. The trainer itself would run one more step."""
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer._load_from_checkpoint(str(checkpoint))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _remember(run: Run, trainer: Any, device: Device, seconds: float, done: int) -> None:
    """Store the speed of all steps except the watched one, for later plans."""
    steps, rows = trainer.state.global_step - done, read_json(run.need("data", "summary.json"))["splits"]["train"]
    with contextlib.suppress(ModelError):  # a model of unknown shape cannot be planned for
        seconds -= trainer.evaluation_seconds
        if steps > 1:
            speed = trainer.real_tokens * (steps - 1) / steps / seconds
            share = rows["labelled_tokens"] / rows["tokens"]
            known = _known(run, trainer)
            plan_speed.remember(run.recipe, subject_of(run.recipe, known), device, speed, share)


def _pack_if_isolated(run: Run, trainer: Any, out: Path) -> None:
    """Train on packs only if the model keeps their documents apart; otherwise on batches of rows."""
    verdict = trainer.isolation()
    trainer.packing = verdict.holds
    write_json(out / "packing.json", {"packing": verdict.holds, **asdict(verdict)})
    what = (
        "packing" if verdict.holds else "warning: packing is off for this run, which trains on batches of rows instead"
    )
    run.progress.notify(f"{what}: isolation of packed documents {verdict.verdict} ({verdict.reason})")


def _write_sums(run: Run, trainer: Any, ledger: Mapping[str, int], out: Path) -> None:
    sums, epochs = trainer.sums, trainer.state.epoch
    counts = {
        **{name: ledger[name] for name in ("records", "rows", "dropped")},
        "epochs": epochs,
        "ledger_labelled_tokens": ledger["labelled_tokens"],
        "drawn_labelled_tokens": sums.drawn,
        "divided_by": sums.divided_by,
        "in_batches": sums.in_batches,
        **({} if sums.drawn_weight is None else {"drawn_weight": sums.drawn_weight}),
    }
    write_json(out / "sums.json", counts)
    weigh = "" if sums.drawn_weight is None else f", which weigh {sums.drawn_weight:,.6g}"
    run.progress.notify(
        f"train: {ledger['labelled_tokens']:,} labelled tokens in the ledger, {epochs:.4g} epochs: {sums.drawn:,} in the sampled "
        f"rows = {sums.in_batches:,} in the batches{weigh} = {sums.divided_by:,} {trainer.divisors}"
    )


def _check_targets(recipe: Recipe) -> None:
    """Raise ModelError, before anything is loaded, if a target of the recipe's lora section does not exist in the model."""
    if not open_task(recipe.task).HEAD.generates or recipe.method != "lora":
        return
    try:
        sizes = shape_of(recipe.model)
    except ModelError:  # it may still be trainable, and is checked again once loaded
        return
    targets.planned(recipe.lora, sizes)


def _check_names(recipe: Recipe) -> None:
    """Raise RecipeError for an optimizer or an attention that transformers does not know, MissingExtra for a tracker that is not installed."""
    trackers.check(recipe)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.training_args import OptimizerNames

    attention = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    for field, given, known in (
        ("train.optim", recipe.train.optim, [str(name.value) for name in OptimizerNames]),
        ("model.attn_implementation", recipe.model.attn_implementation, attention),
    ):
        if given not in known and not (known is attention and "/" in given):  # a kernel of the hub is OWNER/NAME
            near = difflib.get_close_matches(given, known, n=3, cutoff=0.4)
            raise RecipeError(
                f"{field}={short(given)}: unknown to transformers; similar names: {', '.join(near or known)}"
            )


def _warn_of_memory(run: Run, device: Device) -> None:
    """Warn, before the model is loaded, if the plan does not fit. Not an error: activations are an upper bound."""
    try:
        planned = plan_plan.plan(run.recipe, device=device)
    except ModelError as error:  # it may still be trainable
        run.progress.notify(f"not planned: {error}")
        return
    if not planned.fits:
        run.progress.notify(f"warning: {plan_plan.refusal(planned)}")


def _total_steps(trainer: Any) -> int:
    return schedule.steps(trainer.args, len(trainer.batches()))


def _counts(run: Run, trainer: Any, ledger: int) -> Any:
    """A callback that checks label counts and loss after each step, before it is saved, and stores the counts in each checkpoint.

    So an error costs one step and not the whole run.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class Counts(TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": asdict(trainer.sums)}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if problem := trainer.sums.problem(state.epoch, ledger) or _divergence(trainer, state.global_step):
                raise StageFailed("train", run.root, run.log("train"), problem)
            trainer.loss = 0.0

    return Counts()


def _divergence(trainer: Any, step: int) -> str:
    """A message if the loss or the gradient norm of the step is not finite, else an empty string."""
    figures = {"loss": float(trainer.loss), "gradient norm": float(trainer.grad_norm)}
    wrong = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
    if not wrong:
        return ""
    return (
        f"training diverged at step {step}: {' and '.join(wrong)}. Lower train.learning_rate, set quantization.bnb_4bit_compute_dtype=bfloat16 "
        "if it has another value, and check the rows with `qkit inspect`; the last checkpoint before the step is kept"
    )


def _need_disk_for_checkpoints(trainer: Any, recipe: Recipe, evaluates: bool, out: Path) -> None:
    """A new checkpoint is complete before an old one is deleted; the best steps take no more than one."""
    at_once = recipe.train.save_total_limit + 1 + (evaluates and recipe.train.keeps_best)
    need_disk(out, optimization.checkpoint_bytes(recipe, trainer.model) * at_once, "checkpoints")


def _save(trainer: Trainer, folder: Path, run: Run, out: Path) -> None:
    """Write the adapter, or the whole model; with the base that it belongs to, and the labels."""
    recipe, trained = run.recipe, out / ("model" if run.recipe.method in WHOLE else "adapter")
    trainer.model.save_pretrained(str(trained))
    weights = "model*.safetensors" if recipe.method in WHOLE else "adapter_model.safetensors"
    if not any(trained.glob(weights)):
        raise MissingArtifact(f"{trained}: {weights} was not written")
    if (start := out / "checkpoints" / starts.START).is_file():
        starts.subtract_start(trained, start)
    quantized = source.quantized_names(trainer.base_model) if recipe.quantization.load_in_4bit else []
    names = [name.replace(".base_layer.weight", ".weight") for name in quantized]
    provenance.write_adapter_note(trained, folder, recipe, names, _earlier_adapter.origin(recipe.lora))
    labels = run.folder("data") / LABELS
    if labels.is_file():
        shutil.copyfile(labels, trained / LABELS)
    if recipe.method in WHOLE and open_task(recipe.task).HEAD.generates:
        copy_companions(folder, trained, but=("config.json", provenance.NOTE))
    elif recipe.method in WHOLE:
        copy_tokenizer(folder, trained)
