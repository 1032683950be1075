"""What opens an artifact: one file for each runtime, whose name is what recipes call it. The contract is plugins/runtime.py.

In: an artifact's folder. Out: a `Runtime` that generates, scores and tells its memory. No runtime imports another. Start with transformers.py.
"""
