"""Whether a recipe fits a device, before anything is loaded: memory by item at the peak of each stage, time, and changes that make it fit.

In: a recipe, a `Shape`, a device. Out: a `Plan` and its remedies. The stages, the pipeline and the command line may import it; it imports
model, plugins, recipe, run and core. Start with plan.py; stage_memory.py, train_step.py and fixed_memory.py compute the items.
"""
