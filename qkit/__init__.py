"""qkit fine-tunes quantized language models, deploys them, and measures what it claims."""

from __future__ import annotations

__version__ = "0.1.0"
