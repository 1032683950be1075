"""The ground: errors, files, devices, processes, the network, figures. It knows nothing of language models.

In and out: plain values and files. Everything may import it; it imports nothing else of qkit. Start with errors.py and files.py.
"""
