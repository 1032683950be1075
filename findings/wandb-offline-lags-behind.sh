#!/usr/bin/env bash
# wandb, offline, has nothing on the disk of what was logged 8 seconds before its process is killed.
#
# Versions: wandb 0.31.0. Date: 2026-11-29.
#
# What happens: a process logs 3 figures offline, waits 8 seconds, and is killed (SIGKILL). The file of the run has 7 bytes, its header: neither
# the figures nor the settings. wandb's own process, which should write them, sees that its parent is gone and ends at once. Of 30 figures
# that were logged 15 seconds before, some are there.
#
# The guess before it was run: a process of its own is there so that what was logged survives the training's death.
#
# Fails if the file has more than its header.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet wandb==0.31.0
"$work/venv/bin/python" - "$work" >"$work/log" 2>&1 <<'PYTHON' || true
import os
import signal
import sys
import time

import wandb

run = wandb.init(project="p", mode="offline", dir=sys.argv[1])
for step in range(3):
    run.log({"loss": 1 / (step + 1)})
time.sleep(8)
os.kill(os.getpid(), signal.SIGKILL)
PYTHON
sleep 2
file=$(find "$work/wandb" -name '*.wandb')
size=$(stat --format %s "$file")
echo "$size bytes"
[ "$size" -eq 7 ] || { cat "$work/log"; echo "the behaviour has changed"; exit 1; }
