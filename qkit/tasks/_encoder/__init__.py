"""Tasks of encoders: models that read a whole text and label it.

task.py answers every question of the contract that they answer alike. A row goes through labelled_text.py (record -> example) and encoder.py
(example -> token ids), collate.py puts rows into batches, kinds.py says what the checks over rows mean. Start with task.py.
"""
