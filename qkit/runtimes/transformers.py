"""transformers, in this process: the base model, the reference model (base and adapter as trained), or a model folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.core.device import Device, released
from qkit.core.errors import ModelError
from qkit.core.memory_meter import PeakMeter
from qkit.model.load import scaled
from qkit.plugins.runtime import ENCODER_TOKENS, PREFILL_TOKENS, RowScores, Runtime, TokenRow
from qkit.plugins.task import ModelHead, open_task
from qkit.recipe.schema import WHOLE
from qkit.runtimes._encoder import TorchEncoder
from qkit.tasks._encoder.tagging import transitions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qkit.recipe.schema import Recipe


CAUSAL = ModelHead("AutoModelForCausalLM", "CAUSAL_LM", "text-generation")
SCORE_TOKENS = 2048  # padded tokens per forward pass when scoring


def open(artifact: Path, device: Device, **options: Any) -> Runtime | TorchEncoder:
    """Open a model folder; a folder with a .gguf file is dequantized to float32.

    Options:
        dtype: the dtype to load a folder in (default: that of its config.json).
        recipe, adapter: open the reference model, quantized as in training; without an adapter, the base model.
        exact: with `recipe`: compute in fp32 from the same 16-bit weights.
        head: the `ModelHead` of a folder; default: that of a causal language model. With `recipe`, its task's.

    Raises:
        ModelError: the weights are damaged, or do not match config.json.
    """
    meter = PeakMeter(device)
    recipe: Recipe | None = options.get("recipe")
    head: ModelHead = options.get("head", CAUSAL) if recipe is None else open_task(recipe.task).HEAD
    if recipe is None:
        folder = _model_folder(artifact, device, head, options)
        if head.generates:
            return TransformersRuntime(folder, meter)
        transitions.add_stored(folder, artifact)
        return TorchEncoder(folder, meter)
    exact = bool(options.get("exact"))
    loaded = _reference(artifact, recipe, device, options.get("adapter"), exact)
    if not head.generates:
        return TorchEncoder(loaded, meter, autocast=recipe.train.bf16 and not exact)
    mixed = recipe.method in (*WHOLE, "peft") and recipe.train.bf16 and not exact
    return TransformersRuntime(loaded, meter, SCORE_TOKENS // 2 if exact else SCORE_TOKENS, autocast=mixed)


def around(model: PreTrainedModel, meter: PeakMeter, recipe: Recipe) -> Runtime | TorchEncoder:
    """A runtime for a model that is being trained; it scores no more tokens at once than a step trains on."""
    tokens = recipe.data.batch_tokens // recipe.micro_batches
    if open_task(recipe.task).HEAD.generates:
        return TransformersRuntime(model, meter, min(tokens, SCORE_TOKENS))
    return TorchEncoder(model, meter, recipe.train.bf16, min(tokens, ENCODER_TOKENS))


def _reference(folder: Path, recipe: Recipe, device: Device, adapter: Path | None, exact: bool) -> PreTrainedModel:
    from qkit.model import load
    from qkit.runtimes._float32 import compute_in_float32, with_float32_attention

    loaded: PreTrainedModel = load.load_reference(
        folder, with_float32_attention(recipe) if exact else recipe, device, adapter
    )
    if exact:
        compute_in_float32(loaded)
    return loaded


def _model_folder(folder: Path, device: Device, head: ModelHead, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load a folder without changes to its weights. transformers would initialize missing weights at random; here that is an error.

    Raises:
        ModelError: weights are damaged, missing, unexpected, or of another shape than config.json says.
    """
    import transformers
    from safetensors import SafetensorError

    from qkit.model.load import class_of, leave_as_quantized

    arguments: dict[str, Any]
    gguf = next(folder.glob("*.gguf"), None)
    arguments = _gguf(folder, gguf.name) if gguf else {"dtype": options.get("dtype", "auto"), **_unpacked(folder)}
    try:
        if head.generates:
            arguments["generation_config"] = transformers.GenerationConfig()
        loaded, report = class_of(folder, head).from_pretrained(
            str(folder), device_map=device.device_map, output_loading_info=True, **arguments
        )
    except SafetensorError as error:
        raise ModelError(
            f"{folder}: the weights are damaged ({error}); create the folder again", source=folder
        ) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ModelError(
            f"{folder}: the shapes of the weights do not match config.json; create the folder again", source=folder
        ) from None
    for key, problem in (
        ("missing_keys", "missing weights"),
        ("unexpected_keys", "weights that config.json does not describe"),
    ):
        if names := sorted(name for name in report[key] if name.endswith(".weight")):
            message = f"{folder}: {problem}: {names[0]} and {len(names) - 1} more; create the folder again"
            raise ModelError(message, source=folder)
    leave_as_quantized(loaded, also_packable=False)
    model: PreTrainedModel = loaded.eval()
    return model


def _unpacked(folder: Path) -> dict[str, Any]:
    """Return arguments that unpack compressed-tensors on loading; else a forward pass of the whole model would, and scoring runs none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
    packing: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    if packing.get("quant_method") != "compressed-tensors":
        return {}
    config.quantization_config = {**packing, "dequantize": True}
    return {"config": config}


def _gguf(folder: Path, file: str) -> dict[str, Any]:
    """Return arguments that load a .gguf file by its header; only Llama 3.1's RoPE scaling is read from config.json."""
    import torch
    from transformers import AutoConfig, GgufConfig

    config = AutoConfig.from_pretrained(str(folder), gguf_file=file)
    merged = AutoConfig.from_pretrained(str(folder))
    if merged.rope_parameters["rope_type"] != "default":
        config.rope_parameters = merged.rope_parameters
    return {
        "gguf_file": file,
        "config": config,
        "dtype": torch.float32,
        "quantization_config": GgufConfig(dequantize=True),
    }


class TransformersRuntime(Runtime):
    """Greedy decoding and scoring with a transformers model."""

    prefill_tokens = PREFILL_TOKENS

    def __init__(
        self, model: PreTrainedModel, meter: PeakMeter, score_tokens: int = SCORE_TOKENS, autocast: bool = False
    ):
        """`autocast`: compute in bf16 from what was trained in fp32, as training did."""
        self.model = model
        self.autocast = autocast
        self.meter = meter
        self.score_tokens = score_tokens

    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
    ) -> Iterator[dict[int, int]]:
        import torch

        with torch.inference_mode(), self._precision():
            yield from _decode(self.model, prompts, max_new_tokens, stop)

    def score(self, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        import torch

        for batch in within_budget([len(row.input_ids) for row in rows], self.score_tokens):
            with torch.inference_mode(), self._precision():
                scores = list(_score(self.model, rows[batch.start : batch.stop]))
            yield from scores

    def _precision(self) -> Any:
        import torch

        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast)

    def memory_bytes(self) -> int:
        return self.meter.peak_bytes()

    def close(self) -> None:
        with released():
            del self.model


def _decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
) -> Iterator[dict[int, int]]:
    """Left-padded greedy decoding. A row that has ended leaves the batch, so long rows are not slowed by finished ones."""
    import torch
    from transformers import DynamicCache

    ids, mask = _left_padded(prompts, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    alive = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        tokens = ids[:, 0].tolist()
        yield dict(zip(alive, tokens, strict=True))
        running = [index for index, token in enumerate(tokens) if token not in stop]
        if not running:
            return
        if len(running) < len(alive):
            keep = torch.tensor(running, device=ids.device)
            cache.batch_select_indices(keep)
            alive, ids, mask, positions = [alive[i] for i in running], ids[keep], mask[keep], positions[keep]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1


def _left_padded(prompts: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `ids` and `mask`, [rows, longest]; padded positions hold token 0 and are masked."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _score(model: PreTrainedModel, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
    """Score rows in one forward pass, right-padded and without a mask: under causal attention no token sees the padding on its right."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    for index, row in enumerate(rows):
        states = hidden[index, row.start - 1 : len(row.input_ids) - 1]
        logprobs = scaled(base, base.get_output_embeddings()(states).float()).log_softmax(-1)
        targets = torch.tensor(row.input_ids[row.start :], device=logprobs.device)
        yield RowScores(
            targets=logprobs.gather(1, targets[:, None])[:, 0].cpu().numpy(),
            top1=logprobs.argmax(-1).cpu().numpy(),
            full=logprobs.cpu().numpy(),
        )
