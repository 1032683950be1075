"""What the vLLM format needs: compressed-tensors by rounding to nearest, and llm-compressor in an environment of its own."""
