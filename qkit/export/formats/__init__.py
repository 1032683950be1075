"""Formats of export: one file each, whose name is what a recipe's export.formats begins with. The contract is plugins/exporter.py.

`onnx-int4` is onnx.py, its variant `int4`. In: the merged folder. Out: the folder of one format, whole. No format imports another.
"""
