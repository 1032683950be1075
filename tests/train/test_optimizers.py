"""Optimizers: bytes of their state as planned, what they are given, resuming to the same bytes, and refusals before a model is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.training_args import OptimizerNames

from helpers.training import Heard, _run
from qkit.core import device
from qkit.core.errors import MissingExtra, RecipeError
from qkit.model import source
from qkit.plan import _optimizer_state
from qkit.recipe import optimizers
from qkit.recipe.load import from_dict
from qkit.recipe.optimizers import OPTIMIZERS
from qkit.recipe.training import Train
from qkit.train import optimization
from qkit.train import stage as train_stage
from qkit.train.trainers import sft

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),  # the stage says it
]


class Tiny(torch.nn.Module):
    """Tensors on both sides of what an 8-bit optimizer leaves in fp32, one that does not divide into blocks, a table and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 64)
        self.small, self.large = torch.nn.Linear(64, 16, bias=False), torch.nn.Linear(64, 128)
        self.uneven, self.norm = torch.nn.Linear(101, 50), torch.nn.LayerNorm(50)


def refused(name: str) -> bool:
    return bool(OPTIMIZERS[name].refused)


def runs_here(name: str) -> bool:
    return not (refused(name) or optimizers.missing(name) or optimizers.kernels_of_a_gpu(name))


def storages(value: Any) -> dict[int, int]:
    """Bytes of each storage in an optimizer's state, those inside tensors of torchao as well."""
    if hasattr(value, "__tensor_flatten__"):
        return storages([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage()._cdata: value.untyped_storage().nbytes()}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {key: size for one in inner for key, size in storages(one).items()}


def after_two_steps(root: Path, model: torch.nn.Module, section: Train) -> Any:
    """The optimizer that transformers makes of the section, after two steps on gradients drawn at random."""
    arguments = transformers.TrainingArguments(
        output_dir=str(root), optim=section.optim, optim_args=section.optim_args, report_to=[], use_cpu=True
    )
    optimizer = transformers.Trainer(model, arguments).create_optimizer()
    if hasattr(optimizer, "train"):  # of those that average weights
        optimizer.train()
    torch.manual_seed(0)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


WITH_ARGUMENTS = [("sgd", "momentum=0.9"), ("rmsprop", "momentum=0.9,centered=true"), ("rmsprop", "alpha=0.9")]


@pytest.mark.parametrize(
    ("name", "given"), [*((name, None) for name in OPTIMIZERS if runs_here(name)), *WITH_ARGUMENTS]
)
def test_the_state_has_the_bytes_of_the_plan(tmp_path: Path, name: str, given: str | None) -> None:
    model, section = Tiny(), Train(optim=name, optim_args=given)
    optimizer = after_two_steps(tmp_path, model, section)
    planned = _optimizer_state.state_bytes(section, _optimizer_state.tensors_of(model))
    assert sum(storages(dict(optimizer.state)).values()) == planned


def test_every_name_of_transformers_has_its_line() -> None:
    assert OPTIMIZERS.keys() == {str(name.value) for name in OptimizerNames}


def test_each_in_8_bits_takes_what_the_other_takes() -> None:
    """So a plan may put it in the other's place, whatever else a recipe says, and saves memory."""
    pairs = [(one, OPTIMIZERS[one.in_8_bits]) for one in OPTIMIZERS.values() if one.in_8_bits]
    assert len(pairs) > 8
    for one, smaller in pairs:
        assert (one.adam, one.args, one.moments) == (smaller.adam, smaller.args, smaller.moments)
        assert one.layout == "fp32" and smaller.layout == "blocks" and not smaller.own_schedule


# --- what they are given ------------------------------------------------------------------------------------------------


def test_arguments_arrive(tiny_model: Path, tmp_path: Path) -> None:
    train = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    run, out = _run(tmp_path / "adam", tiny_model, train=train)
    group = sft.build_trainer(run, tiny_model, device.detect(), out).create_optimizer().param_groups[0]
    assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6
    run, out = _run(tmp_path / "sgd", tiny_model, train={"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"})
    group = sft.build_trainer(run, tiny_model, device.detect(), out).create_optimizer().param_groups[0]
    assert group["momentum"] == 0.9 and group["nesterov"] is True


CONSTANT = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0}
SECTIONS: list[dict[str, Any]] = [
    {"train": {"optim": "adamw_torch", "adam_beta2": 0.95}, "lora": {"loraplus_lr_ratio": 8.0}},
    {"train": {"optim": "adamw_8bit"}, "lora": {"loraplus_lr_ratio": 8.0, "r": 64}},
    {"train": {"optim": "lion_8bit", "embedding_learning_rate": 1e-3}, "model": {"add_tokens": ["<a>"]}},
    {"train": {"optim": "paged_ademamix_8bit", "optim_args": "alpha=4,t_alpha=5"}},
    {"train": {"optim": "adafactor"}},
    {"train": {"optim": "rmsprop", "optim_args": "centered=true"}},
    {"train": {"optim": "adamw_torch_8bit"}, "lora": {"loraplus_lr_ratio": 8.0, "r": 64}},
    {"train": {"optim": "schedule_free_adamw", **CONSTANT}, "lora": {"loraplus_lr_ratio": 8.0}},
    {"train": {"optim": "schedule_free_sgd", **CONSTANT}},
]


@pytest.mark.parametrize("sections", SECTIONS, ids=lambda sections: sections["train"]["optim"])
def test_a_stopped_training_goes_on_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    """With gradient accumulation, a schedule of three phases, and a checkpoint in the middle of the last."""
    if not runs_here(sections["train"]["optim"]):
        pytest.skip("its package is not installed")
    common: dict[str, Any] = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}}
    common |= {"max_steps": 6, "save_steps": 2, "warmup_steps": 2, "gradient_accumulation_steps": 2}
    sections = {**sections, "train": {**common, **sections["train"]}}
    straight, whole = _run(tmp_path / "straight", tiny_model, **sections)
    train_stage.run(straight, whole)
    stopped, out = _run(tmp_path / "stopped", tiny_model, Heard(stop_at=5), **sections)
    with pytest.raises(KeyboardInterrupt):
        train_stage.run(stopped, out)
    resumed, _ = _run(tmp_path / "stopped", tiny_model, heard := Heard(), **sections)
    train_stage.run(resumed, out)
    assert any("resuming from checkpoint-4" in line for line in heard.lines)
    paged = sections["train"]["optim"].startswith("paged_")
    assert paged == any("is not paged on a CPU" in line for line in heard.lines)
    adapter = "adapter/adapter_model.safetensors"
    assert (whole / adapter).read_bytes() == (out / adapter).read_bytes()


# --- refused ------------------------------------------------------------------------------------------------------------


def _recipe(**train: Any) -> Any:
    raw = {"task": "chat", "model": {"source": "owner/x"}, "data": {}, "train": train}
    return from_dict(raw, (), "the test")


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if refused(name)])
def test_what_cannot_be_used_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(RecipeError, match=f"train.optim={name} cannot be used: ") as caught:
        _recipe(optim=name)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"optim": "sgd", "adam_beta1": 0.8}, r"adam_beta1=0\.8 has no effect with train\.optim=sgd"),
        ({"optim": "lion_8bit", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06 has no effect"),
        ({"optim_args": "momentum=0.9"}, "train.optim=adamw_torch has no entry momentum; it has none"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "did you mean 'momentum'"),
        ({"optim": "sgd", "optim_args": "momentum=2"}, "momentum=2 must be a share of at least 0 and below 1"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "nesterov=true has no effect without momentum"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true,dampening=0.1"}, "takes no dampening"),
        ({"optim": "rmsprop", "optim_args": "centered=1"}, "centered=1 must be one of true, false"),
        ({"optim": "schedule_free_adamw"}, "set train.lr_scheduler_type=constant .now cosine"),
    ],
)
def test_settings_that_an_optimizer_would_ignore(train: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        _recipe(**train)
    assert len(caught.value.problems) == 1


def test_two_rates_of_embeddings(tiny_model: Path) -> None:
    raw = {"task": "classify", "method": "full", "model": {"source": "owner/x"}, "data": {}}
    raw |= {"train": {"embedding_learning_rate": 1e-4}, "layers": {"rate_decay": 0.9}}
    with pytest.raises(RecipeError, match=r"embedding_learning_rate=0.0001 and layers.rate_decay=0.9 both set"):
        from_dict(raw, (), "the test")


@pytest.mark.parametrize(
    ("name", "module", "pip"),
    [
        ("adamw_8bit", "bitsandbytes", "bitsandbytes"),
        ("adamw_torch_4bit", "torchao", "torchao"),
        ("schedule_free_adamw", "schedulefree", "schedulefree"),
        ("stable_adamw", "optimi", "torch-optimi"),
    ],
)
def test_a_missing_package_is_named_before_the_model_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, pip: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *rest: None if one == module else find(one, *rest))
    monkeypatch.setattr(source, "resolve", lambda *_: pytest.fail("the model was looked for"))
    run, out = _run(tmp_path, tiny_model, train={"optim": name, "lr_scheduler_type": "constant"})
    with pytest.raises(MissingExtra, match=f"train.optim={name} .* `pip install {pip}`") as caught:
        train_stage.run(run, out)
    assert caught.value.package == pip


def test_kernels_of_a_gpu_are_refused_on_a_cpu(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch-optimi fails on a CPU if Triton is installed, and runs if it is not."""
    found = {"triton": True, "optimi": True}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object() if found.get(name) else None)
    run, _ = _run(tmp_path, tiny_model, train={"optim": "stable_adamw"})
    with pytest.raises(RecipeError, match=r"uses the GPU kernels of triton .* this device is a CPU"):
        optimization.check(run, device.detect())
    found["triton"] = False
    optimization.check(run, device.detect())


def test_a_checkpoint_takes_the_bytes_that_it_is_said_to(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("adamw_torch", "adafactor"):
        run, out = _run(tmp_path / name, tiny_model, train={"optim": name, "max_steps": 2})
        trainer = sft.build_trainer(run, tiny_model, device.detect(), out)
        said = optimization.checkpoint_bytes(run.recipe, trainer.model)
        train_stage.run(run, out)
        folder = out / "checkpoints" / "checkpoint-2"
        written = sum((folder / file).stat().st_size for file in ("adapter_model.safetensors", "optimizer.pt"))
        assert said <= written < said + 60_000  # names, and of a file of torch the headers of its tensors
