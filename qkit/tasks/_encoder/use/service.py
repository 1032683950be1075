"""How a model with labels answers requests: a text or a pair of texts to its label, its labels, or its numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError, listed, short
from qkit.model import added_tokens
from qkit.plugins.example import RowError
from qkit.plugins.runtime import TextRow
from qkit.plugins.task import Prepared, read_labels
from qkit.tasks._distributions import log_softmax
from qkit.tasks._texts import SURROGATE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IDS = "input_ids"  # of a request that somebody has tokenized


@dataclass(frozen=True)
class Options:
    """The options of a request. `top_k`: how many labels are named with their probabilities, -1: all; None: probabilities by label id.

    `use_activation`: whether logits become probabilities. `limit`: tokens of a row. `special`: whether the tokenizer adds its tokens.
    """

    top_k: int | None = None
    use_activation: bool = True
    limit: int = 0
    special: bool = True


class LabelService:
    """One label for a text. `names`: the labels by id."""

    FIELDS: Sequence[str] = ("text", "pair")
    NAMED = "probabilities"  # the key of the values by name
    VALUE = "probability"
    OPTIONS: Collection[str] = ("top_k", "use_activation", "add_special_tokens", "truncate_prompt_tokens")

    def __init__(self, tokenizer: Any, names: Sequence[str], max_length: int):
        self.tokenizer = tokenizer
        self.names = names
        self.max_length = max_length
        self.has_types = "token_type_ids" in tokenizer.model_input_names

    def prepare(self, requests: Sequence[Mapping[str, Any]]) -> list[Prepared | RowError]:
        """The row of each request, or what is wrong with it. Requests of one form are tokenized in one call."""
        checked = [_checked(request, self.max_length) for request in requests]
        results: list[Prepared | RowError | None] = [e if isinstance(e, RowError) else None for e in checked]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, options in enumerate(checked):
            if isinstance(options, Options):
                form = (options.limit, options.special, IDS in requests[place], "pair" in requests[place])
                groups.setdefault(form, []).append(place)
        for (limit, special, ids, pair), places in groups.items():
            asked = [requests[place] for place in places]
            rows = self._given(asked, limit) if ids else self._tokenized(asked, limit, special, pair)
            for place, row in zip(places, rows, strict=True):
                results[place] = Prepared([row], checked[place]) if isinstance(row, TextRow) else row
        return [result for result in results if result is not None]

    def _tokenized(
        self, asked: Sequence[Mapping[str, Any]], limit: int, special: bool, pair: bool
    ) -> Iterator[TextRow]:
        texts, pairs = ([one.get(name) for one in asked] for name in self.FIELDS)
        encoded = self.tokenizer(
            texts, pairs if pair else None, truncation=True, max_length=limit, add_special_tokens=special, verbose=False
        )
        types = encoded.get("token_type_ids") or [[]] * len(asked)
        return (TextRow(*row) for row in zip(encoded["input_ids"], types, strict=True))

    def _given(self, asked: Sequence[Mapping[str, Any]], limit: int) -> Iterator[TextRow | RowError]:
        """Rows of token ids as they are, up to the limit."""
        for one in asked:
            ids: Any = one[IDS]
            if not ids or not all(type(number) is int and 0 <= number < len(self.tokenizer) for number in ids):
                yield RowError("its token ids are empty, or not all in the vocabulary")
            else:
                yield TextRow(ids[:limit], [0] * len(ids[:limit]) if self.has_types else [])

    def answer(self, prepared: Prepared, logits: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
        """The most likely label, and the probabilities: by label id as `probs`, or with `top_k` by name, the largest first.

        `logits`: [labels], of the request's one row. Without the activation, logits stand in place of probabilities.
        """
        import numpy as np

        options: Options = prepared.kept
        values = self.activated(logits[0]) if options.use_activation else logits[0]
        best = int(values.argmax())
        answer = {"label": self.names[best], **self.said(logits[0], values), "num_classes": len(self.names)}
        if options.top_k is None:
            return {**answer, "probs": [float(value) for value in values]}
        order = np.argsort(-values, kind="stable")[: None if options.top_k < 0 else options.top_k]
        return {**answer, self.NAMED: {self.names[number]: float(values[number]) for number in order}}

    def activated(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """What stands for each label in an answer, [labels]: here its probability, of which one label has the largest."""
        import numpy as np

        return np.exp(log_softmax(logits))

    def said(self, logits: NDArray[np.float32], values: NDArray[np.float32]) -> dict[str, Any]:
        """What the answer says beside the values and the most likely label."""
        return {"score": float(values.max())}

    def difference(self, expected: Mapping[str, Any], given: Mapping[str, Any], tolerance: float) -> str:
        """What differs between the answers to one request, "" if nothing does. `tolerance`: of each value.

        Both name all values. Where two labels are equally likely within the tolerance, either is right.
        """
        ours, theirs = (self._by_name(answer) for answer in (expected, given))
        if ours.keys() != theirs.keys():
            return f"it names the labels {listed(theirs)}, not {listed(ours)}"
        name = max(ours, key=lambda each: abs(ours[each] - theirs[each]))
        if not abs(ours[name] - theirs[name]) <= tolerance:
            return f"{short(repr(name))} has the {self.VALUE} {theirs[name]:.4f}, not {ours[name]:.4f}"
        return self.other_labels(expected, given, ours, tolerance)

    def other_labels(
        self, expected: Mapping[str, Any], given: Mapping[str, Any], values: Mapping[str, float], tolerance: float
    ) -> str:
        """What differs between the labels of two answers whose values agree within the tolerance."""
        if values.get(given["label"], -1.0) < values[expected["label"]] - tolerance:
            return f"the label is {short(repr(given['label']))}, not {short(repr(expected['label']))}"
        return ""

    def _by_name(self, answer: Mapping[str, Any]) -> dict[str, float]:
        if self.NAMED in answer:
            return dict(answer[self.NAMED])
        return dict(zip(self.names, answer["probs"], strict=False))


class SeveralLabelsService(LabelService):
    """Any number of labels for a text: those whose probability exceeds one half."""

    def activated(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The probability of each label, [labels]; each has its own."""
        import numpy as np

        from qkit.tasks._encoder.several_labels import log_probabilities

        return np.exp(log_probabilities(logits)[:, 1])

    def said(self, logits: NDArray[np.float32], values: NDArray[np.float32]) -> dict[str, Any]:
        """`labels`: the names of all that apply."""
        return {"labels": [name for name, logit in zip(self.names, logits, strict=True) if logit > 0]}

    def other_labels(
        self, expected: Mapping[str, Any], given: Mapping[str, Any], values: Mapping[str, float], tolerance: float
    ) -> str:
        """A label that only one answer has, although its probability is not one half within the tolerance."""
        for name in sorted({*expected["labels"]} ^ {*given.get("labels", expected["labels"])}):
            if abs(values.get(name, 1.0) - 0.5) > tolerance:
                return f"the labels are {listed(given['labels'])}, not {listed(expected['labels'])}"
        return ""


class NumberService(LabelService):
    """A number, or several, for a text: the head's outputs as they are."""

    NAMED = "numbers"
    VALUE = "value"

    def activated(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The numbers."""
        return logits

    def said(self, logits: NDArray[np.float32], values: NDArray[np.float32]) -> dict[str, Any]:
        """Nothing: numbers are all there is."""
        return {}

    def other_labels(
        self, expected: Mapping[str, Any], given: Mapping[str, Any], values: Mapping[str, float], tolerance: float
    ) -> str:
        """Nothing: the name of the largest number means nothing."""
        return ""


def _checked(request: Mapping[str, Any], max_length: int) -> Options | RowError:
    """The options of a request whose texts are texts; else what is wrong with it."""
    try:
        if IDS not in request:
            for name in ("text", *(["pair"] if "pair" in request else [])):
                _check_text(name, request.get(name))
        top_k, cut = (_count(name, request.get(name)) for name in ("top_k", "truncate_prompt_tokens"))
        activation, special = (_switch(name, request.get(name)) for name in ("use_activation", "add_special_tokens"))
    except RowError as error:
        return error
    return Options(top_k, activation, max_length if cut in (None, -1) else min(max_length, cut or 0), special)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RowError(f"{name} is not a text: {short(repr(value))}" if value is not None else f"has no {name}")
    if not value.strip():
        raise RowError(f"{name} is empty or contains only white space", "empty")
    if SURROGATE.search(value):
        raise RowError(f"{name} contains half of a surrogate pair, which is not valid Unicode")


def _count(name: str, value: Any) -> int | None:
    """A number from 1, -1 for all, or None."""
    if value is not None and (type(value) is not int or value < -1 or value == 0):
        raise RowError(f"{name} must be -1 or a whole number from 1, not {short(repr(value))}")
    return value


def _switch(name: str, value: Any) -> bool:
    """True unless it is switched off."""
    if not isinstance(value, bool | None):
        raise RowError(f"{name} must be true or false, not {short(repr(value))}")
    return value is not False


def open_service(kind: type[LabelService], folder: Path, max_length: int) -> LabelService:
    """Open the tokenizer and the label names of an artifact. `kind`: what the head's outputs mean.

    Raises:
        ModelError: the folder has no tokenizer, or no labels.json.
    """
    names = read_labels(folder)
    if not names:
        raise ModelError(
            f"{folder}: labels.json is missing, so the labels have no names; export it again", source=folder
        )
    return kind(added_tokens.bare_tokenizer(folder, False), names, max_length)
