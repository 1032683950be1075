"""Where two models diverge: the first layer whose output differs by more than rounding, and the first module inside it.

What rounding does is measured, not assumed: the first model runs twice on the same rows, as it is (bf16) and in fp32, and at each place the
relative error of the one against the other is what one run in bf16 costs there; it grows from layer to layer. Two runs of one model in bf16 are
each that far from the exact answer, so up to twice that from each other; weights that were rounded once more on the way, as a merge does, cost
about as much again. Hence three times (a merged 135M was at most 1.2 times off, at any layer), and never less than a bf16 number's own half
step (2**-9): a norm of few numbers can come out exact by luck.
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

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from transformers import PreTrainedModel

    from qkit.core.progress import Progress

    States = dict[str, torch.Tensor]  # place -> [tokens, width], in the order in which the model comes by


ROWS = 4  # what differs in a layer differs on every row
ROW_TOKENS = 256
TIMES = 3.0
HALF_STEP = 2.0**-9  # relative; bf16 keeps 8 bits of the significand
IN, OUT = " (input)", ""  # a place is a module's name; its input has a name of its own
EMBEDDING, POSITIONS, NORM, HEAD = "embedding", "positions", "final norm", "head"


@dataclass(frozen=True)
class LayerPlace:
    """A place in the model. `error`: the relative difference of the two there, mean over tokens; `rounding`: of one bf16 run from fp32."""

    name: str
    error: float
    rounding: float

    @property
    def differs(self) -> bool:
        return not self.error <= TIMES * max(self.rounding, HALF_STEP)  # a NaN differs


@dataclass(frozen=True)
class Walk:
    """`places`: the embedding, every layer, the final norm and the head; `inside`: modules of the first layer that differs, as they run."""

    places: tuple[LayerPlace, ...]
    inside: tuple[LayerPlace, ...] = ()

    @property
    def first(self) -> LayerPlace | None:
        return next((place for place in self.places if place.differs), None)

    @property
    def first_inside(self) -> LayerPlace | None:
        return next((place for place in self.inside if place.differs), None)

    @property
    def words(self) -> str:
        """The answer as text."""
        if self.first is None:
            worst = max(self.places, key=lambda place: place.error / max(place.rounding, HALF_STEP))
            return f"nowhere by more than rounding; most at {_error(worst)}"
        if self.first_inside is None:
            return f"first at {_error(self.first)}"
        return f"first at {_error(self.first)}; in it first at {self._cause(self.first_inside)}"

    def _cause(self, found: LayerPlace) -> str:
        """A module whose output differs; or the way between two modules, when what reaches the second differs already."""
        if not found.name.endswith(IN):
            return _error(found)
        before = [place.name for place in self.inside[: self.inside.index(found)] if not place.name.endswith(IN)]
        between = f"what happens between {before[-1]} and {found.name.removesuffix(IN)}" if before else "what goes in"
        return f"{between} ({_figures(found)})"

    def to_dict(self) -> dict[str, Any]:
        first, inside = self.first, self.first_inside
        return {
            **asdict(self),
            "first": first and first.name,
            "first_inside": inside and inside.name,
            "words": self.words,
            "tolerance": f"{TIMES:g} times the rounding of one bf16 run",
        }


def _error(place: LayerPlace) -> str:
    return f"{place.name} ({_figures(place)})"


def _figures(place: LayerPlace) -> str:
    return f"relative difference {place.error:.2g}, one bf16 run {max(place.rounding, HALF_STEP):.2g}"


def walk(a: Side, b: Side, rows: Sequence[TokenRow], progress: Progress) -> Walk:
    """Compare the two layer by layer. One model is open at a time.

    Raises:
        NotDeployable: as `need_torch`; or the model's layers cannot be found.
    """
    need_torch(a, b)
    taken = [list(row.input_ids[:ROW_TOKENS]) for row in rows[:ROWS]]
    progress.notify("verify: layer by layer")
    places = _places(a, b, taken, outline)
    number = next((place.name for place in places if place.differs), "").removeprefix("layer ")
    if not number.isdigit():
        return Walk(places)
    return Walk(places, _places(a, b, taken, lambda model: inner(model, int(number))))


def need_torch(*sides: Side) -> None:
    """Raise NotDeployable for a side that is not a model that torch can open."""
    for which in sides:
        if which.url or which.runtime not in ("transformers", "vllm"):
            raise NotDeployable(
                f"--where: {which.name} is {which.format or 'a server'}, and only models that torch opens show their layers; "
                "name the merged model in its place"
            )


def _places(a: Side, b: Side, rows: Sequence[Sequence[int]], watched: Watched) -> tuple[LayerPlace, ...]:
    """Each place that both models have, with the difference there and that of rounding."""
    with opened(_in_torch(a), ROW_TOKENS) as runtime:
        model = runtime.model  # type: ignore[attr-defined]
        as_it_is = _states(model, rows, watched)
        exact = _states(model.float(), rows, watched)
        del model
    rounding = {name: difference(exact[name], as_it_is[name]) for name in exact}
    del exact
    with opened(_in_torch(b), ROW_TOKENS) as runtime:
        other = _states(runtime.model, rows, watched)  # type: ignore[attr-defined]
    return tuple(
        LayerPlace(name, difference(as_it_is[name], other[name]), rounding[name]) for name in as_it_is if name in other
    )


def _in_torch(which: Side) -> Side:
    """The same folder opened with transformers: what vLLM serves is a model folder."""
    if which.runtime != "vllm":
        return which
    return Side(which.name, "transformers", which.path)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |a| of each token's vector, mean over tokens; infinite where the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    size = a.norm(dim=-1).clamp(min=1e-30)
    return float(((a - b).norm(dim=-1) / size).mean())


# --- looking inside -------------------------------------------------------------------------------------------------

Watched = Callable[
    ["PreTrainedModel"], Iterator[tuple[str, "torch.nn.Module", bool]]
]  # place, module, and whether its input counts too


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
    """The modules of a layer that have no submodules; one with a LoRA adapter counts as one."""
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
    """What comes out of each watched module (and goes in) on these rows, one after the other, in the order in which they run."""
    import torch

    kept: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as hooks, torch.inference_mode():
        for name, module, with_input in watched(model):
            hooks.callback(module.register_forward_hook(_keeper(kept, name, with_input)).remove)
        for row in rows:
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _keeper(kept: dict[str, list[torch.Tensor]], name: str, with_input: bool) -> Callable[..., None]:
    def keep(_: object, given: tuple[Any, ...], output: Any) -> None:
        if with_input and given:
            kept.setdefault(name + IN, []).append(_vectors(given[0]))
        kept.setdefault(name, []).append(_vectors(output))

    return keep


def _vectors(value: Any) -> torch.Tensor:
    """[tokens, width] in fp32; of several tensors (cosine and sine) side by side."""
    import torch

    tensors = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and len({tensor.shape for tensor in tensors if tensor is not None}) > 1:
        tensors = tensors[:1]  # a layer's output, followed by extra outputs
    return torch.cat([t.detach().float().flatten(0, -2).cpu() for t in tensors if t is not None], dim=-1)


# --- on a screen ----------------------------------------------------------------------------------------------------


def screen(found: Walk) -> RenderableType:
    """The way through the model, and where the two part."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("place", "difference", "one bf16 run"):
        table.add_column(column, justify="left" if column == "place" else "right")
    first = found.first
    for place in _shown(found.places, first):
        style = "bold red" if place is first else "" if not place.differs else "red"
        cells = (place.name, f"{place.error:.2g}", f"{place.rounding:.2g}")
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return Group(Text(), table, Text(), Text(f"They part {found.words}.", style="bold"))


def _shown(places: Sequence[LayerPlace], first: LayerPlace | None) -> Iterator[LayerPlace]:
    """Up to the first that differs and two more; of equal models all."""
    end = len(places) if first is None else places.index(first) + 3
    yield from places[:end]
