"""Cards that are often trained on: a plan can be made for one without having it.

`memory_bytes` is what CUDA hands to programs, the least that torch's "total capacity of ..." reports for the card
(drivers and ECC take 0.3 to 2 GB of the nominal size). Bandwidth and arithmetic come from the vendor's data sheet or
architecture paper named beside each; arithmetic is bf16 on tensor cores, accumulated in fp32, without sparsity.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from qkit.core.device import Device
from qkit.core.errors import UserError, short

GIB = 2**30
UNKNOWN_CARD_SHARE = (
    0.98  # of what nvidia-smi reports, for cards that are not below; it was 0.98 to 0.99 on those that are
)
OTHER_MODELS = {"ti", "super", "laptop", "mobile", "max", "mig", "d"}  # words that make it another card of like name


@dataclass(frozen=True)
class Card:
    """A GPU: usable memory in bytes, bandwidth in bytes/s, dense bf16 in FLOP/s (None: it has no bf16)."""

    name: str
    title: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float | None


def _card(name: str, title: str, gib: float, gb_per_second: float, tflops: float | None) -> Card:
    return Card(name, title, int(gib * GIB), gb_per_second * 1e9, None if tflops is None else tflops * 1e12)


CARDS = {
    card.name: card
    for card in (
        _card("rtx-3060-12gb", "RTX 3060 12GB", 11.6, 360, 25.5),  # GA102 paper's rate x 3,584 cores at 1.78 GHz
        _card("rtx-3090", "RTX 3090", 23.5, 936, 71),  # Ampere GA102 architecture paper
        _card("rtx-4060", "RTX 4060", 7.6, 272, 30.2),  # Ada paper's rate x 3,072 cores at 2.46 GHz
        _card("rtx-4070", "RTX 4070", 11.6, 504, 58.3),  # Ada paper's rate x 5,888 cores at 2.48 GHz
        _card("rtx-4080", "RTX 4080", 15.5, 717, 97.5),  # Ada architecture paper
        _card("rtx-4090", "RTX 4090", 23.5, 1008, 165.2),  # Ada architecture paper
        _card("rtx-5090", "RTX 5090", 31.3, 1792, 209.5),  # RTX Blackwell architecture paper
        _card("t4", "T4", 14.5, 300, None),  # data sheet; tensor cores for fp16 only (65 TFLOP/s)
        _card("a10g", "A10G", 21.9, 600, 70),  # data sheet
        _card("l4", "L4", 21.9, 300, 121),  # data sheet, half of the figure with sparsity
        _card("rtx-a6000", "RTX A6000", 47.4, 768, 154.8),  # Ampere GA102 architecture paper
        _card("l40s", "L40S", 44.3, 864, 362),  # data sheet
        _card("a100-40gb", "A100 40GB", 39.3, 1555, 312),  # data sheet
        _card("a100-80gb", "A100 80GB", 79.1, 1935, 312),  # data sheet, PCIe (SXM: 2,039 GB/s)
        _card("h100", "H100", 79.1, 3350, 989),  # data sheet, SXM, half of the figure with sparsity
        _card("h200", "H200", 139.7, 4800, 989),  # data sheet, SXM, half of the figure with sparsity
    )
}


def device(name: str) -> Device:
    """A device to plan for, by a card's name.

    Raises:
        UserError: no such card is known.
    """
    card = CARDS.get(name.lower())
    if card is None:
        close = difflib.get_close_matches(name.lower(), CARDS, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown card {short(repr(name))}{hint}; there are: {', '.join(CARDS)}")
    return Device("cuda", card.title, card.memory_bytes, cores=1)


def find(seen: Device) -> Card | None:
    """The card that a detected GPU is: by the word in its name, and by memory where one word means two cards."""
    words = set(re.split(r"[^a-z0-9]+", seen.name.lower()))
    if seen.meter == "rss" or words & OTHER_MODELS:
        return None
    same = [card for card in CARDS.values() if _word(card) in words]
    nearest = min(same, key=lambda card: abs(card.memory_bytes - seen.memory_bytes), default=None)
    # A card of like name and another size (A100 slices, RTX 3060 8GB) is another card.
    return nearest if nearest and abs(nearest.memory_bytes / seen.memory_bytes - 1) < 0.15 else None


def usable_bytes(seen: Device) -> int:
    """Bytes that a program can have on a device: of nvidia-smi's figure, the driver keeps a part for itself."""
    if seen.meter == "rss":
        return seen.memory_bytes
    card = find(seen)
    return min(card.memory_bytes, seen.memory_bytes) if card else int(seen.memory_bytes * UNKNOWN_CARD_SHARE)


def title(seen: Device) -> str:
    """What to call a device in a message."""
    card = find(seen)
    return card.title if card else seen.name.removeprefix("NVIDIA ").removeprefix("GeForce ")


def _word(card: Card) -> str:
    """The word of a device name that says which card it is: rtx-4090 -> 4090, a100-40gb -> a100."""
    parts = card.name.split("-")
    return parts[1] if parts[0] == "rtx" else parts[0]
