"""What is trained on a base model: where adapters go (targets.py), weighted sums of several (sums.py), bottleneck adapters (bottleneck/),
which modules of a model are new (new_heads.py), and what a recipe's method makes of a model (methods.py). Imported by loading, planning,
training and merging.
"""
