"""What is trained on a base model: where adapters go (targets.py), weighted sums of several (sums.py), bottleneck adapters (bottleneck/), and
which modules of a model are new (new_heads.py). Imported by loading, planning, training and merging.
"""
