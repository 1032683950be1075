"""How long a training is, and how its learning rate goes: from the recipe, from the rows' lengths, and in the trainer itself."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import tiny_settings
from helpers.training import CAPACITY, LENGTHS, _run
from qkit.core import device
from qkit.core.batching import TokenBudgetBatches, count_batches, packed
from qkit.core.errors import RecipeError
from qkit.plan import sheet
from qkit.recipe import schedule
from qkit.recipe.load import load
from qkit.recipe.schema import Recipe
from qkit.train import _metrics
from qkit.train import stage as train_stage
from qkit.train.trainers import sft

pytestmark = pytest.mark.slow

HALF = 0.5**0.5  # of the way down a cosine, at a quarter of the way

RATES = {
    # warm-up of 3 steps in 8: transformers' own are 0, 1/3, 2/3, 1 ...
    ("linear", 3, 8): [1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5],
    ("cosine", 4, 8): [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, (1 + HALF) / 2, 1 / 2, (1 - HALF) / 2],
    ("constant_with_warmup", 2, 6): [1 / 3, 2 / 3, 1, 1, 1, 1],
    ("linear", 0.25, 8): [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    ("linear", 0.3, 4): [1 / 3, 2 / 3, 1, 1 / 2],  # 1.2 steps are 2
    ("linear", 0, 4): [1, 3 / 4, 2 / 4, 1 / 4],
    ("cosine", 0, 4): [1, (1 + HALF) / 2, 1 / 2, (1 - HALF) / 2],
    ("constant", 0, 3): [1, 1, 1],
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    run, out = _run(tmp_path_factory.mktemp("rates"), tiny_model)
    return sft.build_trainer(run, tiny_model, device.detect(), out)


@pytest.mark.parametrize(("kind", "warmup", "steps"), RATES)
def test_rates_of_every_step(trainer: Any, kind: str, warmup: float, steps: int) -> None:
    """No step of a warm-up is wasted at rate 0, the first one after it has the rate that was asked for, and it goes down as ever."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    trainer.args.lr_scheduler_type, trainer.args.warmup_steps = kind, warmup
    trainer.optimizer, trainer.lr_scheduler = optimizer, None
    made = trainer.create_scheduler(steps, optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"] / 1e-2)
        optimizer.step()
        made.step()
    assert seen == pytest.approx(RATES[kind, warmup, steps])


def test_a_training_has_these_rates_and_goes_on_with_them(tiny_model: Path, tmp_path: Path) -> None:
    """As metrics.jsonl has them; stopped after four steps and gone on."""
    from helpers.training import Heard

    settings = {"train": {"max_steps": 8, "lr_scheduler_type": "linear", "warmup_steps": 3, "save_steps": 2}}
    run, out = _run(tmp_path, tiny_model, Heard(stop_at=5), **settings)
    with pytest.raises(KeyboardInterrupt):
        train_stage.run(run, out)
    again, _ = _run(tmp_path, tiny_model, **settings)
    train_stage.run(again, out)
    seen = [line["learning_rate"] / 1e-2 for line in _metrics.lines(out / "metrics.jsonl")]
    assert seen == pytest.approx(RATES["linear", 3, 8])


# --- too short --------------------------------------------------------------------------------------------------------


def _recipe(tmp_path: Path, source: object, **sections: Any) -> Recipe:
    import yaml

    settings: dict[str, Any] = tiny_settings(Path(str(source)), tmp_path / "rows.jsonl")
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"warmup_steps": 100, "max_steps": 6, "learning_rate": 1e-3},
            r"train\.warmup_steps=100 must be less than the 6 steps of the training: .* 5\.9e-05 only, .*0\.001",
        ),
        ({"warmup_steps": 6, "max_steps": 6}, "warmup_steps=6 must be less than the 6 steps"),
        ({"warmup_steps": 0.9, "max_steps": 6}, r"warmup_steps=0\.9, which is 6 steps, must be less"),
        ({"logging_steps": 10, "max_steps": 6}, "logging_steps=10 must not exceed the 6 steps"),
        ({"warmup_steps": 2.5}, r"warmup_steps: must be a whole number of steps, or a share below 1, got 2\.5"),
        ({"warmup_steps": -0.1}, "warmup_steps"),
        ({"max_steps": 0}, "0 steps train nothing"),
        ({"warmup_steps": 2, "lr_scheduler_type": "constant"}, "use constant_with_warmup"),
        ({"lr_scheduler_type": "constant_with_warmup"}, r"needs a warm-up, but train\.warmup_steps=0"),
    ],
)
def test_steps_that_make_no_sense_are_refused_with_both_numbers(
    tmp_path: Path, section: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        _recipe(tmp_path, "owner/x", train=section)


@pytest.mark.parametrize("section", [{"warmup_steps": 5, "max_steps": 6}, {"warmup_steps": 0.5, "max_steps": 6}])
def test_steps_that_make_sense_are_taken(tmp_path: Path, section: dict[str, Any]) -> None:
    how = _recipe(tmp_path, "owner/x", train=section)
    assert how.train.warmup_steps == section["warmup_steps"]
    (tmp_path / "again.yaml").write_text(how.to_yaml())
    assert load(tmp_path / "again.yaml") == how


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    for written in (3, 3.0):
        found = _recipe(tmp_path, "owner/x", train={"warmup_steps": written}).train.warmup_steps
        assert found == 3 and isinstance(found, int)


EPOCH = {"max_steps": -1, "num_train_epochs": 1.0, "warmup_steps": 50}


def test_a_warm_up_that_the_rows_make_too_long_is_refused_before_training(tiny_model: Path, tmp_path: Path) -> None:
    run, out = _run(tmp_path, tiny_model, train=EPOCH)
    batches = len(TokenBudgetBatches(LENGTHS, CAPACITY, seed=0))
    with pytest.raises(RecipeError, match=f"warmup_steps=50 must be less than the {batches} steps of the training"):
        train_stage.run(run, out)
    assert not list(out.glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize("packing", [False, True])
def test_the_plan_refuses_it_when_the_rows_are_known(tiny_model: Path, tmp_path: Path, packing: bool) -> None:
    how = _recipe(tmp_path, tiny_model, train=EPOCH, data={"packing": packing, "max_length": 128, "batch_tokens": 128})
    lengths = [[tokens, rows, rows] for tokens, rows in Counter(LENGTHS).items()]
    steps = 1 + max(pack for pack, _ in packed(LENGTHS, 128)) if packing else len(TokenBudgetBatches(LENGTHS, 128, 0))
    with pytest.raises(RecipeError, match=f"the {steps} steps of the training"):
        sheet.sheet(how, lengths=lengths)
    longer = how.model_copy(update={"train": how.train.model_copy(update={"warmup_steps": steps - 1})})
    assert sheet.sheet(longer, lengths=lengths).pace.steps == steps
    assert sheet.sheet(how).pace.steps is None  # nobody knows how many rows there are


def test_lengths_tell_the_steps_of_a_training() -> None:
    """Against the sampler itself, on random rows and budgets."""
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, 300) for _ in range(draw.randint(1, 80))]
        budget, step, most = draw.choice((16, 100, 304, 1000)), draw.choice((1, 16)), draw.choice((1, 4, math.inf))
        rows = [(tokens, count) for tokens, count in Counter(lengths).items()]
        batches = TokenBudgetBatches(lengths, budget, seed=1, step=step, most=most)
        assert count_batches(rows, budget, step, most) == len(batches), (lengths, budget, step, most)


def test_rows_that_are_cut_leave_the_steps_unknown(tmp_path: Path) -> None:
    for too_long, known in (("drop", True), ("truncate_prompt", False)):
        how = _recipe(tmp_path, "owner/x", train={"max_steps": -1}, data={"too_long": too_long})
        assert (schedule.planned_steps(how, [[64, 3, 3], [200, 1, 1]]) is not None) == known


def test_epochs_and_accumulation_are_rounded_as_the_trainer_does(trainer: Any) -> None:
    """transformers counts the steps of an epoch first, and rounds each count up."""
    how = Recipe.model_validate({"task": "chat", "model": {"source": "x"}, "data": {}}).train
    for accumulation, epochs in ((1, 1.0), (4, 1.0), (4, 2.5), (3, 0.2)):
        asked = how.model_copy(update={"gradient_accumulation_steps": accumulation, "num_train_epochs": epochs})
        trainer.args.gradient_accumulation_steps, trainer.args.num_train_epochs = accumulation, epochs
        loader = trainer.get_train_dataloader()
        theirs = trainer.set_initial_training_values(trainer.args, loader)
        assert schedule.steps(asked, len(loader)) == theirs[-1]
