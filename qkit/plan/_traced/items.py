"""The items of each stage of a model with a new head: what persists by arithmetic, what comes and goes by a trace (step.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from qkit.core.device import Device
from qkit.core.errors import ModelError
from qkit.plan._optimizer_state import formula, state_bytes
from qkit.plan._overhead import LABELLED_PROCESS, fixed_item, heap_items, overhead_of, segments
from qkit.plan._traced import shapes
from qkit.plan._traced.head import ASSUMED_LABELS, NewHead
from qkit.plan._traced.model import weights_dtype
from qkit.plan._traced.shapes import BatchShape
from qkit.plan._traced.step import Setting, Traced, inputs_of, setting_of, traced
from qkit.plan.items import MemoryItem
from qkit.plugins.runtime import ENCODER_TOKENS
from qkit.recipe.schema import WHOLE, Recipe
from qkit.run.stages import stages_of

A_CPU = Device("cpu", "", 0, 1)  # for what does not depend on the device
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
FP32, INT64 = 4, 8
PASSING = ("activations", "logits", "workspace", "batch")  # lines of a trace that do not persist between steps
TRACED_GRADIENTS = "traced: those that exist at the peak of the step"
UPDATE_COPIES = 2  # torch's own Adam on a CPU, tensor by tensor: the root of the second moment, and that divided
# The peak resident size of the exporters, as a multiple of the fp32 weights, without a bare process.
ONNX_COPIES = {"fp32": 5, "int8": 6}


@dataclass(frozen=True)
class Step:
    """A training step at its largest batch, with what it was traced from. `optimizer`: bytes of its state."""

    recipe: Recipe
    device: Device
    shape: BatchShape
    trace: Traced
    optimizer: int
    inputs: int  # tensors of ids, masks and types that the model reads

    @property
    def waiting_bytes(self) -> int:
        """The other micro-batches of the batch: the parts are views of it. A row has a label and a length beside its inputs."""
        rows = (self.recipe.micro_batches - 1) * self.shape.rows
        return rows * INT64 * (self.shape.length * self.inputs + 2)

    @property
    def trained_bytes(self) -> int:
        return sum(self.trace.trained) * FP32

    @property
    def update_bytes(self) -> int:
        """Temporaries of the optimizer."""
        if not self.recipe.train.optim.startswith("adamw_torch") or self.recipe.train.optim.endswith("fused"):
            return 0
        if copies := overhead_of(self.device).update_copies:
            return copies * self.trained_bytes
        return UPDATE_COPIES * max(self.trace.trained) * FP32

    @property
    def standing(self) -> int:
        return self.trace.line("weights") + self.trained_bytes

    @property
    def at_update(self) -> bool:
        """Whether the peak is the optimizer's update, when the activations are gone and all gradients are there."""
        return self.trained_bytes + self.update_bytes > self.passing

    @property
    def passing(self) -> int:
        """Bytes at the peak of the pass besides the model: gradients, activations, working space."""
        return sum(self.trace.log.items().values()) - self.trace.line("weights") - self.trace.line("adapter")

    @property
    def peak_bytes(self) -> int:
        tensors = sum(self.trace.log.items().values()) + self.waiting_bytes
        return max(tensors, self.standing + self.trained_bytes + self.update_bytes) + self.optimizer


def step_of(recipe: Recipe, head: NewHead, device: Device) -> Step:
    """The training step with the largest of the micro-batches.

    Raises:
        ModelError: the model cannot be traced.
    """
    setting = setting_of(recipe, head, device.has_gpu)

    def step(shape: BatchShape) -> Step:
        trace = traced(setting, *shape)
        return Step(recipe, device, shape, trace, state_bytes(recipe.train, trace.tensors), len(inputs_of(head)))

    return max((step(shape) for shape in shapes.largest(recipe, head.known)), key=lambda step: step.peak_bytes)


# --- the stages ---------------------------------------------------------------------------------------------------------


def stage_items(recipe: Recipe, head: NewHead, device: Device, stage: str) -> tuple[MemoryItem, ...]:
    """The items of a stage at its peak.

    Raises:
        ModelError: the model cannot be traced, or the stage has no plan.
    """
    if stage not in ITEMS:
        message = f"the memory of the stage {stage} is not planned for a model with a new head (task={recipe.task})"
        raise ModelError(message, source=head.source)
    return ITEMS[stage](recipe, head, device)


def stages(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a recipe that have a plan, in order."""
    names = {stage.name for stage in stages_of(recipe)}
    return tuple(name for name in ITEMS if name == "load" or name in names)


def train_items(recipe: Recipe, head: NewHead, device: Device) -> tuple[MemoryItem, ...]:
    """The items at the peak of a training step."""
    step = step_of(recipe, head, device)
    trained, name = sum(step.trace.trained), recipe.trained_as
    parameters = f"{trained:,} parameters in {len(step.trace.trained):,} tensors x {FP32} bytes{_assumed(head)}"
    lines = step.trace.log.items()
    gradients = step.trained_bytes if step.at_update else lines["gradients"]
    return (
        weights_item(recipe, head, step.trace),
        MemoryItem(name, step.trained_bytes, head.exact, parameters),
        MemoryItem("gradients", gradients, head.exact and step.at_update, _gradients(step)),
        MemoryItem("optimizer", step.optimizer, head.exact, formula(recipe.train, trained)),
        *_passing(step),
        *_overhead(step),
    )


def _assumed(head: NewHead) -> str:
    """What the number of parameters assumes."""
    parts = [] if head.known.labels is not None else [f"{ASSUMED_LABELS} labels assumed until the data stage"]
    parts += [] if head.folder is not None else ["a pooler, if there is one, counts as new"]
    return f"; {', '.join(parts)}" if parts else ""


def weights_item(recipe: Recipe, head: NewHead, trace: Traced) -> MemoryItem:
    """The weights that are not trained."""
    dtype = weights_dtype(recipe, head)
    count, size = trace.frozen, trace.line("weights")
    if recipe.quantization.load_in_4bit:
        formula = f"4-bit linear modules with their constants, the rest in {dtype}"
    elif not count:
        formula = f"buffers; the weights, in float32, are all trained, and count as {recipe.trained_as}"
    else:
        formula = f"{count:,} parameters x {WIDTHS[dtype]} bytes ({dtype}), and buffers"
    return MemoryItem("weights", size, head.exact, formula)


def _gradients(step: Step) -> str:
    if step.at_update:
        return f"{sum(step.trace.trained):,} parameters x {FP32} bytes"
    return TRACED_GRADIENTS


def _passing(step: Step) -> Iterator[MemoryItem]:
    """Activations, working space and batch at the peak."""
    lines, shape = step.trace.log.items(), step.shape
    if step.at_update:
        yield MemoryItem("activations", 0, False, "none at the peak: the optimizer update")
        yield MemoryItem("workspace", step.update_bytes, False, f"temporaries of {step.recipe.train.optim}")
        return
    what = f"one step of {shape.rows:,} rows x {shape.length:,} tokens"
    activations = lines["activations"] + lines["logits"]
    yield MemoryItem("activations", activations, False, f"traced: every tensor at the peak of {what}{mode_text(step)}")
    yield MemoryItem("workspace", lines["workspace"], False, "traced: copies of weights in another dtype")
    yield MemoryItem("batch", lines["batch"] + step.waiting_bytes, False, f"traced: ids and masks of {what}")


def mode_text(step: Step) -> str:
    """How the step computes, as the end of a formula."""
    parts = ["in bf16" if step.recipe.train.bf16 else "in fp32"]
    parts += ["with gradient checkpointing"] if step.recipe.train.gradient_checkpointing else []
    return f", {' '.join(parts)}"


def _overhead(step: Step) -> Iterator[MemoryItem]:
    """Items besides tensors."""
    overhead = overhead_of(step.device)
    if overhead.segments:
        yield fixed_item(overhead)
        size = segments([*step.trace.held, *(count * FP32 for count in step.trace.trained)])
        yield MemoryItem("allocator", size, False, "estimate: unused ends of the weights' segments")
        return
    yield LABELLED_PROCESS
    yield from heap_items(overhead, step.trace.passing_bytes)


def load_items(recipe: Recipe, head: NewHead, device: Device) -> tuple[MemoryItem, ...]:
    """The weights as training holds them, and the largest before it is quantized or cast."""
    trace = step_of(recipe, head, device).trace
    dtype = weights_dtype(recipe, head)
    changed = recipe.quantization.load_in_4bit or dtype != head.dtype
    size = trace.largest_bytes if changed else 0
    why = "the largest tensor before it is quantized or cast" if changed else "nothing: the checkpoint has this dtype"
    return (
        weights_item(recipe, head, trace),
        MemoryItem(recipe.trained_as, sum(trace.trained) * FP32, head.exact, f"{sum(trace.trained):,} parameters"),
        MemoryItem("workspace", size, False, f"estimate: {why}"),
        _process(device),
    )


def evaluate_items(recipe: Recipe, head: NewHead, device: Device) -> tuple[MemoryItem, ...]:
    """The trained model, its 4-bit weights dequantized, and a forward pass over the largest batch of rows."""
    changed = recipe if recipe.train.bf16 else _in_fp32(recipe)
    return _forward_items(_dequantized(changed), head, device)


def merge_items(recipe: Recipe, head: NewHead, device: Device) -> tuple[MemoryItem, ...]:
    """The merged model in fp32, measured as `evaluate` does; or merging, with the change of the largest matrix beside it."""
    items = _forward_items(_in_fp32(_dequantized(recipe)), head, device)
    held = [item for item in items if item.name not in ("activations", "batch", "workspace")]
    largest = traced(_forward_setting(_in_fp32(_dequantized(recipe)), head, device), *_evaluated(recipe)).largest_bytes
    change = MemoryItem("workspace", largest, False, "estimate: what the adapter adds to the largest matrix")
    return max((*items,), (*held, change), key=lambda items: sum(item.bytes for item in items))


def export_items(recipe: Recipe, head: NewHead, device: Device) -> tuple[MemoryItem, ...]:
    """The largest export, in the host's memory on any device."""
    kinds = [name.partition("-")[2] for name in recipe.export.formats if name.startswith("onnx")]
    copies = max((ONNX_COPIES.get(kind, max(ONNX_COPIES.values())) for kind in kinds), default=0)
    count = parameters(recipe, head)
    formula = f"measured on one model: {copies} x {count:,} parameters in fp32; on the host"
    if not copies:
        formula = "files are linked or copied; on the host"
    return MemoryItem("weights", copies * count * FP32, False, formula), LABELLED_PROCESS


ITEMS: Mapping[str, Callable[[Recipe, NewHead, Device], tuple[MemoryItem, ...]]] = {
    "load": load_items,
    "train": train_items,
    "evaluate": evaluate_items,
    "merge": merge_items,
    "export": export_items,
}


def _forward_setting(recipe: Recipe, head: NewHead, device: Device) -> Setting:
    return setting_of(recipe, head, device.has_gpu, trains=False)


def _forward_items(recipe: Recipe, head: NewHead, device: Device) -> tuple[MemoryItem, ...]:
    shape = _evaluated(recipe)
    trace = traced(_forward_setting(recipe, head, device), *shape)
    lines, trained = trace.log.items(), sum(trace.trained)
    passing = sum(lines[name] for name in PASSING)
    return (
        weights_item(recipe, head, trace),
        MemoryItem(recipe.trained_as, trained * FP32, head.exact, f"{trained:,} parameters x {FP32} bytes"),
        MemoryItem(
            "activations",
            passing,
            False,
            f"traced: a forward pass of {shape.rows:,} rows x {shape.length:,} tokens without gradients",
        ),
        _process(device),
    )


def _evaluated(recipe: Recipe) -> BatchShape:
    """The largest batch of a forward pass."""
    length = recipe.data.max_length
    return BatchShape(max(1, ENCODER_TOKENS // length), length)


def _dequantized(recipe: Recipe) -> Recipe:
    section = recipe.quantization.model_copy(update={"load_in_4bit": False})
    return recipe.model_copy(update={"quantization": section})


def _in_fp32(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"bf16": False})})


def _process(device: Device) -> MemoryItem:
    return fixed_item(overhead_of(device)) if device.has_gpu else LABELLED_PROCESS


# --- what else a plan shows ---------------------------------------------------------------------------------------------


def parameters(recipe: Recipe, head: NewHead) -> int:
    """The parameters of the base model with its new head, without an adapter."""
    whole = _dequantized(recipe).model_copy(update={"method": "full"})
    return sum(traced(setting_of(_in_fp32(whole), head, gpu=False, trains=False), 1, 2).trained)


def flops_per_token(recipe: Recipe, head: NewHead) -> float:
    """FLOPs of a training step for each token of its largest batch, padding included."""
    step = step_of(recipe, head, A_CPU)
    return step.trace.flops / (step.shape.rows * step.shape.length)


def weight_bytes(recipe: Recipe, head: NewHead) -> int:
    """Bytes of the model's weights in training."""
    return step_of(recipe, head, A_CPU).standing


def remarks(recipe: Recipe, head: NewHead) -> tuple[str, ...]:
    """Warnings about the model: a checkpoint that training holds in twice its size."""
    dtype = weights_dtype(recipe, head)
    if WIDTHS[dtype] <= WIDTHS.get(head.dtype, FP32) or recipe.quantization.load_in_4bit:
        return ()
    why = "method=full trains" if recipe.method in WHOLE else "train.bf16=false computes"
    remedy = "" if recipe.method in WHOLE else "; train.bf16=true keeps them as they are"
    return (f"The weights are stored in {head.dtype}, and {why} them in fp32, which doubles their memory{remedy}.",)
