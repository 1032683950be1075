"""How to use a model with labels, as Markdown for its card."""

from __future__ import annotations

from qkit.plugins.task import ModelHead
from qkit.recipe.schema import Recipe

PIPELINE = """```python
from transformers import pipeline

label = pipeline("{tag}", model=".", truncation=True, max_length={limit})  # the folder of this file
print(label("A text as in the training data."))
```"""
ONNX = """With ONNX Runtime; `labels.json` has the names of the labels:

```python
import json

import numpy
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("model.onnx")  # beside this file
tokenizer = AutoTokenizer.from_pretrained(".")
batch = tokenizer(["A text as in the training data."], padding=True, truncation=True, max_length={limit}, return_tensors="np")
wanted = [node.name for node in session.get_inputs()]
logits = session.run(["logits"], {{name: batch[name].astype("int64") for name in wanted}})[0]
names = json.load(open("labels.json"))["names"]
print([names[best] for best in logits.argmax(-1)])
```"""


def usage(library: str, head: ModelHead, recipe: Recipe) -> str:
    """The section of the card for a folder that `library` loads: transformers, or onnx."""
    return (ONNX if library == "onnx" else PIPELINE).format(tag=head.pipeline_tag, limit=recipe.data.max_length)
