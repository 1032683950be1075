"""The chain of tags against all of its paths, one by one."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from qkit.core.errors import ModelError
from qkit.tasks._encoder.tagging.crf import Transitions, chain_crf, decode, log_partition, marginals
from qkit.tasks._encoder.tagging.schemes import Scheme, constraint, violations

LENGTHS = [5, 3, 1, 0, 4]


def random(*shape: int, seed: int, dtype: Any = torch.float64) -> Any:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def transitions(tags: int, seed: int = 0) -> Transitions:
    return Transitions(random(tags, tags, seed=seed), random(tags, seed=seed + 1), random(tags, seed=seed + 2))


def crf(tags: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    """A module with random scores."""
    module: Any = chain_crf(tags)
    scores = transitions(tags, seed)
    module.to(dtype).load_state_dict({"pairs": scores.pairs, "start": scores.start, "end": scores.end})
    return module


def paths(scores: Transitions, emissions: Any, length: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every sequence of tags and its score, added up number by number."""
    pairs, start, end, words = (part.tolist() for part in (scores.pairs, scores.start, scores.end, emissions))
    for path in itertools.product(range(len(start)), repeat=length):
        score = sum(words[place][tag] for place, tag in enumerate(path))
        score += sum(pairs[before][tag] for before, tag in itertools.pairwise(path))
        yield path, score + (start[path[0]] + end[path[-1]] if path else 0.0)


def log_sum(values: Sequence[float]) -> float:
    return math.log(math.fsum(math.exp(value) for value in values))


@pytest.mark.parametrize("tags", [1, 2, 4])
def test_every_path_counts(tags: int) -> None:
    scores, emissions = transitions(tags), random(len(LENGTHS), max(LENGTHS), tags, seed=7)
    lengths = torch.tensor(LENGTHS)
    partition, best = log_partition(scores, emissions, lengths), decode(scores, emissions, lengths)
    shares = marginals(scores, emissions, lengths)
    for row, length in enumerate(LENGTHS):
        known = dict(paths(scores, emissions[row], length))
        assert float(partition[row]) == pytest.approx(log_sum(list(known.values())), abs=1e-12)
        assert best[row] == list(max(known, key=lambda path: known[path]))
        for place, tag in itertools.product(range(length), range(tags)):
            through = log_sum([score for path, score in known.items() if path[place] == tag])
            assert float(shares[row, place, tag]) == pytest.approx(through - float(partition[row]), abs=1e-12)
    assert not shares[1, 3:].any()


def test_the_likelihoods_of_all_paths_add_up_to_one() -> None:
    module, emissions = crf(3, dtype=torch.float64), random(1, 4, 3, seed=7)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    likelihoods = module.requires_grad_(False).log_likelihood(
        emissions.expand(len(every), -1, -1), every, torch.full((len(every),), 4)
    )
    known = dict(paths(transitions(3), emissions[0], 4))
    total = log_sum(list(known.values()))
    assert float(likelihoods.exp().sum()) == pytest.approx(1)
    for path, likelihood in zip(every.tolist(), likelihoods.tolist(), strict=True):
        assert likelihood == pytest.approx(known[tuple(path)] - total, abs=1e-12)


def test_a_batch_is_its_rows() -> None:
    """What comes after a sentence's words is of no account: other emissions there, and tags of -100."""
    module, emissions = crf(5), random(len(LENGTHS), 6, 5, seed=7, dtype=torch.float32)
    lengths, tags = (
        torch.tensor(LENGTHS),
        torch.randint(5, (len(LENGTHS), 6), generator=torch.Generator().manual_seed(0)),
    )
    other, marked = emissions.clone(), tags.clone()
    for row, length in enumerate(LENGTHS):
        other[row, length:], marked[row, length:] = 1e4, -100
    likelihoods = module.log_likelihood(other, marked, lengths)
    shares, best = module.marginals(other, lengths), module.decode(other, lengths)
    for row, length in enumerate(LENGTHS):
        alone = (emissions[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(
            likelihoods[row : row + 1], module.log_likelihood(alone[0], tags[row : row + 1, :length], alone[1])
        )
        torch.testing.assert_close(shares[row : row + 1, :length], module.marginals(*alone))
        assert [best[row]] == module.decode(*alone)


def test_an_empty_sentence_has_one_path() -> None:
    module, nothing = crf(3), torch.zeros(2, 0, 3)
    lengths = torch.zeros(2, dtype=torch.long)
    assert module.log_likelihood(nothing, torch.zeros(2, 0, dtype=torch.long), lengths).tolist() == [0, 0]
    assert module.decode(nothing, lengths) == [[], []]
    assert module.marginals(nothing, lengths).shape == (2, 0, 3)
    padded = module.log_likelihood(torch.ones(2, 4, 3), torch.zeros(2, 4, dtype=torch.long), torch.tensor([0, 4]))
    padded.sum().backward()
    assert padded[0] == 0 and padded[1] < 0 and module.start.grad.isfinite().all()


def test_gradients_are_those_of_finite_differences() -> None:
    module, lengths = crf(3, dtype=torch.float64), torch.tensor([4, 2, 0])
    tags = torch.tensor([[0, 1, 2, 1], [2, 2, -100, -100], [-100] * 4])
    emissions = random(3, 4, 3, seed=7).requires_grad_()

    def likelihood(words: Any, pairs: Any, start: Any, end: Any) -> Any:
        values = {"pairs": pairs, "start": start, "end": end}
        call = copy.copy(module)
        call.forward = module.log_likelihood
        return torch.func.functional_call(call, values, (words, tags, lengths))

    assert torch.autograd.gradcheck(likelihood, (emissions, module.pairs, module.start, module.end))


def test_the_gradient_of_the_partition_is_the_marginals() -> None:
    scores, lengths = transitions(4), torch.tensor(LENGTHS)
    emissions = random(len(LENGTHS), 5, 4, seed=7).requires_grad_()
    log_partition(scores, emissions, lengths).sum().backward()
    shares = marginals(scores, emissions.detach(), lengths)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(emissions.grad[row, :length], shares[row, :length].exp())
        assert not emissions.grad[row, length:].any()


def test_without_transitions_each_word_is_on_its_own() -> None:
    module: Any = chain_crf(4)
    emissions, tags, lengths = random(2, 6, 4, seed=7), torch.randint(4, (2, 6)), torch.tensor([6, 6])
    alone = emissions.log_softmax(-1)
    torch.testing.assert_close(
        module.log_likelihood(emissions, tags, lengths), alone.gather(2, tags[..., None]).sum((1, 2))
    )
    torch.testing.assert_close(module.marginals(emissions, lengths), alone)
    assert module.decode(emissions, lengths) == emissions.argmax(-1).tolist()


def test_a_long_sentence_keeps_its_digits() -> None:
    exact, emissions, lengths = transitions(9), 3 * random(1, 512, 9, seed=7), torch.tensor([512])
    module = crf(9).requires_grad_(False)
    shares = module.marginals(emissions.float(), lengths)
    assert float((shares - marginals(exact, emissions, lengths)).abs().max()) < 2e-5
    assert float(shares.exp().sum(-1).sub(1).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_sums(dtype: Any) -> None:
    module, emissions = crf(5), random(2, 40, 5, seed=7, dtype=torch.float32).to(dtype)
    tags, lengths = torch.zeros(2, 40, dtype=torch.long), torch.tensor([40, 30])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module.log_likelihood(emissions, tags, lengths), module.marginals(emissions, lengths)
    for one, other in zip(
        inside,
        (module.log_likelihood(emissions.float(), tags, lengths), module.marginals(emissions.float(), lengths)),
        strict=True,
    ):
        assert one.dtype is torch.float32 and torch.equal(one, other)
    assert module.to(dtype).log_likelihood(emissions, tags, lengths).dtype is torch.float32


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["O", "B-X", "I-X", "B-Y", "I-Y"], Scheme.IOB2),
        (["I-X", "O", "B-X"], Scheme.IOB1),
        (["O", "B-X", "I-X", "E-X", "S-X"], Scheme.BIOES),
        (["U-X", "L-X", "I-X", "B-X"], Scheme.BILOU),
    ],
)
def test_the_best_valid_path(tags: list[str], scheme: Scheme) -> None:
    rule, differ = constraint(tags, scheme), 0
    for seed in range(20):
        scores, emissions = transitions(len(tags), seed), random(1, 4, len(tags), seed=seed + 100)
        known = dict(paths(scores, emissions[0], 4))
        valid = {path: score for path, score in known.items() if not violations([tags[tag] for tag in path], scheme)}
        best = decode(scores, emissions, torch.tensor([4]), rule)[0]
        assert best == list(max(valid, key=lambda path: valid[path]))
        differ += best != decode(scores, emissions, torch.tensor([4]))[0]
    assert differ > 3


def test_tags_without_a_valid_path_are_refused() -> None:
    rule = constraint(["I-X", "I-Y"], Scheme.IOB2)
    with pytest.raises(ModelError, match="no valid sequence"):
        decode(transitions(2), random(1, 3, 2, seed=0), torch.tensor([3]), rule)
    assert decode(transitions(2), random(1, 3, 2, seed=0), torch.tensor([0]), None) == [[]]


def test_it_learns_which_tags_follow_each_other() -> None:
    """Words that say nothing: only the chain can tell that 1 and 2 alternate."""
    module: Any = chain_crf(3)
    tags, lengths = torch.tensor([[1, 2, 1, 2, 1, 2]]), torch.tensor([6])
    emissions = torch.zeros(1, 6, 3)
    for _ in range(60):
        module.zero_grad()
        module.log_likelihood(emissions, tags, lengths).sum().backward()
        for scores in module.parameters():
            scores.data += 0.5 * scores.grad
    loss = -module.requires_grad_(False).log_likelihood(emissions, tags, lengths)
    assert float(loss) < 0.1 < 6 * math.log(3)
    assert module.decode(emissions, lengths) == tags.tolist()


def test_it_is_saved_and_copied_as_other_modules_are() -> None:
    module = crf(3)
    twin = copy.deepcopy(module)
    fresh: Any = chain_crf(3)
    fresh.load_state_dict(module.state_dict())
    assert sorted(module.state_dict()) == ["end", "pairs", "start"]
    for other in (twin, fresh):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
