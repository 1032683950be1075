"""Classification as a practitioner writes it: the Trainer of transformers with its own collator and batches. Prints one line of JSON.

python benchmarks/plain_trainer.py MODEL_FOLDER train.csv test.csv --rows-per-class 10 --seed 1
"""

import argparse
import csv
import json
import random
import resource
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer
from transformers import TrainingArguments as Arguments


def read(file, text, label, per_class=None, seed=0):
    with Path(file).open(encoding="utf-8", newline="") as source:
        rows = [(row[text], row[label]) for row in csv.DictReader(source)]
    random.Random(seed).shuffle(rows)
    classes = {}
    for row in rows:
        classes.setdefault(row[1], []).append(row)
    return [row for name in sorted(classes) for row in classes[name][:per_class]]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("files", nargs=3, metavar=("MODEL", "TRAIN", "TEST"))
parser.add_argument("--columns", nargs=2, metavar=("TEXT", "LABEL"), default=["text", "category"])
for option, kind, default in (("rows-per-class", int, None), ("epochs", float, 3), ("learning-rate", float, 5e-4)):
    parser.add_argument(f"--{option}", type=kind, default=default)
for option, default in (("seed", 1), ("batch", 32)):
    parser.add_argument(f"--{option}", type=int, default=default)
given = parser.parse_args()
train = read(given.files[1], *given.columns, given.rows_per_class, given.seed)
test = read(given.files[2], *given.columns)
labels = {name: number for number, name in enumerate(sorted({label for _, label in train}))}
torch.manual_seed(given.seed)
tokenizer = AutoTokenizer.from_pretrained(given.files[0])
model = AutoModelForSequenceClassification.from_pretrained(given.files[0], num_labels=len(labels), dtype=torch.float32)
train, test = (
    [{**tokenizer(text, truncation=True, max_length=256), "labels": labels[label]} for text, label in rows]
    for rows in (train, test)
)
sizes = {"per_device_train_batch_size": given.batch, "per_device_eval_batch_size": given.batch}
schedule = {"learning_rate": given.learning_rate, "num_train_epochs": given.epochs, "weight_decay": 0.01}
quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "output_dir": "plain_trainer"}
trainer = Trainer(
    model, Arguments(**sizes, **schedule, **quiet, seed=given.seed), DataCollatorWithPadding(tokenizer), train
)
seconds = trainer.train().metrics["train_runtime"]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
right = (trainer.predict(test).predictions.argmax(-1) == [row["labels"] for row in test]).tolist()
trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
speed = {"seconds": seconds, "rows_per_second": len(train) * given.epochs / seconds}
accuracy = sum(right) / len(right)
print(
    json.dumps({"accuracy": accuracy, **speed, "peak_rss_bytes": peak, "trainable_parameters": trained, "right": right})
)
