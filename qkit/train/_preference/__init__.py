"""Training on pairs of answers: the losses, the log-probabilities of the reference, and the trainer.

In: pairs as collate_pairs batches them. Out: one loss for each pair. Start with losses.py.
"""
