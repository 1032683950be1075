"""What a model's folder is: where it comes from, its shape, its tokenizer, and how it is loaded.

In: recipe.model. Out: a folder (source.py), a `Shape` without loading a weight (config.py), a tokenizer, a torch model (load.py).
Imports chat, tensors and what lies below; stages, exporters and runtimes import it. Start with source.py and load.py.
"""
