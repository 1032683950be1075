"""Packs: how rows are put together, and whether the check of their isolation fires when it is broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from qkit.core.batching import IGNORED, PackBatches, packed
from qkit.tasks._conversation.collate import collate_pack
from qkit.train import pack_isolation
from qkit.train.fast.head import labelled_loss
from qkit.train.trainer import add_trl_head


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(1, 64))
def test_packs_hold_every_row_once_and_no_more_than_they_can(lengths: list[int], capacity: int) -> None:
    places = packed(lengths, capacity)
    packs: dict[int, list[tuple[int, int]]] = {}
    for (pack, position), length in zip(places, lengths, strict=True):
        packs.setdefault(pack, []).append((position, length))
    assert sorted(packs) == list(range(len(packs)))
    for members in packs.values():
        members.sort()
        assert [position for position, _ in members] == [sum(n for _, n in members[:i]) for i in range(len(members))]
        assert len(members) == 1 or sum(length for _, length in members) <= capacity
    fills = sorted(sum(length for _, length in members) for members in packs.values())
    assert len(fills) == 1 or fills[0] + fills[1] > capacity  # no two packs could have been one
    assert packed(lengths, capacity) == places


def test_the_tightest_pack_is_taken() -> None:
    assert packed([6, 5, 3, 4, 1], 9) == [(0, 0), (1, 0), (0, 6), (1, 5), (2, 0)]
    assert packed([12, 2], 8) == [(0, 0), (1, 0)]  # a row beyond the capacity has a pack to itself


def test_packs_waste_little() -> None:
    lengths = [(i * 7919) % 900 + 20 for i in range(5000)]
    packs = max(pack for pack, _ in packed(lengths, 2048)) + 1
    assert sum(lengths) / (packs * 2048) > 0.99


def test_batches_are_whole_packs_in_an_order_of_seed_and_epoch() -> None:
    places = packed([(i * 37) % 90 + 1 for i in range(200)], 256)
    packs, positions = [pack for pack, _ in places], [position for _, position in places]
    batches = PackBatches(packs, positions, seed=3)
    seen = list(batches)
    assert len(seen) == len(batches) == max(packs) + 1
    for batch in seen:
        assert {packs[row] for row in batch} == {packs[batch[0]]}
        assert [positions[row] for row in batch] == sorted(positions[row] for row in batch)
    assert sorted(row for batch in seen for row in batch) == list(range(200))
    assert list(batches) == seen != list(PackBatches(packs, positions, seed=4))
    batches.set_epoch(1)
    assert list(batches) != seen


def test_a_pack_is_one_row_of_documents() -> None:
    rows = [{"input_ids": [7, 8, 9], "labels": [IGNORED, 8, 9]}, {"input_ids": [5, 6], "labels": [IGNORED, 6]}]
    batch = collate_pack(rows, pad=1)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5, 6] + [1] * 11]
    assert batch["labels"].tolist() == [[IGNORED, 8, 9, IGNORED, 6] + [IGNORED] * 11]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, *range(11)]]  # the padding is a document too
    assert batch["lengths"].tolist() == [3, 2]
    assert "attention_mask" not in batch


# --- isolation --------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 2},
    "mistral": {"sliding_window": 4096},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "num_hidden_layers": 7},
}


def _model(family: str, attention: str) -> Any:
    settings = {"num_hidden_layers": 4, "num_key_value_heads": 4, **SMALL, **IDS, **FAMILIES[family]}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.use_cache = False
    return model


def _trl_loss(model: Any, batch: Any, items: int) -> torch.Tensor:
    if "forward" not in vars(model):
        add_trl_head(model)
    loss: torch.Tensor = -model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum() / items
    return loss


def _positions_go_on(model: Any, batch: Any, items: int) -> torch.Tensor:
    going_on = torch.arange(batch["input_ids"].shape[1])[None]
    return labelled_loss(model, {**batch, "position_ids": going_on}, items)


def _cache_left_on(model: Any, batch: Any, items: int) -> torch.Tensor:
    loss: torch.Tensor = model(**batch, use_cache=True, num_items_in_batch=items).loss
    return loss


def _mask_of_ones(model: Any, batch: Any, items: int) -> torch.Tensor:
    ones = torch.ones_like(batch["input_ids"])
    loss: torch.Tensor = model(**batch, attention_mask=ones, use_cache=False, num_items_in_batch=items).loss
    return loss


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_isolation_holds_where_nothing_is_broken(family: str, attention: str) -> None:
    model = _model(family, attention)
    for loss in (labelled_loss, _trl_loss):
        verdict = pack_isolation.check(model, loss)
        assert verdict.holds, verdict
        assert verdict.attn_implementation == attention and verdict.dtype == "float32"
        assert verdict.difference is not None and verdict.difference <= 1e-5


@pytest.mark.parametrize("leak", [_positions_go_on, _cache_left_on, _mask_of_ones])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_isolation_broken_on_purpose_is_seen(family: str, attention: str, leak: Any) -> None:
    verdict = pack_isolation.check(_model(family, attention), leak)
    assert verdict.verdict == "does not hold"
    assert verdict.difference is not None and verdict.difference > 1e-3


def test_a_check_that_could_not_fail_says_so() -> None:
    def deaf(model: Any, batch: Any, items: int) -> torch.Tensor:
        return torch.tensor(1.0)

    assert pack_isolation.check(_model("llama", "sdpa"), deaf).verdict == "could not be checked"


def test_a_model_that_cannot_be_copied_small_is_not_called_safe() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4, **IDS)
    verdict = pack_isolation.check(AutoModelForCausalLM.from_config(config), labelled_loss)
    assert verdict.verdict == "could not be checked"
    assert "num_attention_heads" in verdict.reason


def test_the_replica_is_small_and_has_every_kind_of_layer() -> None:
    config = AutoConfig.for_model("gemma3_text")  # the family's own defaults: 26 layers, every sixth of them global
    before = config.to_dict()
    small = pack_isolation.replica_config(config)
    assert set(small.layer_types) == set(config.layer_types) and small.num_hidden_layers == len(small.layer_types) <= 4
    assert small.head_dim == config.head_dim and small.num_key_value_heads < small.num_attention_heads
    assert config.to_dict() == before


def test_the_check_leaves_the_random_numbers_alone() -> None:
    model = _model("llama", "sdpa")
    torch.manual_seed(1)
    wanted = torch.rand(4)
    torch.manual_seed(1)
    pack_isolation.check(model, labelled_loss)
    assert torch.equal(torch.rand(4), wanted)
