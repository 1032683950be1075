#!/usr/bin/env bash
# load_dataset("json") changes integers of more than 64 bits to other integers, where rows hold objects with different keys.
#
# Versions: datasets 5.2.0, pandas 3.1.0, numpy below 2.4, pyarrow as pip chooses it. Date: 2026-11-29.
#
# What happens: rows whose objects have different keys (the arguments of tool calls, say) become a column of the type Json, which is new in
# datasets 5. On the way through it an integer beyond 64 bits comes back as what is left of it in 64 bits: 1234567890123456789012 as
# 17082781258626382356, -18446744073709551617 as -1. No error, no warning; the wrong number is in the table itself, not only in what is read
# from it.
#
# The guess before it was run: Json keeps the text of an object, so every digit lasts; at worst such a number becomes a float or an error.
#
# Fails if the numbers come back right, or as an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 "numpy<2.4" pandas==3.1.0
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import json
import sys
from pathlib import Path

from datasets import load_dataset

file = Path(sys.argv[1]) / "rows.jsonl"
arguments = [{"account": 1234567890123456789012}, {"city": "Oslo"}, {"account": -18446744073709551617}]
file.write_text("".join(json.dumps({"name": "f", "arguments": one}) + "\n" for one in arguments))
read = load_dataset("json", data_files=str(file), split="train")
print(read.features)
for wrote, row in zip(arguments, read):
    print(f"{json.dumps(wrote)} -> {json.dumps(row['arguments'])}")
print(f"in the table: {read.data.column('arguments')[0]}")
found = [row["arguments"].get("account") for row in read]
if found != [17082781258626382356, None, -1]:
    sys.exit("the behaviour has changed")
PYTHON
cat "$work/log" >&2
