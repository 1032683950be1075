"""Where two models diverge: the first layer whose output differs by more than rounding, and the first module inside it.

The effect of rounding is measured: the first model runs twice on the same rows, in bf16 and in fp32. The relative difference of the two runs
at each place is the rounding error of one bf16 run; it grows from layer to layer. Two bf16 runs of the same model each have that error, so
they differ by up to twice as much. Weights that were rounded once more, as in a merge, add about the same error again. The tolerance is
therefore three times the rounding error (a merged 135M model reached at most 1.2 times, in any layer), and at least half a bf16 step (2**-9),
because a norm over few numbers can be exact by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qkit.commands.compare import Side, opened
from qkit.core.errors import NotDeployable
from qkit.plugins.runtime import TokenRow
from qkit.plugins.task import open_task

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from transformers import PreTrainedModel

    from qkit.core.progress import Progress

    States = dict[str, torch.Tensor]  # place -> [tokens, width], in the order of the forward pass


ROWS = 4  # a difference in a layer shows on every row
ROW_TOKENS = 256
TIMES = 3.0
HALF_STEP = 2.0**-9  # relative; bf16 keeps 8 bits of the significand
IN, OUT = " (input)", ""  # suffixes of a module's name: its input and its output are separate places
EMBEDDING, POSITIONS, NORM, HEAD = "embedding", "positions", "final norm", "head"


@dataclass(frozen=True)
class LayerPlace:
    """A place in the model. `error`: relative difference between the two models, mean over tokens. `rounding`: the same of bf16 and fp32."""

    name: str
    error: float
    rounding: float

    @property
    def differs(self) -> bool:
        return not self.error <= TIMES * max(self.rounding, HALF_STEP)  # a NaN differs


@dataclass(frozen=True)
class Walk:
    """The result. `places`: embedding, layers, final norm, head. `inside`: modules of the first layer that differs, in order of execution."""

    places: tuple[LayerPlace, ...]
    inside: tuple[LayerPlace, ...] = ()

    @property
    def first(self) -> LayerPlace | None:
        return next((place for place in self.places if place.differs), None)

    @property
    def first_inside(self) -> LayerPlace | None:
        return next((place for place in self.inside if place.differs), None)

    @property
    def description(self) -> str:
        """The result as text."""
        if self.first is None:
            worst = max(self.places, key=lambda place: place.error / max(place.rounding, HALF_STEP))
            return f"nowhere by more than rounding; the largest difference is at {_error(worst)}"
        if self.first_inside is None:
            return f"first at {_error(self.first)}"
        return f"first at {_error(self.first)}; inside it, first at {self._cause(self.first_inside)}"

    def _cause(self, place: LayerPlace) -> str:
        """The module whose output differs; or, if a module's input differs already, the computation before that module."""
        if not place.name.endswith(IN):
            return _error(place)
        before = [other.name for other in self.inside[: self.inside.index(place)] if not other.name.endswith(IN)]
        cause = f"the computation between {before[-1]} and {place.name.removesuffix(IN)}" if before else "the input"
        return f"{cause} ({_figures(place)})"

    def to_dict(self) -> dict[str, Any]:
        first, inside = self.first, self.first_inside
        return {
            **asdict(self),
            "first": first and first.name,
            "first_inside": inside and inside.name,
            "words": self.description,
            "tolerance": f"{TIMES:g} times the rounding of one bf16 run",
        }


def _error(place: LayerPlace) -> str:
    return f"{place.name} ({_figures(place)})"


def _figures(place: LayerPlace) -> str:
    return f"relative difference {place.error:.2g}, one bf16 run {max(place.rounding, HALF_STEP):.2g}"


def walk(a: Side, b: Side, rows: Sequence[TokenRow], progress: Progress) -> Walk:
    """Compare the two models layer by layer. Only one model is open at a time.

    Raises:
        NotDeployable: torch cannot open a model, or its layers cannot be found.
    """
    need_torch(a, b)
    token_ids = [list(row.input_ids[:ROW_TOKENS]) for row in rows[:ROWS]]
    progress.notify("verify: layer by layer")
    places = _places(a, b, token_ids, outline)
    number = next((place.name for place in places if place.differs), "").removeprefix("layer ")
    if not number.isdigit():
        return Walk(places)
    return Walk(places, _places(a, b, token_ids, lambda model: inner(model, int(number))))


def need_torch(*sides: Side) -> None:
    """Raise NotDeployable if torch cannot open one of the sides."""
    for which in sides:
        if which.run is not None and not open_task(which.run.recipe.task).HEAD.generates:
            raise NotDeployable(
                f"--where: {which.name} has labels; the layers of models that generate text can be compared"
            )
        if which.url or which.runtime not in ("transformers", "vllm"):
            raise NotDeployable(
                f"--where: {which.name} is {which.export_format or 'a server'}, and layers can only be read from models that torch opens; "
                "use the merged model instead"
            )


def _places(a: Side, b: Side, rows: Sequence[Sequence[int]], watched: Watched) -> tuple[LayerPlace, ...]:
    """Every place that both models have, with the difference and the rounding error there."""
    with opened(_in_torch(a), ROW_TOKENS) as runtime:
        model = runtime.model
        as_it_is = _states(model, rows, watched)
        exact = _states(model.float(), rows, watched)
        del model
    rounding = {name: difference(exact[name], as_it_is[name]) for name in exact}
    del exact
    with opened(_in_torch(b), ROW_TOKENS) as runtime:
        other = _states(runtime.model, rows, watched)
    return tuple(
        LayerPlace(name, difference(as_it_is[name], other[name]), rounding[name]) for name in as_it_is if name in other
    )


def _in_torch(which: Side) -> Side:
    """The side, opened with transformers instead of vLLM: vLLM serves a model folder."""
    if which.runtime != "vllm":
        return which
    return Side(which.name, "transformers", which.path)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |a| of each token's vector, mean over tokens, for a and b [tokens, width]; infinite if the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    size = a.norm(dim=-1).clamp(min=1e-30)
    return float(((a - b).norm(dim=-1) / size).mean())


# --- reading the layers -------------------------------------------------------------------------------------------------

Watched = Callable[
    ["PreTrainedModel"], Iterator[tuple[str, "torch.nn.Module", bool]]
]  # place, module, and whether its input is recorded as well


def outline(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """Embedding, layers, final norm, head."""
    base = _base(model)
    decoder = base.get_decoder()
    yield EMBEDDING, base.get_input_embeddings(), False
    if hasattr(decoder, "rotary_emb"):
        yield POSITIONS, decoder.rotary_emb, False
    for number, layer in enumerate(_layers(model)):
        yield f"layer {number}", layer, False
    if hasattr(decoder, "norm"):
        yield NORM, decoder.norm, False
    yield HEAD, base.get_output_embeddings(), False


def inner(model: PreTrainedModel, number: int) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """The modules of a layer without submodules. A module with a LoRA adapter counts as one."""
    for name, module in _leaves(_layers(model)[number]):
        yield name, module, True


def _base(model: PreTrainedModel) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layers(model: PreTrainedModel) -> Any:
    decoder = _base(model).get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise NotDeployable(f"--where: {type(decoder).__name__} has no attribute `layers`")
    return layers


def _leaves(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    for name, child in module.named_children():
        if hasattr(child, "base_layer") or not list(child.children()):
            yield f"{prefix}{name}", child
        else:
            yield from _leaves(child, f"{prefix}{name}.")


def _states(model: PreTrainedModel, rows: Sequence[Sequence[int]], watched: Watched) -> States:
    """Outputs (and inputs) of each watched module on these rows, concatenated over rows, in order of execution."""
    import torch

    kept: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as hooks, torch.inference_mode():
        for name, module, with_input in watched(model):
            hooks.callback(module.register_forward_hook(_keeper(kept, name, with_input)).remove)
        for row in rows:
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _keeper(kept: dict[str, list[torch.Tensor]], name: str, with_input: bool) -> Callable[..., None]:
    def keep(_: object, inputs: tuple[Any, ...], output: Any) -> None:
        if with_input and inputs:
            kept.setdefault(name + IN, []).append(_vectors(inputs[0]))
        kept.setdefault(name, []).append(_vectors(output))

    return keep


def _vectors(value: Any) -> torch.Tensor:
    """The value as [tokens, width] in fp32. Several tensors of one shape (cosine and sine) are concatenated."""
    import torch

    tensors = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and len({tensor.shape for tensor in tensors if tensor is not None}) > 1:
        tensors = tensors[:1]  # a layer's output, followed by extra outputs
    return torch.cat([t.detach().float().flatten(0, -2).cpu() for t in tensors if t is not None], dim=-1)


# --- on a screen ----------------------------------------------------------------------------------------------------


def screen(result: Walk) -> RenderableType:
    """The differences layer by layer as a table, and the first difference as a sentence."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("place", "difference", "one bf16 run"):
        table.add_column(column, justify="left" if column == "place" else "right")
    first = result.first
    for place in _shown(result.places, first):
        style = "bold red" if place is first else "" if not place.differs else "red"
        cells = (place.name, f"{place.error:.2g}", f"{place.rounding:.2g}")
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return Group(Text(), table, Text(), Text(f"They differ {result.description}.", style="bold"))


def _shown(places: Sequence[LayerPlace], first: LayerPlace | None) -> Iterator[LayerPlace]:
    """The places up to the first that differs and two more; all places if none differs."""
    end = len(places) if first is None else places.index(first) + 3
    yield from places[:end]
