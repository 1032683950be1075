"""A model with an adapter that is no longer the reference, and the first step of a trainer on it, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

Step = tuple[float, dict[str, torch.Tensor]]  # loss and gradients by name


def model_of(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **more)


def adapted(folder: Path, **more: Any) -> Any:
    """A model that is no longer the reference; always the same one."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model_of(folder, **more), lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data *= 0.1
    return adapted


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_steps": 1,
        "max_grad_norm": 0,  # gradients as they are
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        **more,
    }


def copy_adapter(source: Any, target: Any) -> None:
    weights = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[name])


def step(trainer: Any) -> Step:
    """Loss and gradients of the one optimizer step of `train()`."""
    gradients: dict[str, torch.Tensor] = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.add_callback(Catch())
    trainer.train()
    return float(trainer.state.log_history[0]["loss"]), gradients


def same(ours: Step, theirs: Step, tolerance: float = 1e-5) -> None:
    """The same loss, and gradients that differ by at most `tolerance` of their length, taken together."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    length, difference = (
        float(sum(gradient.double().square().sum() for gradient in gradients.values())) ** 0.5
        for gradients in (theirs[1], {name: ours[1][name] - gradient for name, gradient in theirs[1].items()})
    )
    assert length > 0 and difference <= tolerance * length, difference / length
