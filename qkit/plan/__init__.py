"""Whether a recipe fits a device, before anything is loaded: memory by item at the peak of each stage, time, and changes that make it fit.

In: a recipe, a `Shape`, a device. Out: a `Plan` and its remedies. The stages, the pipeline and the command line may import it; it imports
model, plugins, recipe, run and core. Start with plan.py. fixed_memory.py computes
weights, adapter and optimizer state, train_step.py what comes and goes in a training step, stage_memory.py the other stages.
"""
