"""The README is true: its commands exist, its files are there, and its figures are those of the results it shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from helpers.paths import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    ")]
# Run for real elsewhere: the Makefile's targets by CI, the run directory's commands on the tiny run of test_pipeline.py.
VERBS = sorted({command.split()[1] for command in COMMANDS if command.startswith("qkit ")})


def test_it_shows_commands() -> None:
    assert {"plan", "run", "show", "serve", "inspect", "doctor"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_its_verbs_exist(verb: str) -> None:
    subprocess.run([sys.executable, "-m", "qkit", verb, "--help"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("qkit plan recipes/")])
def test_its_plans_run(command: str) -> None:
    words = command.partition("#")[0].split()[1:]
    subprocess.run([sys.executable, "-m", "qkit", *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def test_its_make_targets_exist_and_ci_runs_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    ci = (ROOT / ".ci" / "run").read_text() + (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for target in re.findall(r"^    make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert re.search(rf"make .*\b{target}\b", ci), target


def test_its_files_are_there() -> None:
    named = re.findall(r"\((benchmarks/[^)]+)\)|`((?:recipes|serve|benchmarks|qkit)/[\w./-]*)`", TEXT)
    paths = [path for pair in named for path in pair if path]
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_verb_is_in_it() -> None:
    done = subprocess.run([sys.executable, "-m", "qkit", "--help"], capture_output=True, text=True, check=True)
    verbs = re.findall(r"^  (\w+)  ", done.stdout.partition("Commands:")[2], re.MULTILINE)
    assert len(verbs) > 10
    for verb in verbs:
        assert f"`{verb}`" in TEXT or f"qkit {verb}" in TEXT, verb


def test_its_figures_are_those_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    for name, score in results["scores"].items():
        assert re.search(rf"\| {score['score']:.0f} \| {score['low']:.1f}–{score['high']:.1f} \|", TEXT), name
    for name, parity in results["parity"].items():
        assert f"| {parity['kl_mean']:.4f} | {100 * parity['top1']:.1f} % |" in TEXT, name
    peak = results["stages"]["train"]["peak_bytes"]
    assert f"planned at {peak['predicted'] / 2**30:.2f} GiB and peaked at {peak['measured'] / 2**30:.2f} GiB" in TEXT
    faster = json.loads((ROOT / "benchmarks" / "results" / "train_step.json").read_text(encoding="utf-8"))[
        "times_as_fast"
    ]
    words = " ".join(TEXT.split())
    assert f"{faster['trl-padded']:.1f} times as many tokens per second as TRL with padding" in words
    assert f"{faster['trl-packed']:.1f} times as many as TRL with packing" in words
