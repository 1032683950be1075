"""Servers of the OpenAI API: started, watched, asked, drained; and our own server for ONNX models.

In: a command line. Out: a server that is up, or why it is not. vLLM is a program that is started, and never imported.
serve, verify and bench use it. Start with process.py; admission.py is the door in front of a server, onnx_app.py a server of ours.
"""
