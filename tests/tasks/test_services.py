"""How a model with labels answers requests: rows as in training, answers by label id or by name, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_labelled import LABELS, WORDS, build_tokenizer
from qkit.core.errors import ModelError
from qkit.plugins.example import RowError
from qkit.plugins.runtime import TextRow
from qkit.plugins.task import Prepared, Service, open_task

ID = {word: 4 + number for number, word in enumerate(WORDS)}
LOGITS = np.log(np.array([0.2, 0.7, 0.1], np.float32))


@pytest.fixture(scope="module", params=["pairs", "no token types"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("artifact")
    build_tokenizer(pairs=request.param == "pairs").save_pretrained(folder)
    (folder / "labels.json").write_text(json.dumps({"names": LABELS}))
    opened = open_task("classify").service(folder, 6)
    assert opened is not None
    return opened


def rows(service: Service, *requests: Any) -> list[TextRow]:
    made = service.prepare(requests)
    assert all(isinstance(one, Prepared) for one in made), made
    return [one.rows[0] for one in made if isinstance(one, Prepared)]


def answer(service: Service, logits: Any = LOGITS, **options: Any) -> dict[str, Any]:
    (made,) = service.prepare([{"text": "apple", **options}])
    assert isinstance(made, Prepared)
    return service.answer(made, [logits])


def test_requests_of_all_forms_keep_their_order(service: Service) -> None:
    words, pair = "apple pear ban plum apple pear", {"text": "apple", "pair": "pear plum"}
    made = rows(service, {"text": "apple"}, pair, {"input_ids": [1, 5, 2]}, {"text": words}, {"text": "pear"})
    apple, pear, plum, ban = (ID[word] for word in ("apple", "pear", "plum", "ban"))
    assert [row.input_ids for row in made] == [
        [1, apple, 2], [1, apple, 2, pear, plum, 2], [1, 5, 2], [1, apple, pear, ban, plum, 2], [1, pear, 2],
    ]  # fmt: skip
    has_types = "token_type_ids" in service.tokenizer.model_input_names  # type: ignore[attr-defined]
    assert [row.token_type_ids for row in made] == (
        [[0] * 3, [0, 0, 0, 1, 1, 1], [0] * 3, [0] * 6, [0] * 3] if has_types else [[]] * 5
    )


def test_rows_are_cut_at_the_length_of_training_or_earlier(service: Service) -> None:
    long = {"text": " ".join(["apple"] * 20)}
    lengths = [
        len(row.input_ids) for row in rows(service, long, *({**long, "truncate_prompt_tokens": n} for n in (-1, 4, 90)))
    ]
    assert lengths == [6, 6, 4, 6]
    assert rows(service, {"text": "apple", "add_special_tokens": False})[0].input_ids == [ID["apple"]]


def test_probabilities_by_label_id_or_the_likeliest_by_name(service: Service) -> None:
    plain = answer(service)
    assert (plain["label"], plain["num_classes"]) == ("tree", 3) and "probabilities" not in plain
    assert plain["probs"] == pytest.approx([0.2, 0.7, 0.1]) and plain["score"] == plain["probs"][1]
    for top_k, names in (
        (1, ["tree"]),
        (2, ["tree", "fruit"]),
        (-1, ["tree", "fruit", "wood"]),
        (9, ["tree", "fruit", "wood"]),
    ):
        named = answer(service, top_k=top_k)
        assert list(named["probabilities"]) == names and "probs" not in named
        assert named["probabilities"]["tree"] == plain["score"]
    assert answer(service, use_activation=False)["probs"] == LOGITS.tolist()
    assert json.loads(json.dumps(plain)) == plain


def test_answers_are_compared_by_name_and_ties_are_no_difference(service: Service) -> None:
    expected, tie = answer(service, top_k=-1), np.log(np.array([0.45, 0.4501, 0.0999]))
    assert service.difference(expected, answer(service), 1e-6) == ""
    assert service.difference(expected, answer(service, LOGITS + 1e-3), 1e-3) == ""
    moved = answer(service, np.log(np.array([0.35, 0.6, 0.05])))
    assert "'fruit' has the probability 0.3500, not 0.2000" in service.difference(expected, moved, 1e-3)
    swapped = {**expected, "label": "wood"}
    assert service.difference(expected, swapped, 1e-3) == "the label is 'wood', not 'tree'"
    near = answer(service, tie, top_k=-1)
    assert service.difference(near, {**near, "label": "fruit"}, 1e-3) == ""
    assert "names the labels a, not fruit, tree, wood" in service.difference(
        near, {**near, "probabilities": {"a": 1}}, 1
    )
    broken = {**near, "probabilities": dict.fromkeys(near["probabilities"], float("nan"))}
    assert "probability nan" in service.difference(near, broken, 1e-3)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({}, "has no text"),
        ({"text": 3}, "text is not a text: 3"),
        ({"text": " "}, "text is empty"),
        ({"text": "apple", "pair": ""}, "pair is empty"),
        ({"text": "a\ud800"}, "half of a surrogate pair"),
        ({"text": "apple", "top_k": 0}, "top_k must be -1 or a whole number from 1, not 0"),
        ({"text": "apple", "top_k": True}, "top_k must be"),
        ({"text": "apple", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens must be"),
        ({"text": "apple", "use_activation": 1}, "use_activation must be true or false, not 1"),
        ({"input_ids": []}, "token ids are empty"),
        ({"input_ids": [10**6]}, "not all in the vocabulary"),
    ],
)
def test_a_wrong_request_is_an_error_beside_the_others_answers(service: Service, request_: Any, said: str) -> None:
    first, wrong, last = service.prepare([{"text": "apple"}, request_, {"text": "pear"}])
    assert isinstance(wrong, RowError) and said in str(wrong)
    assert isinstance(first, Prepared) and isinstance(last, Prepared) and first.tokens == 3


def test_the_texts_of_a_record() -> None:
    request = open_task("classify").request
    assert request({"premise": "a", "hypothesis": "b", "label": 1}, {}) == {"text": "a", "pair": "b"}
    assert request({"text": "a", "pair": None, "input_ids": [1]}, {}) == {"text": "a"}
    assert request({"title": "a", "text": "b"}, {"text": "title"}) == {"text": "a"}
    for record, columns in (
        ({"headline": "a"}, {}),
        ({"text": "a"}, {"text": "title"}),
        ({"text": "a"}, {"pair": "b"}),
    ):
        with pytest.raises(RowError, match=r"must have a column for|data\.columns maps"):
            request(record, columns)


QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "request_"),
    [
        ({"messages": [QUESTION]}, {"messages": [QUESTION]}),
        ({"messages": [QUESTION, ANSWER], "label": 1}, {"messages": [QUESTION]}),
        ({"messages": json.dumps([QUESTION, ANSWER]), "tools": "[]"}, {"messages": [QUESTION], "tools": []}),
        ({"prompt": "q"}, {"messages": [QUESTION]}),
        ({"prompt": [QUESTION], "completion": "a", "tools": None}, {"messages": [QUESTION]}),
        ({"text": "q"}, {"messages": [QUESTION]}),
        ({"system": "s", "prompt": "q"}, {"messages": [{"role": "system", "content": "s"}, QUESTION]}),
    ],
)
def test_the_turns_of_a_record(record: Any, request_: Any) -> None:
    assert open_task("chat").request(record, {}) == request_


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"a": 1}, "has the columns a; it must have a column messages, prompt, question or text"),
        ({"messages": []}, "messages is not a list of turns that begins with a question"),
        ({"messages": [ANSWER]}, "messages is not a list of turns that begins with a question"),
        ({"messages": "[{"}, "messages is text, but not JSON"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "prompt is not a text"),
    ],
)
def test_records_without_a_question(record: Any, said: str) -> None:
    with pytest.raises(RowError, match=said):
        open_task("chat").request(record, {})


def opened(tmp_path: Path, task: str, names: Any = LABELS) -> Service:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"names": names}))
    made = open_task(task).service(tmp_path, 6)
    assert made is not None
    return made


def test_several_labels(tmp_path: Path) -> None:
    service = opened(tmp_path, "multi_label")
    logits = np.array([2.0, -1.0, 0.5], np.float32)
    sigmoid = 1 / (1 + np.exp(-logits))
    plain, named = answer(service, logits), answer(service, logits, top_k=-1)
    assert plain["probs"] == pytest.approx(sigmoid.tolist()) and plain["label"] == "fruit"
    assert plain["labels"] == named["labels"] == ["fruit", "wood"] and list(named["probabilities"]) == [
        "fruit",
        "wood",
        "tree",
    ]
    assert answer(service, np.array([-1.0, -2.0, -3.0], np.float32))["labels"] == []
    assert service.difference(named, plain, 1e-6) == ""
    assert "the labels are fruit, not fruit, wood" in service.difference(named, {**named, "labels": ["fruit"]}, 1e-3)
    near = answer(service, np.array([2.0, -1.0, 1e-4], np.float32), top_k=-1)
    assert service.difference(near, {**near, "labels": ["fruit"]}, 1e-3) == ""


def test_numbers(tmp_path: Path) -> None:
    service = opened(tmp_path, "regress", ["value_0", "value_1"])
    logits = np.array([2.5, -1.0], np.float32)
    plain, named = answer(service, logits), answer(service, logits, top_k=-1)
    assert plain["probs"] == [2.5, -1.0] and "score" not in plain
    assert named["numbers"] == {"value_0": 2.5, "value_1": -1.0}
    assert service.difference(named, plain, 1e-6) == ""
    other = answer(service, np.array([2.5, 3.0], np.float32))
    assert service.difference(named, other, 1e-3) == "'value_1' has the value 3.0000, not -1.0000"


def test_a_folder_without_label_names(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"labels\.json is missing"):
        open_task("classify").service(tmp_path, 6)


def test_conversations_are_answered_by_other_servers(tmp_path: Path) -> None:
    assert open_task("chat").service(tmp_path, 6) is None
