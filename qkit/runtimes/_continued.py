"""One text that grows, in a model of this process: its keys and values stay in the cache, and only new tokens are computed.

A conversation is rendered anew for each turn, and most of it begins as before. `Continuation` keeps the longest beginning that both have,
forgets the rest, and computes what follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from qkit.plugins.runtime import Runtime
from qkit.runtimes._onnx_traced import TracedRuntime
from qkit.runtimes.onnxruntime import OnnxRuntime, _Cache
from qkit.runtimes.transformers import TransformersRuntime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SMALLEST = 256  # tokens that a cache has room for at first; it doubles


class Continuation(ABC):
    """`ids`: what the cache holds; `computed`: how many tokens the model has read so far, in all."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.computed = 0

    def logits_after(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits [vocabulary] of the token after `ids`, of which there is at least one."""
        shared = min(_shared(self.ids, ids), len(ids) - 1)
        self.ids = list(
            ids[: self.keep(shared)]
        )  # so that an interrupt of what follows leaves no token that is not in the cache
        new = ids[len(self.ids) :]
        logits = self.read(new)
        self.ids = list(ids)
        self.computed += len(new)
        return logits

    @abstractmethod
    def keep(self, count: int) -> int:
        """Forget all but the first `count` tokens, or everything where the cache cannot do that; returns how many are left."""

    @abstractmethod
    def read(self, new: Sequence[int]) -> NDArray[np.float32]:
        """The logits [vocabulary] after `ids` and these tokens, which are in the cache from now on."""


def continued(runtime: Runtime, without_adapter: bool = False) -> Continuation:
    """A text in an opened model. `without_adapter`: of the base below its adapter; only `has_adapter` models have one.

    Raises:
        TypeError: the runtime does not compute in this process.
    """
    if isinstance(runtime, TransformersRuntime):
        model: Any = runtime.model
        return _InTransformers(model, model.disable_adapter if without_adapter else nullcontext)
    if isinstance(runtime, OnnxRuntime):
        return _InBuilt(runtime)
    if isinstance(runtime, TracedRuntime):
        return _InTraced(runtime)
    raise TypeError(f"{type(runtime).__name__} does not compute in this process")


def has_adapter(runtime: Runtime) -> bool:
    """Whether the model has an adapter that can be turned off."""
    return isinstance(runtime, TransformersRuntime) and hasattr(runtime.model, "disable_adapter")


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the longest beginning that both have."""
    shortest = min(len(left), len(right))
    if left[:shortest] == right[:shortest]:
        return shortest
    return next(place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)


class _InTransformers(Continuation):
    """A model of transformers. Keys and values are cut where every layer keeps all of them; sliding windows and states of recurrent
    layers have lost what was before, so such a text begins anew when its beginning changes.
    """

    def __init__(self, model: Any, active: Callable[[], AbstractContextManager[Any]]):
        super().__init__()
        self.model = model
        self.active = active
        self.cache: Any = None
        self.whole = True  # the last pass was not interrupted

    def keep(self, count: int) -> int:
        from transformers.cache_utils import DynamicLayer

        if self.cache is not None and all(type(layer) is DynamicLayer for layer in self.cache.layers):
            for layer in self.cache.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys[..., :count, :], layer.values[..., :count, :]
            return count
        if self.cache is not None and self.whole and count == len(self.ids):
            return count
        self.cache = None
        return 0

    def read(self, new: Sequence[int]) -> NDArray[np.float32]:
        import torch
        from transformers import DynamicCache

        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
        self.whole = False
        device, end = self.model.device, len(self.ids) + len(new)
        with torch.inference_mode(), self.active():
            output = self.model(
                input_ids=torch.tensor([list(new)], device=device),
                attention_mask=torch.ones(1, end, dtype=torch.long, device=device),
                position_ids=torch.arange(len(self.ids), end, device=device)[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits: NDArray[np.float32] = output.logits[0, -1].float().cpu().numpy()
        self.whole = True
        return logits


class _InBuilt(Continuation):
    """A graph of onnxruntime-genai's builder: it writes keys and values where they belong, and reads no further than it is told."""

    def __init__(self, runtime: OnnxRuntime):
        super().__init__()
        self.model = runtime.model
        self.room = 0
        self.cache: Any = None
        self.binding: Any = None

    def keep(self, count: int) -> int:
        return count

    def read(self, new: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        past = len(self.ids)
        self._make_room(past + len(new))
        last = np.array([[0, len(new) - 1]], np.int64)
        counts = np.array([past], np.int64), np.array([len(new)], np.int64)
        logits = self.model.run(self.binding, np.array([new], np.int64), *counts, last)
        return np.asarray(logits[0], np.float32)

    def _make_room(self, tokens: int) -> None:
        if tokens <= self.room:
            return
        room = max(SMALLEST, self.room)
        while room < tokens:
            room *= 2
        larger = _Cache(self.model, 1, room)
        for name, array in self.cache.arrays.items() if self.cache else ():
            larger.arrays[name][:, :, : self.room] = array
        self.cache, self.room, self.binding = larger, room, larger.binding(0, 1)


class _InTraced(Continuation):
    """A traced graph: each pass returns the cache of the next."""

    def __init__(self, runtime: TracedRuntime):
        super().__init__()
        self.runtime = runtime
        self.cache = runtime._empty(1)

    def keep(self, count: int) -> int:
        self.cache = {name: array[:, :, :count] for name, array in self.cache.items()}
        return count

    def read(self, new: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        mask = np.ones((1, len(self.ids) + len(new)), np.int64)
        last = np.array([[0, len(new) - 1]], np.int64)
        logits, self.cache = self.runtime._run(np.array([new], np.int64), mask, self.cache, last)
        return np.asarray(logits[0], np.float32)
