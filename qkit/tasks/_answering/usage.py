"""How to use a model that answers questions, as Markdown for its card."""

from __future__ import annotations

from qkit.recipe.schema import Recipe
from qkit.tasks._answering.windows import stride_of

ASKED = """question, context = "Where is the tower?", "The tower is in the old town, near the river."
batch = tokenizer(
    question, context, truncation="only_second", max_length={limit}, stride={stride},
    return_overflowing_tokens=True, return_offsets_mapping=True, padding=True, return_tensors="{tensors}",
)  # several rows, if the context is long
"""
CHOSEN = """best = (float("-inf"), "")
for row in range(len(starts)):
    inside = [place for place, part in enumerate(batch.sequence_ids(row)) if part == 1]
    for first in inside:
        for last in [place for place in inside if first <= place < first + {longest}]:
            score = float(starts[row][first] + ends[row][last])
            begin, end = batch["offset_mapping"][row][first][0], batch["offset_mapping"][row][last][1]
            best = max(best, (score, context[begin:end]))
none = min(float(start[0] + end[0]) for start, end in zip(starts, ends))  # the first token stands for "no answer"
print(best[1], "| no answer is better by", none - best[0])
"""
TRANSFORMERS = """```python
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForQuestionAnswering.from_pretrained(".")  # the folder of this file
{asked}
with torch.no_grad():
    outputs = model(**{{name: batch[name] for name in tokenizer.model_input_names}})
starts, ends = outputs.start_logits, outputs.end_logits
{chosen}```"""
ONNX = """With ONNX Runtime:

```python
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("model.onnx")  # beside this file
tokenizer = AutoTokenizer.from_pretrained(".")
{asked}
feed = {{node.name: batch[node.name].astype("int64") for node in session.get_inputs()}}
starts, ends = session.run(["start_logits", "end_logits"], feed)
{chosen}```"""
NOTE = """

This is what transformers' pipeline for questions did, which version 5 no longer has. Where the training data has questions without an answer,
none is predicted if it is better by more than `tuned.threshold` of the run's `evaluate/scores.json` (0 if it has none).
"""


def usage(library: str, recipe: Recipe) -> str:
    """The section of the card for a folder that `library` loads: transformers, or onnx."""
    text, tensors = (ONNX, "np") if library == "onnx" else (TRANSFORMERS, "pt")
    limit, stride = recipe.data.max_length, stride_of(recipe.data)
    asked = ASKED.format(limit=limit, stride=stride, tensors=tensors)
    return text.format(asked=asked, chosen=CHOSEN.format(longest=recipe.evaluate.max_answer_tokens)) + NOTE
