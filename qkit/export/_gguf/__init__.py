"""What the GGUF format needs: the tokenizer in llama.cpp's terms, Ollama's Modelfile, and what is lost on the way."""
