"""A true 7B fine-tuned on this machine: two steps on random 4-bit weights of the real shape, planned and measured line by line.

    python benchmarks/demo_7b.py                  Mistral-7B's shape
    python benchmarks/demo_7b.py llama-3.1-8B     or qwen2.5-7B

Memory and time do not depend on the weights' values, so nothing is downloaded. Needs about 8 GiB free and some minutes.
"""

from __future__ import annotations

import sys
from typing import Any

import memory
from memory_points import large_points

MIB = 2**20


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "mistral-7B"
    points = {point["shape"]: point for point in large_points()}
    if wanted not in points:
        sys.exit(f"no such shape: {wanted}; there are {', '.join(points)}")
    result = points[wanted] | memory.measure(points[wanted])
    result |= memory.planned(result)
    print(_table(result))


def _table(result: dict[str, Any]) -> str:
    planned, alive = result["predicted"], result["tensors_alive"]["items"]
    names = dict.fromkeys([*planned, *alive])
    rows = [f"{name:>16} {planned.get(name, 0) / MIB:10,.1f} {_measured(alive, name):>10}" for name in names]
    peaks = f"{result['predicted_peak_bytes'] / MIB:10,.1f} {result['measured_peak_bytes'] / MIB:10,.1f}"
    return "\n".join(
        [
            f"{result['name']}: {result['two_steps_seconds'] / 2:.0f} s a step",
            f"{'MiB':>16} {'planned':>10} {'measured':>10}",
            *rows,
            f"{'peak':>16} {peaks}   ({result['meter']}; error {result['error']:+.1%})",
        ]
    )


def _measured(alive: dict[str, int], name: str) -> str:
    return f"{alive[name] / MIB:,.1f}" if name in alive else "-"


if __name__ == "__main__":
    main()
