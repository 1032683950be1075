"""The report stage: a run's figures as one document, one screen, one page; and the model card.

In: every other stage's folder. Out: RUN/report/index.html. Start with summary.py, which is the public JSON of `qkit show`.
"""
