"""Decides whether a pair passes through the model with its prompt once: where that is quicker than two plain rows, and gives their losses.

It is quicker unless prompts are short. Fewer tokens pass through the weights, but with a mask every token is compared with all of the pair, and
without one only with those before it in its own row. On a CPU, this estimate is within 0.1 of what a layer takes.

Models whose layers do not take any mask (recurrent ones, those with a window, some kinds of attention) would let the rejected answer see the
chosen one, or something else than the prompt. No list of architectures decides, but a pair of random tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.files import read_json, write_json
from qkit.train.fast.pairs import MASKED, labelled_tokens
from qkit.train.trainer import lengths

if TYPE_CHECKING:
    import torch

RECORD = "pairs.json"  # in the folder of the stage `train`: what was decided, for a run that goes on
PROMPT, ANSWERS = 24, (9, 14)  # tokens of the pair that decides
# Nats of a token's log-probability: two orders of the same sum differ by less in bf16, and an answer that is seen changes it by more.
TOLERANCE = 0.25
LEAST = 1.02  # times as fast
SHARE = 0.2  # of the difference that seeing the other answer makes


def shares_prompts(trainer: Any, out: Path) -> tuple[bool, str]:
    """Whether, and why; a run that goes on keeps its decision."""
    file = out / RECORD
    if file.is_file():
        kept = read_json(file)
        return bool(kept["shared"]), "as when this run started"
    shared, why = _decided(trainer)
    write_json(file, {"shared": shared, "why": why})
    return shared, why


def _decided(trainer: Any) -> tuple[bool, str]:
    model = trainer.base_model
    kind = model.config._attn_implementation
    if kind not in MASKED:
        return False, f"attention {kind} takes no mask of this kind"
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or ())} - {"full_attention"}
    if kinds or (window and getattr(model.config.get_text_config(), "use_sliding_window", True)):
        return False, "some of its layers see a window only"
    factor = speedup(trainer)
    if factor < LEAST:
        return False, f"with prompts as short as these, once would take {1 / factor:.2f} times as long"
    try:
        difference, leak = _differences(trainer)
    except (RuntimeError, TypeError, ValueError) as error:  # of a model whose layers are no attention, such as Mamba's
        return False, f"it takes no mask of this kind ({str(error).partition(chr(10))[0]})"
    if difference <= max(SHARE * leak, 0.0) and difference <= TOLERANCE:
        return (
            True,
            f"that is estimated {factor:.2f} times as fast, and a probe differs by {difference:.2g} nats from two rows",
        )
    return False, f"the losses of a probe would differ by {difference:.2g} nats from those of two rows"


def speedup(trainer: Any) -> float:
    """The time that the trainer's pairs take as two rows each / the time as one, by the multiplications of a forward pass."""
    import numpy as np
    from torch import nn

    decoder, rows = trainer.base_model.get_decoder(), trainer.train_dataset
    linear = [part for part in decoder.modules() if isinstance(part, nn.Linear)]
    weights = sum(part.in_features * part.out_features for part in linear)
    config = trainer.base_model.config.get_text_config()
    width = config.hidden_size * config.num_hidden_layers
    starts, rejected = (np.array(rows[name][:], np.float64) for name in ("start", "rejected_start"))
    whole = np.array(lengths(rows), np.float64)
    other = whole - rejected + starts
    once = whole @ (weights + 2 * width * whole)
    apart = rejected @ (weights + width * rejected) + other @ (weights + width * other)
    return float(apart / once)


def _differences(trainer: Any) -> tuple[float, float]:
    """The largest difference of a token's log-probability between the layouts; and what it is if the rejected answer sees the chosen one."""
    import torch

    batch = probe(trainer.base_model)
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            apart, shared = (labelled_tokens(trainer.base_model, batch, way).log_probabilities for way in (False, True))
            leaking = labelled_tokens(trainer.base_model, _leaking(batch), False).log_probabilities
    finally:
        trainer.model.train(was_training)
    rejected = leaking[-(ANSWERS[1] - 1) :]
    return float((apart - shared).abs().max()), float((apart[-len(rejected) :] - rejected).abs().max())


def probe(model: Any) -> dict[str, torch.Tensor]:
    """One pair of random tokens, as collate_pairs has it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    length = PROMPT + sum(ANSWERS)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (1, length), generator=generator)
    labels = ids.masked_fill(torch.arange(length) < PROMPT, -100)
    starts = torch.tensor([[PROMPT, PROMPT + ANSWERS[0]]])
    batch = {"input_ids": ids, "labels": labels, "starts": starts}
    return {name: value.to(model.device) for name, value in batch.items()}


def _leaking(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pair as one conversation: the rejected answer follows the chosen one."""
    starts = batch["starts"].clone()
    starts[:, 1] = batch["labels"].shape[1]
    return {**batch, "starts": starts}
