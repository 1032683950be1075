"""A base model that has neither a chat template nor tokens for its turns: both are given to it, learnt, and merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from helpers.tiny import build_tokenizer, chat_rows, tiny_settings
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import ModelError, RecipeError
from qkit.core.progress import Progress
from qkit.merging import folder as merging_folder
from qkit.model import added_tokens, load, provenance, source
from qkit.model import tokenizer as model_tokenizer
from qkit.recipe import schema
from qkit.recipe.load import from_dict
from qkit.run.directory import Run
from qkit.train.trainers import sft

pytestmark = pytest.mark.slow

TOKENS = ["<|im_start|>", "<|im_end|>"]
KNOWN = 257  # <|endoftext|> and one token for each byte
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def build_base(
    folder: Path, tied: bool = False, spare: int = 0, shard_bytes: int = 1 << 30, seed: int = 0, both: bool = False
) -> Path:
    """A tiny Llama as it comes from pretraining: one special token, which ends a document, and no template.

    `both`: the checkpoint holds the head although it is tied to the embedding.
    """
    tokenizer = bare_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=KNOWN + spare,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_bytes)
    tokenizer.save_pretrained(folder)
    if both:
        held = weights(folder)
        save_file({**held, HEAD: held[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def bare_tokenizer() -> Any:
    """The bytes of the usual one, and of its special tokens only <|endoftext|>."""
    from transformers import PreTrainedTokenizerFast

    written = json.loads(build_tokenizer().backend_tokenizer.to_str())
    kept = [token for token in written["model"]["vocab"] if token not in TOKENS]
    written["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    written["added_tokens"] = []
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)), eos_token="<|endoftext|>")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def prepared(folder: Path, tokens: list[str] = TOKENS) -> Path:
    return source.resolve(schema.Model(source=str(folder), add_tokens=tuple(tokens)))


# --- the prepared model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spare", "count", "rows"),
    [(0, 2, 259), (7, 2, 264), (1, 2, 260), (63, 70, 384)],
    ids=["none", "enough", "too few", "padded"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_are_added_where_there_are_none_to_spare(
    tmp_path: Path, tied: bool, spare: int, count: int, rows: int
) -> None:
    base = build_base(tmp_path / "base", tied, spare)
    tokens = [f"<|{number}|>" for number in range(count)]
    folder = prepared(base, tokens)
    before, after = weights(base), weights(folder)
    assert before.keys() == after.keys() and (HEAD in after) is not tied
    for name in before.keys() - {EMBEDDING, HEAD}:
        assert torch.equal(before[name], after[name]), name
    for name in {EMBEDDING, HEAD} & before.keys():
        assert after[name].shape == (rows, 64)
        assert torch.equal(before[name][:KNOWN], after[name][:KNOWN])
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("".join(tokens))["input_ids"] == list(range(KNOWN, KNOWN + count))
    assert AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[KNOWN]])).logits.shape[-1] == rows


def test_new_rows_are_like_the_others_and_always_the_same(tmp_path: Path) -> None:
    base, tokens = build_base(tmp_path / "base", spare=300), [f"<|{number}|>" for number in range(300)]
    with torch.no_grad():
        changed = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        changed.lm_head.weight[:KNOWN] += torch.arange(64)
        changed.lm_head.weight[KNOWN:] = 0
    changed.save_pretrained(base)
    one = weights(prepared(base, tokens))[HEAD].double()
    old, new = one[:KNOWN], one[KNOWN : KNOWN + 300]
    assert (old.mean(0) - new.mean(0)).abs().max() < 0.1
    assert (new.std(0) / old.std(0)).min() > 0.8 and (new.std(0) / old.std(0)).max() < 1.2
    added_tokens.prepare(base, tokens, False, tmp_path / "again")
    assert torch.equal(weights(tmp_path / "again")[HEAD].double(), one)


def test_shards_that_stay_as_they_are_are_links(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", shard_bytes=40_000)
    folder = prepared(base)
    same = [shard for shard in base.glob("*.safetensors") if shard.stat().st_ino == (folder / shard.name).stat().st_ino]
    assert len(list(base.glob("*.safetensors"))) == len(same) + 2 > 4  # of the embedding, and of the head
    index = json.loads((folder / added_tokens.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(folder).values())
    assert index["weight_map"].keys() == weights(folder).keys()


def test_what_depends_on_the_base_and_the_tokens_alone_is_made_once(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    first = prepared(base)
    made = (first / "config.json").stat().st_mtime_ns
    assert prepared(base) == first and (first / "config.json").stat().st_mtime_ns == made
    assert prepared(base, ["<|other|>"]) != first
    assert prepared(build_base(tmp_path / "other", seed=1)) != first
    assert not list(first.parent.glob(".making-*"))


def test_tokens_that_are_there_change_no_weight(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    folder = prepared(base, ["<|endoftext|>", "A"])
    assert (base / "model.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "A" in tokenizer.all_special_tokens and len(tokenizer) == KNOWN


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    config = PhiConfig(
        vocab_size=KNOWN, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    bare_tokenizer().save_pretrained(tmp_path / "phi")
    with pytest.raises(ModelError, match=r"a head with a bias \(lm_head.bias\)"):
        prepared(tmp_path / "phi")


# --- what is refused, and what is offered -----------------------------------------------------------------------------


def test_a_base_without_a_template_is_offered_one(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    with pytest.raises(ModelError, match=r"model\.chat_template=chatml"):
        model_tokenizer.load_tokenizer(base, schema.Model(source=str(base)))


def test_markers_that_are_no_tokens_are_refused_with_both_ways_out(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    with pytest.raises(ModelError) as refused:
        model_tokenizer.load_tokenizer(base, schema.Model(source=str(base), chat_template="chatml"))
    text = str(refused.value)
    assert "<|im_start|> would be read as 12 ordinary tokens" in text
    assert '--set \'model.add_tokens=["<|im_start|>", "<|im_end|>"]\'' in text and "model.chat_template=plain" in text
    offered = {"chat_template": "chatml", "add_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer = model_tokenizer.load_tokenizer(base, schema.Model(source=str(base), **offered))
    assert (
        len(tokenizer.apply_chat_template([{"role": "user", "content": ""}])["input_ids"]) == 1 + len("user\n") + 1 + 1
    )


def test_a_copy_of_the_models_own_template_may_write_markers_as_text(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    own = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
    tokenizer.chat_template = own
    tokenizer.save_pretrained(base)
    (tmp_path / "copy.jinja").write_text(own + "{# dated #}")
    section = schema.Model(source=str(base), chat_template=str(tmp_path / "copy.jinja"))
    assert model_tokenizer.load_tokenizer(base, section).chat_template.endswith("{# dated #}")


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_named_template_begins_as_the_models_texts_do(tmp_path: Path, name: str) -> None:
    from tokenizers.processors import TemplateProcessing

    base = build_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    number = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    tokenizer.save_pretrained(base)
    section = schema.Model(source=str(base), chat_template=name, add_tokens=tuple(TOKENS))
    ids = model_tokenizer.load_tokenizer(base, section).apply_chat_template([{"role": "user", "content": "a"}])[
        "input_ids"
    ]
    assert ids.count(number) == 1 and ids[0] == number


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.target_modules=[q_proj, lm_head]"], "lora.target_modules contains lm_head"),
        (["model.add_tokens=['two words']"], "should match pattern"),
    ],
)
def test_what_cannot_stand_beside_added_tokens(tmp_path: Path, overrides: list[str], said: str) -> None:
    settings = tiny_settings(tmp_path, tmp_path / "rows.jsonl")
    settings["model"]["add_tokens"] = TOKENS
    settings["bench"]["runtimes"] = ["transformers"]
    with pytest.raises(RecipeError, match=said):
        from_dict(settings, overrides, "test")


# --- from rows to the merged model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A run through data, train and merge, and the folder that it was trained on."""

    run: Run
    base: Path

    @property
    def merged(self) -> Path:
        return self.run.folder("merge")

    @property
    def ids(self) -> torch.Tensor:
        """A training row, [1, tokens]."""
        import pyarrow.parquet as pq

        rows = pq.read_table(self.run.need("data", "train.parquet"), columns=["input_ids"]).to_pylist()
        return torch.tensor([rows[0]["input_ids"]])


def finish(folder: Path, section: dict[str, Any], **shape: Any) -> Finished:
    base = build_base(folder / "base", **shape)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24)), encoding="utf-8")
    settings = tiny_settings(base, rows)
    settings["model"] |= section
    run = Run.create(folder / "run", from_dict(settings, [], "test"))
    for stage in ("data", "train"):
        pipeline.execute(run, stage)
    merging_folder.write_folder(run, run.folder("merge"), "dequantized")
    return Finished(run, source.resolve(run.recipe.model))


CHATML = {"chat_template": "chatml", "add_tokens": TOKENS}
CASES = {
    "untied": (CHATML, {}),
    "tied": (CHATML, {"tied": True}),
    "tied, both stored": (CHATML, {"tied": True, "both": True}),
    "spare": (CHATML, {"spare": 7}),
    "plain": ({"chat_template": "plain"}, {}),
}


@pytest.fixture(scope="module", params=list(CASES))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    section, shape = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:  # the fixture of one test, which does the same, comes too late
        patch.setenv("QKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return finish(tmp_path_factory.mktemp("finished"), section, **shape)


def logprobs(loaded: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return loaded(ids).logits.float().log_softmax(-1)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_merged_model_says_what_the_live_one_says(finished: Finished, tmp_path: Path) -> None:
    how, adapter = finished.run.recipe, finished.run.need("train", "adapter")
    live = logprobs(load.load_reference(finished.base, how, detect(), adapter), finished.ids)
    base = logprobs(load.load_reference(finished.base, how, detect(), None), finished.ids)
    merged = logprobs(AutoModelForCausalLM.from_pretrained(finished.merged, dtype=torch.bfloat16), finished.ids)
    assert kl(live, merged) < 2e-3 and kl(live, base) > 20 * kl(live, merged)


def test_only_the_learnt_rows_change(finished: Finished) -> None:
    before, after = weights(finished.base), weights(finished.merged)
    tokenizer = AutoTokenizer.from_pretrained(finished.merged)
    learnt = sorted(tokenizer.convert_tokens_to_ids(token) for token in finished.run.recipe.model.add_tokens)
    for name in {EMBEDDING, HEAD} & before.keys():
        moved = (before[name] != after[name]).any(dim=1).nonzero()[:, 0].tolist()
        assert moved == learnt, name


def test_without_its_rows_the_merged_model_is_another(finished: Finished) -> None:
    merged = AutoModelForCausalLM.from_pretrained(finished.merged, dtype=torch.bfloat16)
    whole = logprobs(merged, finished.ids)
    with torch.no_grad():
        for name, tensor in weights(finished.base).items():
            if name in (EMBEDDING, HEAD):
                merged.get_parameter(name).copy_(tensor)
    changed = kl(whole, logprobs(merged, finished.ids))
    assert changed > 1e-2 if finished.run.recipe.model.add_tokens else changed == 0


def test_the_merged_folder_reads_each_added_token_as_one(finished: Finished) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished.merged)
    config = json.loads((finished.merged / "config.json").read_text())
    assert config["vocab_size"] == weights(finished.merged)[EMBEDDING].shape[0] >= len(tokenizer)
    for token in finished.run.recipe.model.add_tokens:
        [number] = tokenizer(token)["input_ids"]
        assert tokenizer.decode([number]) == token and tokenizer.decode([number], skip_special_tokens=True) == ""


def test_server_and_training_agree_on_a_prompt_and_on_its_end(finished: Finished) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished.merged)
    [asked, said] = chat_rows(24)[4]["messages"]
    whole = finished.ids[0].tolist()
    prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True)["input_ids"]
    assert whole[: len(prompt)] == prompt and tokenizer.decode(whole[len(prompt) : -1]) == said["content"]
    stop = json.loads((finished.merged / "generation_config.json").read_text())["eos_token_id"]
    assert whole[-1] in (stop if isinstance(stop, list) else [stop])


def test_the_adapter_holds_rows_and_not_matrices(finished: Finished) -> None:
    held = load_file(finished.run.need("train", "adapter") / "adapter_model.safetensors")
    rows = {name: tuple(tensor.shape) for name, tensor in held.items() if "lora_" not in name}
    added = len(finished.run.recipe.model.add_tokens)
    tied = json.loads((finished.base / "config.json").read_text())["tie_word_embeddings"]
    assert list(rows.values()) == ([(added, 64)] * (1 if tied else 2) if added else [])


def test_live_rows_are_settled_without_a_change(finished: Finished) -> None:
    """peft's own forward copies the matrix and puts the rows into the copy."""
    how, adapter = finished.run.recipe, finished.run.need("train", "adapter")
    base = load.load_base(finished.base, how, detect())
    source.dequantize(base)
    copied = logprobs(PeftModel.from_pretrained(base, str(adapter)).eval(), finished.ids)
    assert torch.equal(copied, logprobs(load.load_reference(finished.base, how, detect(), adapter), finished.ids))


def test_both_heads_give_the_learnt_rows_the_same_gradient(finished: Finished, tmp_path: Path) -> None:
    """On a GPU the loss is TRL's, which reads the head's weight and bias and never calls it."""
    trainer = sft.build_trainer(finished.run, finished.base, detect(), tmp_path)
    ours, theirs = (row_gradients(trainer, labelled) for labelled in (True, False))
    assert ours.keys() == theirs.keys() and bool(ours) == bool(finished.run.recipe.model.add_tokens)
    for name, gradient in ours.items():
        assert gradient.abs().sum(1).min() > 0, name
        assert (gradient - theirs[name]).norm() < 1e-2 * gradient.norm(), name


def row_gradients(trainer: Any, labelled: bool) -> dict[str, torch.Tensor]:
    trainer._labelled_head = labelled
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"] >= 0).sum()).backward()
    found = {name: p.grad for name, p in trainer.model.named_parameters() if "trainable_tokens_delta" in name}
    trainer.model.zero_grad()
    return found


def test_a_killed_run_goes_on_with_the_rows_it_had(finished: Finished, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", finished.run.recipe, StopsAt(2))
    pipeline.execute(run, "data")
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute(run, "train")
    rest = StopsAt(4)
    again = Run.create(tmp_path / "run", finished.run.recipe, rest)
    pipeline.execute(again, "train")
    assert rest.left == 2  # of the four steps two were done
    one, two = (load_file(r.need("train", "adapter") / "adapter_model.safetensors") for r in (finished.run, again))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


class StopsAt(Progress):
    """Ends the run at a training step, as a signal would."""

    def __init__(self, step: int):
        self.left = step

    @contextmanager
    def bar(self, name: str, total: float | None, start: float = 0) -> Iterator[Any]:
        self.name = name
        yield self

    def advance(self, steps: float = 1, **figures: float) -> None:
        self.left -= self.name == "train"
        if self.left < 0:
            raise KeyboardInterrupt


def test_another_base_is_refused(finished: Finished, tmp_path: Path) -> None:
    bare = shutil.copytree(finished.run.recipe.model.source, tmp_path / "bare")
    adapter = finished.run.need("train", "adapter")
    if finished.run.recipe.model.add_tokens:
        with pytest.raises(ModelError, match="was trained on"):
            provenance.check_adapter(adapter, bare)
    else:
        provenance.check_adapter(adapter, bare)
