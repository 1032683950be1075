"""The train stage: trains a LoRA adapter with TRL's SFTTrainer on the token ids of RUN/data/.

In: RUN/data/train.parquet and the base. Out: RUN/train/ with adapter, checkpoints, metrics, planned and measured memory.
Only qkit/commands and the pipeline import it, never another stage. Start with stage.py; trainers/sft.py builds
TRL's trainer, trainer.py is our subclass of it.
"""
