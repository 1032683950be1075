from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qkit.core.errors import DataError
from qkit.core.strict_json import Rounded, Struct
from qkit.data import read as data_read
from qkit.data import read_json
from qkit.data.read import Broken, Record, read
from qkit.recipe.schema import Source

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, content: str | bytes) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return file

    return written


def found(file: Path, **settings: Any) -> list[tuple[int, Any]]:
    """Line and value of each record; a broken line's value is why."""
    return [
        (row.line, row.value if isinstance(row, Record) else row.reason)
        for row in read(Source(source=str(file), **settings))
    ]


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("lines", '{"a": 1}\n{"a": 2}\n', [1, 2]),
        ("no end of line", '{"a": 1}\n{"a": 2}', [1, 2]),
        ("carriage returns", '{"a": 1}\r\n{"a": 2}\r\n', [1, 2]),
        ("byte order mark", '\ufeff{"a": 1}\n{"a": 2}\n', [1, 2]),
        ("blank lines count", '\n\r\n{"a": 1}\n  \n{"a": 2}\n\n', [3, 5]),
        ("array", '[{"a": 1}, {"a": 2}]', [1, 2]),
        ("array with a mark", '\ufeff [{"a": 1},{"a": 2}]', [1, 2]),
        ("array after white space", ' \n\n  [\n  {\n    "a": 1\n  }\n  ,\n {"a": 2}\n]\n', [1, 2]),
    ],
)
def test_json_is_read_as_lines_or_as_an_array(write: Write, name: str, text: str, lines: list[int]) -> None:
    expected = [(line, {"a": value}) for line, value in zip(lines, (1, 2), strict=True)]
    assert found(write("a.jsonl", text)) == expected, name
    assert found(write("a.json", text)) == expected, name
    assert found(write("a.ndjson.gz", gzip.compress(text.encode()))) == expected, name


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"data": [{"a": 1}, {"a": 2}], "version": "1"}', [{"a": 1}, {"a": 2}]),
        ('{\n "data": [\n {"a": 1}\n ]\n}\n', [{"a": 1}]),
        ('{\n "a": 1\n}\n', [{"a": 1}]),
        ('{"messages": [{"role": "user", "content": "q"}]}', [{"messages": [{"role": "user", "content": "q"}]}]),
        ('{"x": [{"from": "gpt"}]}', [{"x": [{"from": "gpt"}]}]),
        ('{"a": [{"b": 1}], "c": [1]}', [{"a": [{"b": 1}], "c": [1]}]),
        ("[]", []),
        ("", []),
        ("\n \n", []),
    ],
)
def test_a_json_file_that_is_one_object(write: Write, text: str, values: list[Any]) -> None:
    assert [value for _, value in found(write("a.json", text))] == values


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": oops}', "invalid JSON: Expecting value at column 7: '{\"a\": oops}'"),
        ('{"a": ' + "x" * 99, f"invalid JSON: Expecting value at column 7: '{{\"a\": {'x' * 54}'"),
        ('"text"', "is not a JSON object: '\"text\"'"),
        ("[1]", "is not a JSON object: '[1]'"),
        ('{"a": NaN}', "invalid JSON: NaN is not a number in JSON: '{\"a\": NaN}'"),
        ('{"a": -Infinity}', "invalid JSON: -Infinity is not a number in JSON: '{\"a\": -Infinity}'"),
        ('{"a": 1e999}', "invalid JSON: 1e999 is not a number in JSON: '{\"a\": 1e999}'"),
        ('{"a":' * 20_000, "invalid JSON: nested too deeply: '" + '{"a":' * 12 + "'"),
        ('{"a": ' + "1" * 5000 + "}", "invalid JSON: Exceeds the limit"),
        ('{"a": 1, "a": 2}', "an object has the key 'a' twice: keep only one of them: '{\"a\": 1"),
        ('{"a": [{"b": 1, "b": 1}]}', "an object has the key 'b' twice"),
        ("{} {}", "invalid JSON: Extra data at column 4: '{} {}'"),
    ],
)
def test_a_broken_line_says_why_and_the_others_are_read(write: Write, line: str, reason: str) -> None:
    file = write("a.jsonl", f'{{"a": 1}}\n{line}\n{{"a": 3}}\n')
    first, (number, said), last = found(file)
    assert (first, last) == ((1, {"a": 1}), (3, {"a": 3}))
    assert number == 2 and said.startswith(reason)
    broken = list(read(Source(source=str(file))))[1]
    assert isinstance(broken, Broken) and broken.place == f"{file}:2"


def test_a_line_in_another_encoding_is_named(write: Write) -> None:
    file = write("a.jsonl", b'{"a": "gr\xfcn"}\n{"a": 2}\n')
    assert found(file) == [(1, 'invalid UTF-8: byte 0xfc at offset 9: b\'{"a": "gr\\xfcn"}\''), (2, {"a": 2})]


def test_a_first_line_that_is_a_list_does_not_make_an_array_of_lines(write: Write) -> None:
    assert found(write("a.jsonl", '[1]\n{"a": 1}\n')) == [(1, "is not a JSON object: '[1]'"), (2, {"a": 1})]


def test_an_element_that_is_no_object_is_named(write: Write) -> None:
    assert found(write("a.jsonl", '[{"a": 1}, [2],\n "x"]')) == [
        (1, {"a": 1}),
        (2, "is not a JSON object: '[2]'"),
        (3, "is not a JSON object: '\"x\"'"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '[{"a": 1},\n {"a": }]', r"a\.jsonl:2: invalid JSON: Expecting value at column 8: in element 2"),
        (
            "a.jsonl",
            '\n[{"a": 1},\n{"a": 2},\n{"a": NaN}]',
            r"a\.jsonl:4: invalid JSON: NaN is not a number .* in element 3",
        ),
        ("a.json", '[{"a": 1},\n' + "[" * 20_000, r"a\.json:2: invalid JSON: nested too deeply: in element 2"),
        ("a.json", '[{"a": 1}\n {"a": 2}]', r"a\.json:2: invalid JSON: a comma or the end .* after element 1"),
        ("a.json", '[{"a": 1}', r"a\.json:1: .* after element 1"),
        ("a.json", '[{"a": 1},\n]', r"a\.json:2: invalid JSON: .* in element 2"),
        ("a.json", '{"a": 1,\n"b"}', r"a\.json:2: invalid JSON: .* at column 4"),
        ("a.json", '{\n"a": 1}\nmore', r"a\.json:3: invalid JSON: unexpected text after the end: 'more'"),
        ("a.json", '[\n{"a": 1}]\n[]', r"a\.json:3: invalid JSON: unexpected text after the end: '\[\]'"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json: invalid UTF-8: byte 0xff at offset 8; save the file as UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), r"a\.jsonl: the file is UTF-16; save it as UTF-8"),
        ("a.jsonl.gz", b"{}", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
            r"a\.jsonl\.gz: cannot be read: Compressed file ended",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"", mtime=0)[:10] + b"\xff",
            r"a\.jsonl\.gz: cannot be read: Error -3 while decompressing",
        ),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: the header has a column twice: a, a"),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', r"a\.csv: unexpected end of data at line 4: a quote is not closed"),
        ("a.csv", b"a,b\n1,\xff\n", r"a\.csv:2: invalid UTF-8: byte 0xff"),
        ("a.txt", b"\xff", r"a\.txt: cannot be read as text: .*can't decode byte 0xff"),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read as parquet"),
        ("a.xml", "x", r"a\.xml: unsupported file type '\.xml'; supported: \.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        found(write(name, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        found(tmp_path / "gone.jsonl")


def test_csv_fields_stay_the_text_that_they_are(write: Write) -> None:
    text = '\ufeffprompt,completion\r\n"two\nlines, and ""quotes""",007\r\nNA,\r\n\r\nnull,1e5\r\n'
    assert found(write("a.csv", text)) == [
        (1, {"prompt": 'two\nlines, and "quotes"', "completion": "007"}),
        (2, {"prompt": "NA", "completion": ""}),
        (3, {"prompt": "null", "completion": "1e5"}),
    ]
    assert found(write("a.tsv.gz", gzip.compress(b'a\tb\n"1\t2"\t3,4\n', mtime=0))) == [(1, {"a": "1\t2", "b": "3,4"})]
    assert found(write("long.csv", "a\n" + "x" * 200_000 + "\n"))[0][1] == {"a": "x" * 200_000}


def test_a_broken_csv_record_says_why_and_the_others_are_read(write: Write) -> None:
    assert found(write("a.csv", 'a,b\n1\n"2"x,3\n4,5,6\n7,8\n')) == [
        (1, "has 1 fields, but the header has 2"),
        (2, "cannot be parsed: ',' expected after '\"'"),
        (3, "has 3 fields, but the header has 2"),
        (4, {"a": "7", "b": "8"}),
    ]


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [
        ("document", ["one\ntwo\n\nthree\n"]),
        ("paragraph", ["one\ntwo", "three\n"]),
        ("line", ["one", "two", "", "three"]),
    ],
)
def test_plain_text(write: Write, sample_by: str, texts: list[str]) -> None:
    expected = [(number, {"text": text}) for number, text in enumerate(texts, start=1)]
    for name in ("a.txt", "a.md", "a[1].txt"):
        assert found(write(name, "\ufeffone\ntwo\r\n\r\nthree\n"), sample_by=sample_by) == expected, name
    compressed = write("a.txt.gz", gzip.compress(b"one\ntwo\n\nthree\n", mtime=0))
    assert found(compressed, sample_by=sample_by) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(tmp_path: Path, streaming: bool) -> None:
    values = [{"messages": [{"role": "user", "content": "q", "name": None}], "n": n} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    assert found(tmp_path / "a.parquet", streaming=streaming) == list(enumerate(values, start=1))


def test_a_folder_is_its_files_by_name(write: Write, tmp_path: Path) -> None:
    write("b/two.csv", "a\n2\n")
    write("a/deep/one.jsonl", '{"a": 1}\n')
    write("c.JSONL", '{"a": 3}\n')
    for other in ("README.md", "LICENSE.txt", ".hidden.jsonl", "notes.pdf"):
        write(other, "not a row")
    places = [row.place for row in read(Source(source=str(tmp_path)))]
    assert places == [f"{tmp_path}/{file}:1" for file in ("a/deep/one.jsonl", "b/two.csv", "c.JSONL")]


def test_an_empty_folder_is_refused(write: Write, tmp_path: Path) -> None:
    write("notes.pdf", "")
    with pytest.raises(DataError, match=r"the folder contains no data files; supported: \.jsonl, "):
        found(tmp_path)


@pytest.mark.parametrize(
    ("cut", "kept"), [(":", "01234"), ("1:3", "12"), ("3:", "34"), (":2", "01"), ("4:9", "4"), ("0:0", ""), ("3:1", "")]
)
def test_slices(write: Write, tmp_path: Path, cut: str, kept: str) -> None:
    values = [{"id": i, "prompt": str(i)} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    files = [
        write("a.jsonl", "".join(json.dumps(value) + "\n" for value in values)),
        write("a.json", json.dumps(values)),
        write("a.csv", "id,prompt\n" + "".join(f"{i},{i}\n" for i in range(5))),
        tmp_path / "a.parquet",
    ]
    for file in files:
        assert "".join(value["prompt"] for _, value in found(file, rows=cut)) == kept, file


def test_a_slice_reads_no_further_than_it_goes(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(read_json, "decode", lambda text: decoded.append(text) or json.loads(text))
    for name in ("a.jsonl", "b.jsonl"):
        write(name, '{"a": 1}\n' * 1000)
    assert len(found(tmp_path, rows=":3")) == len(decoded) == 3


def test_answers_are_joined_by_id(write: Write) -> None:
    file = write("a.jsonl", "".join(json.dumps({"id": i}) + "\n" for i in range(4)) + '{"no": "id"}\n')
    answers = write("answers.jsonl", '{"id": 3, "ground_truth": ["x"]}\n{"ground_truth": ["y"]}\n')
    joined = list(read(Source(source=str(file), answers=str(answers), format="text")))
    assert joined[3] == Record(str(file), 4, {"id": 3}, ["x"], "text") and joined[3].place == f"{file}:4"
    assert [row.accepted for row in joined if isinstance(row, Record)] == [None, None, None, ["x"], None]
    table = write("a.csv", "id\n3\n")
    (row,) = read(Source(source=str(table), answers=str(answers)))
    assert isinstance(row, Record) and row.accepted == ["x"]


def test_a_broken_line_of_answers_is_refused(write: Write) -> None:
    file, answers = write("a.jsonl", '{"id": 1}\n'), write("answers.jsonl", "{}\noops\n")
    with pytest.raises(DataError, match=re.escape(f"{answers}:2: invalid JSON")):
        list(read(Source(source=str(file), answers=str(answers))))


def test_hub_data_sets_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: Any, **settings: Any) -> Any:
        asked.append((arguments, settings))
        return ({"n": n} for n in range(10**9))

    monkeypatch.setattr("datasets.load_dataset", load)
    source = Source(source="owner/name", name="main", split="test", revision="abc", streaming=True, rows="1:3")
    assert [(row.place, row.value) for row in read(source) if isinstance(row, Record)] == [
        ("owner/name:1", {"n": 1}),
        ("owner/name:2", {"n": 2}),
    ]
    assert asked == [(("owner/name", "main"), {"split": "test", "revision": "abc", "streaming": True})]


def test_a_hub_data_set_that_cannot_be_had_is_named() -> None:
    with pytest.raises(
        DataError, match=r"nobody/nothing: could not be loaded from the hub \(.*set data\.\*\.source to a local"
    ):
        list(read(Source(source="nobody/nothing")))


# What tables make of values


def test_objects_of_a_table_are_told_from_json(tmp_path: Path) -> None:
    """Nulls of a struct are fillers; those of datasets' Json type, and of JSON in a text, are meant."""
    from datasets import Dataset, Features, Json, List, Value

    struct = {"city": Value("string"), "unit": Value("string")}
    turn = {"arguments": struct, "json": Json(), "text": Value("string")}
    features = Features({"turns": List(turn), "plain": struct, "tools": List(Json())})
    given = {"city": "Oslo", "unit": None}
    row = {
        "turns": [{"arguments": given, "json": given, "text": json.dumps(given)}],
        "plain": given,
        "tools": [{"default": None}],
    }
    table = Dataset.from_list([row], features=features)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        (_, read), *_ = found(source)
        [turn] = read["turns"]
        assert read == row
        assert type(turn) is type(turn["arguments"]) is type(read["plain"]) is Struct
        assert type(turn["json"]) is type(read["tools"][0]) is dict


def test_objects_of_json_lines_are_json(write: Write) -> None:
    ((_, value),) = found(write("a.jsonl", '{"a": {"b": null, "c": 18446744073709551617}}'))
    assert value == {"a": {"b": None, "c": 2**64 + 1}} and type(value["a"]) is dict


def test_objects_of_nobody_knows_what_are_of_a_table() -> None:
    [row] = data_read._meant([{"a": [{"b": None}], "n": 2.0**64}])
    assert type(row["a"][0]) is Struct and type(row["n"]) is Rounded


def test_numbers_that_a_table_has_rounded_are_marked(tmp_path: Path) -> None:
    values = [float(2**63), 2.0**53, -(2.0**70), 1e300, 0.5, float("inf")]
    pq.write_table(pa.table({"n": [values], "s": [{"x": 2.0**64}]}), tmp_path / "a.parquet")
    ((_, value),) = found(tmp_path / "a.parquet")
    assert [type(number) is Rounded for number in value["n"]] == [True, False, True, True, False, False]
    assert type(value["s"]["x"]) is Rounded and value["n"] == values


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one, other = (Dataset.from_list([{"text": f"{name}{i}"} for i in range(3)]) for name in "ab")
    one.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(train=one, test=other).save_to_disk(tmp_path / "both")
    assert found(tmp_path / "one") == [(i, {"text": f"a{i}"}) for i in range(3)]
    assert found(tmp_path / "both", split="test", rows="1:") == [(1, {"text": "b1"}), (2, {"text": "b2"})]
    assert found(tmp_path / "both" / "train")[0] == (0, {"text": "a0"})
    with pytest.raises(DataError, match=r"both: .* contains the splits train and test; choose one: data\.\*\.split"):
        found(tmp_path / "both")
    with pytest.raises(DataError, match=r"both: .* no split 'dev'.*train and test"):
        found(tmp_path / "both", split="dev")
    with pytest.raises(DataError, match=r"one: .* one data set without splits"):
        found(tmp_path / "one", split="test")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"one: .* cannot be read"):
        found(tmp_path / "one")


def test_a_saved_data_set_of_one_split_needs_no_name(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list([{"text": "a"}])).save_to_disk(tmp_path / "d")
    assert found(tmp_path / "d") == [(0, {"text": "a"})]


def test_a_key_twice_in_the_first_line_of_a_json_file_leaves_the_others(write: Write) -> None:
    (_, why), other = found(write("a.json", '{"a": 1, "a": 2}\n{"a": 3}\n'))
    assert why.startswith("an object has the key 'a' twice") and other == (2, {"a": 3})
    with pytest.raises(
        DataError, match=r"a\.json:1: an object has the key 'a' twice: keep only one of them: in element 1"
    ):
        found(write("a.json", '[{"a": 1, "a": 2}]'))


@pytest.mark.parametrize(
    "text", ['{"spl', "[]", "null", "{}", '{"splits": null}', '{"splits": []}', '{"splits": [1]}', ""]
)
def test_a_damaged_list_of_splits_is_named(write: Write, tmp_path: Path, text: str) -> None:
    write("saved/dataset_dict.json", text)
    with pytest.raises(
        DataError,
        match=r"saved: a DatasetDict .* its dataset_dict\.json (is damaged|does not list splits).*save it again",
    ):
        found(tmp_path / "saved")


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"a'])
def test_a_damaged_file_of_a_saved_data_set_is_named(tmp_path: Path, name: str, text: str) -> None:
    from datasets import Dataset

    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(text)
    if (name, text) == ("dataset_info.json", "{}"):  # datasets does without what it says
        assert found(tmp_path / "saved") == [(0, {"text": "a"})]
        return
    with pytest.raises(DataError, match="saved: a Dataset written by save_to_disk cannot be read"):
        found(tmp_path / "saved")


def test_what_is_no_whole_saved_data_set_is_named_and_not_read_as_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    for name in ("one", "other"):
        Dataset.from_list([{"text": name}]).save_to_disk(tmp_path / "both" / name)
    with pytest.raises(DataError, match=r"both: contains data sets written by save_to_disk \(one, other\); use one"):
        found(tmp_path / "both")
    (tmp_path / "both" / "one" / "state.json").unlink()
    with pytest.raises(DataError, match=r"one: is part of .*save_to_disk, but state\.json is missing"):
        found(tmp_path / "both" / "one")


def test_arrow_files_by_themselves_are_named(write: Write, tmp_path: Path) -> None:
    write("data-00000-of-00001.arrow", b"")
    with pytest.raises(DataError, match=r"type '\.arrow'.*save_to_disk"):
        found(tmp_path / "data-00000-of-00001.arrow")


def test_what_nothing_reads_of_answers_is_noted(write: Write) -> None:
    file = write("a.jsonl", '{"id": 1}\n{"id": 2}\n')
    answers = write("answers.jsonl", '{"id": 1, "ground_truth": ["x"], "groundtruth": ["y"], "note": null}\n')
    joined = [row for row in read(Source(source=str(file), answers=str(answers))) if isinstance(row, Record)]
    assert [row.unread for row in joined] == [("answers.groundtruth",), ()]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            '{"id": 1, "answer": ["x"]}\n',
            "contains no answers: it has the columns id, answer; it must have id and ground_truth",
        ),
        (
            '{"id": "a-1", "ground_truth": ["x"]}\n',
            "contains no answer to any record: ",
        ),
        (
            '{"id": 1, "ground_truth": ["x"]}\n{"id": 1, "ground_truth": ["y"]}\n',
            ":2: the id 1 appears twice, with different answers",
        ),
    ],
)
def test_answers_that_are_none(write: Write, lines: str, words: str) -> None:
    file, answers = write("a.jsonl", '{"id": 1}\n'), write("answers.jsonl", lines)
    with pytest.raises(DataError, match=re.escape(words)):
        list(read(Source(source=str(file), answers=str(answers))))


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 1234567890123456789012, -(2**64) - 1])
def test_json_in_a_table_keeps_every_digit(number: int, tmp_path: Path) -> None:
    """ujson, with which datasets reads its Json type, takes the third for 17082781258626382356 and the fourth for -1."""
    from datasets import Dataset, Features, Json, List, Value

    nested = {"name": Value("string"), "arguments": Json()}
    features = Features({"a": Json(), "calls": List(nested), "nothing": Json()})
    text = json.dumps({"b": number, "c": None})
    columns = {"a": [text], "calls": [[{"name": "f", "arguments": text}]], "nothing": [None]}
    table = Dataset.from_dict(columns, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        ((_, value),) = found(source)
        assert value["a"] == value["calls"][0]["arguments"] == {"b": number, "c": None} and value["nothing"] is None
        assert type(value["a"]) is dict and type(value["calls"][0]) is Struct


@pytest.mark.parametrize("setting", [{"split": "test"}, {"name": "main"}, {"revision": "abc"}, {"sha256": "0" * 64}])
def test_settings_of_another_kind_of_source_are_refused(write: Write, setting: dict[str, str]) -> None:
    """Else they would be taken, and change nothing."""
    file = write("a.jsonl", '{"id": 1}\n')
    with pytest.raises(
        DataError, match=rf"a\.jsonl: data\.\*\.{next(iter(setting))} does not apply to a file or folder"
    ):
        found(file, **setting)
