"""The streaming merge of a 7B: memory and speed, beside a plain copy of the same files on the same disk.

    python benchmarks/merge_7b.py /big/disk --layers 32

Mistral-7B's shape in bf16 with random weights (one random block, repeated: values do not matter, and drawing 7 billion takes minutes), an
adapter of rank 16 on all linears. The merge runs in a process of its own; memory is its resident set over what Python and its imports hold,
and mapped files count. Needs three times 14.5 GB of disk; everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qkit.core.device import detect
from qkit.core.memory_meter import PeakMeter
from qkit.merging import weights
from qkit.recipe import schema
from qkit.recipe.schema import Merge, Quantization
from qkit.run.environment import environment
from qkit.tensors.shards import TensorFile

HIDDEN, WIDE, KEYS, VOCABULARY, RANK = 4096, 14336, 1024, 32000, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
BUFFER_BYTES = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("disk", type=Path, help="where there is room")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", choices=["dequantized", "16bit"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.child:
        print(json.dumps(_merge(given.disk, given.child)))
        return
    with tempfile.TemporaryDirectory(dir=given.disk, prefix="merge-7b-") as temporary:
        result = _measured(Path(temporary), given.layers)
    result["command"] = f"python benchmarks/merge_7b.py DISK --layers {given.layers}"
    (given.out / "merge_7b.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=1))


def _measured(work: Path, layers: int) -> dict[str, Any]:
    size = _build(work / "base", layers)
    _adapter(work / "adapter", layers)
    result: dict[str, Any] = {
        "what": "streaming merge of Mistral-7B's shape, bf16, rank 16 on all linears",
        "date": dt.date.today().isoformat(),
        "bytes": size,
        "largest_tensor_bytes": VOCABULARY * HIDDEN * 2,
    }
    result["copy"] = _speed(size, _copied(work))
    for base in ("dequantized", "16bit"):
        command = [sys.executable, __file__, str(work), "--child", base]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        result[base] = {**_speed(size, found.pop("seconds")), **found}
    return {**result, "load_average": os.getloadavg(), "environment": environment(detect().to_dict())}


def _speed(size: int, seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "mb_per_second": size / 1e6 / seconds}


def _copied(work: Path) -> float:
    """Seconds of reading and writing all shards, to the disk and not only to memory."""
    begin = time.perf_counter()
    for shard in sorted((work / "base").glob("*.safetensors")):
        with shard.open("rb") as source, (work / "copy").open("wb") as sink:
            shutil.copyfileobj(source, sink, BUFFER_BYTES)
            os.fsync(sink.fileno())
    (work / "copy").unlink()
    return time.perf_counter() - begin


def _merge(work: Path, base: schema.Base) -> dict[str, float]:
    """One merge in this process: seconds until all is on the disk, CPU seconds, and peak memory over the imports'."""
    import bitsandbytes.functional  # noqa: F401
    import peft  # noqa: F401

    note = {"quantized": _names(work / "base"), "quantization": Quantization().model_dump()}
    held = _resident()
    meter, begin, cpu = PeakMeter(detect()), time.perf_counter(), time.process_time()
    out = work / "merged"
    out.mkdir()
    weights.merge(work / "base", work / "adapter", out, base, Merge(), note)
    for shard in out.glob("*.safetensors"):
        with shard.open("rb+") as file:
            os.fsync(file.fileno())
    seconds, used = time.perf_counter() - begin, time.process_time() - cpu
    shutil.rmtree(out)
    return {"seconds": seconds, "cpu_seconds": used, "peak_bytes": meter.peak_bytes() - held, "imports_bytes": held}


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _names(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    return [f"model.layers.{n}.{linear}.weight" for n in range(config["num_hidden_layers"]) for linear in LINEARS]


def _build(folder: Path, layers: int) -> int:
    """The base: a shard for each four layers, one for embedding, norm and head. Returns its bytes."""
    folder.mkdir()
    config = {"model_type": "mistral", "hidden_size": HIDDEN, "num_hidden_layers": layers, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    ends = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    groups = [list(range(first, min(first + 4, layers))) for first in range(0, layers, 4)]
    shapes = [{f"model.layers.{n}.{name}": shape for n in group for name, shape in LINEARS.items()} for group in groups]
    block = (torch.randn(64, WIDE) * 0.02).bfloat16().reshape(-1)
    for index, found in enumerate([*shapes, ends]):
        specs = {f"{name}.weight": {"dtype": "BF16", "shape": list(shape)} for name, shape in found.items()}
        file = TensorFile(folder / f"model-{index + 1:05d}-of-{len(shapes) + 1:05d}.safetensors", specs)
        for name, spec in specs.items():
            values = torch.Size(spec["shape"]).numel()
            pieces = [len(block)] * (values // len(block)) + [values % len(block)]
            file.write_parts(name, (block[:count] for count in pieces))
        file.close()
    return sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))


def _adapter(folder: Path, layers: int) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pairs = {}
    for number in range(layers):
        for name, (outputs, inputs) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{number}.{name}"
            pairs[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.01
            pairs[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.01
    save_file(pairs, folder / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
