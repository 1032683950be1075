"""What the ONNX format needs: graphs traced by transformers, and matrices rounded anew by GPTQ. Start with requantize.py."""
