from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.command import qkit
from helpers.sample import SAMPLE
from qkit.bench import compare as bench_compare
from qkit.bench.compare import STUDENT_T, Ratio, compare, judge, parse_threshold, regression
from qkit.bench.record import with_hash
from qkit.core.errors import MissingArtifact, UserError

RECORD = SAMPLE / "bench" / "vllm-c8.json"


def record(file: Path, speeds: Sequence[float] = (120, 121, 122), **changed: Any) -> Path:
    """The sample's record with these output tokens per second in its repeats."""
    raw = json.loads(RECORD.read_text(encoding="utf-8"))
    raw["by_repeat"] = [{**raw["by_repeat"][0], "output_tokens_per_second": speed} for speed in speeds]
    file.write_text(json.dumps({**raw, **changed}), encoding="utf-8")
    return file


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return record(tmp_path / "before.json")


def speed(result: list[bench_compare.Comparison]) -> Ratio:
    return next(ratio for ratio in result[0].ratios if ratio.name == "output_tokens_per_second")


def test_chats_are_not_compared_over_a_change_of_what_a_first_token_is(tmp_path: Path) -> None:
    raw = json.loads(RECORD.read_text(encoding="utf-8"))
    load = {**raw["load"], "command": [*raw["load"]["command"], "--backend", "openai-chat"]}
    old, new = record(tmp_path / "old.json", load=load), record(tmp_path / "new.json", load=load, doubts=[])
    with pytest.raises(
        UserError, match="first token: one record is from a version of qkit that counted the chunk with the role"
    ):
        compare(old, new, 0.05)
    assert compare(new, new, 0.05) and compare(old, old, 0.05)
    assert compare(record(tmp_path / "a.json"), record(tmp_path / "b.json", doubts=[]), 0.05)


# --- ratios -----------------------------------------------------------------------------------------------------------


def test_the_interval_is_welchs() -> None:
    """By hand: logs 0, 0.1, 0.2 and 0.5, 0.6, 0.7 have variances 0.01, so 4 degrees of freedom and a standard error of 0.0816."""
    from math import exp

    ratio = judge("x", [exp(v) for v in (0, 0.1, 0.2)], [exp(v) for v in (0.5, 0.6, 0.7)], 0.05, True)
    assert ratio.ratio == pytest.approx(exp(0.5))
    assert ratio.low == pytest.approx(exp(0.5 - 2.776 * 0.081650), rel=1e-4)
    assert ratio.high == pytest.approx(exp(0.5 + 2.776 * 0.081650), rel=1e-4)


@pytest.mark.parametrize(("degrees", "quantile"), list(enumerate(STUDENT_T, 1)))
def test_the_table_holds_the_quantiles_of_students_t(degrees: int, quantile: float) -> None:
    """Simpson's rule over the density: 95 % lies between -quantile and quantile."""
    from math import gamma, pi, sqrt

    steps = 2000
    width = quantile / steps
    density = [(1 + (i * width) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)]
    integral = width / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))
    scale = gamma((degrees + 1) / 2) / (sqrt(degrees * pi) * gamma(degrees / 2))
    assert 2 * scale * integral == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize(
    ("after", "more", "regressed"),
    [
        ([100, 101, 102], True, True),  # a sixth slower
        ([100, 101, 102], False, False),  # of a latency that is a gain
        ([140, 141, 142], True, False),
        ([140, 141, 142], False, True),
        ([118, 119, 120], True, False),  # slower for sure, and by less than the threshold
        ([80, 120, 160], True, False),  # may be slower by much: the interval holds 1
        ([60, 110, 160], True, False),
    ],
)
def test_a_regression_is_beyond_the_threshold_and_beyond_noise(after: list[float], more: bool, regressed: bool) -> None:
    assert judge("x", [120, 121, 122], after, 0.05, more).regressed is regressed


def test_equal_repeats_have_an_interval_of_no_width() -> None:
    result = judge("x", [2.0, 2.0], [3.0, 3.0], 0.05, False)
    assert (result.low, result.high) == (pytest.approx(1.5), pytest.approx(1.5)) and result.regressed


def test_figures_without_repeats_are_shown_and_not_judged(before: Path, tmp_path: Path) -> None:
    result = compare(before, record(tmp_path / "b.json", peak_bytes=2**40), 0.05)
    peak = next(ratio for ratio in result[0].ratios if ratio.name == "peak_bytes")
    assert peak.ratio > 100 and peak.low is None and not peak.regressed


# --- what may be compared ---------------------------------------------------------------------------------------------


def elsewhere(file: Path, **changed: Any) -> Path:
    raw = json.loads(RECORD.read_text(encoding="utf-8"))["environment"]
    return record(file, environment=with_hash({**raw, **changed}))


def test_other_environments_are_refused_and_named(before: Path, tmp_path: Path) -> None:
    there = elsewhere(tmp_path / "b.json", device={"name": "an abacus", "memory_bytes": 1, "cores": 1})
    with pytest.raises(UserError, match=r"(?s)environment\.device\.name: .* and an abacus.*--anyway"):
        compare(before, there, 0.05)
    result = compare(before, there, 0.05, ignore_mismatch=True)
    assert any("abacus" in line for line in result[0].differences)


def test_another_version_of_qkit_is_what_comparisons_are_for(before: Path, tmp_path: Path) -> None:
    packages = json.loads(RECORD.read_text(encoding="utf-8"))["environment"]["packages"]
    newer = elsewhere(tmp_path / "b.json", packages={**packages, "qkit": "99"}, git="f" * 40)
    assert compare(before, newer, 0.05)[0].differences == ()
    other = elsewhere(tmp_path / "c.json", packages={**packages, "torch": "99"})
    with pytest.raises(UserError, match=r"environment\.packages\.torch: .* and 99"):
        compare(before, other, 0.05)


def test_other_loads_are_refused(before: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="concurrency: 8 and 4"):
        compare(before, record(tmp_path / "b.json", concurrency=4), 0.05)
    load = {**json.loads(RECORD.read_text(encoding="utf-8"))["load"], "prompts": "random, 128 tokens"}
    with pytest.raises(UserError, match=r"load\.prompts: held-out rows and random"):
        compare(before, record(tmp_path / "c.json", load=load), 0.05)


def test_more_failed_requests_are_worse_however_fast_the_others_were(before: Path, tmp_path: Path) -> None:
    result = compare(before, record(tmp_path / "b.json", [200, 201, 202], failed_requests=3), 0.05)
    assert "failed_requests: 0 before, 3 after" in str(regression(result, 0.05))
    assert regression(compare(tmp_path / "b.json", tmp_path / "b.json", 0.05), 0.05) is None


def test_two_servers_are_not_one(tmp_path: Path) -> None:
    load = json.loads(RECORD.read_text(encoding="utf-8"))["load"]
    files = [
        record(tmp_path / f"{name}.json", runtime="url", load={**load, "command": ["--base-url", f"http://{name}"]})
        for name in ("a", "b")
    ]
    with pytest.raises(UserError, match="server: http://a and http://b"):
        compare(*files, 0.05)
    assert compare(files[0], files[0], 0.05)[0].differences == ()


def test_one_repeat_tells_nothing_of_noise(before: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 1 repeat.*bench\.repeats=3"):
        compare(before, record(tmp_path / "b.json", [120]), 0.05)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": 2, "by_repeat": []}'])
def test_what_is_no_record(before: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(MissingArtifact, match=r"b\.json: (not JSON|not a bench record)"):
        compare(before, tmp_path / "b.json", 0.05)
    with pytest.raises(MissingArtifact, match="bench record not found"):
        compare(before, tmp_path / "nowhere.json", 0.05)


def test_folders_are_compared_name_by_name(tmp_path: Path) -> None:
    folders = [shutil.copytree(SAMPLE / "bench", tmp_path / name) for name in ("a", "b")]
    (folders[1] / "vllm-c1.json").unlink()
    with pytest.raises(UserError, match=r"b has no vllm-c1\.json, which .*--anyway"):
        compare(folders[0], folders[1], 0.05)
    assert "vllm-c1" not in [
        result.name for result in compare(folders[1], folders[0], 0.05)
    ]  # what is new has nothing beside it
    names = [result.name for result in compare(folders[0], folders[1], 0.05, ignore_mismatch=True)]
    assert "vllm-c8" in names and "vllm-c1" not in names and "vllm-r0.5" not in names
    with pytest.raises(MissingArtifact, match="no bench records with the same name"):
        compare(folders[0], tmp_path, 0.05)


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0), ("12.5 %", 0.125)])
def test_thresholds(text: str, value: float) -> None:
    assert parse_threshold(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["five", "-1%", "150%", ""])
def test_thresholds_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="must be a percentage or a fraction"):
        parse_threshold(text)


# --- as a command -----------------------------------------------------------------------------------------------------


def test_a_regression_is_named(before: Path, tmp_path: Path) -> None:
    result = compare(before, record(tmp_path / "b.json", [100, 101, 102]), 0.05)
    assert speed(result).ratio == pytest.approx(101 / 121, rel=1e-3)
    error = regression(result, 0.05)
    assert error is not None and error.figures == (("before", "output_tokens_per_second"),)
    assert "output_tokens_per_second is 0.835 times the value before" in str(error)
    assert regression(result, 0.5) is not None  # judged by the threshold it was compared with
    assert regression(compare(before, before, 0.05), 0.05) is None


@pytest.mark.parametrize(
    ("speeds", "threshold", "status"),
    [([100, 101, 102], "5%", 1), ([100, 101, 102], "30%", 0), ([123, 124, 125], "5%", 0)],
)
def test_exit_codes(before: Path, tmp_path: Path, speeds: list[float], threshold: str, status: int) -> None:
    done = qkit("bench", "compare", before, record(tmp_path / "b.json", speeds), "--threshold", threshold, "--json")
    assert done.returncode == status, done.stderr
    assert json.loads(done.stdout)[0]["ratios"][0]["name"] == "output_tokens_per_second"
    assert ("worse by more than" in done.stderr) is bool(status)
