"""Artifacts broken on purpose: which check sees it, and what it says. And the whole ones, at which none fires."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkit import pipeline
from qkit.commands import compare, where_layers_part
from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, ModelError, ParityFailed
from qkit.core.progress import Progress
from qkit.measure import contract as measure_contract
from qkit.measure import evidence, parity, reference
from qkit.measure import gates as measure_gates
from qkit.measure.held_out import HeldOut, held_out_of
from qkit.plugins.runtime import open_runtime
from qkit.run.directory import Run
from qkit.verify import stage as verify_stage

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """A tiny run through `merge`, and what its reference model says of the held-out rows."""

    run: Run
    held_out: HeldOut
    reference: parity.Reference

    @property
    def merged(self) -> Path:
        return self.run.folder("merge")


@pytest.fixture(scope="module")
def trained(trained_run: Run) -> Iterator[Trained]:
    """Each model that is closed is followed by a garbage collection: of what is there by now nothing need be looked at again."""
    held_out = held_out_of(trained_run)
    known = Trained(trained_run, held_out, reference.recorded(trained_run, held_out.rows))
    gc.collect()
    gc.freeze()
    yield known
    gc.unfreeze()


def tensors(change: Callable[[Tensors, Trained], Any]) -> Callable[[Path, Trained], None]:
    """A break of the weights."""

    def broken(folder: Path, trained: Trained) -> None:
        held = load_file(folder / "model.safetensors")
        changed = change(held, trained) or held
        save_file({n: t.contiguous() for n, t in changed.items()}, folder / "model.safetensors", {"format": "pt"})

    return broken


def texts(name: str, **changes: Any) -> Callable[[Path, Trained], None]:
    """A break of a JSON file; None takes a key out."""

    def broken(folder: Path, _: Trained) -> None:
        found = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return broken


def template(old: str, new: str) -> Callable[[Path, Trained], None]:
    def broken(folder: Path, _: Trained) -> None:
        file = folder / "chat_template.jinja"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return broken


def swapped(one: str, other: str) -> Callable[[Tensors, Trained], Any]:
    return lambda held, _: {n.replace(one, "@").replace(other, one).replace("@", other): t for n, t in held.items()}


def transposed(name: str) -> Callable[[Tensors, Trained], Any]:
    return lambda held, _: {**held, name: held[name].T}


def adapter_once_more(share: float) -> Callable[[Tensors, Trained], Any]:
    """The adapter's deltas added again, times `share`."""

    def change(held: Tensors, trained: Trained) -> None:
        adapter = load_file(trained.run.folder("train") / "adapter" / "adapter_model.safetensors")
        for name in [name for name in adapter if "lora_A" in name]:
            delta = adapter[name.replace("lora_A", "lora_B")].float() @ adapter[name].float()
            weight = re.sub(r"base_model\.model\.(.*)\.lora_A\.weight", r"\1.weight", name)
            held[weight] = (held[weight].float() + share * 2 * delta).to(held[weight].dtype)  # lora_alpha / r = 2

    return change


def flipped_bit(name: str) -> Callable[[Tensors, Trained], None]:
    """The highest bit of the exponent of one weight."""

    def change(held: Tensors, _: Trained) -> None:
        held[name].view(torch.int16)[3, 5] ^= 1 << 14

    return change


def overflown(held: Tensors, _: Trained) -> None:
    """A weight too large for the dtype that it was written in."""
    held["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf


def without(name: str) -> Callable[[Tensors, Trained], Any]:
    return lambda held, _: {n: t for n, t in held.items() if n != name}


def of_the_base(held: Tensors, trained: Trained) -> Tensors:
    return load_file(Path(trained.run.recipe.model.source) / "model.safetensors")


def truncated(folder: Path, _: Trained) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def no_tokenizer(folder: Path, _: Trained) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def other_tokenizer(folder: Path, _: Trained) -> None:
    """Two letters have changed places."""
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    words = found["model"]["vocab"]
    words["a"], words["s"] = words["s"], words["a"]
    file.write_text(json.dumps(found))


@dataclass(frozen=True)
class Break:
    """`gates`: the limits that it does not keep; `contract`: the checks that differ; each with words of what is said. `loader`: why it does not
    open.

    `place`, `inside`: where `--where` says that it parts from the whole one.
    """

    how: Callable[[Path, Trained], None]
    gates: Mapping[str, str] = field(default_factory=dict)
    contract: Mapping[str, str] = field(default_factory=dict)
    loader: str = ""
    place: str = ""
    inside: str = ""


FAR = {"kl_mean": r"mean KL to the trained model beyond rounding and chance .* \(limit 0.0001\)"}
BREAKS = {
    "two layers swapped": Break(tensors(swapped("layers.0.", "layers.1.")), FAR, place="layer 0"),
    "a transposed matrix": Break(
        tensors(transposed("model.layers.1.self_attn.q_proj.weight")), FAR, place="layer 1", inside="self_attn.q_proj"
    ),
    "another transposed matrix": Break(
        tensors(transposed("model.layers.0.self_attn.o_proj.weight")), FAR, place="layer 0", inside="self_attn.o_proj"
    ),
    "keys and values swapped": Break(
        tensors(swapped("layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj")),
        FAR,
        place="layer 1",
        inside="self_attn.k_proj",
    ),
    "another rope base": Break(
        texts("config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        FAR,
        {"transformers 4": "has rope_theta 10000, but 500000 in the new form"},
        place="positions",
    ),
    "another norm epsilon": Break(
        texts("config.json", rms_norm_eps=1.0), FAR, place="layer 0", inside="input_layernorm"
    ),
    "another activation": Break(
        texts("config.json", hidden_act="relu"), FAR, place="layer 0", inside="mlp.act_fn"
    ),
    "the adapter times 1.1": Break(tensors(adapter_once_more(0.1)), FAR),
    "the adapter twice": Break(tensors(adapter_once_more(1.0)), FAR, place="layer 0", inside="self_attn.q_proj"),
    "the base in its place": Break(tensors(of_the_base), {**FAR, "lost": "the fine-tune is lost"}, place="layer 0"),
    "a flipped bit": Break(
        tensors(flipped_bit("model.layers.1.mlp.down_proj.weight")), FAR, place="layer 1", inside="mlp.down_proj"
    ),
    "a weight that overflowed": Break(
        tensors(overflown), {"numbers": "NaN or infinite log-probabilities"}, place="layer 1", inside="mlp.up_proj"
    ),
    "a head that is not tied": Break(
        texts("config.json", tie_word_embeddings=True), contract={"tied head": "runtimes use different heads"}
    ),
    "a head lost to the tie": Break(
        lambda folder, trained: (
            texts("config.json", tie_word_embeddings=True)(folder, trained),
            tensors(without("lm_head.weight"))(folder, trained),
        )[0],
        FAR,
        place="head",
    ),
    "a missing tensor": Break(
        tensors(without("model.layers.1.mlp.up_proj.weight")), loader="missing weights: model.layers.1.mlp.up_proj.weight"
    ),
    "a layer too few": Break(texts("config.json", num_hidden_layers=1), loader="weights that config.json does not describe"),
    "another number of heads": Break(texts("config.json", num_attention_heads=4), loader="do not match config"),
    "a truncated shard": Break(truncated, loader="weights are damaged"),
    "a class of transformers 5": Break(
        texts("tokenizer_config.json", tokenizer_class="TokenizersBackend"), contract={"transformers 4": "names the class TokenizersBackend"}
    ),
    "another dtype": Break(
        texts("config.json", dtype="float16"),
        contract={"dtype": "float16, the run wrote bfloat16", "transformers 4": "torch_dtype bfloat16, but float16 in the new form"},
    ),
    "no stop token": Break(texts("generation_config.json", eos_token_id=0), contract={"stop tokens": "does not stop at token 2"}),
    "no tokenizer": Break(no_tokenizer, contract={"prompt tokens": "the folder has no tokenizer"}),
    "another tokenizer": Break(other_tokenizer, contract={"prompt tokens": r"training had 'system\\nBe br', this has 'ayatem"}),
    "no system turn": Break(
        template("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"),
        contract={"prompt tokens": r"From token 1 on, training had 'system\\nBe br', this has 'user"},
    ),
    "one more BOS": Break(
        template("{% for message in messages %}", "{{ bos_token }}{% for message in messages %}"),
        contract={"prompt tokens": "45 prompt tokens; training had 44"},
    ),
    "a shorter context": Break(texts("config.json", max_position_embeddings=40), contract={"length": "the context is 40 tokens"}),
}  # fmt: skip


def gated(trained: Trained, folder: Path) -> list[evidence.Breach]:
    """What the gate of a 16-bit artifact says of the folder."""
    with open_runtime("transformers", folder, detect()) as runtime:
        try:
            measured = parity.measure(trained.reference, runtime.score(trained.held_out.rows))
        except ParityFailed:
            return [evidence.Breach("numbers")]
    return measure_gates.judge(measure_gates.gate_of("merged", trained.run.recipe), measured)


def walked(trained: Trained, one: Path, other: Path) -> where_layers_part.Walk:
    return where_layers_part.walk(compare.side(str(one)), compare.side(str(other)), trained.held_out.rows, Progress())


def test_no_check_fires_at_a_whole_artifact(trained: Trained) -> None:
    assert gated(trained, trained.merged) == []
    assert measure_contract.check_folder(trained.run, trained.merged).broken == ()
    assert trained.run.changed("merge") == []
    found = walked(trained, trained.run.root, trained.merged)
    assert found.first is None and len(found.places) == 6 and "nowhere by more than rounding" in found.description


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_artifact_is_seen(name: str, trained: Trained, tmp_path: Path) -> None:
    """By just the checks that are named here, in these words; `--where` leads to the place."""
    wanted, folder = BREAKS[name], shutil.copytree(trained.merged, tmp_path / "merge")
    wanted.how(folder, trained)
    found = measure_contract.check_folder(trained.run, folder).broken if not wanted.loader else ()
    assert {check.name for check in found} == set(wanted.contract)
    assert all(re.search(wanted.contract[check.name], check.detail) for check in found), found
    if wanted.loader:
        with pytest.raises(ModelError, match=wanted.loader):
            gated(trained, folder)
        return
    breaches = gated(trained, folder)
    found_gates = {breach.gate: breach.message for breach in breaches}
    more = {
        "lost",
        "kl_row",
    }  # what is far from all models may be nearer to any, and what is far on the whole is so in some row
    assert found_gates.keys() - more == wanted.gates.keys() - more
    assert all(re.search(words, found_gates[gate]) for gate, words in wanted.gates.items()), breaches
    if wanted.place:
        walk = walked(trained, trained.merged, folder)
        assert walk.first is not None and walk.first.name == wanted.place, walk.description
        if wanted.inside:
            assert walk.first_inside is not None and walk.first_inside.name == wanted.inside, walk.description


@pytest.mark.parametrize("name", ["a flipped bit", "a truncated shard", "no stop token", "no system turn"])
def test_what_changed_after_it_was_made_is_seen_by_its_hash(name: str, trained: Trained, tmp_path: Path) -> None:
    """Also where size and time of the file are the old ones, as on a disk that fails."""
    run = Run.open(shutil.copytree(trained.run.root, tmp_path / "run"))
    before = {file: file.stat() for file in run.folder("merge").iterdir()}
    BREAKS[name].how(run.folder("merge"), trained)
    for file, status in before.items():
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(run.changed("merge")) == 1
    with pytest.raises(MissingArtifact, match=r"not that of the file that the stage `merge` wrote.*qkit merge"):
        verify_stage.run(run, tmp_path)


def test_a_shard_of_another_run_is_seen_by_its_hash(trained: Trained, other_model: Path, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(trained.run.root, tmp_path / "run"))
    shutil.copyfile(other_model / "model.safetensors", run.folder("merge") / "model.safetensors")
    assert not run.whole("merge") and run.changed("merge") == ["merge/model.safetensors"]
    with pytest.raises(MissingArtifact, match="`verify` needs the stage `merge`, which is out of date"):
        pipeline.execute(run, "verify")
