"""What a LoRA adapter changes, weight by weight: the arithmetic of PEFT's merge, for one tensor of a checkpoint at a time.

It covers low-rank deltas (with rank and alpha patterns, rank stabilization and DoRA's magnitudes; of linear layers, Conv1D, embeddings, and
experts stacked in one parameter), their biases, whole tensors that were trained or resized, and rows of learned tokens. Any other feature of
PEFT is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import MissingArtifact, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
ROWS = ".token_adapter.trainable_tokens_delta"  # after the name of an embedding or head: the rows of learned tokens


@dataclass(frozen=True)
class FactorKeys:
    """Suffixes of the two factors of a delta in an adapter's file. `transposed`: the weight is stored [in, out]."""

    down: str
    up: str
    transposed: bool


FACTOR_KEYS = (
    FactorKeys(".lora_A.weight", ".lora_B.weight", transposed=False),
    FactorKeys(".lora_embedding_A", ".lora_embedding_B", transposed=True),
)
FACTOR_SUFFIXES = tuple(suffix for keys in FACTOR_KEYS for suffix in (keys.down, keys.up))
# A parameter's deltas are named after its module; if a module has several, each further one is nested in one more base_layer.
NESTED = re.compile(r"((?:\.base_layer)+)\.lora_[AB]\.weight$")
BIAS, MAGNITUDE = ".lora_B.bias", ".lora_magnitude_vector"

# Fields of LoraConfig that make a forward pass more than weight + delta, or that apply the delta to another weight.
REFUSED = {
    "alora_invocation_tokens": "the delta is added after certain tokens only",
    "arrow_config": "several adapters are chosen between, token by token",
    "kasa_config": "the base is changed as well",
    "layer_replication": "layers are repeated",
    "megatron_config": "the layers are those of Megatron",
    "monteclora_config": "the delta is drawn from a distribution",
    "use_bdlora": "the matrices are block-diagonal",
    "use_qalora": "inputs are pooled in groups",
}
UNSET: tuple[Any, ...] = (None, False, "", [], {})  # values of a key that has no effect
# Initializations that subtract the adapter's initial state from the base, so the delta does not apply to the original base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """scaling * (up @ down), transposed if the weight is stored [in, out]; with `magnitude`, weight + delta is rescaled to that norm (DoRA).

    `up` [out, r] and `down` [r, in], in fp32; `magnitude` [out].
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float
    transposed: bool = False
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the delta applies to."""
        out, inputs = int(self.up.shape[0]), int(self.down.shape[1])
        return (inputs, out) if self.transposed else (out, inputs)

    @property
    def by_rows(self) -> bool:
        """Whether rows of the weight can be computed one block at a time: not if a norm runs over all rows."""
        return self.magnitude is None or not self.transposed

    def added(self, weight: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """`weight` (rows `begin` to `end` of the whole) plus the delta, in fp32."""
        product = self.up @ self.down[:, begin:end] if self.transposed else self.up[begin:end] @ self.down
        delta = (product.T if self.transposed else product) * self.scaling
        if self.magnitude is None:
            return delta.add_(weight)
        total = weight.float() + delta
        if self.transposed:
            return self.magnitude / _norms(total.T) * total
        return (self.magnitude[begin:end] / _norms(total)).view(-1, 1) * total


@dataclass(frozen=True)
class Experts:
    """scaling * (up @ down) for each expert, transposed if the parameter is [experts, in, out].

    `up` [experts, out, r] and `down` [experts, r, in], in fp32.
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float
    transposed: bool = False
    by_rows = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the parameter that the delta applies to."""
        count, out, inputs = int(self.up.shape[0]), int(self.up.shape[1]), int(self.down.shape[2])
        return (count, inputs, out) if self.transposed else (count, out, inputs)

    def delta(self, begin: int, end: int) -> torch.Tensor:
        """The delta of experts `begin` to `end`."""
        product = self.up[begin:end] @ self.down[begin:end] * self.scaling
        return product.transpose(1, 2) if self.transposed else product

    def added(self, weight: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """`weight` (experts `begin` to `end` of the whole) plus the delta, in fp32."""
        return self.delta(begin, end).add_(weight)


@dataclass(frozen=True)
class Parameter:
    """Where the deltas of a parameter are in an adapter's file, and the layout of its experts.

    `prefix`: of the keys in the file. `experts`: how many the parameter stacks; 0 if it is an ordinary matrix.
    """

    prefix: str
    experts: int = 0
    transposed: bool = False


def _norms(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    norms: torch.Tensor = torch.linalg.norm(matrix, dim=1)
    return norms


class Deltas:
    """The changes of an adapter, by the name of the checkpoint's tensor. Without an adapter (None) there are none.

    Raises:
        MissingArtifact: the folder holds no adapter in safetensors.
        ModelError: the adapter is of a kind that cannot be merged.
    """

    def __init__(self, adapter: Path | None):
        from peft import LoraConfig
        from safetensors.torch import load_file

        self.adapter = adapter
        self.config = LoraConfig() if adapter is None else _config(adapter)
        loaded = {} if adapter is None else load_file(adapter / WEIGHTS)
        self.tensors = {_plain(name.removeprefix(PREFIX)): tensor for name, tensor in loaded.items()}
        self.unused = set(self.tensors)
        self.parameters: dict[str, Parameter] = {}
        self.cached: dict[
            str, Experts | None
        ] = {}  # the last two, because a checkpoint alternates between gate_up and down

    def find_parameters(self, model: PreTrainedModel | None) -> None:
        """Find which parameters of the model PEFT's target_parameters name, and their keys in the file.

        Raises:
            ModelError: the model runs remote code, so its parameters are unknown.
        """
        targets = self.config.target_parameters or ()
        if not targets:
            return
        if model is None:
            raise ModelError(
                f"{self.adapter}: has deltas of parameters ({', '.join(sorted(targets))}), and the base is a model with remote code; merge it "
                "with PeftModel.merge_and_unload",
                source=self.adapter,
            )
        for name, module in model.named_modules():
            parameters = dict(module.named_parameters(recurse=False))
            matched = [key for key in parameters if _ends_in(f"{name}.{key}", targets)]
            for depth, key in enumerate(reversed(matched)):  # PEFT wraps them in order, so the last one is innermost
                experts = int(parameters[key].shape[0]) if parameters[key].ndim == 3 else 0
                transposed = bool(getattr(module, "is_transposed", False))
                self.parameters[f"{name}.{key}"] = Parameter(f"{name}{'.base_layer' * depth}", experts, transposed)

    def experts(self, name: str) -> Experts | None:
        """The deltas of a parameter that stacks experts, or None."""
        parameter = self.parameters.get(name)
        if parameter is None or not parameter.experts:
            return None
        if name not in self.cached:
            self.cached = {**dict(list(self.cached.items())[-1:]), name: self._experts(name, parameter)}
        return self.cached[name]

    def _experts(self, name: str, parameter: Parameter) -> Experts | None:
        factors = self._factors(parameter.prefix, FACTOR_KEYS[0])
        if factors is None:
            return None
        down, up = factors
        ranks, needed = len(down), self._rank(name) * parameter.experts
        if ranks != needed:
            raise ModelError(
                f"{self.adapter}: its delta of {name} has {ranks} ranks, but {parameter.experts} experts of rank {self._rank(name)} need "
                f"{needed}: the adapter was trained on another model",
                source=self.adapter,
            )
        return Experts(
            up.float().view(len(up), -1, parameter.experts).permute(2, 0, 1),
            down.float().view(parameter.experts, -1, down.shape[1]),
            self._scaling(name),
            parameter.transposed,
        )

    def low_rank(self, name: str, transposed: bool) -> LowRank | None:
        """The delta of a weight, or None. `transposed`: the weight is the [in, out] matrix of a Conv1D."""
        if (parameter := self.parameters.get(name)) is not None:
            delta = self._low_rank(parameter.prefix, False)
            return delta and replace(delta, scaling=self._scaling(name))
        return self._low_rank(name.removesuffix(".weight"), transposed)

    def _low_rank(self, module: str, transposed: bool) -> LowRank | None:
        for keys in FACTOR_KEYS:
            factors = self._factors(module, keys)
            if factors is None:
                continue
            down, up = factors
            magnitude = self._take(f"{module}{MAGNITUDE}")
            return LowRank(
                up.float(),
                down.float(),
                self._scaling(module),
                transposed or keys.transposed,
                None if magnitude is None else magnitude.float(),
            )
        return None

    def _factors(self, prefix: str, keys: FactorKeys) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(down, up) of a module, or None."""
        down, up = self._take(f"{prefix}{keys.down}"), self._take(f"{prefix}{keys.up}")
        return None if down is None or up is None else (down, up)

    def low_rank_weights(self) -> set[str]:
        """Names of the weights that the adapter has a low-rank delta of."""
        return {
            f"{name.removesuffix(suffix)}.weight"
            for suffix in FACTOR_SUFFIXES
            for name in self.tensors
            if name.endswith(suffix)
        }

    def bias(self, name: str) -> torch.Tensor | None:
        """What is added to a bias (lora_bias), or None."""
        if not name.endswith(".bias"):
            return None
        module = name.removesuffix(".bias")
        delta = self._take(f"{module}{BIAS}")
        return None if delta is None else delta.float() * self._scaling(module)

    def replaced(self, name: str) -> torch.Tensor | None:
        """The tensor that replaces the base's (modules_to_save, trained biases, resized embeddings), or None."""
        return self._take(name)

    def shape(self, name: str) -> list[int] | None:
        """The shape of the tensor that replaces the base's, or None."""
        return list(self.tensors[name].shape) if name in self.tensors else None

    def changes(self, name: str) -> bool:
        """Whether the adapter has deltas of a weight, or replaces it. Learned rows do not count."""
        prefix = self.parameters[name].prefix if name in self.parameters else name.removesuffix(".weight")
        return name in self.tensors or any(f"{prefix}{suffix}" in self.tensors for suffix in FACTOR_SUFFIXES)

    def learned_rows(self, name: str) -> tuple[list[int], torch.Tensor] | None:
        """Indices [n] and values [n, width] of the rows of a matrix that were learned, or None."""
        module = name.removesuffix(".weight")
        indices = self.config.trainable_token_indices or {}
        if isinstance(indices, list):  # PEFT's short form: the embedding only
            indices = {key.removesuffix(ROWS): indices for key in self.tensors if key.endswith(ROWS)}
        matching = [key for key in indices if _ends_in(module, [key])]
        if not matching:
            return None
        rows = self._take(f"{module}{ROWS}")
        if rows is None:  # a head tied to the embedding has no rows of its own, though some checkpoints contain it
            rows = next(value for key, value in self.tensors.items() if key.endswith(ROWS))
        return indices[matching[0]], rows

    def _take(self, name: str) -> torch.Tensor | None:
        self.unused.discard(name)
        return self.tensors.get(name)

    def _rank(self, module: str) -> int:
        return int(_of_pattern(self.config.rank_pattern, module, self.config.r))

    def _scaling(self, module: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilized LoRA, with rank_pattern and alpha_pattern applied."""
        rank, alpha = self._rank(module), _of_pattern(self.config.alpha_pattern, module, self.config.lora_alpha)
        return float(alpha / rank**0.5 if self.config.use_rslora else alpha / rank)

    def check_all_used(self) -> None:
        """Raise ModelError if the adapter changes a weight that the base does not have."""
        if self.unused:
            raise ModelError(
                f"{self.adapter}: changes {min(self.unused)} and {len(self.unused) - 1} more tensors that the base model does not have: the "
                "adapter belongs to another base, or to one that was saved under other names",
                source=self.adapter,
            )


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value that rank_pattern or alpha_pattern has for a module, matched as PEFT matches."""
    from peft.utils.other import get_pattern_key

    return (patterns or {}).get(get_pattern_key((patterns or {}).keys(), module), default)


def _plain(name: str) -> str:
    """The name without `base_layer`, except for parameters, which differ only in how often it is nested."""
    return name if NESTED.search(name) else name.replace(".base_layer.", ".")


def _ends_in(name: str, targets: Collection[str]) -> bool:
    """PEFT's rule for target_parameters: the whole name, or its end after a dot."""
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def _config(adapter: Path) -> Any:
    """The adapter's LoraConfig, after checking that weight + delta is all that it means."""
    from peft import PeftConfig

    if not (adapter / "adapter_config.json").is_file() or not (adapter / WEIGHTS).is_file():
        raise MissingArtifact(
            f"{adapter}: not an adapter (it has no adapter_config.json and {WEIGHTS}); save an older one in .bin again with "
            "PeftModel.save_pretrained",
            path=adapter,
        )
    _check_known(adapter)
    config = PeftConfig.from_pretrained(str(adapter))
    if config.peft_type != "LORA":
        raise ModelError(
            f"{adapter}: an adapter of type {config.peft_type.value}; only type LORA can be merged", source=adapter
        )
    for field, reason in REFUSED.items():
        if getattr(config, field, None):
            raise ModelError(
                f"{adapter}: adapters with {field} cannot be merged ({reason}); serve this one unmerged", source=adapter
            )
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        raise ModelError(
            f"{adapter}: init_lora_weights={start} changed the base that this adapter was trained on; save it as an ordinary LoRA first: "
            "PeftModel.save_pretrained(path_initial_model_for_weight_conversion=...)",
            source=adapter,
        )
    return config


def _check_known(adapter: Path) -> None:
    """Raise ModelError if the adapter's config sets a key that the installed PEFT does not know: PEFT would silently ignore it."""
    from peft import LoraConfig

    raw = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = [f"{key}={value!r:.60}" for key, value in raw.items() if key not in fields and value not in UNSET]
    if raw.get("peft_type") == "LORA" and unknown:
        raise ModelError(
            f"{adapter}: its adapter_config.json sets {', '.join(unknown)}, which peft {version('peft')} does not know and would ignore; merge "
            "it with the version of peft that wrote it, or remove the key if it does not change a forward pass",
            source=adapter,
        )
