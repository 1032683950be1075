"""`qkit inspect`: one screen, one document, one page, single rows; from a recipe, from a run, and for a set-up that is not ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.command import qkit_here
from qkit import pipeline
from qkit.core.errors import DataError, ModelError
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.data import summary
from qkit.data.inspection import page as inspection_page
from qkit.data.inspection import screen, view
from qkit.model import vocabulary
from qkit.plugins.example import Reads
from qkit.recipe import schema
from qkit.recipe.load import load
from qkit.run.directory import Run
from qkit.tasks._conversation import formats

ASKED = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}


@pytest.fixture
def seen(tiny_recipe: Path) -> view.Inspection:
    return view.inspect(load(tiny_recipe), Progress())


def test_the_document(tiny_recipe: Path) -> None:
    done = qkit_here("inspect", tiny_recipe, "--json", "--row", 2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {check["status"] for check in found["checks"]} <= {"pass", "skipped"}
    assert all({"name", "status", "message", "rows", "remedy"} <= set(check) for check in found["checks"])
    assert found["counts"] == {"records": 24, "kept": 24, "dropped": 0, "by_rule": {}}
    assert found["splits"]["train"]["rows"] == 20
    assert found["tokens"]["real"] + found["tokens"]["padding"] == found["tokens"]["computed"]
    assert sum(found["loss_mask"]) == 4 and len(found["input_ids"]) == len(found["texts"]) == len(found["loss_mask"])
    learnt = "".join(text for text, mask in zip(found["texts"], found["loss_mask"], strict=True) if mask)
    assert learnt == "ggg<|im_end|>"


def test_the_screen_names_what_is_wrong_with_its_row_and_remedy(
    rows_file: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    with rows_file.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    done = qkit_here("inspect", tiny_recipe)
    assert done.returncode == 2
    words = " ".join(done.stdout.split())
    assert "fail roles" in words and "rows.jsonl:25" in words and "data.clean.roles=drop" in words
    assert "train 21 20 1 20" in words
    assert qkit_here("inspect", tiny_recipe, "--set", "data.clean.roles=drop").returncode == 0


def test_a_second_look_reads_nothing_again(tiny_recipe: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = load(tiny_recipe)
    first = view.inspect(how, Progress())
    with monkeypatch.context() as patched:
        patched.setattr(data_stage, "prepare", lambda *_: pytest.fail("nothing has changed"))
        assert view.inspect(how, Progress()) == first
    with rows_file.open("a") as file:
        file.write(
            json.dumps({"messages": [{"role": "user", "content": "say z"}, {"role": "assistant", "content": "z"}]})
            + "\n"
        )
    assert view.inspect(how, Progress()).summary["splits"]["train"]["rows"] == 21


def test_a_run_is_shown_from_its_own_folder(tiny_recipe: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    pipeline.execute(run, "data")
    found = view.of_run(run)
    assert found.folder == run.folder("data") and view.losses(run) is None
    assert json.loads(qkit_here("inspect", run.root, "--json").stdout)["splits"] == found.summary["splits"]


def test_losses_name_the_rows(tiny_recipe: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = Run.create(tmp_path / "run", load(tiny_recipe))
    pipeline.execute(run, "data")
    run.folder("train").mkdir()
    table = pa.table({"row": [0, 1, 2], "loss_before": [3.0, 0.1, 2.0], "loss_after": [1.0, 0.1, 2.5]})
    pq.write_table(table, run.folder("train") / "losses.parquet")
    found = view.losses(run)
    assert found is not None
    assert [row["row"] for row in found["did_not_learn"]] == [2, 1, 0]
    assert [row["row"] for row in found["suspiciously_low"]] == [1, 2, 0]
    assert found["did_not_learn"][0]["place"].endswith("rows.jsonl:7")
    assert "rows that were not learned" in qkit_here("inspect", run.root).stdout


def test_somebody_elses_set_up(tiny_model: Path, rows_file: Path) -> None:
    done = qkit_here("inspect", "--model", tiny_model, "--data", rows_file, "--format", "messages", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["splits"]["train"]["rows"] == 24
    assert [check["name"] for check in found["checks"] if check["status"] == "warn"] == ["held_out"]
    assert qkit_here("inspect", "--model", tiny_model).returncode == 2


@pytest.mark.parametrize(
    ("split", "row", "words"),
    [("train", 99, "has 20 rows"), ("train", -1, "has 20 rows"), ("dev", 0, "must be one of")],
)
def test_rows_that_are_not_there(seen: view.Inspection, split: str, row: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        view.row(seen, split, row)


def test_characters_split_over_tokens_are_read_together(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    ids = tokenizer("é🙂a", add_special_tokens=False)["input_ids"]
    assert list(view.token_texts(tokenizer, ids)) == ["é", "", "🙂", "", "", "", "a"]
    assert list(view.token_texts(tokenizer, ids[:3])) == ["é", "", "�"]


def test_a_row_does_not_steer_the_terminal() -> None:
    assert screen.plain("a\x1b[2Jb\x00") == "a␛[2Jb␀"


def test_the_histogram_counts_every_row() -> None:
    lengths = [[10, 5, 20], [55, 3, 9], [200, 2, 8]]
    lines = list(screen.histogram(lengths, 100))
    assert "p50 10" in lines[0] and "p99 200" in lines[0] and "longest 200" in lines[0]
    assert sum(int(re.search(r"(\d+) \(", line)[1]) for line in lines[1:]) == 10  # type: ignore[index]


def test_the_page_holds_every_row_and_no_row_can_end_its_script(
    tiny_recipe: Path, rows_file: Path, tmp_path: Path
) -> None:
    evil = "</script><script>alert(1)</script>"
    with rows_file.open("a") as file:
        file.write(
            json.dumps({"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": "z"}]}) + "\n"
        )
    seen = view.inspect(load(tiny_recipe), Progress())
    inspection_page.write(seen, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("</script>") == 1
    rows: dict[str, Any] = json.loads(re.search(r"const rows = (.*);", page)[1])  # type: ignore[index]
    assert len(rows["train"]) == 21 and len(rows["test"]) == 4
    assert evil in "".join(text for _, text in rows["train"][-1]["segments"])
    assert not re.search(r"(src|href)=", page)


def test_a_row_is_shown_with_the_check_that_fails(rows_file: Path, tiny_recipe: Path) -> None:
    with rows_file.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    done = qkit_here("inspect", tiny_recipe, "--row", 0)
    assert done.returncode == 2 and done.stdout.startswith("train row 0")
    assert "check roles: 1 row has an invalid order" in done.stderr and "rows.jsonl:25" in done.stderr
    assert "data.clean.roles=drop" in done.stderr


def test_what_nothing_reads_is_counted_and_named(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"say {i},{i % 2}\n" for i in range(20)), encoding="utf-8")
    how = view.recipe_for(str(tiny_model), str(rows), "auto", ())
    [check] = [c for c in view.inspect(how, Progress()).summary["checks"] if c["name"] == "unused"]
    assert check["status"] == "warn" and check["found"] == 20
    assert check["message"] == f"20 records have data that nothing reads: label in 20; the first is {rows}:1"
    assert check["remedy"].startswith("these rows are trained on as plain text, without label")
    how = view.recipe_for(str(tiny_model), str(rows), "auto", ("data.ignore=[label, 'lable*']",))
    [check] = [c for c in view.inspect(how, Progress()).summary["checks"] if c["name"] == "unused"]
    assert check["status"] == "pass" and check["message"].endswith(
        "data.ignore has lable*, which does not match any name"
    )
    how = view.recipe_for(str(tiny_model), str(rows), "auto", ("data.columns={prompt: text, completion: label}",))
    assert "unused" not in {c["name"] for c in view.inspect(how, Progress()).summary["checks"] if c["status"] == "warn"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ASKED, SAID], "reasoning": "so"}, "reasoning in 1 (it belongs in the assistant's turn);"),
        ({"messages": [ASKED, SAID], "outputs": "so"}, "outputs in 1;"),  # not output, which other formats take
        (
            {"prompt": "q", "completion": [SAID], "thinking": "so"},
            "thinking in 1 (it belongs in the assistant's turn);",
        ),
        ({"prompt": "q", "completion": "a", "reasonning": "so"}, "reasonning in 1 (did you mean reasoning?);"),
        ({"text": "t", "reasoning": "so"}, "reasoning in 1;"),
        ({"messages": [ASKED, SAID], "tool": "so"}, "tool in 1 (did you mean tools?);"),
    ],
)
def test_only_names_that_the_format_takes_are_offered(
    tiny_model: Path, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    how = view.recipe_for(str(tiny_model), str(tmp_path / "rows.jsonl"), "auto", ())
    [check] = [c for c in view.inspect(how, Progress()).summary["checks"] if c["name"] == "unused"]
    assert words in check["message"]


def test_a_map_that_would_have_no_effect_is_an_error(tiny_model: Path, rows_file: Path) -> None:
    for name, words in (("promt", "did you mean prompt?"), ("xyz", "there are attention_mask")):
        how = view.recipe_for(str(tiny_model), str(rows_file), "auto", (f"data.columns={{{name}: question}}",))
        with pytest.raises(DataError, match=f"data.columns maps '{name}' to 'question', but .*{re.escape(words)}"):
            view.inspect(how, Progress())
    section = schema.Data(columns={"source": "origin", "label": "kind"}, group="source")
    assert formats.unknown_column(section, Reads()) == ""


def test_records_that_are_left_out_are_counted_in_words(tiny_model: Path, rows_file: Path) -> None:
    with rows_file.open("a") as file:
        file.write(rows_file.read_text(encoding="utf-8"))
    seen = view.inspect(view.recipe_for(str(tiny_model), str(rows_file), "auto", ()), Progress())
    assert summary.left_out(seen.summary, "train") == (
        "24 of 48 records are dropped (duplicate 24): see `qkit inspect`"
    )
    assert summary.left_out(seen.summary, "test") == ""


def test_the_stage_says_what_is_not_learnt_before_training(tiny_recipe: Path, rows_file: Path, tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "say z"}, {"role": "assistant", "content": "z", "reasonning": "so"}]
    }
    with rows_file.open("a") as file:
        file.write(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    done = qkit_here("data", tiny_recipe, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert (
        "data: unused: 2 records have data that nothing reads: messages.reasonning in 2 (did you mean reasoning?)"
        in said
    )
    assert "data: warnings, see `qkit inspect`: duplicate" in said


# --- tokenizer and embedding ----------------------------------------------------------------------------------------------


def with_tokens(model: Path, target: Path, change: Any, **config: Any) -> Path:
    """A copy of a model whose tokenizer was changed, and its weights were not."""
    import shutil

    shutil.copytree(model, target)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    change(tokenizer)
    tokenizer.save_pretrained(str(target))
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


def vocabulary_of(model: Path, rows: Path, *overrides: str) -> dict[str, Any]:
    how = view.recipe_for(str(model), str(rows), "messages", overrides)
    (check,) = (c for c in view.inspect(how, Progress()).summary["checks"] if c["name"] == "vocabulary")
    return dict(check)


def another_end(tokenizer: Any) -> None:
    """Turns end with a token that came later."""
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")


BEYOND = {
    "a padding token": (lambda t: t.add_special_tokens({"pad_token": "[PAD]"}), "warn", "[PAD] (259)"),
    "an added token": (lambda t: t.add_tokens(["<think>"]), "warn", "<think> (259)"),
    "a special token": (lambda t: t.add_special_tokens({"extra_special_tokens": ["<x>"]}), "warn", "<x> (259)"),
    "what ends a turn": (another_end, "fail", "<|end|> (259)"),
    "a mark of the template": (
        lambda t: (
            t.add_special_tokens({"extra_special_tokens": ["<|start|>"]}),
            setattr(t, "chat_template", t.chat_template.replace("<|im_start|>", "<|start|>")),
        ),
        "fail",
        "<|start|> (259)",
    ),
}


@pytest.mark.parametrize("what", BEYOND)
def test_tokens_that_the_model_has_no_row_for(what: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    change, status, words = BEYOND[what]
    model = with_tokens(tiny_model, tmp_path / "model", change)
    check = vocabulary_of(model, rows_file)
    assert (check["status"], words in check["message"], "0 to 258" in check["message"]) == (status, True, True)
    assert "model.add_tokens" in check["remedy"]


def test_the_remedy_gives_them_rows(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    model = with_tokens(tiny_model, tmp_path / "model", another_end)
    assert vocabulary_of(model, rows_file, 'model.add_tokens=["<|end|>"]')["status"] == "pass"


def test_the_remedy_is_good_for_a_padding_token_that_the_config_names(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """As a Llama 2 with [PAD] is often saved: its weights have no row for it, and the model cannot be loaded."""
    from transformers import AutoModelForCausalLM

    from qkit.model import source

    pads = with_tokens(
        tiny_model, tmp_path / "model", lambda t: t.add_special_tokens({"pad_token": "[PAD]"}), pad_token_id=259
    )
    assert vocabulary_of(pads, rows_file)["status"] == "fail"
    assert vocabulary_of(pads, rows_file, 'model.add_tokens=["[PAD]"]')["status"] == "pass"
    grown = AutoModelForCausalLM.from_pretrained(source.resolve(schema.Model(source=str(pads), add_tokens=("[PAD]",))))
    assert grown.get_input_embeddings().weight.shape[0] == 260


def test_padding_is_chosen_within_the_embedding(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    model = with_tokens(tiny_model, tmp_path / "model", lambda t: t.add_special_tokens({"pad_token": "[PAD]"}))
    how = view.recipe_for(str(model), str(rows_file), "messages", ())
    assert json.loads((view.inspect(how, Progress()).folder / "tokens.json").read_text())["pad"] < 259
    with pytest.raises(ModelError, match=r"its id is 259, but the model's ids are 0 to 258"):
        vocabulary_of(model, rows_file, 'model.pad_token="[PAD]"')


def test_a_row_that_spells_a_token_without_a_row(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    model = with_tokens(tiny_model, tmp_path / "model", lambda t: t.add_tokens(["<think>"]))
    rows_file.write_text(rows_file.read_text().replace("say b ", "say <think>"))
    check = vocabulary_of(model, rows_file)
    assert check["status"] == "fail" and check["rows"][0]["line"] == 2
    assert (
        "has the id 259" in check["message"] and "<think> (259)" in check["message"] and "add_tokens" in check["remedy"]
    )


def test_a_config_that_names_a_token_without_a_row(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """The embedding could not even be made with such a padding index."""
    model = with_tokens(tiny_model, tmp_path / "model", lambda t: None, pad_token_id=300)
    check = vocabulary_of(model, rows_file)
    assert check["status"] == "fail" and "pad_token_id (300)" in check["message"]


def test_more_rows_than_tokens_are_well(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """As Phi-3 and Qwen have them: the embedding is padded to a multiple."""
    model = with_tokens(tiny_model, tmp_path / "model", lambda t: None, vocab_size=320)
    assert vocabulary_of(model, rows_file)["status"] == "pass"


def test_the_plan_says_it_too(tiny_model: Path, tmp_path: Path) -> None:
    model = with_tokens(tiny_model, tmp_path / "model", lambda t: t.add_special_tokens({"pad_token": "[PAD]"}))
    found = vocabulary.without_a_row(schema.Model(source=str(model)))
    assert found is not None and "[PAD] (259)" in found and "0 to 258" in found
    assert vocabulary.without_a_row(schema.Model(source=str(model), add_tokens=("[PAD]",))) is None
    assert vocabulary.without_a_row(schema.Model(source=str(tiny_model))) is None
    done = qkit_here("plan", "--model", model)
    assert f"warning: {found}" in " ".join(done.stdout.split()), done.stdout
