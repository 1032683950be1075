"""Parts of the ONNX exporter: the programs that make graphs (builder.py, trace.py), and GPTQ for their matrices (requantize.py)."""
