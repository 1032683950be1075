"""The parts of a server: one process of it, its clients, its adapters; and qkit's own servers of ONNX models, for text and for labels.

In: a command line. Out: a running server, or the reason why it does not run. vLLM is started as a program and never imported.
The serve, verify and bench stages and the runtimes use it; a server's life from start to restart is in serve/lifecycle.py. Start with
process.py (one process); client.py sends requests, admission.py admits them (qkit/admission.py is its old address), lora.py knows which
adapters vLLM can load, adapters.py loads them into a running server, onnx_app.py is the ONNX server,
labels/ the one for labels; both are built on http_app.py.
"""
