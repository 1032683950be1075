"""The GPTQ of our onnx-int4 beside GPTQModel's, on the merged model and the training rows of one run.

    qkit run RECIPE --out RUN           # up to merge, with held-out rows
    pip install gptqmodel==7.6.0 torch==2.13.0 transformers==5.19.0      # in an environment of its own: PYTHON
    python benchmarks/gptq.py RUN --gptqmodel PYTHON

Both round the decoder layers' matrices to 4 bits with a scale for 32 weights, from the same calibration rows, and leave the head at 8 bits.
GPTQModel's checkpoint goes through onnxruntime-genai's builder. Of each: seconds and peak memory to make it, bytes, and the distance to the
model as trained on all held-out rows. Writes benchmarks/results/gptq.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.files import write_json
from qkit.export._onnx import genai_config
from qkit.export._onnx.builder import BUILDER, run_program
from qkit.export._onnx.requantize import calibration_rows
from qkit.export.formats import onnx
from qkit.measure import artifacts, held_out, parity, reference
from qkit.plugins.exporter import Job
from qkit.recipe.load import load
from qkit.run.directory import Run
from qkit.run.environment import environment

# Run by the other environment: SOURCE ROWS.json OUT OPTIONS.json
QUANTIZE = """
import json, sys
from gptqmodel import GPTQModel, QuantizeConfig
source, rows, out, options = sys.argv[1:]
model = GPTQModel.load(source, QuantizeConfig(bits=4, group_size=32, **json.loads(options)), device="cpu")
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in json.load(open(rows))], batch_size=1)
model.save(out)
"""
# Its default of one worker on a machine with two cores ends in an error.
WORKERS = {"GPTQMODEL_CPU_WORKERS": "2"}
SETTINGS: dict[str, dict[str, Any]] = {
    "GPTQModel, its defaults (symmetric)": {},
    "GPTQModel, asymmetric": {"sym": False},
    "GPTQModel, asymmetric, search for scales": {"sym": False, "mse": 2.4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--gptqmodel", type=Path, required=True, help="the python of an environment with GPTQModel")
    parser.add_argument("--make", nargs=2, metavar=("HOW", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    run = Run(given.run, load(given.run / "recipe.yaml"))
    if given.make:
        how, out = given.make
        _make(run, how, Path(out), given.gptqmodel)
        return
    rows = [_measured(run, given.gptqmodel, how) for how in ("qkit", *SETTINGS)]
    result = {
        "what": "GPTQ to 4 bits in blocks of 32 for ONNX: seconds and peak to make, bytes, distance to the model as trained",
        "command": "python benchmarks/gptq.py RUN --gptqmodel PYTHON",
        "date": dt.date.today().isoformat(),
        "calibration_tokens": sum(map(len, calibration_rows(run.need("data", "train.parquet")))),
        "rows": rows,
        "environment": environment(detect().to_dict()),
    }
    write_json(given.out / "gptq.json", result)


def _measured(run: Run, python: Path, how: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=run.root.parent) as scratch:
        out, begin = Path(scratch) / "onnx", time.monotonic()
        command = [sys.executable, __file__, str(run.root), "--gptqmodel", str(python), "--make", how, str(out)]
        subprocess.run(command, check=True)
        seconds = time.monotonic() - begin
        artifact = artifacts.Artifact("onnx-int4", out)
        held = held_out.read_held_out(run.need("data", "test.parquet")).rows
        trained = reference.recorded(run, held)
        with artifacts.open_artifact(run, artifact, "verify") as runtime:
            distance = parity.measure(trained, runtime.score(held))
        figures = json.loads((out.parent / "made.json").read_text())
        row = {"how": how, "seconds": seconds, **figures, "disk_bytes": artifact.disk_bytes}
        row |= {
            key: getattr(distance, key) for key in ("kl_mean", "kl_low", "kl_high", "kl_p99", "top1", "heldout_loss")
        }
    print(json.dumps(row), flush=True)
    return row


def _make(run: Run, how: str, out: Path, python: Path) -> None:
    """Make the folder `out`, and note the peak memory of the largest process beside it."""
    merged = run.need("merge", "config.json").parent
    rows = run.need("data", "train.parquet")
    job = Job(merged, merged, merged, rows, run.recipe, out.with_name("log"))
    if how == "qkit":
        onnx.export(job, out, "int4")
    else:
        _with_gptqmodel(job, SETTINGS[how], out, python)
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    write_json(
        out.with_name("made.json"), {"peak_bytes": max(resource.getrusage(part).ru_maxrss for part in who) * 1024}
    )


def _with_gptqmodel(job: Job, settings: dict[str, Any], out: Path, python: Path) -> None:
    calibration, checkpoint = out.with_name("rows.json"), out.with_name("checkpoint")
    write_json(calibration, calibration_rows(job.rows))
    inputs = [str(job.merged), str(calibration), str(checkpoint), json.dumps(settings)]
    with job.log.open("w") as log:
        subprocess.run(
            [python, "-c", QUANTIZE, *inputs], check=True, env={**os.environ, **WORKERS}, stdout=log, stderr=log
        )
    # A folder with GPTQ weights is read with -i only: with -m alone, the builder looks for them in the folder ''.
    places = ["-i", str(checkpoint), "-o", str(out), "-c", str(out.with_name("cache"))]
    options = ["block_size=32", *onnx.BUILDER_OPTIONS_TO_ROUND]
    arguments = [
        "-m",
        "onnxruntime_genai.models.builder",
        *places,
        "-p",
        "int4",
        "-e",
        "cpu",
        "--extra_options",
        *options,
    ]
    run_program(arguments, job.log, out, BUILDER)
    genai_config.complete(job.merged, out)


if __name__ == "__main__":
    main()
