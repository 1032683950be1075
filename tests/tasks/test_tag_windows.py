"""Words to tokens: which token begins each word, and windows over long sentences, with each kind of tokenizer."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qkit.core.errors import ModelError
from qkit.tasks._encoder.tagging.windows import NOWHERE, Tokenized, divided, windows
from qkit.tasks._encoder.tagging.words import word_offsets

CORPUS = [
    "the quick brown fox jumped over 13 lazy dogs, and unbelievably nobody was watching",
    "naïve café déjà-vu: Angela Merkel (of Berlin) said it's the U.S.-based company's",
]
SENTENCE = ["the", "unbelievably", "\ufe0f", "lazy", "fox", "isn't", "\u200b", "café", "(", "New York", "U.S.-based"]


def _wordpiece() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=60, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _bytes(prefix_space: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=prefix_space)
    return tokenizer


def _unigram() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


KINDS = {
    "word pieces": _wordpiece,
    "bytes": lambda: _bytes(prefix_space=False),
    "bytes with a space first": lambda: _bytes(prefix_space=True),
    "unigrams": _unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param]())


def test_the_first_token_of_each_word(tokenizer: Any) -> None:
    """transformers says which token stands for the character with which a word begins."""
    text = " ".join(SENTENCE)
    whole = tokenizer(text)
    (found,) = windows(tokenizer, [SENTENCE], 512)
    assert list(found.ids[0]) == whole["input_ids"] and found.whole == len(whole["input_ids"])
    begin = 0
    for word, start in zip(SENTENCE, found.starts, strict=True):
        theirs = whole.char_to_token(begin)
        assert start == (NOWHERE if theirs is None else theirs), word
        begin += len(word) + 1
    assert {word for word in SENTENCE if word.isascii()} <= {
        word for word, start in zip(SENTENCE, found.starts, strict=True) if start >= 0
    }


def test_words_without_a_token_shift_nothing() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_wordpiece())
    with_sign, without = windows(tokenizer, [["fox", "\ufe0f", "\u200b", "dogs"], ["fox", "dogs"]], 64)
    assert with_sign.ids == without.ids
    assert with_sign.starts == (without.starts[0], NOWHERE, NOWHERE, without.starts[1])


@pytest.mark.parametrize("limit", [6, 9, 16, 33])
def test_windows_have_every_word_once_and_whole(tokenizer: Any, limit: int) -> None:
    rng = random.Random(limit)
    sentences = [[rng.choice(SENTENCE) for _ in range(rng.randint(1, 40))] for _ in range(30)]
    for words, found, whole in zip(
        sentences, windows(tokenizer, sentences, limit), windows(tokenizer, sentences, 10_000), strict=True
    ):
        assert all(len(window) <= limit for window in found.ids)
        tokens = [token for window in found.ids for token in window]
        (reference,) = whole.ids
        assert [start >= 0 for start in found.starts] == [start >= 0 for start in whole.starts], words
        for start, first in zip(found.starts, whole.starts, strict=True):
            assert start < 0 or tokens[start] == reference[first]
        known = [start for start in found.starts if start >= 0]
        assert known == sorted({*known})
        assert (len(found.ids) == 1 and found.ids == whole.ids) == (whole.whole <= limit) or not known


def test_a_further_window_begins_with_what_was_before() -> None:
    ids = tuple(range(10, 30))
    sentence = Tokenized((1,), ids, (2,), tuple(range(20)))
    found = divided(sentence, 10)
    assert found.ids[0] == (1, *range(10, 18), 2)
    assert found.ids[1] == (1, *range(16, 24), 2), "a quarter of 8 tokens"
    assert found.starts[8] == 10 + 1 + 2


def test_a_word_longer_than_a_window_is_cut() -> None:
    found = divided(Tokenized((1,), tuple(range(10, 30)), (2,), (0, 1, 15)), 6)
    assert found.ids == ((1, 10, 2), (1, 11, 12, 13, 14, 2), (1, 25, 26, 27, 28, 2))
    assert found.starts == (1, 4, 10)


def test_no_room_for_words() -> None:
    with pytest.raises(ModelError, match="leaves no room"):
        divided(Tokenized((1,), (5, 6), (2,), (0, 1)), 2)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ModelError, match="which characters"):
        windows(object(), [["a"]], 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Angela Merkel, of Berlin.", ["Angela", "Merkel", ",", "of", "Berlin", "."]),
        ("it's  a_b\n3.5%", ["it", "'", "s", "a_b", "3", ".", "5", "%"]),
        ("cafe\u0301s \u2764\ufe0f!", ["cafe\u0301s", "\u2764\ufe0f", "!"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("東京 is かな", ["東", "京", "is", "か", "な"]),
        ("  ", []),
        ("", []),
        ("a", ["a"]),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert [text[begin:end] for begin, end in word_offsets(text)] == words
