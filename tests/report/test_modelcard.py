from __future__ import annotations

import ast
import io
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.sample import FILES, SAMPLE, edit, open_sample
from qkit.core.errors import MissingArtifact
from qkit.recipe.schema import Recipe
from qkit.report import model_card
from qkit.run.directory import Run


def changed(run: Run, **settings: Any) -> Run:
    """The same run with other settings in its recipe."""
    dumped = run.recipe.model_dump(mode="json")
    for section, values in settings.items():
        dumped[section].update(values)
    return Run(run.root, Recipe.model_validate(dumped))


def front(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return loaded


def code(text: str, language: str) -> str:
    return text.split(f"```{language}\n")[1].partition("```")[0]


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    card = front(model_card.render(open_sample(tmp_path)))
    assert card["library_name"] == "transformers"
    assert card["pipeline_tag"] == "text-generation"
    assert card["base_model"] == "example-org/tiny-llama"
    assert "license" not in card


def test_front_matter_has_the_artifacts_own_score_for_the_hub(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    scores = json.loads((run.folder("evaluate") / "scores.json").read_text(encoding="utf-8"))
    (entry,) = front(model_card.render(run, "vllm-adapter"))["model-index"]
    assert entry["name"] == run.root.name
    assert entry["results"][0]["metrics"][0]["value"] == scores["scores"]["adapter"]["score"]
    assert "model-index" not in front(model_card.render(run, "gguf-q4"))  # its score was not measured


@pytest.mark.parametrize("source", ["./model", "model.gguf", "pypi:a==1!b/c.gguf", "org/model.gguf"])
def test_only_a_hub_id_is_named_as_base(tmp_path: Path, source: str) -> None:
    run = changed(open_sample(tmp_path), model={"source": source})
    assert "base_model" not in front(model_card.render(run))


@pytest.mark.parametrize(
    ("chosen", "said"), [("dequantized", "dequantized 4-bit base"), ("16bit-fp16", "| the 16-bit base |")]
)
def test_it_says_onto_which_weights_it_was_merged(tmp_path: Path, chosen: str, said: str) -> None:
    """The recipe leaves it to measuring; the adapter alone was merged onto none."""
    run = open_sample(tmp_path)
    run.folder("merge").mkdir()
    (run.folder("merge") / "candidates.json").write_text(json.dumps({"chosen": chosen}))
    assert said in model_card.render(run)
    assert "Merged onto" not in model_card.render(run, "vllm-adapter")
    folder = run.folder("export") / "onnx-int4"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qkit.json").write_text(json.dumps({"base": chosen}))
    assert said in model_card.render(run, "onnx-int4")


def test_figures_of_other_weights_are_not_quoted(tmp_path: Path) -> None:
    """A model that was merged again has not been measured, whatever verify and bench said of the one before."""
    run = open_sample(tmp_path)
    assert "| merged |" in model_card.render(run)
    manifest = run.manifest()
    merged = next(name for name in manifest["stages"]["merge"]["outputs"])
    manifest["stages"]["merge"]["outputs"][merged]["sha256"] = 64 * "f"
    edit(run, "run.json", **manifest)
    text = model_card.render(run)
    assert "| merged |" not in text and "| adapter |" in text and "| onnx-int4 |" in text


def test_a_hub_id_may_hold_dots(tmp_path: Path) -> None:
    run = changed(open_sample(tmp_path), model={"source": "org/model-2.5-7B"})
    assert front(model_card.render(run))["base_model"] == "org/model-2.5-7B"


def test_evidence_is_that_of_the_run(tmp_path: Path) -> None:
    text = model_card.render(open_sample(tmp_path))
    assert "**exact call match: 0 → 52 of 100 (95 % interval 42–62)**" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    int4 = next(row for row in rows if row[0] == "onnx-int4")
    assert int4 == ["onnx-int4", "47.0", "37–57", "100", "0.1934", "0.0271", "0.4830", "98.0 %", "all tokens"]
    vllm = next(row for row in rows if row[:3] == ["vllm", "vllm", "8"])
    assert vllm[3:] == ["402 / 643", "57.1 / 69.7", "2,172 / 2,824", "122.3", "1.42 GiB", "257 MiB"]
    assert next(row for row in rows if row[0] == "train")[1:] == ["4 min 43 s", "1.52 GiB", "1.70 GiB", "rss"]


def test_provenance_names_the_weights(tmp_path: Path) -> None:
    manifest = json.loads((SAMPLE / "run.json").read_text(encoding="utf-8"))
    text = model_card.render(open_sample(tmp_path))
    wanted = [manifest["recipe_sha256"], manifest["environment"]["git"]]
    wanted += [
        o["sha256"] for stage in ("data", "train", "merge") for o in manifest["stages"][stage]["outputs"].values()
    ]
    assert not [digest for digest in wanted if digest not in text]


def test_tables_are_whole(tmp_path: Path) -> None:
    """Every table row has as many cells as the row above it."""
    lines = model_card.render(open_sample(tmp_path)).splitlines()
    cells = [len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else None for line in lines]
    assert not [b for a, b in pairwise(cells) if a is not None and b is not None and a != b]


@pytest.mark.parametrize("system", [None, 'It\'s "one" call\nin JSON | only.'])
def test_the_commands_can_be_pasted(tmp_path: Path, system: str | None) -> None:
    run = changed(open_sample(tmp_path), data={"system": system}, serve={"port": 0})
    text = model_card.render(run)
    ast.parse(code(text, "python"))
    curl = shlex.split(code(text, "sh").split("\n", 1)[1])
    body = json.loads(curl[-1])
    assert (curl[0], curl[1]) == ("curl", "http://127.0.0.1:8000/v1/chat/completions")
    assert body["model"] == "tiny-calls"
    assert [m["content"] for m in body["messages"] if m["role"] == "system"] == ([system] if system else [])


@pytest.mark.parametrize("absent", FILES)
def test_a_file_may_be_absent(tmp_path: Path, absent: str) -> None:
    text = model_card.render(open_sample(tmp_path, without=absent))
    assert "None" not in text


def test_a_new_run_has_a_card_that_claims_nothing(tmp_path: Path) -> None:
    text = model_card.render(open_sample(tmp_path, only_recipe=True))
    assert "Scores and distances have not been measured yet." in text
    assert "Latency and throughput have not been measured yet." in text
    assert "Quality has not been measured yet." in text
    assert "None" not in text


def test_the_card_goes_to_the_merged_model_and_the_served_one(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    with pytest.raises(MissingArtifact, match="qkit merge"):
        model_card.write(run)
    run.folder("merge").mkdir()
    model_card.write(run)
    assert not run.folder("export").exists()
    (run.folder("export") / "vllm").mkdir(parents=True)
    model_card.write(run)
    cards = [run.folder("merge") / "README.md", run.folder("export") / "vllm" / "README.md"]
    assert [card.read_text(encoding="utf-8") for card in cards] == [
        model_card.render(run),
        model_card.render(run, "vllm"),
    ]
    assert [path.name for path in run.folder("merge").iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("export", "library", "used"),
    [
        ("safetensors", "transformers", "from_pretrained(folder)"),
        ("vllm-w8a8", "transformers", "from_pretrained(folder)"),
        ("vllm-adapter", "peft", "--enable-lora --max-lora-rank"),
        ("gguf-q8_0", "gguf", "ollama create"),
        ("onnx-int4", "onnx", "onnxruntime_genai.Model"),
    ],
)
def test_an_export_is_used_as_what_it_is(tmp_path: Path, export: str, library: str, used: str) -> None:
    text = model_card.render(open_sample(tmp_path), export)
    assert front(text)["library_name"] == library and f"export `{export}`" in text
    assert used in text.partition("## Use")[2].partition("## Limits")[0]
    assert (front(text)["base_model_relation"] == "adapter") is (export == "vllm-adapter")
    if library in ("transformers", "onnx"):
        ast.parse(code(text, "python"))


def noted(run: Run, export: str, **keys: Any) -> str:
    (run.folder("export") / export).mkdir(parents=True, exist_ok=True)
    (run.folder("export") / export / "qkit.json").write_text(json.dumps(keys))
    return model_card.render(run, export)


def test_the_card_says_how_many_rows_llama_cpp_reads_otherwise(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    found = {"rows": 400, "differ": 10, "first": "caf\u00e9 `x`", "because": ["the normalizer NFC"]}
    text = noted(run, "gguf-f16", served_otherwise=found, unstopped=[7])
    assert (
        "llama.cpp reads 2.5 % of 400 training rows in other tokens than they were trained on (the normalizer NFC)"
        in text
    )
    assert "does not stop at the tokens 7" in text
    text = noted(run, "gguf-f16", served_otherwise={"rows": 0, "differ": 0, "because": ["the normalizer NFC"]})
    assert "leaves out what this tokenizer does to texts (the normalizer NFC)" in text
    text = noted(run, "gguf-f16", served_otherwise={"rows": 400, "differ": 0}, unstopped=[])
    assert "reads 400 training rows in the tokens that they were trained on" in text and "does not stop" not in text


def test_what_was_measured_with_another_runtime_is_said_beside_the_figure(tmp_path: Path) -> None:
    from rich.console import Console

    from qkit.report import screen, summary
    from qkit.report import stage as report_stage

    run = open_sample(tmp_path)
    distances = {
        "kl_mean": 0.0025,
        "kl_p99": 0.1,
        "top1": 0.99,
        "status": "passed",
        "failed": [],
        "tokens": 9,
        "over": "all",
    }
    parity = json.loads((run.folder("verify") / "parity.json").read_text())["parity"]
    edit(run, "verify/parity.json", parity={**parity, "gguf-q8_0": distances, "gguf-q4_0": distances})
    for said in (model_card.render(run), report_stage.page(run)):
        assert "0.0071 in llama.cpp" in said and "Q4_K_M" in said
    assert {name for name, _ in summary.remarks(summary.summary(run))} == {"gguf-q8_0", "gguf-q4_0"}
    drawn = Console(width=80, record=True, file=io.StringIO())
    drawn.print(screen.screen(summary.summary(run)))
    assert "and 0.0071 in llama.cpp" in " ".join(drawn.export_text().split())
