#!/usr/bin/env bash
# A process that continues a run of trackio deletes the run's settings.
#
# Versions: trackio 0.43.0. Date: 2026-11-29.
#
# What happens: one process gives a run its settings (learning rate, rank), another continues it with resume="allow", adds a figure, and has
# one setting of its own, or none. Afterwards the run has the settings of the second process only. The figures of both are there.
#
# The guess before it was run: as with wandb, whose names trackio's functions have, settings are merged, and those of the first process stay.
#
# Fails if the first process's settings are still there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet trackio==0.43.0
export TRACKIO_DIR="$work/runs"
for config in '{"learning_rate": 0.1, "rank": 16}' '{"note": "evaluated"}'; do
  "$work/venv/bin/python" - "$config" >"$work/log" 2>&1 <<'PYTHON' || { cat "$work/log"; exit 1; }
import json
import sys

import trackio

trackio.init(project="p", name="r", resume="allow", config=json.loads(sys.argv[1]), auto_log_cpu=False, auto_log_gpu=False)
trackio.log({"figure": 1})
trackio.finish()
PYTHON
done
"$work/venv/bin/python" - <<'PYTHON'
import sys

import trackio

(run,) = trackio.Api().runs("p")
print(run.config)
if "rank" in run.config or run.config["note"] != "evaluated":
    sys.exit("the behaviour has changed")
PYTHON
