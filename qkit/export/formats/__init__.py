"""The exporters: one module each, named as the first part of a format in a recipe's export.formats. The contract is in plugins/exporter.py.

`onnx-int4` is the variant `int4` of onnx.py. In: the merged folder. Out: the complete folder of one format. No exporter imports another.
"""
