"""qkit fine-tunes quantized language models, deploys them, and measures what it claims."""

__version__ = "0.1.0"
