"""Trackers that fail, are missing, or have settings of the user's own; nothing is trained here."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.training import Heard
from qkit.core.errors import MissingExtra, RecipeError
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.recipe.training import TRACKERS
from qkit.run.directory import Run
from qkit.tracking import reporting, trackers
from qkit.tracking.guarded import Guarded

SCORES = {
    "scores": {
        "base": {"score": 10.0, "low": 5.0, "high": 15.0, "rows": 20, "heldout_loss": 2.5},
        "adapter": {
            "score": 60.0,
            "low": 50.0,
            "high": 70.0,
            "rows": 20,
            "heldout_loss": 0.5,
            "metrics": {"macro_f1": {"value": 55.0, "low": 40.0, "high": 65.0}, "f1:fruit": {"value": 1.0}},
        },
    },
    "gain": {"points": 50.0, "low": 40.0, "high": 60.0},
}


def _recipe(**train: Any) -> Recipe:
    data = {"train": [{"source": "org/rows"}]}
    return from_dict({"task": "chat", "model": {"source": "org/model"}, "data": data, "train": train}, (), "the test")


def _guarded(tmp_path: Path, heard: Heard, callback: Any) -> Guarded:
    tracker = Guarded("mlflow", Run(tmp_path, _recipe(), heard), "train", "an id")
    tracker._callback = callback
    return tracker


def test_every_tracker_of_transformers_may_be_named_and_no_other() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert {*TRACKERS} == {*INTEGRATION_TO_CALLBACK} == {*trackers.MODULES}
    assert _recipe(report_to=[*TRACKERS]).train.report_to == TRACKERS
    assert _recipe(report_to="wandb").train.report_to == ("wandb",) and _recipe(report_to="none").train.report_to == ()
    with pytest.raises(RecipeError) as refused:
        _recipe(report_to=["wandb", "tensorbord"])
    assert [problem.key[:2] for problem in refused.value.problems] == [("train", "report_to")]


def test_a_missing_package_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_importable", lambda module: module == "tensorboardX")
    trackers.check(_recipe(report_to=["tensorboard", "kubeflow"]))
    with pytest.raises(MissingExtra, match=r"pip install comet-ml wandb$") as refused:
        trackers.check(_recipe(report_to=["tensorboard", "comet_ml", "wandb"]))
    assert refused.value.package == "comet-ml"


def test_the_folder_that_a_tracker_writes_is_not_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tracker_of_a_test").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not trackers._importable("tracker_of_a_test")
    (tmp_path / "tracker_of_a_test" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert trackers._importable("tracker_of_a_test")


def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    with trackers.environment(trackers.variables("mlflow", tmp_path, "an id")):
        assert os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
        assert (os.environ["MLFLOW_EXPERIMENT_NAME"], os.environ["MLFLOW_RUN_ID"]) == ("qkit", "an id")
    assert "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_RUN_ID" not in os.environ
    assert os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example"


def test_wandb_works_offline_unless_it_knows_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    logins = tmp_path / "logins"
    monkeypatch.setenv("NETRC", str(logins))
    assert trackers.variables("wandb", tmp_path, None)["WANDB_MODE"] == "offline"
    logins.write_text("machine elsewhere.example login a password b\n")
    assert trackers.variables("wandb", tmp_path, None)["WANDB_MODE"] == "offline"
    logins.write_text("machine api.wandb.ai login user password key\n")
    assert "WANDB_MODE" not in trackers.variables("wandb", tmp_path, None)
    logins.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert "WANDB_MODE" not in trackers.variables("wandb", tmp_path, None)


def test_a_tracker_that_fails_is_named_once_and_left_out(tmp_path: Path) -> None:
    class Failing:
        asked = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any) -> None:
            self.asked += 1
            if self.asked == 2:
                raise ConnectionError("the server is gone\nand more")

    heard, callback = Heard(), Failing()
    tracker = _guarded(tmp_path, heard, callback)
    for _ in range(4):
        tracker.handle("on_log", None, None, None, {"logs": {}})
    assert callback.asked == 2
    assert len(heard.lines) == 1 and "the tracker mlflow failed" in heard.lines[0]
    assert "the server is gone" in heard.lines[0] and "and more" not in heard.lines[0]


def test_a_signal_still_ends_the_training(tmp_path: Path) -> None:
    class Interrupted:
        def on_log(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _guarded(tmp_path, Heard(), Interrupted()).handle("on_log", None, None, None, {"logs": {}})


def test_the_settings_of_a_run_are_the_resolved_recipe_and_the_arguments(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], learning_rate=3e-4)
    recipe = _recipe(learning_rate=3e-4, report_to=["wandb"])
    shown = reporting.with_recipe(args, recipe, "a name")
    told = shown.to_dict()
    assert told["learning_rate"] == told["recipe.train.learning_rate"] == 3e-4
    assert (told["recipe.lora.r"], told["recipe.task"], told["recipe.train.report_to"]) == (16, "chat", ["wandb"])
    assert (shown.run_name, shown.project) == ("a name", "qkit") and '"recipe.lora.r": 16' in shown.to_json_string()
    assert args.run_name != "a name" and "recipe.lora.r" not in args.to_dict() and isinstance(shown, TrainingArguments)


def test_scores_are_figures_of_the_test_rows() -> None:
    named = reporting.figures(SCORES, "base")
    assert named == {
        "test_score": 60.0,
        "test_score_low": 50.0,
        "test_score_high": 70.0,
        "test_loss": 0.5,
        "test_macro_f1": 55.0,
        "test_base_score": 10.0,
        "test_base_score_low": 5.0,
        "test_base_score_high": 15.0,
        "test_base_loss": 2.5,
        "test_gain": 50.0,
        "test_gain_low": 40.0,
        "test_gain_high": 60.0,
    }


def test_a_run_without_trackers_gets_no_scores(tmp_path: Path) -> None:
    heard = Heard()
    reporting.add_scores(Run(tmp_path, _recipe(), heard), SCORES, "base")
    assert heard.lines == [] and list(tmp_path.iterdir()) == []
