"""The first step of a Trainer: its batches, loss and gradients."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Step:
    """`sizes`: how many batches passed through the model, by their rows; `gradients`: before they are clipped, by parameter."""

    sizes: Counter[int]
    loss: float
    gradients: dict[str, torch.Tensor]


def first_step(trainer: Any) -> Step:
    """Train with `max_steps=1`, and keep what was computed."""
    sizes: Counter[int] = Counter()
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    own = trainer.compute_loss

    def counted(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        sizes[len(inputs["labels"])] += 1
        loss = own(model, inputs, *given, **named)
        losses.append(float(loss.detach()))
        return loss

    def kept(model: Any, *_: Any) -> torch.Tensor:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return torch.tensor(1.0)

    trainer.compute_loss, trainer._clip_grad_norm = counted, kept
    trainer.train()
    return Step(sizes, sum(losses), gradients)
