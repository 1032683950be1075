"""Checks that packed documents do not attend to each other, before the first step, on a small replica of the run's model.

The replica has the run's model class, attention implementation, head size and every kind of layer, with random weights in fp32. The loss of
each document in a pack must equal its loss alone. A control shows that the check can fail: if positions do not restart at each document, the
losses of the same pack must change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qkit.core.batching import IGNORED
from qkit.tasks._conversation.collate import collate, collate_pack

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    Loss = Callable[[PreTrainedModel, dict[str, torch.Tensor], int], torch.Tensor]


LENGTHS = (7, 23, 12, 5, 16)  # the pack is padded by one token to a multiple of 16, so padding is covered
NARROW_WINDOW = 4  # shorter than the documents
VOCABULARY = 128
EXPERTS = 4
# fp32 rounds at 2^-24, bf16 at 2^-9; a loss is a mean over tokens, and a leak moves it by 3 % and more in most families.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-8}
CONTROL = 4  # a leak must change the losses by more than this many tolerances


@dataclass(frozen=True)
class IsolationResult:
    """`difference`: the largest relative one between a document's loss in a pack and alone; `control`: the same for a broken pack."""

    verdict: Literal["holds", "does not hold", "could not be checked"]
    reason: str
    model_class: str
    attn_implementation: str
    dtype: str
    tolerance: float
    difference: float | None = None
    control: float | None = None

    @property
    def holds(self) -> bool:
        return self.verdict == "holds"


def check(model: PreTrainedModel, loss: Loss) -> IsolationResult:
    """Check whether `loss` (model, batch, items), which is how the run computes the loss of a batch, keeps documents apart on `model`."""
    attention = str(model.config._attn_implementation)
    dtype = "bfloat16" if "flash" in attention else "float32"  # flash attention has no fp32
    about: dict[str, Any] = {
        "model_class": type(model).__name__,
        "attn_implementation": attention,
        "dtype": dtype,
        "tolerance": TOLERANCES[dtype],
    }
    try:
        pairs = [_differences(replica, loss) for replica in _replicas(model, dtype)]
    except Exception as error:  # third-party model code: whatever it raises, the check has no result
        return IsolationResult("could not be checked", f"{type(error).__name__}: {error}", **about)
    difference, control = max(pair[0] for pair in pairs), min(pair[1] for pair in pairs)
    return _judged(about, difference, control)


def _judged(about: Mapping[str, Any], difference: float, control: float) -> IsolationResult:
    tolerance = about["tolerance"]
    figures = {**about, "difference": difference, "control": control}
    if not difference <= tolerance:  # so that NaN fails
        reason = (
            f"the loss of a document in a pack differs by {difference:.1e} of its loss alone (allowed: {tolerance:.1e})"
        )
        return IsolationResult("does not hold", reason, **figures)
    if not control > CONTROL * tolerance:
        reason = f"a deliberate leak changes the losses by {control:.1e} only, so the check would not detect one"
        return IsolationResult("could not be checked", reason, **figures)
    return IsolationResult(
        "holds", f"losses differ by {difference:.1e}, and by {control:.1e} with a deliberate leak", **figures
    )


def _differences(replica: PreTrainedModel, loss: Loss) -> tuple[float, float]:
    """The largest relative difference to the losses alone: of a pack, and of one whose positions do not restart."""
    import torch

    rows = _documents()
    pack = collate_pack(rows, pad=0)
    leaking = {**pack, "position_ids": torch.arange(pack["input_ids"].shape[1])[None]}
    with torch.no_grad():
        alone = [_loss_of(replica, loss, collate([row], pad=0), 0, len(row["input_ids"])) for row in rows]
        packed, broken = (list(_document_losses(replica, loss, batch)) for batch in (pack, leaking))
    return _largest(packed, alone), _largest(broken, alone)


def _largest(packed: list[float], alone: list[float]) -> float:
    return max(abs(there - here) / here for there, here in zip(packed, alone, strict=True))


def _documents() -> list[dict[str, Any]]:
    """Random rows; as in every row, the first token carries no loss."""
    import torch

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [IGNORED, *ids[1:]]} for ids in drawn]


def _document_losses(replica: PreTrainedModel, loss: Loss, pack: dict[str, torch.Tensor]) -> Iterator[float]:
    begin = 0
    for length in LENGTHS:
        yield _loss_of(replica, loss, pack, begin, begin + length)
        begin += length


def _loss_of(replica: PreTrainedModel, loss: Loss, batch: dict[str, torch.Tensor], begin: int, end: int) -> float:
    """Mean loss of the tokens from `begin` to `end`, all others ignored."""
    import torch

    labels = torch.full_like(batch["labels"], IGNORED)
    labels[:, begin:end] = batch["labels"][:, begin:end]
    names = ("input_ids", "position_ids")
    inputs = {name: batch[name].to(replica.device) for name in names} | {"labels": labels.to(replica.device)}
    return float(loss(replica, inputs, int((labels != IGNORED).sum())))


# --- the replica ------------------------------------------------------------------------------------------------------


def _replicas(model: PreTrainedModel, dtype: str) -> Iterator[PreTrainedModel]:
    """One with the model's own window, and one with a window that is shorter than the documents, if it has windows at all."""
    config = replica_config(model.config)
    yield _built(model, config, dtype)
    text = config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = NARROW_WINDOW
        yield _built(model, config, dtype)


def _built(model: PreTrainedModel, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """Random weights, drawn on the CPU so that only its generator has to be put back."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        replica: PreTrainedModel = type(model)._from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=model.config._attn_implementation
        )
    return replica.to(model.device).train()


def replica_config(config: PretrainedConfig) -> PretrainedConfig:
    """The model's configuration with few narrow layers, one of each kind at least, and no dropout.

    The size of a head stays: attention kernels and rotary tables depend on it.
    """
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    text = small.get_text_config()
    for name, value in {**_shallow(text), **_narrow(text), **_without_dropout(text)}.items():
        setattr(text, name, value)
    for other in (getattr(small, name) for name in small.sub_configs):
        if other is not text:  # encoders of images or audio: rows contain neither
            other.num_hidden_layers = 1
    return small


def _shallow(text: PretrainedConfig) -> dict[str, Any]:
    """Settings with one layer of each kind, or two layers if all are of one kind. Values listed per layer define its kind."""
    count = text.num_hidden_layers
    by_layer = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == count}
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(count):
        kinds.setdefault(tuple(repr(value[layer]) for value in by_layer.values()), layer)
    chosen = sorted({0, count - 1, *kinds.values()}) if count > 1 else [0]
    return {
        "num_hidden_layers": len(chosen),
        **{name: [value[layer] for layer in chosen] for name, value in by_layer.items()},
    }


def _narrow(text: PretrainedConfig) -> dict[str, Any]:
    """Two heads of the same size as before (on one key-value head where these are shared), and what follows from it."""
    heads = text.num_attention_heads
    hidden = 2 * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    wanted = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if getattr(text, "num_key_value_heads", heads) == heads else 1,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": hidden,
        "initializer_range": hidden**-0.5,  # activations keep their size from layer to layer, so that a leak shows
        "vocab_size": VOCABULARY,
        "pad_token_id": 1,
    }
    most = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS // 2}
    found = {name: getattr(text, name, None) for name in (*wanted, *most)}
    return {name: wanted.get(name) or min(value, most[name]) for name, value in found.items() if value is not None}


def _without_dropout(text: PretrainedConfig) -> dict[str, float]:
    return {name: 0.0 for name, value in vars(text).items() if name.endswith(("dropout", "pdrop")) and value}
