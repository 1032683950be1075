"""Tasks of encoders: models that read a whole text and label it, or its words.

task.py answers every question of the contract that they answer alike. A row goes through labelled_text.py (record -> example) and encoder.py
(example -> token ids), collate.py puts rows into batches, kinds.py says what the checks over rows mean, label_checks.py what is odd about the
labels of a set. tagging/ has what is particular to labels of words, metrics/ the figures and their intervals, _report/ what a report shows of
them. Start with task.py.
"""
