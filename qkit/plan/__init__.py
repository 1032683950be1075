"""Whether it fits, before anything is loaded: bytes of every part at the peak of every stage, time, and what would make it fit.

In: a recipe, a `Shape`, a device. Out: a `Plan` and its remedies. Start with plan.py; train_step.py and stage_memory.py do the sums.
"""
