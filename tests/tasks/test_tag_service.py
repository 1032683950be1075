"""Requests to a model that tags words: sentences to entities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_labelled import build_tokenizer
from qkit.commands.predict import servers
from qkit.measure import label_contract
from qkit.plugins.example import RowError
from qkit.plugins.task import Prepared, open_task
from qkit.server.labels.requests import requests_of
from qkit.tasks._encoder.tagging.service import TagService
from qkit.tasks._encoder.tagging.words import BY_KIND

NAMES = ("O", "B-x", "I-x")


def answered(service: TagService, request: Mapping[str, Any], best: dict[int, int]) -> dict[str, Any]:
    """The answer if the token `id` has the tag `best[id]`, and all others O."""
    (prepared,) = service.prepare([request])
    assert isinstance(prepared, Prepared)
    logits = [np.eye(3, dtype=np.float32)[[best.get(token, 0) for token in row.input_ids]] for row in prepared.rows]
    return service.answer(prepared, logits)


@pytest.mark.parametrize("limit", [4, 32])
def test_entities_of_a_sentence(limit: int) -> None:
    """In one window or several."""
    service = TagService(build_tokenizer(), NAMES, limit)
    ids = service.tokenizer.convert_tokens_to_ids(["plum", "pear"])
    answer = answered(service, {"text": "ban  plum pear\nben"}, {ids[0]: 1, ids[1]: 2})
    assert answer["words"] == ["ban", "plum", "pear", "ben"] and answer["tags"] == ["O", "B-x", "I-x", "O"]
    assert answer["entities"] == [{"type": "x", "begin": 1, "end": 3, "text": "plum pear"}]
    assert service.difference(answer, answer, 0.0) == ""
    other = answered(service, {"text": "ban  plum pear\nben"}, {ids[0]: 1})
    assert service.difference(answer, other, 0.0) == "the word 'pear' has the tag O, not I-x"


def test_what_is_refused() -> None:
    service = TagService(build_tokenizer(), NAMES, 32)
    results = service.prepare([{"text": 5}, {}, {"text": " "}, {"text": "\ud800"}, {"text": "ban"}])
    assert [type(one) for one in results] == [RowError] * 4 + [Prepared]
    assert [str(one) for one in results[:2]] == ["text is not a text: 5", "has no text"]


def test_requests_of_records() -> None:
    task: Any = open_task("tag")
    assert task.request({"tokens": ["a", "b"], "ner_tags": [0, 0]}, {}) == {"tokens": ["a", "b"]}
    assert task.request({"w": ["a"], "text": "z"}, {"words": "w"}) == {"tokens": ["a"]}
    assert task.request({"text": "a b"}, {}) == {"text": "a b"}
    assert task.request({"text": "a b", "tokens": ["c"]}, {"text": "text"}) == {"text": "a b"}
    assert task.request({"tokens": '["a b", "c"]'}, {}) == {"tokens": ["a b", "c"]}
    with pytest.raises(RowError, match="must have a column for text: text, sentence, content"):
        task.request({"w": ["a"]}, {})
    with pytest.raises(RowError, match=r"has no column 'x' \(data.columns maps words to it\)"):
        task.request({"text": "a"}, {"words": "x"})


def test_tokens_are_taken_as_they_are() -> None:
    service = TagService(build_tokenizer(), NAMES, 32)
    results = service.prepare(
        [
            {"tokens": ["plum", "pear"], "text": "ban"},
            {"tokens": "ban"},
            {"tokens": ["ban", 5]},
            {"tokens": [""]},
            {"tokens": [" "]},
            {"tokens": []},
            {"tokens": ["\ud800"]},
        ]
    )
    assert [str(one) for one in results] == [
        "has both text and tokens: give one of them",
        "tokens is not a list: 'ban'",
        "tokens: word 1 (counted from 0) is not a text with a sign in it: 5",
        "tokens: word 0 (counted from 0) is not a text with a sign in it: ''",
        "tokens has no words",
        "tokens has no words",
        "tokens contains half of a surrogate pair, which is not valid Unicode",
    ]
    ids = service.tokenizer.convert_tokens_to_ids(["plum", "pear"])
    answer = answered(service, {"tokens": ["ban", "plum pear", "ben"]}, {ids[0]: 1, ids[1]: 2})
    assert (answer["words"], answer["tags"]) == (["ban", "plum pear", "ben"], ["O", "B-x", "O"])
    assert answer["entities"] == [{"type": "x", "begin": 1, "end": 2, "text": "plum pear"}]
    (prepared,) = service.prepare([{"tokens": ["ban", "plum pear", "ben"]}])
    (same,) = service.prepare([{"text": "ban plum pear ben"}])
    assert isinstance(prepared, Prepared) and isinstance(same, Prepared) and prepared.rows == same.rows


@pytest.mark.parametrize("body", [{"input": [{"tokens": ["ban", "a b"]}]}, {"tokens": ["ban", "a b"]}])
def test_a_server_reads_tokens(body: dict[str, Any]) -> None:
    """As the serve contract and `qkit predict` send them, and in place of `input`."""
    service = TagService(build_tokenizer(), NAMES, 32)
    assert requests_of(body, service, "m") == [{"tokens": ["ban", "a b"]}]
    for sent in (label_contract._input, servers._input):
        assert sent({"tokens": ["ban", "a b"]}) == {"tokens": ["ban", "a b"]} and sent({"text": "ban"}) == "ban"
        assert sent({"text": "ban", "pair": "ben"}) == {"text": "ban", "pair": "ben"}


def test_an_entity_has_the_text_as_it_was_sent() -> None:
    service = TagService(build_tokenizer(), NAMES, 32, divided=BY_KIND)
    ids = service.tokenizer.convert_tokens_to_ids(["plum", "pear"])
    answer = answered(service, {"text": "ban plum-pear, ben"}, {ids[0]: 1, ids[1]: 2})
    assert answer["words"] == ["ban", "plum", "-", "pear", ",", "ben"] and answer["tags"][1] == "B-x"
    answer = answered(service, {"text": "plum  pear."}, {ids[0]: 1, ids[1]: 2})
    assert answer["words"] == ["plum", "pear", "."] and answer["entities"][0]["text"] == "plum  pear"


def test_a_folder_without_names_is_refused(tmp_path: Path) -> None:
    from qkit.core.errors import ModelError

    with pytest.raises(ModelError, match="so the tags have no names"):
        open_task("tag").service(tmp_path, 8)
