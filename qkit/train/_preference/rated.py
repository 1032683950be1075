"""The Trainer of rated answers: KTO (https://arxiv.org/abs/2402.01306), as TRL's KTOTrainer has it.

How far the model is from the reference is estimated on answers to other prompts. Beside each answer stands such a one, of another row; the
prompt is computed once for both, as in a pair.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qkit.core.batching import IGNORED
from qkit.train._preference.trainer import CountedPairs, side_sums
from qkit.train.fast.pairs import CHOSEN, REJECTED, LabelledTokens, labelled_tokens

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


class CountedRated(CountedPairs):
    """What qkit changes in a Trainer whose rows are rated answers. `section`: recipe.feedback."""

    section: Any

    def tokens(self, inputs: Mapping[str, torch.Tensor]) -> LabelledTokens:
        """The log-probabilities of the answer and of the other prompt's, whose labels are not counted."""
        return labelled_tokens(self.base_model, {**inputs, "labels": inputs["scored"]}, self.shared)

    def losses(
        self, tokens: LabelledTokens, inputs: Mapping[str, torch.Tensor], per_token: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each answer, [rows]: how little a good one gained, or a bad one lost, against what answers gain anyway."""
        import torch

        ratios = side_sums(tokens, len(inputs["starts"]), None) - inputs["reference"]
        gains = ratios[:, CHOSEN]
        if self.section.loss_type == "kto":
            gains = gains - ratios[:, REJECTED].detach().mean().clamp(min=0)
        good = inputs["desirable"].bool()
        weights = torch.where(good, self.section.desirable_weight, self.section.undesirable_weight)
        return weights * (1 - (self.section.beta * torch.where(good, gains, -gains)).sigmoid())


def trainer_class() -> Any:
    """The trainer as a subclass of transformers' Trainer. A function, to import transformers no sooner than needed."""
    from transformers import Trainer

    return type("Trainer", (CountedRated, Trainer), {})


def with_others(rows: Dataset, seed: int, compares: bool) -> Dataset:
    """Rows as collate_rated reads them: each with the answer of another row behind its own, or with none. `rows`: input_ids, labels, start,
    desirable. Which answer stands where depends on the seed and the number of rows alone.
    """
    from datasets import Features, List, Value

    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    following = dict(zip(order, [*order[1:], *order[:1]], strict=True))

    def joined(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        other: Mapping[str, Any] = rows[following[number]] if compares else {"input_ids": [], "labels": [], "start": 0}
        ids, labels = (other[name][other["start"] :] for name in ("input_ids", "labels"))
        return {
            "input_ids": [*row["input_ids"], *ids],
            "labels": [*row["labels"], *[IGNORED] * len(labels)],
            "scored": [*row["labels"], *labels],
            "start": row["start"],
            "rejected_start": len(row["input_ids"]),
            "desirable": row["desirable"],
        }

    ids, place = List(Value("int32")), Value("int32")
    columns = {**dict.fromkeys(("input_ids", "labels", "scored"), ids)}
    features = Features({**columns, **dict.fromkeys(("start", "rejected_start", "desirable"), place)})
    mapped: Dataset = rows.map(joined, with_indices=True, remove_columns=rows.column_names, features=features)
    return mapped
