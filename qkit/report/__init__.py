"""The report stage: the figures of a run as JSON, on a screen and as an HTML page; and the model card.

In: every other stage's folder. Out: RUN/report/index.html. Start with summary.py, which is the public JSON of `qkit show`.
What only one kind of task shows comes from the task as plain data: further.py reads it, section_charts.py draws it.
"""
