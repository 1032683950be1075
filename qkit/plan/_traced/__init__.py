"""The memory of models with a new head, and of language models that train more than LoRA: a training step is run on tensors without data.

Every tensor that it makes is counted. Encoders differ in what autograd keeps of them, and a formula for each would be wrong for the next.
torch's fake tensors have shapes and storages but no data: a step of a 12-layer BERT takes under a second and no memory, and its tensors are,
to the byte, those of training.

In: a recipe, what the data stage knows, a device. Out: the items of a stage, FLOPs. Start with items.py. head.py reads what the model is,
shapes.py the largest batches, model.py builds the model, kernels.py what the device computes otherwise, step.py counts. language.py has the
loss of a language model, language_items.py the items of its training.
"""
