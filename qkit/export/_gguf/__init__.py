"""Parts of the GGUF exporter: the tokenizer in llama.cpp's terms, Ollama's Modelfile, and a comparison of tokens with training."""
