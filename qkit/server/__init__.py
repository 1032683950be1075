"""Servers of the OpenAI API: how they are started, watched, queried and drained; and qkit's own server for ONNX models.

In: a command line. Out: a running server, or the reason why it does not run. vLLM is started as a program and never imported.
The serve, verify and bench stages and the runtimes use it. Start with process.py; client.py sends requests, admission.py admits them, and
onnx_app.py is the ONNX server.
"""
