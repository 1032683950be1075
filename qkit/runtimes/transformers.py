"""transformers: the base model, the live adapter, or a merged model folder, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.core.device import Device, released
from qkit.core.errors import ModelError
from qkit.core.memory_meter import PeakMeter
from qkit.model.load import scaled
from qkit.plugins.runtime import PREFILL_TOKENS, RowScores, Runtime, TokenRow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qkit.recipe.schema import Recipe


SCORE_TOKENS = 2048  # right-padded tokens per forward when scoring


def open(artifact: Path, device: Device, **options: Any) -> Runtime:
    """A model folder, in the dtype that it has or in `dtype` of options; one that holds a .gguf file, dequantized to float32. With `recipe` and
    `adapter` in options: the live model, quantized as it was trained; with `exact` too: the same numbers, computed in fp32."""
    meter = PeakMeter(device)
    recipe: Recipe | None = options.get("recipe")
    if recipe is None:
        return TransformersRuntime(_merged(artifact, device, options), meter)
    exact = bool(options.get("exact"))
    loaded = _live(artifact, recipe, device, options.get("adapter"), exact)
    return TransformersRuntime(loaded, meter, SCORE_TOKENS // 2 if exact else SCORE_TOKENS)


def _live(folder: Path, recipe: Recipe, device: Device, adapter: Path | None, exact: bool) -> PreTrainedModel:
    from qkit.model import load
    from qkit.runtimes._float32 import compute_in_float32, with_any_dtype

    loaded: PreTrainedModel = load.load_live(folder, with_any_dtype(recipe) if exact else recipe, device, adapter)
    if exact:
        compute_in_float32(loaded)
    return loaded


def _merged(folder: Path, device: Device, options: Mapping[str, Any]) -> PreTrainedModel:
    """Loaded as it is; what transformers would make up with random numbers is an error.

    Raises:
        ModelError: weights are damaged, missing, of another shape, or more than the model has.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig

    from qkit.model.load import leave_as_quantized

    gguf = next(folder.glob("*.gguf"), None)
    how = _gguf(folder, gguf.name) if gguf else {"dtype": options.get("dtype", "auto"), **_unpacked(folder)}
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            device_map=device.device_map,
            output_loading_info=True,
            generation_config=GenerationConfig(),
            **how,
        )
    except SafetensorError as error:
        raise ModelError(f"{folder}: its weights are damaged ({error}); make the folder again") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ModelError(
            f"{folder}: its weights have other shapes than its config.json says; make the folder again"
        ) from None
    for what in ("missing_keys", "unexpected_keys"):
        if names := sorted(name for name in report[what] if name.endswith(".weight")):
            words = {"missing_keys": "lacks", "unexpected_keys": "has, and its config.json knows nothing of,"}[what]
            raise ModelError(f"{folder}: {words} {names[0]} and {len(names) - 1} more weights; make the folder again")
    leave_as_quantized(loaded, also_packable=False)
    return loaded.eval()


def _unpacked(folder: Path) -> dict[str, Any]:
    """compressed-tensors would leave weights packed until a forward of the whole model, which scoring does not make."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
    packing: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    if packing.get("quant_method") != "compressed-tensors":
        return {}
    config.quantization_config = {**packing, "dequantize": True}
    return {"config": config}


def _gguf(folder: Path, file: str) -> dict[str, Any]:
    """How a .gguf file is read back: by its own header, but for Llama 3.1's scaling of positions, which transformers takes from config.json."""
    import torch
    from transformers import AutoConfig, GgufConfig

    config = AutoConfig.from_pretrained(str(folder), gguf_file=file)
    beside = AutoConfig.from_pretrained(str(folder))
    if beside.rope_parameters["rope_type"] != "default":
        config.rope_parameters = beside.rope_parameters
    return {
        "gguf_file": file,
        "config": config,
        "dtype": torch.float32,
        "quantization_config": GgufConfig(dequantize=True),
    }


class TransformersRuntime(Runtime):
    """Greedy decoding and scoring with a model that is loaded here."""

    prefill_tokens = PREFILL_TOKENS

    def __init__(self, model: PreTrainedModel, meter: PeakMeter, score_tokens: int = SCORE_TOKENS):
        self.model = model
        self.meter = meter
        self.score_tokens = score_tokens

    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
    ) -> Iterator[dict[int, int]]:
        import torch

        with torch.inference_mode():
            yield from _decode(self.model, prompts, max_new_tokens, stop)

    def score(self, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        import torch

        for batch in within_budget([len(row.input_ids) for row in rows], self.score_tokens):
            with torch.inference_mode():
                scores = list(_score(self.model, rows[batch.start : batch.stop]))
            yield from scores

    def memory_bytes(self) -> int:
        return self.meter.peak_bytes()

    def close(self) -> None:
        with released():
            del self.model


def _decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
) -> Iterator[dict[int, int]]:
    """Left-padded greedy decoding; a row that has ended leaves the batch, so the last long ones do not wait for the rest."""
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
        going = [index for index, token in enumerate(tokens) if token not in stop]
        if not going:
            return
        if len(going) < len(alive):
            keep = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(keep)
            alive, ids, mask, positions = [alive[i] for i in going], ids[keep], mask[keep], positions[keep]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1


def _left_padded(prompts: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids` and `mask`, [rows, longest]; padded positions hold token 0 and are masked."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _score(model: PreTrainedModel, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
    """One forward, right-padded and without a mask: under causal attention a token does not see what is on its right."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    for index, row in enumerate(rows):
        wanted = hidden[index, row.start - 1 : len(row.input_ids) - 1]
        logprobs = scaled(base, base.get_output_embeddings()(wanted).float()).log_softmax(-1)
        targets = torch.tensor(row.input_ids[row.start :], device=logprobs.device)
        yield RowScores(
            targets=logprobs.gather(1, targets[:, None])[:, 0].cpu().numpy(),
            top1=logprobs.argmax(-1).cpu().numpy(),
            full=logprobs.cpu().numpy(),
        )
