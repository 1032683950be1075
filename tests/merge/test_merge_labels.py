"""Saved models with labels: used by plain transformers and PEFT they answer as measured; and what `verify` finds in a spoilt one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.tiny_labelled import LABELS, build_model, labelled_run, text
from qkit import pipeline
from qkit.core.errors import ParityFailed
from qkit.measure import gates, label_contract
from qkit.recipe.load import load
from qkit.run.directory import Run

pytestmark = pytest.mark.slow
STAGES = ("data", "train", "evaluate", "merge", "export", "verify")
RATES = {"lora": 1e-2, "full": 3e-3, "head": 3e-2}
KINDS = {"lora": ["bert", "distilbert", "roberta", "llama"], "full": ["bert", "llama"], "head": ["bert"]}
CASES = [(method, kind) for method, kinds in KINDS.items() for kind in kinds]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """Runs through `verify`, one for each method and kind. Not to be changed."""
    finished: dict[tuple[str, str], Run] = {}

    def of(method: str, kind: str) -> Run:
        if (method, kind) not in finished:
            root = tmp_path_factory.mktemp(f"{method}-{kind}")
            sizes = {"distilbert": {}}.get(kind, {"initializer_range": 0.1})
            model = build_model(root / "model", kind, **sizes)
            train = {"max_steps": 60, "learning_rate": RATES[method], "save_steps": 60}
            rows = [{"text": text(i), "pair": text(i + 5), "label": LABELS[i % 3]} for i in range(96)]
            if kind == "llama":
                rows = [{name: row[name] for name in ("text", "label")} for row in rows]
            run = labelled_run(root, model, rows=rows, method=method, train=train)
            for stage in STAGES:
                pipeline.execute(run, stage)
            finished[method, kind] = run
        return finished[method, kind]

    return of


def predictions(run: Run) -> list[dict[str, Any]]:
    lines = (run.folder("evaluate") / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["artifact"] == run.recipe.trained_as]


def held_out(run: Run) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.root.parent / "rows.jsonl").read_text().splitlines()]
    return rows[:24]


def same_answers(run: Run, answers: list[Any], atol: float = 1e-5) -> None:
    expected = predictions(run)
    assert len(answers) == len(expected) == 24
    assert [answer["label"] for answer in answers] == [line["prediction"] for line in expected]
    for answer, line in zip(answers, expected, strict=True):
        assert answer["score"] == pytest.approx(line["confidence"], abs=atol)


def asked(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["text"], **({"text_pair": row["pair"]} if "pair" in row else {})}


# --- plain libraries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_pipeline_answers_as_measured(
    runs: Callable[[str, str], Run], method: str, kind: str, batch_size: int
) -> None:
    run = runs(method, kind)
    label = transformers.pipeline("text-classification", model=str(run.folder("merge")), device="cpu")
    same_answers(run, label([asked(row) for row in held_out(run)], batch_size=batch_size))
    shown = {(line["prediction"], round(line["confidence"], 4)) for line in predictions(run)}
    assert len(shown) > 5  # it is not a constant that is compared


@pytest.mark.parametrize("kind", KINDS["lora"])
def test_an_adapter_loads_in_plain_peft(runs: Callable[[str, str], Run], kind: str) -> None:
    from peft import PeftModel

    run = runs("lora", kind)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(run.recipe.model.source, num_labels=3)
    model = PeftModel.from_pretrained(base, str(run.trained())).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.recipe.model.source)
    names = json.loads((run.trained() / "labels.json").read_text())["names"]
    answers = []
    for row in held_out(run):
        encoded = tokenizer(row["text"], row.get("pair"), return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**encoded).logits.softmax(-1)[0]
        answers.append({"label": names[int(probabilities.argmax())], "score": float(probabilities.max())})
    same_answers(run, answers)


@pytest.mark.parametrize(("method", "kind"), [case for case in CASES if case[0] != "lora"])
def test_a_whole_model_is_a_folder_of_its_own(runs: Callable[[str, str], Run], method: str, kind: str) -> None:
    run = runs(method, kind)
    assert run.trained() == run.folder("train") / "model"
    label = transformers.pipeline("text-classification", model=str(run.trained()), device="cpu")
    same_answers(run, label([asked(row) for row in held_out(run)]))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run.trained(), run.folder("merge")))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_intact_models_pass(runs: Callable[[str, str], Run], method: str, kind: str) -> None:
    run = runs(method, kind)
    parity = json.loads((run.folder("verify") / "parity.json").read_text())
    merged = parity["parity"]["merged"]
    assert (merged["status"], merged["failed"]) == ("passed", [])
    assert [(check["name"], check["status"]) for check in merged["contract"]] == [
        ("tokens", "ok"),
        ("labels", "ok"),
        ("padding", "ok"),
    ]
    scores = json.loads((run.folder("evaluate") / "scores.json").read_text())["scores"]
    right = sum(line["correct"] for line in predictions(run))
    assert scores[run.recipe.trained_as]["score"] == pytest.approx(100 * right / 24)
    assert parity["scores"]["merged"]["score"] == pytest.approx(100 * right / 24)
    assert right == sum(
        line["prediction"] == row["label"] for line, row in zip(predictions(run), held_out(run), strict=True)
    )
    assert scores["majority"]["score"] == pytest.approx(100 / 3)


# --- spoilt ones ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(runs: Callable[[str, str], Run], tmp_path: Path) -> Run:
    run = runs("lora", "bert")
    shutil.copytree(run.root, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    return Run(tmp_path / "run", load(tmp_path / "run" / "recipe.yaml"))


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def swap_names(folder: Path) -> None:
    names = {"0": "fruit", "1": "wood", "2": "tree"}
    change_json(folder / "config.json", id2label=names, label2id={name: int(key) for key, name in names.items()})


def no_names(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("id2label", "label2id")})
    )


def other_words(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["apple"], vocabulary["pear"] = vocabulary["pear"], vocabulary["apple"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def no_types(folder: Path) -> None:
    """The second text of a pair is no longer told from the first: the ids are the same."""
    content = json.loads((folder / "tokenizer.json").read_text())
    for piece in content["post_processor"]["pair"]:
        next(iter(piece.values()))["type_id"] = 0
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "name", "said"),
    [
        (swap_names, "labels", "label 1 is 'tree' in training, 'wood' in config.json"),
        (no_names, "labels", "label 0 is 'fruit' in training, no label in config.json"),
        (
            lambda folder: change_json(folder / "config.json", pad_token_id=2),
            "padding",
            "pad_token_id=2, training padded with 0",
        ),
        (lambda folder: change_json(folder / "config.json", pad_token_id=None), "padding", "pad_token_id=None"),
        (other_words, "tokens", "the ids differ from training"),
        (no_types, "tokens", "the token types differ from training"),
    ],
    ids=["swapped names", "no names", "another padding", "no padding", "another tokenizer", "no token types"],
)
def test_the_contract_finds(copied: Run, spoil: Callable[[Path], None], name: str, said: str) -> None:
    spoil(copied.folder("merge"))
    checks = {check.name: check for check in label_contract.check_folder(copied, copied.folder("merge")).checks}
    assert [key for key, check in checks.items() if check.status != "ok"] == [name]
    assert said in checks[name].detail


def verified(run: Run) -> dict[str, Any]:
    """The entry of the merged model after its files were changed and accepted: the stage merge is recorded anew."""
    manifest = json.loads((run.root / "run.json").read_text())
    outputs = run.root / "merge"
    (run.root / ".work").mkdir(exist_ok=True)
    shutil.copytree(outputs, run.root / ".work" / "merge")
    hashed = run.hash_outputs("merge")
    shutil.rmtree(run.root / ".work" / "merge")
    manifest["stages"]["merge"]["outputs"] = {name: vars(output) for name, output in hashed.items()}
    for name, output in manifest["stages"]["merge"]["outputs"].items():
        output["mtime_ns"] = (run.root / name).stat().st_mtime_ns
    (run.root / "run.json").write_text(json.dumps(manifest))
    from qkit.verify import stage

    out = run.root / ".work" / "verify"
    out.mkdir(parents=True, exist_ok=True)
    stage.run(run, out)
    entry: dict[str, Any] = json.loads((out / "parity.json").read_text())["parity"]["merged"]
    return entry


def test_files_that_were_changed_later_are_refused(copied: Run) -> None:
    from qkit.core.errors import MissingArtifact

    swap_names(copied.folder("merge"))
    with pytest.raises(MissingArtifact):
        pipeline.execute(copied, "verify")


def test_a_wrong_contract_fails_the_gate(copied: Run) -> None:
    swap_names(copied.folder("merge"))
    entry = verified(copied)
    assert entry["status"] == "failed" and [breach["gate"] for breach in entry["failed"]] == ["contract"]
    assert "label 1 is 'tree' in training" in entry["failed"][0]["detail"]


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def swap_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["classifier.weight"] = tensors["classifier.weight"][[1, 0, 2]].contiguous()


def lose_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bert.encoder.layer.1.output.dense.weight"].zero_()


def no_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bert.encoder.layer.0.output.dense.weight"][0, 0] = float("nan")


@pytest.mark.parametrize("change", [swap_rows, lose_a_layer, no_number])
def test_a_broken_merge_fails(copied: Run, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the merge itself goes wrong: every candidate is measured after it was written."""
    from qkit.merge import stage

    write = stage.write_folder

    def broken(run: Run, out: Path, *given: Any, **named: Any) -> None:
        write(run, out, *given, **named)
        damaged(out, change)

    monkeypatch.setattr(stage, "write_folder", broken)
    shutil.rmtree(copied.folder("merge"))
    try:
        pipeline.execute(copied, "merge")
    except ParityFailed:
        return
    pipeline.execute(copied, "export")
    pipeline.execute(copied, "verify")
    with pytest.raises(ParityFailed):
        gates.check(copied)
