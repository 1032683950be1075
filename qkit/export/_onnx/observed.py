"""What the tensors of a graph hold on given rows: the range of each channel, and some of the vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.export._onnx.matmul_nbits import GRAPH
from qkit.runtimes._onnx_encoder import stacked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]


SAMPLE = 512  # vectors of each tensor that are kept


@dataclass(frozen=True)
class Observed:
    """Of one tensor: the lowest and the highest value of each channel, and a sample [vectors, channels]."""

    low: Array
    high: Array
    sample: Array

    def with_more(self, vectors: Array) -> Observed:
        import numpy as np

        sample = np.concatenate([self.sample, vectors[: SAMPLE - len(self.sample)]])
        return Observed(np.minimum(self.low, vectors.min(0)), np.maximum(self.high, vectors.max(0)), sample)


def observe(folder: Path, names: Sequence[str], rows: Sequence[Mapping[str, Sequence[int]]]) -> Mapping[str, Observed]:
    """Run `folder/model.onnx` on each row alone, so that no padding is observed, and return what the named tensors held."""
    session = _session(folder, names)
    inputs = [node.name for node in session.get_inputs()]
    observed: dict[str, Observed] = {}
    for row in rows:
        feed = {name: values for name, values in stacked([row]).items() if name in inputs}
        for name, values in zip(names, session.run(list(names), feed), strict=True):
            vectors = values.reshape(-1, values.shape[-1])
            before = observed.get(name) or Observed(vectors[0], vectors[0], vectors[:0])
            observed[name] = before.with_more(vectors)
    return observed


def _session(folder: Path, names: Sequence[str]) -> Any:
    """Return a session on the graph whose outputs also are the named tensors."""
    import onnx
    import onnxruntime

    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in present)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
