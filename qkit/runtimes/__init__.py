"""The runtimes, which open an artifact: one module each, named as recipes name the runtime. The contracts are in plugins/runtime.py.

In: an artifact's folder. Out: a `Runtime` that scores and generates. No runtime imports another. Start with transformers.py.
"""
