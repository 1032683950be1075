from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import paths
from qkit.core.errors import RecipeError
from qkit.recipe.load import load
from qkit.recipe.schema import Recipe

RECIPES = sorted(paths.RECIPES.glob("*.yaml"))
MINIMAL = "task: chat\nmodel: {source: x}\ndata: {}\n"


def _write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_loads_and_survives_a_round_trip(file: Path, tmp_path: Path) -> None:
    recipe = load(file)
    again = load(_write(tmp_path, recipe.to_yaml()))
    assert again == recipe and again.sha256() == recipe.sha256()


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    file = _write(
        tmp_path,
        "task: chatt\nmodel: {source: x}\ndata:\n  batch_tokens: 5\nlora:\n  lora_alfa: 3\ntrain:\n  max_steps: many\n",
    )
    with pytest.raises(RecipeError) as caught:
        load(file, ["train.optimm=adamw_torch"])
    lines = str(caught.value).splitlines()
    assert f"{file}:6: unknown key 'lora.lora_alfa', did you mean 'lora_alpha'?" in lines
    assert any(line.startswith(f"{file}:8: train.max_steps: ") and "'many'" in line for line in lines)
    assert "--set: unknown key 'train.optimm', did you mean 'optim'?" in lines
    assert any(line.startswith(f"{file}:4: data.batch_tokens=5 is less than data.max_length") for line in lines)
    unknown = f"{file}:1: unknown task 'chatt', did you mean 'chat'?; available: answer, chat, classify, "
    assert any(line.startswith(unknown) for line in lines)
    assert len(lines) == 5


def test_numbers_written_as_yaml_reads_them(tmp_path: Path) -> None:
    recipe = load(
        _write(
            tmp_path,
            MINIMAL.replace("{source: x}", "{source: owner/x, revision: 695e0514}") + "train: {learning_rate: 2e-4}\n",
        ),
        [],
    )
    assert recipe.train.learning_rate == 2e-4
    assert load(_write(tmp_path, MINIMAL), ["train.learning_rate=1e-5"]).train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "a recipe must be a mapping"),
        ("a: [\n", "not YAML"),
        ("task: chat\n", "'model' is missing"),
        (
            MINIMAL + "merge: {base: dequantized}\nquantization: {load_in_4bit: false}\n",
            "needs quantization.load_in_4bit",
        ),
        (
            MINIMAL + "evaluate: {answer_pattern: '#### (.+'}\n",
            r"r\.yaml:4: evaluate\.answer_pattern: not a regular expression: missing \), .* at position 5, got '#### \(\.\+'",
        ),
        (
            MINIMAL.replace("{}", "{max_length: 1, too_long: split}"),
            r"r\.yaml:3: data\.max_length: Input should be greater than or equal to 2, got 1",
        ),
        (
            MINIMAL + "lora: {target_modules: [q_proj, lm_head]}\n",
            "contains lm_head, whose adapter would not be trained",
        ),
        (MINIMAL + "lora: {target_modules: lm_head}\n", "contains lm_head, whose adapter would not be trained"),
        (MINIMAL + "export: {formats: [tflite]}\n", "unknown format 'tflite'"),
        (MINIMAL + "export: {formats: [vllm]}\n", "but export.formats does not"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(_write(tmp_path, text))


@pytest.mark.parametrize("override", ["train", "=1", "train.=1", "task.x=1", "train.optim=["])
def test_overrides_that_are_none(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        load(_write(tmp_path, MINIMAL), [override])


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load(tmp_path / "none.yaml")


def test_the_hash_does_not_depend_on_what_is_left_to_defaults(tmp_path: Path) -> None:
    plain = load(_write(tmp_path, MINIMAL))
    spelt = load(_write(tmp_path, MINIMAL + f"seed: {Recipe.model_fields['seed'].default}\n"))
    assert plain.sha256() == spelt.sha256() != load(_write(tmp_path, MINIMAL), ["seed=7"]).sha256()


LONG = "x" * 100_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (
            json.dumps([{"messages": [{"role": "user", "content": LONG}]}] * 50),
            [],
            "a recipe must be a mapping of sections",
        ),
        (json.dumps({"data": [{"text": LONG}], "version": 1}), [], "data: Input should be"),
        (json.dumps({f"{LONG[:900]}{number}": 1 for number in range(1000)}), [], "\nand 983 more"),
        (json.dumps({"task": LONG, "model": {"source": "m"}, "data": {}}), [], "unknown task 'xxx"),
        (MINIMAL + f"export: {{formats: [{LONG}]}}\n", [], "unknown format 'xxx"),
        (MINIMAL + f"bench: {{runtimes: [{LONG}]}}\n", [], "bench.runtimes contains 'xxx"),
        (MINIMAL + f"train: {{learning_rate: {LONG}}}\n", [], "train.learning_rate: Input should be a valid number"),
        (MINIMAL + f"train: {{? {LONG} : 1}}\n", [], "unknown key 'train.xxx"),
        (f"a: !{LONG} 1\n", [], "not YAML"),
        (MINIMAL, [LONG], "write it as section.key=value"),
        (MINIMAL, [f"train.optim=[{LONG}"], "is not YAML"),
        (MINIMAL, [f"task.{LONG}.y=1"], "is not a section"),
    ],
)
def test_what_is_given_back_is_short(tmp_path: Path, text: str, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(_write(tmp_path, text), overrides)
    said = str(caught.value)
    assert words in said and len(said) < 300 * (said.count("\n") + 1) + 2000 and "x" * 2000 not in said


def test_a_line_of_a_message_ends_somewhere() -> None:
    said = str(RecipeError(f"{LONG}\nsecond"))
    assert len(said) < 2100 and said.endswith("\N{HORIZONTAL ELLIPSIS}\nsecond")


INFINITE = ("learning_rate", "weight_decay", "num_train_epochs", "warmup_steps", "max_grad_norm")


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf", "true"])
@pytest.mark.parametrize("field", [*(f"train.{name}" for name in INFINITE), "lora.lora_alpha", "bench.price_per_hour"])
def test_a_number_is_finite_and_no_truth(tmp_path: Path, field: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"--set: {field}.*: "):
        load(_write(tmp_path, MINIMAL), [f"{field}={value}"])


@pytest.mark.parametrize(
    "setting",
    [
        *("train.max_steps=true", "lora.r=true", "seed=true", "bench.concurrency=[1, true]", "data.max_overlap=true"),
        *("serve.port=false", "verify.gates={merged: {kl_mean: true}}"),
    ],
)
def test_true_is_no_number(tmp_path: Path, setting: str) -> None:
    with pytest.raises(RecipeError, match="must be a number, not true or false"):
        load(_write(tmp_path, MINIMAL), [setting])


def test_truths_and_limits_that_are_none_stay(tmp_path: Path) -> None:
    settings = ["train.gradient_checkpointing=true", "verify.gates={merged: {kl_mean: .inf, score: true}}"]
    recipe = load(_write(tmp_path, MINIMAL), settings)
    assert recipe.train.gradient_checkpointing is True
    assert (recipe.verify.gates["merged"].kl_mean, recipe.verify.gates["merged"].score) == (float("inf"), True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  learning_rate: 1e-4\n  learning_rate: 1e-5\n", r"r\.yaml:6: duplicate key 'learning_rate'"),
        ("data: {}\n", r"r\.yaml:4: duplicate key 'data'"),
        ("export: {formats: [{a: 1, a: 1}]}\n", r"r\.yaml:4: duplicate key 'a'"),
    ],
)
def test_a_key_twice_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(_write(tmp_path, MINIMAL + text))
