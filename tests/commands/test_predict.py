"""`qkit predict`: runs, folders and servers give one line for each record, bad ones too; and an output goes on where it ended."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.command import qkit_here
from helpers.labels_served import exported_run
from helpers.served import KEY, serving
from helpers.tiny_labelled import LABELS, settings, text
from qkit.commands.predict import predict as predicting
from qkit.commands.predict import servers, sink, source, targets
from qkit.commands.predict.job import Job
from qkit.commands.predict.predictors import Answer, Predictor
from qkit.commands.predict.targets import Target
from qkit.core.errors import DataError, MissingArtifact, UserError
from qkit.core.progress import Progress
from qkit.plugins.example import RowError
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.run.directory import Run

TEXTS = [text(number) for number in range(30)]


class Counting(Predictor):
    """Answers with the length of the text; notes how many it was asked."""

    window = 4

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[int] = []
        self.fail_after = fail_after

    def predict(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | RowError]:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked.append(len(requests))
        sizes = [len(request["text"]) for request in requests]
        return [RowError("is odd") if n == 13 else {"label": "a", "probabilities": {"b": 0.5, "a": n}} for n in sizes]

    def names(self, example: Mapping[str, Any]) -> Collection[str]:
        return ("label", "probabilities")


def run(
    tmp_path: Path, rows: str, predictor: Predictor, out: str = "out.jsonl", suffix: str = ".jsonl",
    target: Mapping[str, Any] | None = None, **job: Any,
) -> Any:  # fmt: skip
    """Predict a file with this content. `target`: what else is known of the model."""
    file = tmp_path / f"rows{suffix}"
    file.write_text(rows, encoding="utf-8", newline="")
    made = Job("the target", str(file), str(tmp_path / out), **{"columns": {}, **job})
    known: dict[str, Any] = {"weights": "w", "options": {"top_k": made.top_k}, **(target or {})}
    model = Target("the model", "/the/target", task=open_task("classify"), open=lambda: predictor, **known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicting, "resolve", lambda _: model)
        return predicting.run(made, Progress())


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


ROWS = "".join(json.dumps({"id": f"r{n}", "text": "x" * (n + 1)}) + "\n" for n in range(10))
BAD = ROWS + '{"text": \n\n{"id": "no text"}\n' + json.dumps({"id": "odd", "text": "x" * 13}) + "\n"


def test_every_record_has_its_line(tmp_path: Path) -> None:
    predictor = Counting()
    result = run(tmp_path, BAD, predictor, keep=("id",))
    made = lines(tmp_path / "out.jsonl")
    assert [(line["line"], line["id"]) for line in made[:10]] == [(n + 1, f"r{n}") for n in range(10)]
    assert [line["probabilities"]["a"] for line in made[:10]] == list(range(1, 11))
    assert [(line["line"], line["id"], line["error"].split(":")[0]) for line in made[10:]] == [
        (11, None, "invalid JSON"),
        (13, "no text", "has the columns id; it must have a column for text"),
        (14, "odd", "is odd"),
    ]
    assert (result.rows, result.errors, result.skipped) == (13, 3, 0) and predictor.asked == [4, 4, 2, 1]


def test_windows_grow_until_they_take_seconds() -> None:
    assert [predicting.next_window(128, seconds, 300) for seconds in (0.1, 5.0, 11.0)] == [256, 128, 64]
    assert predicting.next_window(256, 0.1, 300) == 300 and predicting.next_window(1, 99.0, 300) == 1


@pytest.mark.parametrize("out", ["out.jsonl", "out.csv", "out.tsv"])
@pytest.mark.parametrize("windows", [0, 1, 2])
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_an_output_goes_on_where_it_ended(tmp_path: Path, out: str, windows: int, cut: int) -> None:
    rows = "".join(json.dumps({"text": "x" * (n + 5), "note": f'"a"\n{n}'}) + "\n" for n in range(10))
    run(tmp_path, rows, Counting(), "whole" + Path(out).suffix, keep=("note",))
    whole = (tmp_path / ("whole" + Path(out).suffix)).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rows, Counting(fail_after=windows), out, keep=("note",))
    written = (tmp_path / out).read_bytes()
    assert whole.startswith(written)
    (tmp_path / out).write_bytes(written[: max(len(written) - cut, 0)])
    result = run(tmp_path, rows, Counting(), out, keep=("note",))
    assert (tmp_path / out).read_bytes() == whole
    assert result.skipped == max(4 * windows - bool(cut), 0) and result.rows + result.skipped == 10
    again = run(tmp_path, rows, Counting(), out, keep=("note",))
    assert (again.rows, again.skipped) == (0, 10) and (tmp_path / out).read_bytes() == whole
    assert run(tmp_path, rows, Counting(), out, keep=("note",), overwrite=True).rows == 10


def test_a_table_has_a_column_for_each_label_and_for_the_error(tmp_path: Path) -> None:
    rows = "text,n\n" + "x" * 13 + ",1\nab,2\n,3\nxyz,4,5\n"
    run(tmp_path, rows, Counting(), "out.csv", ".csv", keep=("n",))
    made = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert list(made[0]) == ["line", "n", "label", "probabilities.a", "probabilities.b", "error"]
    assert [line["error"] for line in made] == ["is odd", "", "", "has 3 fields, but the header has 2"]
    assert (made[1]["probabilities.a"], made[1]["n"], made[3]["n"]) == ("2", "2", "")
    run(tmp_path, "text\n" + "x" * 13 + "\n", Counting(), "bad.csv", ".csv")
    assert (tmp_path / "bad.csv").read_text() == "line,error\n1,is odd\n"


def test_outputs_of_something_else_are_left_alone(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", "no JSON\n"),
        ("a.jsonl", '{"a": 1}\n'),
        ("a.csv", "id,label\n1,a\n"),
        ("a.jsonl", '{"line": 7}\n'),
        ("a.jsonl", "".join(f'{{"line": {n + 1}}}\n' for n in range(11))),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=r"it exists, and .* set --overwrite"):
            run(tmp_path, ROWS, Counting(), name)
        assert (tmp_path / name).read_text() == content
    for name in ("a.parquet", "a"):
        with pytest.raises(UserError, match=r"must end in \.jsonl, \.csv, \.tsv"):
            run(tmp_path, ROWS, Counting(), name)


def test_a_table_does_not_take_top_k(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--top-k 2: a table has a column for each label"):
        run(tmp_path, ROWS, Counting(), "a.csv", top_k=2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "ab"}\n{"text": "c"}'),
        ("a.json", b'[{"text": "ab"}, {"text": "c"}]'),
        ("a.csv", b"\xef\xbb\xbftext\nab\nc\n"),
        ("a.tsv", b"text\tn\nab\t1\nc\t2\n"),
        ("a.txt", b"ab\nc\n"),
    ],
)
def test_files_and_streams_of_every_kind(
    tmp_path: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(content)
    read = list(source.records(str(tmp_path / name), "jsonl"))
    assert [(record.line, record.value["text"]) for record in read if hasattr(record, "value")] == [(1, "ab"), (2, "c")]
    form = {".csv": "csv", ".tsv": "tsv", ".txt": "text", ".jsonl": "jsonl"}.get(Path(name).suffix)
    if form:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        streamed = list(source.records("-", form))
        assert [(record.line, record.value["text"]) for record in streamed if hasattr(record, "value")] == [
            (1, "ab"),
            (2, "c"),
        ]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["ab", "c"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert [record.value for record in source.records(str(tmp_path / "a.parquet"), "jsonl")] == [  # type: ignore[union-attr]
        {"text": "ab", "n": 1},
        {"text": "c", "n": 2},
    ]


def test_what_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        source.records(str(tmp_path / "absent.csv"), "jsonl")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(DataError, match="unsupported file type"):
        source.records(str(tmp_path / "a.xlsx"), "jsonl")
    with pytest.raises(UserError, match="--format xml: must be one of csv, tsv, jsonl, text"):
        source.records("-", "xml")


def test_a_folder_that_does_not_say_what_it_is_for(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(ROWS)
    with pytest.raises(MissingArtifact, match="not an artifact that says what it is for"):
        predicting.run(Job(str(tmp_path), str(file), str(tmp_path / "o.jsonl"), {}), Progress())


# --- real models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Run:
    pytest.importorskip("onnxruntime")
    return exported_run(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "questions.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("nr", "question"), *enumerate(TEXTS), (30, " ")])
    return file


def predicted(target: object, file: object, out: Path, *options: object) -> list[dict[str, Any]]:
    done = qkit_here("predict", target, file, "--out", out, "--json", "--column", "text=question", *options)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rows"] == len(TEXTS) + 1 and told["errors"] == 1 and told["rows_per_second"] > 0
    return lines(out)


@pytest.mark.slow
def test_a_run_its_folders_and_its_server_predict_alike(labels: Run, questions: Path, tmp_path: Path) -> None:
    of_run = predicted(labels.root, questions, tmp_path / "run.jsonl", "--keep", "nr")
    assert [line["nr"] for line in of_run] == [str(number) for number in range(31)]
    assert "text is empty" in of_run[-1]["error"] or "question is empty" in of_run[-1]["error"]
    assert all(set(line["probabilities"]) == {*LABELS} for line in of_run[:-1])
    assert len({line["label"] for line in of_run[:-1]}) == 3
    others = {
        "merged": predicted(labels.root, questions, tmp_path / "m.jsonl", "--artifact", "merged"),
        "folder": predicted(labels.folder("export") / "onnx-fp32", questions, tmp_path / "f.jsonl"),
        "merge folder": predicted(labels.folder("merge"), questions, tmp_path / "mf.jsonl"),
    }
    with serving(tmp_path, labels.root) as running:
        key = tmp_path / "key.txt"
        key.write_text(KEY)
        others["server"] = predicted(running.url, questions, tmp_path / "s.jsonl", "--api-key-file", key)
        options = ("--out", tmp_path / "n.jsonl", "--api-key-file", key, "--model", "nobody")
        done = qkit_here("predict", running.url, questions, *options)
        assert done.returncode == 2 and f"does not serve nobody, but {running.model}" in done.stderr
    for name, made in others.items():
        assert made[-1]["error"] == of_run[-1]["error"].replace("`input[0]`: ", "") or name == "server"
        for line, wanted in zip(made[:-1], of_run[:-1], strict=True):
            assert line["label"] == wanted["label"], name
            for label in LABELS:
                assert line["probabilities"][label] == pytest.approx(wanted["probabilities"][label], abs=1e-5), name


@pytest.mark.slow
def test_texts_in_a_pipe(labels: Run) -> None:
    command = [
        sys.executable,
        "-m",
        "qkit",
        "predict",
        str(labels.root),
        "-",
        "--format",
        "text",
        "--out",
        "-",
        "--top-k",
        "1",
    ]
    done = subprocess.run(command, input="\n".join(TEXTS), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(made) == len(TEXTS) and all(list(line["probabilities"]) == [line["label"]] for line in made)
    assert "30 rows in" in done.stderr


@pytest.mark.slow
def test_an_artifact_that_a_run_does_not_have(labels: Run, questions: Path, tmp_path: Path) -> None:
    done = qkit_here("predict", labels.root, questions, "--out", tmp_path / "o.jsonl", "--artifact", "onnx-int4")
    assert done.returncode == 2 and "has no artifact onnx-int4; it has merged, onnx-fp32, onnx-int8" in done.stderr


def test_answers_of_a_chat_run(trained_run: Run, tmp_path: Path) -> None:
    """The merged model answers the held-out rows as it did when it was measured."""
    import yaml

    recipe = yaml.safe_load((trained_run.root / "recipe.yaml").read_text())
    test = recipe["data"]["test"][0]
    begin, end = [*test["rows"].split(":"), ""][:2]
    rows = Path(test["source"]).read_text().splitlines(keepends=True)[int(begin or 0) : int(end) if end else None]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    done = qkit_here("predict", trained_run.root, tmp_path / "rows.jsonl", "--out", tmp_path / "o.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    table = json.loads((trained_run.folder("merge") / "candidates.json").read_text())
    made = lines(tmp_path / "o.jsonl")
    assert [line["answer"] for line in made] == table["texts"]
    assert all(line["finish_reason"] in ("stop", "length") and line["completion_tokens"] > 0 for line in made)
    copy = tmp_path / "merged"
    shutil.copytree(trained_run.folder("merge"), copy)
    done = qkit_here("predict", copy, tmp_path / "rows.jsonl", "--out", tmp_path / "p.jsonl")
    assert done.returncode == 2 and "says what it is for" in done.stderr


def test_options_of_another_kind_of_model_are_refused(trained_run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(ROWS)
    done = qkit_here("predict", trained_run.root, file, "--out", tmp_path / "o.jsonl", "--top-k", 2)
    assert done.returncode == 2 and "--top-k: no effect with a model that generates text" in done.stderr
    with pytest.raises(UserError, match="--max-new-tokens: no effect with labels"):
        targets.check_options(Job("t", "f", "o", {}, max_new_tokens=3), open_task("classify"))


def test_one_bad_text_does_not_fail_those_that_are_sent_with_it() -> None:
    import httpx

    sent: list[Any] = []

    class Server:
        """As a server answers: a request with a bad text is refused as a whole."""

        def send(self, _: str, path: str, body: Any) -> httpx.Response:
            sent.append(body["input"])
            bad = [n for n, one in enumerate(body["input"]) if one == "bad"]
            if bad:
                return httpx.Response(400, json={"error": {"message": f"`input[{bad[0]}]`: is bad"}})
            data = [
                {"index": n, "label": one["text"] if isinstance(one, dict) else one}
                for n, one in enumerate(body["input"])
            ]
            return httpx.Response(200, json={"data": data})

        def expect_ok(self, answer: httpx.Response) -> httpx.Response:
            assert answer.status_code == 200
            return answer

        def read(self, answer: httpx.Response, pick: Any) -> Any:
            return pick(answer.json())

    client: Any = Server()
    predictor = servers.LabelServerPredictor(client, "m", open_task("classify"), {"top_k": -1})
    rng = np.random.default_rng(0)
    requests = [{"text": "x" * int(rng.integers(1, 90)) + str(n)} for n in range(100)]
    requests[50] = {"text": "bad"}
    requests[60] = {"text": "one", "pair": "two"}
    answers = predictor.predict(requests)
    assert str(answers[50]) == "`input[0]`: is bad" and isinstance(answers[50], RowError)
    assert answers[60] == {"label": "one"}
    assert [one["label"] for n, one in enumerate(answers) if n not in (50, 60) and not isinstance(one, RowError)] == [
        one["text"] for n, one in enumerate(requests) if n not in (50, 60)
    ]
    whole = [part for part in sent if len(part) > 1]
    assert len(whole) == 4 and {len(part) for part in whole} == {32, 4}


def test_header_names_come_from_the_first_answer(tmp_path: Path) -> None:
    made = sink.Sink(str(tmp_path / "a.tsv"))
    made.write(3, {}, {"error": "why"})
    made.write(5, {}, {"entities": [{"type": "PER"}]})
    made.close()
    assert (tmp_path / "a.tsv").read_text() == 'line\tentities\terror\n3\t\twhy\n5\t"[{""type"": ""PER""}]"\t\n'


def test_a_table_of_errors_gets_the_columns_of_the_first_answer_after_a_restart(tmp_path: Path) -> None:
    odd, even = json.dumps({"text": "x" * 13, "note": 'a "b"\nc'}), json.dumps({"text": "xy", "note": ""})
    rows = "\n".join([odd] * 5 + [even] * 3 + [odd])
    run(tmp_path, rows, Counting(), "whole.csv", keep=("note",))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rows, Counting(fail_after=1), "out.csv", keep=("note",))
    assert (tmp_path / "out.csv").read_text().startswith("line,note,error\n1,")
    result = run(tmp_path, rows, Counting(), "out.csv", keep=("note",))
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes() and result.skipped == 4
    made = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [line["probabilities.a"] for line in made] == ["", "", "", "", "", "2", "2", "2", ""]


def test_a_table_refuses_what_it_has_no_column_for(tmp_path: Path) -> None:
    made = sink.Sink(str(tmp_path / "a.csv"))
    made.write(1, {"meta": {"x": 1}}, {"label": "a"})
    made.write(2, {"meta": None}, {"error": "why"})
    with pytest.raises(UserError, match=r"a\.csv: record 3 has meta\.y, score, for which the table has no column"):
        made.write(3, {"meta": {"x": 2, "y": 3}}, {"label": "b", "score": 1})
    made.close()
    assert (tmp_path / "a.csv").read_text() == "line,meta.x,label,error\n1,1,a,\n2,,,why\n"


def test_columns_of_the_recipe_count_where_the_file_has_them(tmp_path: Path) -> None:
    rows = '{"body": "xy", "content": "xyz"}\n{"content": "xyz"}\n{"text": "x", "body": "xy"}\n'
    sizes = {}
    for name, columns in (("default", {}), ("other", {"text": "content"})):
        run(tmp_path, rows, Counting(), f"{name}.jsonl", target={"columns": {"text": "body"}}, columns=columns)
        sizes[name] = [line.get("probabilities", {}).get("a") for line in lines(tmp_path / f"{name}.jsonl")]
    assert sizes == {"default": [2, 3, 2], "other": [3, 3, None]}
    assert "has no column 'content'" in lines(tmp_path / "other.jsonl")[2]["error"]


@pytest.mark.parametrize(
    ("task", "name", "known"),
    [("classify", "txt", "text"), ("answer", "contxt", "context"), ("chat", "promt", "prompt")],
)
def test_a_name_that_the_task_does_not_read_is_refused(task: str, name: str, known: str) -> None:
    with pytest.raises(UserError, match=rf"^--column maps '{name}' to 'body', .*{known}"):
        targets.check_options(Job("t", "f", "o", {name: "body"}), open_task(task))
    targets.check_options(Job("t", "f", "o", {known: "body"}), open_task(task))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": {"weights": "others"}}, 'weights "w", now "others"'),
        ({"keep": ("id",)}, r'--keep \[\], now \["id"\]'),
        ({"columns": {"text": "id"}}, r'--column \{\}, now \{"text": "id"\}'),
        ({"top_k": 1}, "top_k -1, now 1"),
        ({"rows": ROWS.replace("r9", "s9")}, 'sha256 of the file "[0-9a-f]+", now "[0-9a-f]+"'),
    ],
)
def test_an_output_made_with_something_else_is_not_continued(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ROWS, Counting(fail_after=1))
    written = (tmp_path / "out.jsonl").read_bytes()
    other = {"rows": ROWS, **change}
    with pytest.raises(UserError, match=rf"it exists, and was made with {message}; .* set --overwrite"):
        run(tmp_path, predictor=Counting(), **other)
    assert (tmp_path / "out.jsonl").read_bytes() == written
    assert run(tmp_path, ROWS, Counting()).skipped == 4
    assert run(tmp_path, ROWS, Counting()).rows == 0  # it is known to be finished
    assert run(tmp_path, predictor=Counting(), overwrite=True, **other).rows == 10
    assert run(tmp_path, predictor=Counting(), **other).skipped == 10


def test_an_output_without_its_state_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path, ROWS, Counting())
    for damage in ("", "[]", None):
        state = tmp_path / "out.jsonl.state"
        state.unlink() if damage is None else state.write_text(damage)
        with pytest.raises(
            UserError, match=r"no out\.jsonl\.state beside it says with what it was made; .* --overwrite"
        ):
            run(tmp_path, ROWS, Counting())
    (tmp_path / "out.jsonl").write_text("")
    assert run(tmp_path, ROWS, Counting()).rows == 10


def test_kept_columns_and_answers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    rows = (
        '{"text": "xxxxxxxxxxxxx", "label": "was", "line": 70, "error": 1}\n{"text": "xy", "label": "is", "line": 80}\n'
    )
    keep = ("label", "line", "error", "text")
    run(tmp_path, rows, Counting(), keep=keep)
    bad, good = lines(tmp_path / "out.jsonl")
    kept = {"line": 1, "input.label": "was", "input.line": 70, "input.error": 1, "text": "x" * 13}
    assert bad == {**kept, "error": "is odd"}
    assert (good["line"], good["input.line"], good["label"], good["input.label"]) == (2, 80, "a", "is")
    assert run(tmp_path, rows, Counting(), keep=keep).skipped == 2
    run(tmp_path, '{"text": "xy", "probabilities.a": 3}', Counting(), "a.csv", keep=("probabilities.a",))
    assert (tmp_path / "a.csv").read_text().startswith("line,input.probabilities.a,label,probabilities.a,")
    with pytest.raises(UserError, match=r"--keep label: is written as input\.NAME, which is kept too"):
        sink.kept_names(("label", "input.label"), ("label",), "a.jsonl")
    assert Predictor.names(Counting(), {"text": "xy"}) == {"label", "probabilities"}


def test_a_run_with_nothing_to_predict_with_says_what_it_has(tmp_path: Path) -> None:
    recipe = settings(tmp_path / "model", tmp_path / "rows.jsonl", method="houlsby", export={"formats": ["onnx-int8"]})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    made = Run.create(tmp_path / "run", load(tmp_path / "recipe.yaml"))
    made.save_recipe()
    folder = made.folder("export") / "onnx-int8"
    for file, content in (
        (folder / "config.json", {}),
        (made.folder("verify") / "parity.json", {"parity": {"onnx-int8": {"status": "failed"}}}),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    job = Job(str(made.root), "f", "o", {})
    with pytest.raises(
        MissingArtifact, match=r"method=houlsby makes no merged .* onnx-int8 \(onnxruntime; failed\): .*--artifact"
    ):
        targets.resolve(job)
    named = dataclasses.replace(job, artifact="onnx-int8")
    seen = [targets.resolve(named)]
    (folder / "model.onnx").write_text("")
    seen.append(targets.resolve(named))
    for digest in ("a", "b"):
        outputs = {"export/onnx-int8/model.onnx": {"sha256": digest, "bytes": 0}}
        (made.root / "run.json").write_text(json.dumps({"stages": {"export": {"outputs": outputs}}}))
        seen.append(targets.resolve(named))
    (folder / "more.txt").write_text("")
    assert len({one.weights for one in seen}) == 4 and {one.name for one in seen} == {"onnx-int8 of run"}
    assert targets.resolve(named).weights == seen[-1].weights
