"""The stage `train`: recipe -> SFTConfig + LoraConfig -> SFTTrainer -> adapter.

train/adapter/        adapter_model.safetensors, adapter_config.json, and qkit.json: the base it belongs to
train/metrics.jsonl   one line per logged step
train/checkpoints/    the last one; a killed run goes on from it
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import model, plan
from qkit.device import Device, PeakMeter, detect
from qkit.errors import MissingArtifact
from qkit.progress import Bar
from qkit.recipe import Recipe
from qkit.run import Peak, Run, need_disk, read_json, write_json
from qkit.source import cache_dir

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel
    from trl import SFTConfig, SFTTrainer

CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 weight and two Adam moments
CHECKPOINTS_AT_ONCE = 2  # the new one is written before the old one goes


def run(run: Run, out: Path) -> Peak:
    """Train the adapter; goes on from the last checkpoint in `out` when there is one. Returns planned and measured peak memory."""
    how, device = run.recipe, detect()
    meter = PeakMeter(device)
    _warn_of_memory(run, device)
    folder = model.resolve(how.model)
    trainer = build_trainer(run, folder, device, out)
    need_disk(out, _checkpoint_bytes(trainer.model) * CHECKPOINTS_AT_ONCE, "checkpoints")
    checkpoint = last_checkpoint(out / "checkpoints")
    steps = _total_steps(trainer)
    with run.progress.bar("train", steps, start=_step_of(checkpoint)) as bar:
        trainer.add_callback(_recorder(out / "metrics.jsonl", bar, meter, trainer, _step_of(checkpoint)))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _save(trainer, folder, how, out / "adapter")
    predicted = plan.predicted_items(how, device, _most_labelled(trainer))
    peak = Peak(meter.peak_bytes(), meter.meter, sum(predicted.values()))
    write_json(
        out / "memory.json",
        {"predicted": predicted, "measured_peak_bytes": peak.measured, "meter": peak.meter},
    )
    return peak


def _warn_of_memory(run: Run, device: Device) -> None:
    """Say it before the model is loaded. Only a warning: activations are a bound, and may turn out smaller."""
    planned = plan.plan(run.recipe, device=device)
    if not planned.fits:
        run.progress.say(f"warning: {plan.refusal(planned)}")


def build_trainer(run: Run, folder: Path, device: Device, out: Path) -> SFTTrainer:
    """The trainer on the run's tokenized rows, with the model loaded as the recipe says."""
    from datasets import Dataset

    how = run.recipe
    rows = Dataset.from_parquet(str(run.need("data", "train.parquet")), cache_dir=str(cache_dir() / "datasets"))
    return trainer_class()(
        model=model.load_base(folder, how, device),
        args=sft_config(how, device, out),
        train_dataset=rows,
        processing_class=model.load_tokenizer(folder, how.model.trust_remote_code),
        peft_config=lora_config(how),
        pad=read_json(run.need("data", "tokens.json"))["pad"],
        batch_tokens=how.data.batch_tokens,
        labelled_head=device.uses_labelled_head,
    )


def sft_config(how: Recipe, device: Device, out: Path) -> SFTConfig:
    """SFTConfig from the recipe's train section, and what our rows and this device need."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(out / "checkpoints"),
        seed=how.seed,
        max_length=None,  # the data stage has decided about lengths; TRL would cut the answer off
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=1,  # batches come from the token budget
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        **device.trainer_arguments,
        **how.train.model_dump(),
    )


def lora_config(how: Recipe) -> LoraConfig:
    """The recipe's lora section as peft's LoraConfig."""
    from peft import LoraConfig

    fields = how.lora.model_dump()
    if not isinstance(fields["target_modules"], str):
        fields["target_modules"] = list(fields["target_modules"])
    return LoraConfig(task_type="CAUSAL_LM", **fields)


def trainer_class() -> Any:
    """SFTTrainer with our batches, and our head where the device says so. A function, to import TRL no sooner than needed."""
    import torch
    from torch.utils.data import DataLoader
    from trl import SFTTrainer

    from qkit.fast.batches import TokenBudgetBatches, collate
    from qkit.fast.head import labelled_loss

    class Trainer(SFTTrainer):
        def __init__(self, *args: Any, pad: int, batch_tokens: int, labelled_head: bool, **kwargs: Any):
            self._batch_tokens = batch_tokens
            self._labelled_head = labelled_head
            self.real_tokens = 0
            super().__init__(*args, data_collator=lambda rows: collate(rows, pad), **kwargs)
            # TRL holds the adapter in bf16, where small optimizer steps round to nothing; autocast computes in bf16 anyway.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

        def get_train_dataloader(self) -> DataLoader[Any]:
            lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
            batches = TokenBudgetBatches(lengths, self._batch_tokens, self.args.seed)
            loader: DataLoader[Any] = DataLoader(
                self.train_dataset,
                batch_sampler=batches,
                collate_fn=self.data_collator,
            )
            prepared: DataLoader[Any] = self.accelerator.prepare(loader)
            return prepared

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            self.real_tokens += int(inputs.pop("lengths").sum())
            if not self._labelled_head:
                loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                return loss
            with self.accelerator.autocast():
                base = self.accelerator.unwrap_model(model).get_base_model()
                return labelled_loss(base, inputs["input_ids"], inputs["labels"], num_items_in_batch)

    return Trainer


def _most_labelled(trainer: SFTTrainer) -> int:
    """The most tokens that carry loss in any batch: what the head and the loss have to hold."""
    rows = trainer.train_dataset
    labelled = [len(ids) - start for ids, start in zip(rows["input_ids"], rows["start"], strict=True)]
    batches: list[int] = [sum(labelled[i] for i in batch) for batch in trainer.get_train_dataloader().batch_sampler]
    return max(batches)


def _total_steps(trainer: SFTTrainer) -> int:
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    batches = len(trainer.get_train_dataloader())
    return int(trainer.args.num_train_epochs * max(batches // trainer.args.gradient_accumulation_steps, 1))


def _recorder(file: Path, bar: Bar, meter: PeakMeter, trainer: SFTTrainer, resumed_at: int) -> Any:
    """A callback that writes metrics.jsonl and moves the bar. Lines after the checkpoint we go on from are cut away."""
    from transformers import TrainerCallback

    earlier = [line for line in _lines(file) if line["step"] <= resumed_at]
    file.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")
    tokens_before = earlier[-1]["tokens"] if earlier else 0
    seconds_before = earlier[-1]["seconds"] if earlier else 0.0
    begin = time.perf_counter()

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            seconds = time.perf_counter() - begin
            line = {
                "step": state.global_step,
                "epoch": logs["epoch"],
                "loss": float(logs["loss"]),
                "learning_rate": float(logs["learning_rate"]),
                "grad_norm": float(logs["grad_norm"]),
                "tokens": tokens_before + trainer.real_tokens,
                "tokens_per_second": trainer.real_tokens / seconds,
                "peak_bytes": meter.peak_bytes(),
                "seconds": seconds_before + seconds,
            }
            with file.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(line) + "\n")
            bar.advance(args.logging_steps, loss=line["loss"], tokens_per_second=line["tokens_per_second"])

    return Recorder()


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    whole = [line for line in file.read_text(encoding="utf-8").split("\n")[:-1] if line]
    return [json.loads(line) for line in whole]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole: the trainer's state is its last file."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _checkpoint_bytes(trained: PreTrainedModel) -> int:
    parameters: int = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    return parameters * CHECKPOINT_BYTES_PER_PARAMETER


def _save(trainer: SFTTrainer, folder: Path, how: Recipe, adapter: Path) -> None:
    trained = trainer.model
    trained.save_pretrained(str(adapter))
    if not (adapter / "adapter_model.safetensors").is_file():
        raise MissingArtifact(f"{adapter}: peft wrote no adapter_model.safetensors")
    quantized = model.quantized_names(trained.get_base_model()) if how.quantization.load_in_4bit else []
    names = [name.replace(".base_layer.weight", ".weight") for name in quantized]
    model.write_adapter_note(adapter, folder, how, names)


__all__ = ["build_trainer", "last_checkpoint", "lora_config", "run", "sft_config"]
