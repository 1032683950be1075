"""GPUs that are often used for training: `qkit plan --card` plans for one that this machine does not have.

`memory_bytes` is the memory that CUDA gives to programs: the smallest "total capacity of ..." that torch reports for the card (drivers and
ECC take 0.3 to 2 GB of the nominal size). Bandwidth and FLOP/s come from the vendor's data sheet or architecture paper, which a comment
names; FLOP/s are bf16 on tensor cores, accumulated in fp32, without sparsity.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from qkit.core.device import Device
from qkit.core.errors import UserError, short

GIB = 2**30
# The share of nvidia-smi's figure that programs get on a card that is not listed; on those below it is 0.98 to 0.99.
UNKNOWN_CARD_SHARE = 0.98
OTHER_MODELS = {"ti", "super", "laptop", "mobile", "max", "mig", "d"}  # suffixes of other cards with a similar name


@dataclass(frozen=True)
class Card:
    """A GPU: usable memory in bytes, bandwidth in bytes/s, dense bf16 FLOP/s (None: no bf16)."""

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
    """The device with the card called `name`.

    Raises:
        UserError: the card is unknown.
    """
    card = CARDS.get(name.lower())
    if card is None:
        close = difflib.get_close_matches(name.lower(), CARDS, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown card {short(repr(name))}{hint}; known cards: {', '.join(CARDS)}")
    return Device("cuda", card.title, card.memory_bytes, cores=1)


def find(device: Device) -> Card | None:
    """The card that a detected GPU is, by the model number in its name and, where two cards share it, by memory; None: unknown or a CPU."""
    words = set(re.split(r"[^a-z0-9]+", device.name.lower()))
    if not device.has_gpu or words & OTHER_MODELS:
        return None
    same = [card for card in CARDS.values() if _word(card) in words]
    nearest = min(same, key=lambda card: abs(card.memory_bytes - device.memory_bytes), default=None)
    # The same name with another size is another card: an A100 slice, an RTX 3060 8GB.
    return nearest if nearest and abs(nearest.memory_bytes / device.memory_bytes - 1) < 0.15 else None


def usable_bytes(device: Device) -> int:
    """Bytes that a program can use on a device. On a GPU this is less than nvidia-smi's figure: the driver keeps some memory."""
    if not device.has_gpu:
        return device.memory_bytes
    card = find(device)
    return min(card.memory_bytes, device.memory_bytes) if card else int(device.memory_bytes * UNKNOWN_CARD_SHARE)


def title(device: Device) -> str:
    """The device's name for messages."""
    card = find(device)
    return card.title if card else device.name.removeprefix("NVIDIA ").removeprefix("GeForce ")


def _word(card: Card) -> str:
    """The word of a device name that identifies the card: rtx-4090 -> 4090, a100-40gb -> a100."""
    parts = card.name.split("-")
    return parts[1] if parts[0] == "rtx" else parts[0]
