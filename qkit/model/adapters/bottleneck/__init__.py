"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2021, He et al. 2022) as a method of PEFT: small networks between frozen modules.

In: a loaded transformers model. Out: what PEFT needs to train, save, load and switch such adapters (tuner.py: `register`), and the modules
that get one (places.py). What an adapter computes is in layer.py, its settings in config.py. Start with places.py and tuner.py.
"""
