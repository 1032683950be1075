"""Tasks on conversations: what they have in common.

task.py answers every question of the contract that they answer alike, among them the default gates of artifacts (GATES). A row goes through
formats.py (record -> example), encode.py (example -> token ids and labels), too_long.py (data.max_length) and checks.py; encoder.py opens the
tokenizer and the template for them. Start with task.py.
"""
