"""Trainers: one file each, whose name is what a task's TRAINER says. Each offers `build_trainer(run, folder, device, out)`.

In: RUN/data/train.parquet, the base, the task. Out: a transformers Trainer that is ready to run. Start with sft.py.
"""
