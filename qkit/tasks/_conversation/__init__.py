"""What tasks on conversations share: formats of data, turns, tokens and labels, and the checks of each row.

One row goes through formats.py (record -> example), encode.py (example -> token ids and labels) and checks.py. Start with formats.py.
"""
