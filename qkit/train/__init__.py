"""The train stage: a LoRA adapter by TRL's SFTTrainer, on the token ids of RUN/data/.

In: RUN/data/train.parquet and the base. Out: RUN/train/ with adapter, checkpoints, metrics, planned and measured memory.
No other stage imports it. Start with stage.py; sft.py makes TRL's objects, trainer.py is our subclass.
"""
