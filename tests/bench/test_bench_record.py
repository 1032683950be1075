from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from helpers.sample import SAMPLE, open_sample
from helpers.schemas import BENCH_SCHEMA as SCHEMA
from helpers.schemas import closed
from qkit.bench import meter as bench_meter
from qkit.bench import record as bench_record
from qkit.bench import stage as bench_stage
from qkit.bench.load import Load
from qkit.bench.meter import EnergyReading, Meter, energy_spent
from qkit.bench.record import Repeat, Request, Slo, distribution, figures, with_hash
from qkit.core.errors import DataError
from qkit.core.figures import steady
from qkit.measure import artifacts
from qkit.recipe.schema import Bench

RECORDS = sorted((SAMPLE / "bench").glob("*.json"))


def request(ttft: float, gap: float, tokens: int = 5, prompt: int = 10) -> Request:
    return Request(ttft, (gap,) * (tokens - 1), prompt, tokens)


# --- the schema -------------------------------------------------------------------------------------------------------


def check(record: Any) -> None:
    jsonschema.Draft202012Validator(closed(SCHEMA)).validate(record)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: f.stem)
def test_records_of_the_sample_are_records(file: Path) -> None:
    check(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("key", sorted(SCHEMA["required"]))
def test_nothing_may_be_left_out(key: str) -> None:
    record = json.loads(RECORDS[0].read_text(encoding="utf-8"))
    del record[key]
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(record, SCHEMA)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    """Two requests of 5 tokens in 2 s, then the same in 4 s."""
    one = Repeat(2.0, (request(0.5, 0.25), request(1.0, 0.25)))
    record = figures([one, Repeat(4.0, one.requests)])
    assert record["ttft_seconds"]["mean"] == 0.75 and record["ttft_seconds"]["p50"] == 0.75
    assert record["tpot_seconds"] == {"mean": 0.25, "p50": 0.25, "p90": 0.25, "p99": 0.25}
    assert record["itl_seconds"]["mean"] == 0.25
    assert record["e2e_seconds"]["p50"] == 1.75
    assert record["output_tokens_per_second"] == (10 / 2 + 10 / 4) / 2
    assert record["output_tokens_per_second_range"] == [2.5, 5.0]
    assert record["total_tokens_per_second"] == (30 / 2 + 30 / 4) / 2
    assert record["requests_per_second"] == (1 + 0.5) / 2
    assert record["chunks"] == record["tokens"] == 20
    assert record["goodput_per_second"] is None and record["slo"] is None
    assert not record["steady"]


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_seconds=0.7), 1),
        (Slo(ttft_seconds=1.0), 2),
        (Slo(ttft_seconds=1.0, tpot_seconds=0.2), 0),
        (Slo(e2e_seconds=1.6), 1),
        (Slo(ttft_seconds=0.7, e2e_seconds=1.4), 0),
    ],
)
def test_good_requests_meet_every_limit(slo: Slo, good: int) -> None:
    repeat = Repeat(2.0, (request(0.5, 0.25), request(1.0, 0.25)))
    record = figures([repeat], slo)
    assert record["goodput_per_second"] == good / 2 and record["slo"] == slo.limits


def test_a_single_token_has_no_time_per_token() -> None:
    assert Request(0.5, (), 3, 1).tpot == 0 and Request(0.5, (), 3, 1).e2e == 0.5
    assert figures([Repeat(1.0, (Request(0.5, (), 3, 1),))])["itl_seconds"]["p99"] is None


def test_percentiles_lie_between_the_nearest_values() -> None:
    assert distribution([3.0, 1.0, 2.0]) == {
        "mean": 2.0,
        "p50": 2.0,
        "p90": pytest.approx(2.8),
        "p99": pytest.approx(2.98),
    }
    assert set(distribution([1.0]).values()) == {1.0} and set(distribution([]).values()) == {None}


@pytest.mark.parametrize(
    ("values", "one"), [([100, 110, 95], True), ([100, 116, 100], False), ([5.0], True), ([0, 0], True)]
)
def test_what_ranges_too_far_is_no_single_figure(values: list[float], one: bool) -> None:
    assert steady(values) is one


def test_cost_of_a_million_tokens() -> None:
    assert bench_record.cost(3.6, 1000.0) == {"price_per_hour": 3.6, "per_million_output_tokens": pytest.approx(1.0)}
    assert bench_record.cost(None, 1000.0) is None


def test_the_environments_hash_is_of_what_speed_depends_on() -> None:
    base = {
        "python": "3.11",
        "packages": {"torch": "2", "qkit": "1"},
        "git": "abc",
        "device": {"name": "a"},
        "driver": None,
    }
    same = {**base, "git": "def", "packages": {"torch": "2", "qkit": "2"}}
    hashes = [
        with_hash(e)["sha256"]
        for e in (base, same, {**base, "device": {"name": "b"}}, {**base, "packages": {"torch": "3"}})
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert with_hash(with_hash(base)) == with_hash(base)


def test_the_hash_of_an_artifact_is_that_of_its_files() -> None:
    outputs = {"export/a/x": "1", "export/a/y": "2", "export/b/x": "1"}
    moved = {"merge/y": "2", "merge/x": "1"}
    assert bench_record.artifact_sha256(outputs, "export/a/") == bench_record.artifact_sha256(moved, "merge/")
    assert bench_record.artifact_sha256(outputs, "export/a/") != bench_record.artifact_sha256(outputs, "export/b/")
    assert bench_record.artifact_sha256(outputs, "export/c/") is None


# --- loads ------------------------------------------------------------------------------------------------------------


class Queue:
    """A server that does up to 4 requests at once: four times the throughput of one, and no more."""

    name, command, description = "made up", None, "none"

    def __init__(self, queues: bool = True) -> None:
        self.queues = queues
        self.asked: list[tuple[Load, int]] = []

    def measure(self, load: Load, number: int) -> Repeat:
        self.asked.append((load, number))
        seconds = load.requests / min(load.concurrency or 4, 4)
        return Repeat(seconds, tuple(request(0.2, 0.1) for _ in range(load.requests)))


def test_a_sweep_ends_when_throughput_stops_growing_and_then_goes_below_it() -> None:
    source = Queue()
    result = list(bench_stage.measure(source, Bench(sweep=True, repeats=2, rounds=2), None))
    assert [m.load.concurrency for m in result] == [1, 2, 4, 8, None, None, None]
    assert [m.name for m in result[-3:]] == ["r0.25", "r0.5", "r0.75"]
    assert [m.load.request_rate for m in result[-3:]] == [1.0, 2.0, 3.0]  # of the 4 a second at 4 at once
    assert [number for _, number in source.asked] == [0, 1, 2] * 7
    assert {load.requests for load, number in source.asked if number == 0 and load.concurrency == 4} == {4}
    assert {load.requests for load, number in source.asked if number and load.concurrency == 4} == {8}


def test_what_has_no_queue_is_not_waited_for() -> None:
    assert all(m.load.concurrency for m in bench_stage.measure(Queue(queues=False), Bench(sweep=True, repeats=1), None))


def test_without_a_sweep_the_recipe_says_the_loads() -> None:
    result = list(bench_stage.measure(Queue(), Bench(concurrency=(1, 3), repeats=1), None))
    assert [(m.load.concurrency, m.load.requests) for m in result] == [(1, 1), (3, 3)]


def test_one_repeat_is_not_called_steady() -> None:
    (measured,) = bench_stage.measure(Queue(), Bench(concurrency=(1,), repeats=1), None)
    assert figures(measured.repeats)["steady"] is False and figures([*measured.repeats] * 2)["steady"] is True


def test_a_server_elsewhere_has_no_energy_of_this_machine() -> None:
    (measured,) = bench_stage.measure(Queue(), Bench(concurrency=(1,), repeats=1), None)
    assert measured.energy["joules"] is None and "another machine" in measured.energy["why"]


def test_a_record_of_anything_is_valid() -> None:
    source = Queue()
    section = Bench(repeats=2, price_per_hour=1.0, slo_ttft_seconds=0.3, concurrency=(2,))
    (measured,) = bench_stage.measure(source, section, None)
    metadata = {"runtime": "url", "artifact": "m", "model_sha256": None, "disk_bytes": None, "startup_seconds": None}
    metadata |= {"argv": None, "peak_bytes": None, "meter": None, "training": None, "quality": None}
    record = bench_stage.record(measured, source, section, 0, metadata)
    check(json.loads(json.dumps(record)))
    assert record["goodput_per_second"] == record["requests_per_second"] == 2.0
    assert record["cost"]["per_million_output_tokens"] == pytest.approx(1e6 / 10 / 3600)


def test_the_record_joins_what_the_run_knows(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    (run.root / "export" / "vllm").mkdir(parents=True)
    (run.root / "export" / "vllm" / "file").write_bytes(b"12345")
    metadata = bench_stage._metadata(run, artifacts.Artifact("vllm", run.root / "export" / "vllm"))
    parity = json.loads((SAMPLE / "verify" / "parity.json").read_text(encoding="utf-8"))
    assert metadata["disk_bytes"] == 5 and metadata["runtime"] == "vllm"
    assert metadata["quality"]["kl_mean"] == parity["parity"]["vllm"]["kl_mean"]
    assert metadata["quality"]["score"] == parity["scores"]["vllm"]["score"]
    assert metadata["training"]["seconds"] == 282.6 and metadata["training"]["peak_bytes"]["measured"] > 1e9


def test_rows_that_are_other_tokens_as_text_are_left_out_and_counted(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    whole, torn = tokenizer("say a").input_ids, tokenizer("ü").input_ids[:1]  # half of a letter is no text
    result = bench_stage.text_prompts(tokenizer, [whole, torn])
    assert [(p.text, p.tokens) for p in result.prompts] == [("say a", len(whole))]
    assert result.description == "held-out rows, 1 left out whose text has other tokens"
    with pytest.raises(DataError, match="every held-out prompt changes its token ids"):
        bench_stage.text_prompts(tokenizer, [torn])


# --- meters -----------------------------------------------------------------------------------------------------------


def test_memory_over_time_is_kept_and_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(bench_meter, "MAX_SAMPLES", 4)
    with Meter(os.getpid(), every_seconds=60) as meter:
        for _ in range(9):
            meter.sample()
    result = meter.to_dict()
    assert 1 < len(result["rss_tree"]) <= 5 and result["device"] == [] and result["device_peak_bytes"] is None
    assert result["rss_tree_peak_bytes"] > 20e6
    assert [seconds for seconds, _ in result["rss_tree"]] == sorted(seconds for seconds, _ in result["rss_tree"])


def test_nobodys_memory_is_none() -> None:
    with Meter(None, every_seconds=60) as meter:
        pass
    assert meter.to_dict()["rss_tree_peak_bytes"] is None


def test_energy_is_read_from_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_meter, "POWERCAP", tmp_path)
    assert bench_meter.energy() == "no NVML, and no RAPL below /sys/class/powercap"
    zones = {
        "0": "package-0",
        "0:0": "core",
        "1": "package-1",
        "2": "psys",
    }  # a part of a package, and the board that holds both
    for number, name in zones.items():
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        for file, text in (("name", name), ("energy_uj", f"{len(name)}000000"), ("max_energy_range_uj", "10000000")):
            (zone / file).write_text(f"{text}\n")
    assert bench_meter.energy() == EnergyReading("rapl", (9.0, 9.0), (10.0, 10.0))


@pytest.mark.parametrize(
    ("before", "after", "joules", "why"),
    [
        (EnergyReading("rapl", (5.0,), (20.0,)), EnergyReading("rapl", (9.0,), (20.0,)), 4.0, None),
        (
            EnergyReading("rapl", (18.0, 1.0), (20.0, 20.0)),
            EnergyReading("rapl", (2.0, 2.0), (20.0, 20.0)),
            5.0,
            None,
        ),  # one has wrapped
        (EnergyReading("nvml", (5.0,)), EnergyReading("nvml", (9.0,)), 4.0, None),
        ("nothing here", "nothing here", None, "nothing here"),
    ],
)
def test_energy_spent(before: Any, after: Any, joules: float | None, why: str | None) -> None:
    result = energy_spent(before, after, tokens=8)
    assert (result["joules"], result["why"]) == (joules, why)
    assert result["joules_per_output_token"] == (None if joules is None else joules / 8)


def test_what_is_read_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Energy comes in millijoules; what a card does not support is None."""
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(total=80, free=50, used=30))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: 2500)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "595.1")
    card = bench_meter.GpuCard(None)
    assert (card.memory_bytes(), card.energy_joules(), card.driver_version()) == (30, 2.5, "595.1")

    def unsupported(_: Any) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    assert card.energy_joules() is None


def test_a_card_that_qkit_leaves_alone_is_not_metered() -> None:
    assert bench_meter.GpuCard.open() is None and bench_meter.driver_version() is None
