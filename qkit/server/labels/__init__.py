"""The server of models with labels: texts in, JSON out, with ONNX Runtime in its own process.

requests.py reads requests (of vLLM's /classify, and those of other tasks), engine.py batches the rows that wait, app.py is the program,
program.py starts it. Start with app.py.
"""
