"""CoNLL columns, as files divide them."""

from __future__ import annotations

import pytest

from qkit.tasks._encoder.tagging.conll import FIRST_AND_LAST, BadSentence, Columns, Sentence, read_sentences

WANTED = [Sentence(1, ("EU", "rejects"), ("B-ORG", "O")), Sentence(4, ("Peter",), ("B-PER",))]


def sentences(text: str, columns: Columns = FIRST_AND_LAST) -> list[Sentence | BadSentence]:
    return list(read_sentences(text.split("\n"), columns))


@pytest.mark.parametrize(
    "text",
    [
        "EU\tB-ORG\nrejects\tO\n\nPeter\tB-PER\n",
        "EU B-ORG\nrejects O\n\nPeter B-PER",
        "EU      B-ORG\nrejects O\n\nPeter   B-PER\n\n\n\n",
        "EU \t B-ORG\nrejects\tO  \n\nPeter\tB-PER",
        "EU\tB-ORG\r\nrejects\tO\r\n\r\nPeter\tB-PER\r\n",
        "\ufeffEU\tB-ORG\nrejects\tO\n\t\nPeter\tB-PER",  # WNUT17 has a tab in its blank lines
        "EU NNP I-NP B-ORG\nrejects VBZ I-VP O\n   \nPeter NNP I-NP B-PER",
        "EU\tNNP\t\tB-ORG\nrejects\tVBZ\t_\tO\n\nPeter\tNNP\t\tB-PER",
        "EU B-ORG\nrejects O\n-DOCSTART- -X-\nPeter B-PER",
    ],
)
def test_columns_are_read_however_they_are_divided(text: str) -> None:
    assert sentences(text) == WANTED


def test_a_file_is_read_by_its_lines() -> None:
    assert list(read_sentences(iter(["EU B-ORG\n", "rejects O\n", "\n", "Peter B-PER\n"]))) == WANTED
    assert sentences("") == sentences("\n\n \n") == sentences("-DOCSTART- -X- -X- O\n\n") == []


def test_other_columns() -> None:
    text = "1\tPeter\tNNP\tB-PER\t_\n2\tsang\tVBD\tO\tlate\n"
    assert sentences(text, Columns(1, 3)) == [Sentence(1, ("Peter", "sang"), ("B-PER", "O"))]
    assert sentences(text, Columns(-4, 2)) == [Sentence(1, ("Peter", "sang"), ("NNP", "VBD"))]
    ragged = "a 0 Peter B-PER (A0*)\na 1 sang O * (V*)\n"  # the annotations of CoNLL-2012 differ in number
    assert sentences(ragged, Columns(2, 3)) == [Sentence(1, ("Peter", "sang"), ("B-PER", "O"))]


@pytest.mark.parametrize("space", ["\t", " ", "   "])
@pytest.mark.parametrize(
    "remark", ["# sent_id = 1", "# a remark", "#text=x", "#begin document (bc/cctv); part 0", "# EU"]
)
def test_remarks_are_left_out(space: str, remark: str) -> None:
    rows = f"#{space}NN{space}O\n{remark}\n#tag{space}NN{space}O\n"
    wanted = Sentence(2, ("#", "#tag"), ("O", "O"))
    assert sentences(f"{remark}\n{rows}") == [wanted]
    assert sentences(f"{remark}\n\n{rows}") == [Sentence(3, wanted.words, wanted.tags)]


@pytest.mark.parametrize(
    "word",
    [
        "\u200b",
        "\ufe0f",
        "Dubbz\ufeff",
        "watched\u200bwas",
        "\xa0",
        "a\u2028b",
        "\x85",
        "...",
        "#",
        "-",
        "-DOCSTART",
        "\u0301",
        "\U0001f600",
    ],
)
@pytest.mark.parametrize("space", ["\t", " "])
def test_odd_words_are_words(word: str, space: str) -> None:
    assert sentences(f"a{space}O\n{word}{space}B-X\n{word}{space}I-X\n") == [
        Sentence(1, ("a", word, word), ("O", "B-X", "I-X"))
    ]


def test_a_word_may_have_spaces_where_tabs_divide() -> None:
    assert sentences("1 000\tO\nNew York\tB-LOC") == [Sentence(1, ("1 000", "New York"), ("O", "B-LOC"))]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("EU B-ORG\nrejects\n\nPeter B-PER", 2, "'rejects' has one column: its tag is missing"),
        ("EU\nrejects O\n\nPeter B-PER", 1, "'EU' has one column: its tag is missing"),
        ("EU\tO\nrejects\t\n\nPeter\tB-PER", 2, r"'rejects\t' has an empty column -1: its tag is missing"),
        ("EU\tO\n\tO\n\nPeter\tB-PER", 2, r"'\tO' has an empty column 0: its word is missing"),
        ("EU O\n#tag\n\nPeter B-PER", 2, "'#tag' has one column: its tag is missing"),
        ("EU\tO\n#tag\n\nPeter\tB-PER", 2, "'#tag' has one column: its tag is missing"),
        ("EU\tO\nNew York\n\nPeter\tB-PER", 2, "'New York' has one column: its tag is missing"),
        (
            "EU NNP O\nrejects VBZ\n\nPeter NNP B-PER",
            2,
            "'rejects VBZ' has 2 columns, separated by spaces, where line 1 has 3: its tag is missing, or its word is divided",
        ),
        (
            "EU NNP\nrejects VBZ O\n\nPeter NNP B-PER",
            1,
            "'EU NNP' has 2 columns, separated by spaces, where line 2 has 3",
        ),
        ("a\tO\nthe\tO\nNew York O\n\nPeter\tB-PER", 3, "'New York O' has one column: its tag is missing"),
    ],
)
def test_a_line_without_its_tag_spoils_its_sentence_only(text: str, line: int, reason: str) -> None:
    bad, good = sentences(text)
    assert isinstance(bad, BadSentence) and isinstance(good, Sentence)
    assert bad.line == line and bad.reason.startswith(reason)
    assert (good.words, good.tags) == (("Peter",), ("B-PER",))


def test_a_column_that_is_not_there() -> None:
    assert sentences("EU O", Columns(0, 3)) == [
        BadSentence(1, "'EU O' has 2 columns: column 3, of the tag, is missing (columns are counted from 0)")
    ]


def test_a_long_line_is_not_quoted_in_full() -> None:
    (bad,) = sentences("x" * 10_000)
    assert isinstance(bad, BadSentence) and len(bad.reason) < 120
