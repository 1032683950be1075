"""Models that come as one .gguf file: header, tokenizer, rotary scaling, and llama.cpp's names for how texts are cut.

In: a .gguf file. Out: the same as of a folder of transformers. Start with header.py.
"""
