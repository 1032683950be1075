"""What a LoRA adapter changes, weight by weight: the arithmetic of PEFT's merge, for one tensor of a checkpoint at a time.

Low-rank deltas (with their patterns, rank stabilization and DoRA's magnitudes; of linear layers, transposed ones, embeddings, and of experts
that are held in one parameter), their biases, whole tensors that were trained or resized, and rows of learnt tokens. What else PEFT knows
is refused by name.
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
ROWS = ".token_adapter.trainable_tokens_delta"  # the rows of learnt tokens, behind the name of their embedding or head
LOW_RANK = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
# A parameter's deltas are named after its module, and the second, third ... of one module's lie around the first.
NESTED = re.compile(r"((?:\.base_layer)+)\.lora_[AB]\.weight$")
BIAS, MAGNITUDE = ".lora_B.bias", ".lora_magnitude_vector"


# Fields of LoraConfig under which a forward is more than weight + delta, or the delta belongs to another weight.
REFUSED = {
    "alora_invocation_tokens": "the delta is added after certain tokens only",
    "arrow_config": "several adapters are chosen between, token by token",
    "kasa_config": "the base is changed as well",
    "layer_replication": "layers are repeated",
    "megatron_config": "layers are Megatron's",
    "monteclora_config": "the delta is drawn from a distribution",
    "use_bdlora": "the matrices are block-diagonal",
    "use_qalora": "inputs are pooled in groups",
}
NOTHING: tuple[Any, ...] = (None, False, "", [], {})  # what a key says that is not set
# Ways of starting that take the adapter's first state off the base: the delta is not one to the base as it comes.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """scaling * (up @ down), transposed where the weight is stored so; with `magnitude` the sum is given that norm (DoRA).

    `up` [out, r] and `down` [r, in], in fp32.
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float
    transposed: bool = False
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it belongs to."""
        out, inputs = int(self.up.shape[0]), int(self.down.shape[1])
        return (inputs, out) if self.transposed else (out, inputs)

    @property
    def by_rows(self) -> bool:
        """Whether some rows of the weight can be had without the others: not where a norm runs over all of them."""
        return self.magnitude is None or not self.transposed

    def added(self, weight: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """`weight`, which is rows `begin` to `end` of the whole, with the delta; in fp32."""
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
    """scaling * (up @ down) of each expert, transposed where the parameter is [experts, in, out].

    `up` [experts, out, r] and `down` [experts, r, in], in fp32.
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float
    transposed: bool = False
    by_rows = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the parameter that it belongs to."""
        count, out, inputs = int(self.up.shape[0]), int(self.up.shape[1]), int(self.down.shape[2])
        return (count, inputs, out) if self.transposed else (count, out, inputs)

    def delta(self, begin: int, end: int) -> torch.Tensor:
        """Of experts `begin` to `end`."""
        product = self.up[begin:end] @ self.down[begin:end] * self.scaling
        return product.transpose(1, 2) if self.transposed else product

    def added(self, weight: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """`weight`, which is experts `begin` to `end` of the whole, with the delta; in fp32."""
        return self.delta(begin, end).add_(weight)


@dataclass(frozen=True)
class Parameter:
    """Where the deltas of a parameter lie in an adapter's file, and how its experts are held."""

    place: str
    experts: int = 0
    transposed: bool = False


def _norms(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    norms: torch.Tensor = torch.linalg.norm(matrix, dim=1)
    return norms


class Deltas:
    """The changes of an adapter, by the name of the checkpoint's tensor; with None for an adapter there are none.

    Raises:
        MissingArtifact: the folder holds no adapter in safetensors.
        ModelError: it is of a kind that is not merged.
    """

    def __init__(self, adapter: Path | None):
        from peft import LoraConfig
        from safetensors.torch import load_file

        self.adapter = adapter
        self.config = LoraConfig() if adapter is None else _config(adapter)
        pairs = {} if adapter is None else load_file(adapter / WEIGHTS)
        self.tensors = {_plain(name.removeprefix(PREFIX)): pairs[name] for name in pairs}
        self.left = set(self.tensors)
        self.parameters: dict[str, Parameter] = {}
        self.held: dict[str, Experts | None] = {}  # the last two: a checkpoint has them by turns

    def find_parameters(self, model: PreTrainedModel | None) -> None:
        """See which parameters of the model PEFT's target_parameters are, and by which names: those of a module in their order, inside out.

        Raises:
            ModelError: the model's code is not transformers', so that its parameters are not known.
        """
        wanted = self.config.target_parameters or ()
        if not wanted:
            return
        if model is None:
            raise ModelError(
                f"{self.adapter}: has deltas of parameters ({', '.join(sorted(wanted))}), and the base is a model of remote code; merge it "
                "with PeftModel.merge_and_unload"
            )
        for name, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            matched = [key for key in own if _ends_in(f"{name}.{key}", wanted)]
            for depth, key in enumerate(reversed(matched)):
                count = int(own[key].shape[0]) if own[key].ndim == 3 else 0
                transposed = bool(getattr(module, "is_transposed", False))
                self.parameters[f"{name}.{key}"] = Parameter(f"{name}{'.base_layer' * depth}", count, transposed)

    def experts(self, name: str) -> Experts | None:
        """The deltas of a parameter that holds experts, or None."""
        found = self.parameters.get(name)
        if found is None or not found.experts:
            return None
        if name not in self.held:
            self.held = {**dict(list(self.held.items())[-1:]), name: self._experts(name, found)}
        return self.held[name]

    def _experts(self, name: str, found: Parameter) -> Experts | None:
        down, up = (self._take(f"{found.place}.lora_{side}.weight") for side in "AB")
        if down is None or up is None:
            return None
        if (ranks := len(down)) != self._rank(name) * found.experts:
            raise ModelError(
                f"{self.adapter}: its delta of {name} has {ranks} ranks, and the base's {found.experts} experts of rank {self._rank(name)} "
                f"need {self._rank(name) * found.experts}: it was trained on another model"
            )
        return Experts(
            up.float().view(len(up), -1, found.experts).permute(2, 0, 1),
            down.float().view(found.experts, -1, down.shape[1]),
            self._scaling(name),
            found.transposed,
        )

    def low_rank(self, name: str, transposed: bool) -> LowRank | None:
        """The delta of a weight, or None. `transposed`: it is the [in, out] matrix of a Conv1D."""
        if (parameter := self.parameters.get(name)) is not None:
            found = self._low_rank(parameter.place, False)
            return found and replace(found, scaling=self._scaling(name))
        return self._low_rank(name.removesuffix(".weight"), transposed)

    def _low_rank(self, module: str, transposed: bool) -> LowRank | None:
        embedding = f"{module}.lora_embedding_A" in self.tensors
        down, up = (
            self._take(f"{module}.lora_{'embedding_' if embedding else ''}{side}{'' if embedding else '.weight'}")
            for side in "AB"
        )
        if down is None or up is None:
            return None
        magnitude = self._take(f"{module}{MAGNITUDE}")
        return LowRank(
            up.float(),
            down.float(),
            self._scaling(module),
            transposed or embedding,
            None if magnitude is None else magnitude.float(),
        )

    def bias(self, name: str) -> torch.Tensor | None:
        """What is added to a bias (lora_bias), or None."""
        module = name.removesuffix(".bias")
        found = self._take(f"{module}{BIAS}") if name.endswith(".bias") else None
        return None if found is None else found.float() * self._scaling(module)

    def replaced(self, name: str) -> torch.Tensor | None:
        """What stands in the place of a tensor (modules_to_save, trained biases, resized embeddings), or None."""
        return self._take(name)

    def shape(self, name: str) -> list[int] | None:
        """Shape of what stands in the place of a tensor, or None."""
        return list(self.tensors[name].shape) if name in self.tensors else None

    def changes(self, name: str) -> bool:
        """Whether a weight's module has deltas, or is replaced, in this adapter; learnt rows are another matter."""
        module = name.removesuffix(".weight")
        if name in self.parameters:
            module = self.parameters[name].place
        return name in self.tensors or any(f"{module}{kind}" in self.tensors for kind in LOW_RANK)

    def learnt_rows(self, name: str) -> tuple[list[int], torch.Tensor] | None:
        """Indices and values of a matrix's rows that were learnt, or None."""
        module = name.removesuffix(".weight")
        learnt = self.config.trainable_token_indices or {}
        if isinstance(learnt, list):  # peft's short form: the embedding alone
            learnt = {key.removesuffix(ROWS): learnt for key in self.tensors if key.endswith(ROWS)}
        named = [
            key for key in learnt if module == key or module.endswith(f".{key}")
        ]  # peft takes the end of a name too
        if not named:
            return None
        # A head that is tied to the embedding has no rows of its own, and stands in some checkpoints all the same.
        own = self._take(f"{module}{ROWS}")
        rows = next(value for key, value in self.tensors.items() if key.endswith(ROWS)) if own is None else own
        return learnt[named[0]], rows

    def _take(self, name: str) -> torch.Tensor | None:
        self.left.discard(name)
        return self.tensors.get(name)

    def _rank(self, module: str) -> int:
        return int(_of_pattern(self.config.rank_pattern, module, self.config.r))

    def _scaling(self, module: str) -> float:
        """lora_alpha / r, or / sqrt(r) for rank-stabilized LoRA, with the patterns of this module as peft reads them."""
        rank, alpha = self._rank(module), _of_pattern(self.config.alpha_pattern, module, self.config.lora_alpha)
        return float(alpha / rank**0.5 if self.config.use_rslora else alpha / rank)

    def check_all_used(self) -> None:
        """Raises ModelError when the adapter changes a weight that the base does not have."""
        if self.left:
            raise ModelError(
                f"{self.adapter}: the adapter changes {min(self.left)} and {len(self.left) - 1} more, which the base model does not have: "
                "it belongs to another base, or to one that is saved under other names"
            )


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """What a pattern says of a module, as peft reads them."""
    from peft.utils.other import get_pattern_key

    return (patterns or {}).get(get_pattern_key((patterns or {}).keys(), module), default)


def _plain(name: str) -> str:
    """Without what PEFT's wrappers add; but for parameters, whose wrappers' depth tells them apart."""
    return name if NESTED.search(name) else name.replace(".base_layer.", ".")


def _ends_in(name: str, wanted: Collection[str]) -> bool:
    """PEFT's rule for target_parameters."""
    return name in wanted or any(name.endswith(f".{end}") for end in wanted)


def _config(adapter: Path) -> Any:
    """The adapter's LoraConfig, if deltas are all that it means."""
    from peft import PeftConfig

    if not (adapter / "adapter_config.json").is_file() or not (adapter / WEIGHTS).is_file():
        raise MissingArtifact(
            f"{adapter}: not an adapter (it has no adapter_config.json and {WEIGHTS}); older ones in .bin are saved anew with "
            "PeftModel.save_pretrained"
        )
    _check_known(adapter)
    config = PeftConfig.from_pretrained(str(adapter))
    if config.peft_type != "LORA":
        raise ModelError(f"{adapter}: an adapter of type {config.peft_type.value}; merged are those of type LORA")
    for field, why in REFUSED.items():
        if getattr(config, field, None):
            raise ModelError(f"{adapter}: adapters with {field} are not merged ({why}); serve this one apart")
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        raise ModelError(
            f"{adapter}: init_lora_weights={start} changed the base that this adapter was trained on; save it as an ordinary one first: "
            "PeftModel.save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return config


def _check_known(adapter: Path) -> None:
    """Raises ModelError when the adapter's config has a key that is set, and that this peft does not know: it would leave it out of account."""
    from peft import LoraConfig

    raw = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = [f"{key}={value!r:.60}" for key, value in raw.items() if key not in fields and value not in NOTHING]
    if raw.get("peft_type") == "LORA" and unknown:
        raise ModelError(
            f"{adapter}: its adapter_config.json says {', '.join(unknown)}, which peft {version('peft')} does not know and would leave out of "
            "account; merge it with the peft that wrote it, or take the key out where it changes nothing of a forward"
        )
