"""Every option of every verb, in every way of using it: it has an effect there, or is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from helpers.sample import SAMPLE
from qkit.bench import any_server
from qkit.cli import app, opening
from qkit.cli.options import COMMON
from qkit.cli.verbs.bench import with_command
from qkit.core.errors import RecipeError
from qkit.core.progress import Progress

MAIN: Any = typer.main.get_command(app.app)
RECIPE = "recipes/quickstart.yaml"
PLANNED = {"overrides", "memory", "card", "solve", "explain"}
STAGE = {"overrides", "out"}
SERVED = {"overrides", "out", "runtime", "artifact", "name", "adapter", "runtime_adapters", "api_key_file", "force"}
PREDICTED = {"out", "column", "keep", "top_k", "max_new_tokens", "overwrite"}
TALKED = {"system", "beside", "temperature", "top_p", "top_k", "max_tokens", "seed"}
# A way of using a verb -> the options that it reads. `child` and the like, which every way has, are left out.
WAYS: dict[str, tuple[list[str], set[str]]] = {
    "init": (["init", "rows.jsonl"], {"model", "task", "out", "force"}),
    "init an example": (["init", "--example", "quickstart"], {"out", "force", "example"}),
    "doctor": (["doctor"], {"make"}),
    "plan a recipe": (["plan", RECIPE], PLANNED | {"schedule"}),
    "plan a schedule": (["plan", RECIPE, "--schedule"], {"overrides", "schedule"}),
    "plan a model": (["plan", "--model", "m"], PLANNED | {"model", "quantization", "rank", "batch", "length"}),
    "inspect a recipe": (["inspect", RECIPE], {"overrides", "row", "html"}),
    "inspect a row": (["inspect", RECIPE, "--row", "0"], {"overrides", "row", "html", "split"}),
    "inspect a data set": (
        ["inspect", "--model", "m", "--data", "d"],
        {"overrides", "row", "html", "model", "data", "format"},
    ),
    "show": (["show", "r"], set()),
    "run": (["run", RECIPE], STAGE | {"fit"}),
    **{name: ([name, RECIPE], STAGE) for name in ("data", "train", "evaluate", "export", "report")},
    "merge": (["merge", RECIPE], STAGE),
    "merge one": (
        ["merge", "--base", "b", "--adapter", "a", "--out", "o"],
        {"overrides", "out", "base", "adapter", "weight", "data"},
    ),
    "merge several": (
        ["merge", "--base", "b", "--adapter", "a", "--adapter", "c", "--out", "o"],
        {"overrides", "out", "base", "adapter", "weight", "data", "combine"},
    ),
    "merge by parts": (
        ["merge", "--base", "b", "--adapter", "a", "--adapter", "c", "--out", "o", "--combine", "ties"],
        {"overrides", "out", "base", "adapter", "weight", "data", "combine", "density"},
    ),
    "verify": (["verify", RECIPE], STAGE),
    "verify two": (["verify", "a", "b"], {"data", "where", "max_kl"}),
    "verify a server": (["verify", "r", "--server", "http://127.0.0.1:9"], {"server"}),
    "bench run": (["bench", "run", RECIPE], STAGE | {"sweep", "price"}),
    "bench a server": (
        ["bench", "url", "http://127.0.0.1:9"],
        STAGE | {"sweep", "price", "model", "tokenizer", "prompt_tokens", "chat", "charts"},
    ),
    "bench a server with a run": (
        ["bench", "url", "http://127.0.0.1:9", "--run", "r"],
        STAGE | {"sweep", "price", "run", "model", "tokenizer", "chat", "charts"},
    ),
    "bench training": (["bench", "train", RECIPE], STAGE | {"batch_tokens", "length", "steps"}),
    "bench charts": (["bench", "charts", "r"], {"out", "png"}),
    "bench charts of a server": (
        ["bench", "url", "http://127.0.0.1:9", "--charts", "c"],
        STAGE | {"sweep", "price", "model", "tokenizer", "prompt_tokens", "chat", "charts", "png"},
    ),
    "bench compare": (["bench", "compare", "a", "b"], {"threshold", "anyway"}),
    "predict": (["predict", "r", "f", "--out", "o.jsonl"], PREDICTED | {"artifact"}),
    "predict standard input": (["predict", "r", "-", "--out", "o.jsonl"], PREDICTED | {"artifact", "input_format"}),
    "predict with a server": (
        ["predict", "http://127.0.0.1:9", "f", "--out", "o.jsonl"],
        PREDICTED | {"model", "api_key_file"},
    ),
    "chat": (["chat", "r"], TALKED | {"artifact"}),
    "chat with a server": (["chat", "http://127.0.0.1:9"], TALKED | {"model", "api_key_file"}),
    "ls": (["ls"], set()),
    "rm": (["rm", "r"], {"yes"}),
    "gc": (["gc"], {"yes", "days"}),
    "push": (["push", "f", "me/m"], {"private", "dry_run", "force"}),
    "serve": (["serve", RECIPE], SERVED | {"no_contract", "restart", "form"}),
    "print": (["serve", RECIPE, "--print", "shell"], SERVED | {"form"}),
    "adapters list": (["adapters", "list"], {"url", "api_key_file"}),
    "adapters load": (["adapters", "load", "n=r"], {"url", "api_key_file"}),
    "adapters unload": (["adapters", "unload", "n"], {"url", "api_key_file"}),
}
# Which way of using a verb an option itself chooses.
CHOOSING = {"run", "charts", "server", "form", "base", "model", "row", "make", "example"}


GROUPS = {"adapters", "bench"}
NUMBERS = {
    "price",
    "prompt_tokens",
    "batch_tokens",
    "length",
    "steps",
    "rank",
    "batch",
    "density",
    "weight",
    "max_kl",
    "row",
}


def options_of(argv: list[str]) -> Iterator[Any]:
    command = MAIN
    for word in argv:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    yield from (param for param in command.params if param.param_type_name == "option" and param.name not in COMMON)


def words_of(option: Any) -> list[str]:
    if option.is_flag:
        return [option.opts[0]]
    value = "1" if option.name in NUMBERS else "x"
    return [option.opts[0], *([value] * option.nargs)]


IDLE = [
    (way, option)
    for way, (argv, used) in WAYS.items()
    for option in options_of(argv)
    if option.name not in used and option.name not in CHOOSING
]


def test_every_verb_is_here() -> None:
    assert {argv[0] for argv, _ in WAYS.values()} == {*MAIN.commands}
    for way, (argv, used) in WAYS.items():
        assert used <= {option.name for option in options_of(argv)}, way


def test_every_option_is_of_use_somewhere() -> None:
    useful: dict[str, set[str]] = {}
    for argv, used in WAYS.values():
        useful.setdefault(" ".join(argv[: 2 if argv[0] in GROUPS else 1]), set()).update(used)
    for verb, used in useful.items():
        assert {option.name for option in options_of(verb.split())} == used, verb


@pytest.mark.parametrize(("way", "option"), IDLE, ids=lambda value: getattr(value, "name", value))
def test_what_would_have_no_effect_is_refused(
    way: str, option: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qkit", *WAYS[way][0], *words_of(option)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"{option.opts[0]}" in said and "no effect" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["plan", RECIPE, "--explain", "weights", "--solve", "card"], "--solve: no effect with --explain"),
        (["plan", RECIPE, "--model", "m"], "one of the two"),
        (["inspect", RECIPE, "--split", "test"], "--split: no effect without --row"),
        (["bench", "compare", "a", "b", "r"], "unexpected extra argument"),
        (["bench", str(SAMPLE), "--png"], "No such option: --png"),
        (
            ["bench", "url", "http://127.0.0.1:9", "--png"],
            "--png: no effect without --charts; see `qkit bench url --help`",
        ),
        (["serve", RECIPE, "--print", "shell", "--json"], "--json: no effect with --print"),
        (["serve", "org/model", "--artifact", "onnx-int4"], "--artifact onnx-int4: org/model is not a run"),
        (["serve", "org/model", "--out", "runs/x"], "--out runs/x: org/model is not a run"),
    ],
)
def test_what_does_not_go_together(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qkit", *argv])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_a_run_directory_is_not_put_elsewhere() -> None:
    with pytest.raises(RecipeError, match=r"sample_run.*--out|--out.*sample_run"):
        opening.open_run(SAMPLE, None, Path("other"), Progress())
    assert opening.open_run(SAMPLE, None, SAMPLE, Progress()).root == SAMPLE


def test_a_price_of_nothing_is_not_passed_over(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "qkit", "bench", RECIPE, "--price-per-hour", "0", "--out", str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and "bench.price_per_hour" in done.stderr


def test_charts_of_a_server_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records of a bench that was made before stand for a server's; what it measures is tested elsewhere."""
    records = [json.loads(file.read_text()) for file in sorted((SAMPLE / "bench").glob("vllm-c*.json"))]
    monkeypatch.setattr(any_server, "run", lambda *_: [{**record, "doubts": []} for record in records])
    argv = ["qkit", "bench", "url", "http://127.0.0.1:9", "--charts", str(tmp_path / "charts"), "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0, capsys.readouterr().err
    assert "vllm: " in (tmp_path / "charts" / "latency.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r --sweep --out o", "run r --sweep --out o"),
        ("r --child --quiet", "run r --child --quiet"),
        ("--out o train r --steps 2", "train --out o --steps 2 r"),
        ("--compare a b --threshold 3%", "compare a b --threshold 3%"),
        ("--json --compare a b", "compare a b --json"),
        ("--url http://h --model m --chat", "url http://h --model m --chat"),
        ("r --sweep --url=http://h -q", "url http://h --run r --sweep -q"),
        ("--url http://h --charts c --png", "url http://h --charts c --png"),
        ("r --charts c --png", "charts r --out c --png"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_old_spellings_of_bench_are_translated(old: str, new: str) -> None:
    arguments, spelling = with_command(old.split())
    assert arguments == new.split()
    assert spelling == next((name for name in ("--compare", "--url", "--charts") if name in old), "")


def test_an_old_spelling_of_bench_names_the_new_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qkit", "bench", "--compare", "/nowhere/a", "/nowhere/b", "--json"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert json.loads(printed.out)["error"]["type"] == "MissingArtifact"
    note, _ = printed.err.splitlines()
    assert "`qkit bench compare ...`" in note
