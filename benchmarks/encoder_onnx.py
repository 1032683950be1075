"""A fine-tuned classifier in ONNX, fp32 and int8, beside torch: texts per second and distance to fp32.

    python benchmarks/encoder_onnx.py --base MINILM --train train.csv --test test.csv --work DISK

`--base`: the folder of a small BERT; `--train`, `--test`: columns `text` and `category`, such as banking77's. The classifier is trained first,
for two epochs on 4,500 rows with frozen embeddings, and kept in `--work`. Speed: sets of 32 texts of 12 to 25 tokens. All ways take each turn
one after the other, in changing order; a ratio is the median over the turns of two ways' ratio within one turn.

    torch batch         transformers' model on the 32 rows, padded to the longest
    torch pipeline      transformers.pipeline, a text at a time: what a server without batches does, tokens included
    pipeline, clients   the same from 32 threads at once
    as installed        torch.onnx.export, and ONNX Runtime with its defaults, on the padded batch
    its int8            onnxruntime.quantization.quantize_dynamic of that, per channel
    onnx-fp32, onnx-int8 (calibrated), dynamic, per tensor      qkit's, from token ids
    onnx-int8 of texts  the same from texts: tokenizer and softmax included
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from qkit.core.device import detect
from qkit.core.files import make_folder
from qkit.export._onnx.encoder import export_encoder
from qkit.export._onnx.int8 import quantize_int8
from qkit.run.environment import environment
from qkit.runtimes._onnx_encoder import EncoderSession

TRAINED_ROWS, EPOCHS, BATCH, RATE = 4500, 2, 32, 4e-4
SET, SETS = 32, 8
CALIBRATION_ROWS = 256
Work = Callable[[Sequence[str]], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make_folder(given.work)
    model, tokenizer = classifier(given)
    folders = exported(model, tokenizer, given)
    tests = rows_of(given.test)
    texts = [text for text, _ in tests if 12 <= len(tokenizer(text)["input_ids"]) <= 25][: SET * SETS]
    speed = race(
        ways(model, tokenizer, folders), [texts[at : at + SET] for at in range(0, SET * SETS, SET)], given.turns
    )
    write(given, speed, distances(model, tokenizer, folders, tests), folders)


def rows_of(file: Path) -> list[tuple[str, str]]:
    with file.open(encoding="utf-8", newline="") as source:
        return [(row["text"], row["category"]) for row in csv.DictReader(source)]


def classifier(given: argparse.Namespace) -> tuple[Any, Any]:
    """The fine-tuned model and its tokenizer; trained if `--work` has none."""
    folder = given.work / "classifier"
    if not (folder / "config.json").is_file():
        train(given.base, rows_of(given.train), folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def train(base: Path, rows: list[tuple[str, str]], folder: Path) -> None:
    labels = sorted({label for _, label in rows})
    random.Random(0).shuffle(rows)
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **names).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model.base_model.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    steps = EPOCHS * TRAINED_ROWS // BATCH
    for step in range(steps):
        at = step * BATCH % (TRAINED_ROWS - BATCH)
        batch = tokenizer([text for text, _ in rows[at : at + BATCH]], padding=True, return_tensors="pt")
        targets = torch.tensor([names["label2id"][label] for _, label in rows[at : at + BATCH]])
        optimizer.param_groups[0]["lr"] = RATE * min(1, step / 50) * (1 - step / steps)
        model(**batch, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exported(model: Any, tokenizer: Any, given: argparse.Namespace) -> Mapping[str, Path]:
    """The folders of every way in ONNX."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folders = {name: given.work / name.replace(" ", "-") for name in ("as installed", "its int8", "onnx-fp32")}
    folders |= {f"onnx-int8 {name}": given.work / f"onnx-int8-{name}" for name in ("calibrated", "dynamic", "tensor")}
    for folder in folders.values():
        make_folder(folder)
    plain, fp32 = folders["as installed"] / "model.onnx", folders["onnx-fp32"]
    ids = torch.full((3, 7), 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    program = torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=axes, dynamo=True, verbose=False)
    program.save(plain, external_data=False)
    without_shapes(plain)
    quantize_dynamic(plain, folders["its int8"] / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    export_encoder(model, fp32)
    rows = [tokenizer(text) for text, _ in random.Random(1).sample(rows_of(given.train), CALIBRATION_ROWS)]
    quantize_int8(fp32, folders["onnx-int8 calibrated"], rows)
    quantize_int8(fp32, folders["onnx-int8 dynamic"])
    quantize_int8(fp32, folders["onnx-int8 tensor"], per_channel=False)
    return folders


def without_shapes(file: Path) -> None:
    """Remove the shapes of inner tensors: quantize_dynamic fails on those that the exporter leaves."""
    import onnx

    model = onnx.load(str(file))
    del model.graph.value_info[:]
    onnx.save(model, str(file))


def ways(model: Any, tokenizer: Any, folders: Mapping[str, Path]) -> Mapping[str, Work]:
    """What each way does with the texts of a set; tokens are computed beforehand where the way does not count them."""
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    clients = ThreadPoolExecutor(SET)
    sessions = {name: EncoderSession(folder) for name, folder in folders.items() if name.startswith("onnx-")}
    int8 = sessions["onnx-int8 calibrated"]
    ids: dict[str, Any] = {}

    def tokens(texts: Sequence[str]) -> list[Any]:
        return [ids.setdefault(text, tokenizer(text)) if text not in ids else ids[text] for text in texts]

    def batch(texts: Sequence[str]) -> Any:
        key = "\n".join(texts)
        if key not in ids:
            ids[key] = dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
        return ids[key]

    @torch.inference_mode()
    def forward(texts: Sequence[str]) -> Any:
        return model(**batch(texts)).logits

    made: dict[str, Work] = {
        "torch batch": forward,
        "torch pipeline": lambda texts: [pipe(text) for text in texts],
        "pipeline, clients": lambda texts: list(clients.map(pipe, texts)),
        "onnx-int8 of texts": lambda texts: served(int8, tokenizer, texts),
    }
    for name in ("as installed", "its int8"):
        made[name] = defaults(folders[name], batch)
    for name, session in sessions.items():
        made[name] = lambda texts, session=session: list(session.logits(tokens(texts)))
    return made


def defaults(folder: Path, batch: Work) -> Work:
    """ONNX Runtime with its defaults on a padded batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    names = [node.name for node in session.get_inputs()]
    return lambda texts: session.run(None, {name: batch(texts)[name].numpy() for name in names})


def served(session: EncoderSession, tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, float]]:
    """The label and its probability for each text."""
    encoded = tokenizer(list(texts))
    rows = [{"input_ids": ids} for ids in encoded["input_ids"]]
    answers = []
    for outputs in session.logits(rows):
        odds = np.exp(outputs["logits"] - outputs["logits"].max())
        answers.append((int(odds.argmax()), float(odds.max() / odds.sum())))
    return answers


def race(works: Mapping[str, Work], sets: Sequence[Sequence[str]], turns: int) -> dict[str, list[float]]:
    """Seconds for a text, of each way in each turn."""
    for work in works.values():
        for texts in sets:
            work(texts)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns):
        for name in random.Random(turn).sample(list(works), len(works)):
            begin = time.perf_counter()
            for texts in sets:
                works[name](texts)
            seconds[name].append((time.perf_counter() - begin) / sum(map(len, sets)))
    return seconds


def distances(
    model: Any, tokenizer: Any, folders: Mapping[str, Path], tests: Sequence[tuple[str, str]]
) -> Mapping[str, Mapping[str, float]]:
    """Of each format over all test rows: mean KL divergence from torch in nats, the same label, accuracy, bytes."""
    rows = [tokenizer(text) for text, _ in tests]
    truth = np.array([model.config.label2id[label] for _, label in tests])
    with torch.inference_mode():
        exact = [model(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits[0].numpy() for row in rows]
    reference, measured = log_softmax(np.array(exact)), {}
    for name in folders:
        if not name.startswith("onnx-"):
            continue
        found = np.array([outputs["logits"] for outputs in EncoderSession(folders[name]).logits(rows)])
        other = log_softmax(found)
        measured[name] = {
            "kl_mean": float((np.exp(reference) * (reference - other)).sum(-1).mean()),
            "same_label": float((reference.argmax(-1) == other.argmax(-1)).mean()),
            "accuracy": float((other.argmax(-1) == truth).mean()),
            "furthest_logit": float(np.abs(found - np.array(exact)).max()),
        }
    measured["torch"] = {"accuracy": float((reference.argmax(-1) == truth).mean())}
    return measured


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def write(
    given: argparse.Namespace, seconds: Mapping[str, list[float]], near: Any, folders: Mapping[str, Path]
) -> None:
    def ratios(base: str) -> dict[str, float]:
        return {
            name: median(b / a for a, b in zip(taken, seconds[base], strict=True)) for name, taken in seconds.items()
        }

    result = {
        "what": f"texts/s of a six-layer BERT of width 384 on sets of {SET} texts of 12 to 25 tokens, and distance to fp32 on the test rows",
        "command": "python benchmarks/encoder_onnx.py --base MINILM --train train.csv --test test.csv --work DISK "
        f"--turns {given.turns}",
        "date": dt.date.today().isoformat(),
        "texts_per_second": {name: 1 / median(taken) for name, taken in seconds.items()},
        "spread": {name: [1 / max(taken), 1 / min(taken)] for name, taken in seconds.items()},
        "times_torch_batch": ratios("torch batch"),
        "times_torch_pipeline": ratios("torch pipeline"),
        "times_as_installed": ratios("as installed"),
        "distance_to_fp32": near,
        "bytes": {name: sum(file.stat().st_size for file in folder.iterdir()) for name, folder in folders.items()},
        "environment": environment(detect().to_dict()),
    }
    (given.out / "encoder_onnx.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shown = {name: value for name, value in result.items() if name not in ("environment", "command", "what")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
