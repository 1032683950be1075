"""Tensors in files: safetensors read and written a piece at a time, an adapter's change of each, the NF4 round trip.

In: folders of weights. Out: numpy or torch arrays, one tensor at a time. It knows no architectures. Start with shards.py.
"""
