"""A head on whole texts, run by torch in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.core.device import released
from qkit.core.memory_meter import PeakMeter
from qkit.plugins.runtime import ENCODER_TOKENS, Encodes, TextRow, joined
from qkit.tasks._encoder.collate import padded
from qkit.tasks._encoder.tagging import transitions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

WINDOW = 4096  # rows that are sorted by length together


class TorchEncoder(Encodes):
    """Logits of a transformers model. `autocast`: compute in bf16 as training does; `batch_tokens`: at most in a pass."""

    def __init__(
        self, model: PreTrainedModel, meter: PeakMeter, autocast: bool = False, batch_tokens: int = ENCODER_TOKENS
    ):
        self.model = model
        self.batch_tokens = batch_tokens
        self.meter = meter
        self.autocast = autocast

    def logits(self, rows: Sequence[TextRow]) -> Iterator[NDArray[np.float32]]:
        for begin in range(0, len(rows), WINDOW):
            window = rows[begin : begin + WINDOW]
            order = sorted(range(len(window)), key=lambda index: len(window[index].input_ids))
            results: list[NDArray[np.float32] | None] = [None] * len(window)
            for batch in within_budget((len(window[index].input_ids) for index in order), self.batch_tokens):
                places = [order[place] for place in batch]
                for index, values in zip(places, self._forward([window[index] for index in places]), strict=True):
                    results[index] = values
            yield from (values for values in results if values is not None)

    def _forward(self, rows: Sequence[TextRow]) -> Iterator[NDArray[np.float32]]:
        import torch

        device = self.model.device
        batch = padded([vars(row) for row in rows], self.model.config.pad_token_id or 0)
        casting: Any = torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()
        with torch.inference_mode(), casting:
            outputs = self.model(**{name: tensor.to(device) for name, tensor in batch.items()})
            logits = joined(outputs, torch.stack).float().cpu().numpy()
        for row, values in zip(rows, logits, strict=True):
            yield values[: len(row.input_ids)] if values.ndim > 1 else values

    def transitions(self) -> Mapping[str, NDArray[np.float32]] | None:
        return transitions.of(self.model)

    def memory_bytes(self) -> int:
        return self.meter.peak_bytes()

    def close(self) -> None:
        with released():
            del self.model
