"""How to use a model that tags words, as Markdown for its card."""

from __future__ import annotations

from qkit.recipe.schema import Recipe

PIPELINE = """```python
from transformers import pipeline

tag = pipeline("token-classification", model=".", aggregation_strategy="first")  # the folder of this file
print(tag("A sentence as in the training data ."))
```

A word has the tag of its first token, as in training: aggregation_strategy="first" reads it so. The pipeline reads {limit} tokens at most."""
ONNX = """With ONNX Runtime; `labels.json` has the names of the tags:

```python
import json

import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("model.onnx")  # beside this file
tokenizer = AutoTokenizer.from_pretrained(".")
text = "A sentence as in the training data ."
batch = tokenizer([text], return_offsets_mapping=True, truncation=True, max_length={limit}, return_tensors="np")
wanted = [node.name for node in session.get_inputs()]
logits = session.run(["logits"], {{name: batch[name].astype("int64") for name in wanted}})[0]
names = json.load(open("labels.json"))["names"]
for (begin, end), best in zip(batch["offset_mapping"][0], logits[0].argmax(-1)):
    print(text[begin:end], names[best])  # a word has the tag of its first token
```"""
CRF = """
The model was trained with a CRF, whose scores of neighbouring tags are {place}. qkit uses them, and gives valid sequences of tags only. What
is shown above ignores them: it takes the most likely tag of each token alone."""


def usage(library: str, recipe: Recipe) -> str:
    """The section of the card for a folder that `library` loads: transformers, or onnx."""
    text = (ONNX if library == "onnx" else PIPELINE).format(limit=recipe.data.max_length)
    if recipe.loss.name != "crf":
        return text
    place = "in `transitions.json`" if library == "onnx" else "among its weights, as crf.pairs, crf.start and crf.end"
    return f"{text}\n{CRF.format(place=place)}"
