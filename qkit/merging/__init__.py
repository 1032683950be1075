"""Adapter and base become one folder of weights, a tensor at a time.

In: the folders of base and adapter, the dtype. Out: a model folder (folder.py). The merge stage chooses among such folders by measurement,
and export makes more of them where a format wants another. Start with weights.py.
"""
