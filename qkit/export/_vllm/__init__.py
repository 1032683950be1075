"""Parts of the vLLM exporter: compressed-tensors rounded to nearest, and llm-compressor in its own environment."""
