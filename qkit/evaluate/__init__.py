"""The evaluate stage: did training help? Base and adapter answer the held-out rows, and score their true answers.

In: RUN/data/test.parquet, RUN/train/adapter. Out: RUN/evaluate/ with scores.json and predictions.jsonl. Start with stage.py.
"""
