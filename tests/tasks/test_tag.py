"""The task `tag` through all stages on tiny models: predictions by other means, plain libraries, gates, contract and the recipe in recipes/."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from helpers.paths import RECIPES
from helpers.served import serving
from helpers.tiny_labelled import WORDS, build_model
from helpers.tiny_tagged import TAGS, Sentence, sentences, tagged_run, write_conll
from qkit import pipeline
from qkit.core.device import detect
from qkit.measure import label_contract
from qkit.measure.gates import check as check_gates
from qkit.measure.held_out import held_out_of
from qkit.plugins.runtime import Encodes, TextRow, open_runtime
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.run.directory import Run
from qkit.tasks._encoder.tagging import transitions
from qkit.tasks._encoder.tagging.rows import TaggedRow
from qkit.tasks._encoder.tagging.schemes import Scheme, entities, violations
from qkit.tasks._encoder.tagging.tagger import MostFrequent, Tagger, log_probabilities, scores
from qkit.tasks._encoder.tagging.usage import usage

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
STAGES = ("data", "train", "evaluate", "merge", "export", "verify", "bench", "report")
RATES = {"full": 3e-3, "lora": 1e-2, "houlsby": 1e-2, "head": 1e-2}
CASES = [
    ("full", "cross_entropy"),
    ("full", "crf"),
    ("lora", "cross_entropy"),
    ("lora", "crf"),
    ("houlsby", "crf"),
    ("head", "crf"),
]
LONG = [(sentences(60)[n][0] * 4, sentences(60)[n][1] * 4) for n in (1, 2)]  # held out, and longer than data.max_length
ROWS: list[Sentence] = [*LONG, *sentences(94)]
HELD_OUT = ROWS[:24]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert", **QUIET)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[str, str], Run]:
    """A run through all stages, by method and loss; each is made once. Not to be changed."""
    finished: dict[tuple[str, str], Run] = {}

    def of(method: str, loss: str) -> Run:
        if (method, loss) not in finished:
            run = tagged_run(
                tmp_path_factory.mktemp(f"{method}-{loss}"),
                model,
                given=ROWS,
                method=method,
                loss={"name": loss},
                data={"max_length": 16},
                train={"max_steps": 60, "learning_rate": RATES[method], "save_steps": 60},
                export={"formats": ["onnx-fp32", "onnx-int8"]},
            )
            for stage in STAGES:
                if stage != "merge" or method != "houlsby":
                    pipeline.execute(run, stage)
            finished[method, loss] = run
        return finished[method, loss]

    return of


def lines_of(run: Run) -> list[dict[str, Any]]:
    lines = (run.folder("evaluate") / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["artifact"] == run.recipe.trained_as]


def json_of(run: Run, stage: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.folder(stage) / name).read_text(encoding="utf-8"))
    return content


# --- through all stages -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("method", "loss"), CASES)
def test_the_score_is_that_of_the_predictions(runs: Callable[[str, str], Run], method: str, loss: str) -> None:
    run = runs(method, loss)
    said = [line["prediction"].split() for line in lines_of(run)]
    assert [len(tags) for tags in said] == [len(words) for words, _ in HELD_OUT]
    pairs = [(set(entities(one)), set(entities(tags))) for one, (_, tags) in zip(said, HELD_OUT, strict=True)]
    f1 = 2 * sum(len(one & two) for one, two in pairs) / sum(len(one) + len(two) for one, two in pairs)
    scores_of = json_of(run, "evaluate", "scores.json")
    trained = scores_of["scores"][run.recipe.trained_as]
    assert (scores_of["metric"], trained["score"]) == ("entity F1", pytest.approx(100 * f1))
    assert trained["metrics"]["f1_micro"]["value"] == pytest.approx(f1) and f1 > 0.4
    right = [sum(a == b for a, b in zip(one, tags, strict=True)) for one, (_, tags) in zip(said, HELD_OUT, strict=True)]
    words = sum(len(tags) for _, tags in HELD_OUT)
    assert trained["metrics"]["token_accuracy"]["value"] == pytest.approx(sum(right) / words)
    assert [line["correct"] for line in lines_of(run)] == [n == len(one) for n, one in zip(right, said, strict=True)]
    assert scores_of["scores"]["majority"]["score"] == 0 and scores_of["gain"]["low"] > 0
    if loss == "crf":
        assert not any(violations(tags, Scheme.IOB2) for tags in said)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "loss"), CASES)
def test_artifacts_pass_their_gates(runs: Callable[[str, str], Run], method: str, loss: str) -> None:
    run = runs(method, loss)
    check_gates(run)
    parity = json_of(run, "verify", "parity.json")["parity"]
    made = [name for name in parity if name not in ("trained", "adapter")]
    assert made == ["merged", "onnx-fp32", "onnx-int8"][method == "houlsby" :]
    assert {parity[name]["status"] for name in made} == {"passed"}
    assert abs(parity["onnx-fp32"]["kl_mean"]) < 1e-6 and parity["onnx-fp32"]["top1"] == 1.0
    assert parity["onnx-fp32"]["tokens"] == sum(len(words) for words, _ in HELD_OUT)
    assert all(check["status"] == "ok" for name in made for check in parity[name]["contract"])


def same_entities(run: Run, strategy: str) -> int:
    """Compare a pipeline with the predictions, where their tags are valid; return the number of entities.

    Without a CRF, an I may continue nothing: that is an entity to the pipeline, and none by strict rules.
    """
    pipe = transformers.pipeline(
        "token-classification", model=str(run.folder("merge")), device="cpu", aggregation_strategy=strategy
    )
    count = 0
    for line, (words, _) in list(zip(lines_of(run), HELD_OUT, strict=True))[len(LONG) :]:
        tags = line["prediction"].split()
        if violations(tags, Scheme.IOB2):
            continue
        ours = [
            (entity.type, len(" ".join(words[: entity.begin])) + bool(entity.begin), len(" ".join(words[: entity.end])))
            for entity in entities(tags)
        ]
        assert [(one["entity_group"], one["start"], one["end"]) for one in pipe(" ".join(words))] == ours, words
        count += len(ours)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_pipeline_finds_the_same_entities(runs: Callable[[str, str], Run], method: str) -> None:
    assert same_entities(runs(method, "cross_entropy"), "simple") > 8


@pytest.mark.slow
def test_a_pipeline_reads_the_first_piece_of_a_word(tmp_path: Path) -> None:
    """With a tokenizer of word pieces, of which every word has two."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model = build_model(tmp_path / "model", "bert", **QUIET)
    pieces = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *(w[0] for w in WORDS), *(f"##{w[1:]}" for w in WORDS)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(model)
    train = {"max_steps": 100, "learning_rate": 3e-3, "save_steps": 100}
    run = tagged_run(tmp_path, model, given=ROWS, method="full", train=train, data={"max_length": 32})
    for stage in ("data", "train", "evaluate", "merge"):
        pipeline.execute(run, stage)
    assert len(held_out_of(run).rows[5].windows[0].input_ids) == 2 + 2 * len(HELD_OUT[5][0])
    assert same_entities(run, "first") > 8


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "crf"])
def test_an_adapter_loads_in_plain_peft(runs: Callable[[str, str], Run], loss: str) -> None:
    from peft import PeftModel

    run = runs("lora", loss)
    base = transformers.AutoModelForTokenClassification.from_pretrained(run.recipe.model.source, num_labels=len(TAGS))
    model = PeftModel.from_pretrained(base, str(run.trained())).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.recipe.model.source)
    with open_runtime(
        "transformers", Path(run.recipe.model.source), detect(), recipe=run.recipe, adapter=run.trained()
    ) as runtime:
        for row, (words, _) in list(zip(held_out_of(run).rows, HELD_OUT, strict=True))[len(LONG) :]:
            (ours,) = runtime.logits(row.windows)
            with torch.no_grad():
                theirs = model(**tokenizer(" ".join(words), return_tensors="pt")).logits[0]
            assert np.allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "crf"])
def test_lora_is_not_put_on_the_head(runs: Callable[[str, str], Run], loss: str) -> None:
    names = load_file(runs("lora", loss).trained() / "adapter_model.safetensors")
    on = {name.split(".lora_")[0] for name in names if ".lora_" in name}
    assert on and not any("classifier" in name or "crf" in name for name in on)
    whole = {name.removeprefix("base_model.model.") for name in names if ".lora_" not in name}
    heads = {"classifier.weight", "classifier.bias"}
    assert whole == heads | ({"crf.pairs", "crf.start", "crf.end"} if loss == "crf" else set())


# --- the scores of a CRF in every artifact ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "houlsby", "head"])
def test_every_artifact_has_the_transitions(runs: Callable[[str, str], Run], method: str) -> None:
    run = runs(method, "crf")
    weights = "model.safetensors" if method in ("full", "head") else "adapter_model.safetensors"
    stored = load_file(run.trained() / weights)
    pairs = next(value for name, value in stored.items() if name.endswith("crf.pairs")).numpy()
    assert np.abs(pairs).max() > 1e-3 and pairs.shape == (len(TAGS), len(TAGS))
    if method != "houlsby":
        assert np.array_equal(load_file(run.folder("merge") / "model.safetensors")["crf.pairs"].numpy(), pairs)
    task = open_task("tag")
    opened: list[tuple[str, Path, dict[str, Any]]] = [
        ("transformers", Path(run.recipe.model.source), {"recipe": run.recipe, "adapter": run.trained()}),
        *(("onnxruntime", run.folder("export") / name, {"head": task.HEAD}) for name in ("onnx-fp32", "onnx-int8")),
    ]
    if method != "houlsby":
        opened.append(("transformers", run.folder("merge"), {"head": task.HEAD}))
    for runtime_name, folder, options in opened:
        with open_runtime(runtime_name, folder, detect(), **options) as runtime:
            given = runtime.transitions()
            assert given is not None and np.array_equal(given["pairs"], pairs), folder


@pytest.mark.slow
def test_a_lost_crf_is_seen(runs: Callable[[str, str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an export forgets the file."""
    from qkit.measure import parity

    run, task = runs("full", "crf"), open_task("tag")
    rows = held_out_of(run).rows
    folder = shutil.copytree(run.folder("export") / "onnx-fp32", tmp_path / "folder")
    scored = []
    for _ in range(2):
        with open_runtime("onnxruntime", folder, detect(), head=task.HEAD) as runtime:
            scored.append(tuple(task.outputs(runtime, rows)))
        (folder / transitions.FILE).unlink(missing_ok=True)
    found = parity.measure(parity.Reference(scored[0], ()), scored[1])
    assert found.max_difference is not None and found.max_difference > 1e-2


@pytest.mark.slow
def test_cards_say_what_plain_libraries_ignore(runs: Callable[[str, str], Run]) -> None:
    for loss in ("cross_entropy", "crf"):
        run = runs("full", loss)
        onnx = (run.folder("export") / "onnx-int8" / "README.md").read_text(encoding="utf-8")
        assert ("transitions.json" in onnx) == (loss == "crf") and "onnxruntime.InferenceSession" in onnx
        assert ("crf.pairs" in usage("transformers", run.recipe)) == (loss == "crf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export/onnx-fp32", "merge"])
def test_requests_give_the_predictions(runs: Callable[[str, str], Run], name: str) -> None:
    """With the scores of a CRF from the artifact's folder, and long sentences in windows."""
    run, task = runs("full", "crf"), open_task("tag")
    folder = run.root / name
    service: Any = task.service(folder, run.recipe.data.max_length)
    prepared = service.prepare([task.request(record, {}) for record in held_out_of(run).records])
    assert len(prepared[0].rows) > 1
    with open_runtime("onnxruntime" if "onnx" in name else "transformers", folder, detect(), head=task.HEAD) as runtime:
        answers = [service.answer(one, list(runtime.logits(one.rows))) for one in prepared]
    assert [answer["tags"] for answer in answers] == [line["prediction"].split() for line in lines_of(run)]


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(runs: Callable[[str, str], Run], tmp_path: Path) -> Run:
    run = runs("full", "cross_entropy")
    shutil.copytree(run.root, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    return Run(tmp_path / "run", load(tmp_path / "run" / "recipe.yaml"))


def other_words(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["apple"], vocabulary["pear"] = vocabulary["pear"], vocabulary["apple"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_names(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    names = {**config["id2label"], "1": "I-fruit", "2": "B-fruit"}
    (folder / "config.json").write_text(json.dumps({**config, "id2label": names}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "name", "said"),
    [
        (other_words, "tokens", "the ids differ from training"),
        (other_names, "labels", "label 1 is 'B-fruit' in training, 'I-fruit' in config.json"),
    ],
)
def test_the_contract_finds(copied: Run, spoil: Callable[[Path], None], name: str, said: str) -> None:
    spoil(copied.folder("merge"))
    checks = {check.name: check for check in label_contract.check_folder(copied, copied.folder("merge")).checks}
    assert [key for key, check in checks.items() if check.status != "ok"] == [name]
    assert said in checks[name].detail


@pytest.mark.slow
def test_a_server_is_checked_with_the_words_of_training(model: Path, tmp_path: Path) -> None:
    """Also with words that contain white space."""
    rows = [((*words, "den fin"), (*tags, "O")) for words, tags in sentences(96)]
    sections = {"train": {"max_steps": 20, "learning_rate": 3e-3, "save_steps": 20}, "data": {"max_length": 24}}
    run = tagged_run(tmp_path, model, given=rows, **sections, export={"formats": ["onnx-fp32"]})
    for stage in ("data", "train", "evaluate", "merge", "export"):
        pipeline.execute(run, stage)
    records = held_out_of(run).records
    requests = [open_task("tag").request(record, {}) for record in records]
    with serving(tmp_path, run.folder("export") / "onnx-fp32", env={"VLLM_API_KEY": ""}) as running:
        checks = label_contract.check_server(run, running.url).checks
        answers = httpx.post(f"{running.url}/tag", json={"input": requests}, timeout=60).json()["data"]
    assert [(check.name, check.status) for check in checks] == [("tokens", "ok"), ("labels", "ok"), ("answers", "ok")]
    assert [answer["words"] for answer in answers] == [record["words"] for record in records]
    assert all(answer["words"][-1] == "den fin" for answer in answers)


# --- other ways -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_crf_in_4_bit(model: Path, tmp_path: Path) -> None:
    run = tagged_run(
        tmp_path,
        build_model(tmp_path / "model", "bert", hidden_size=64, **QUIET),
        loss={"name": "crf"},
        quantization={"load_in_4bit": True},
        train={"max_steps": 40, "learning_rate": 1e-2, "save_steps": 40},
    )
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, stage)
    assert json_of(run, "evaluate", "scores.json")["gain"]["low"] > 0
    assert json_of(run, "verify", "parity.json")["parity"]["merged"]["status"] == "passed"
    stored = load_file(run.folder("merge") / "model.safetensors")
    assert stored["crf.pairs"].dtype == torch.float32 and float(stored["crf.pairs"].abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilbert", "roberta", "modernbert", "electra", "llama"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    head = "AutoModelForCausalLM" if kind == "llama" else "AutoModel"
    model = build_model(tmp_path / "model", kind, head, initializer_range=0.1)
    run = tagged_run(tmp_path, model, loss={"name": "crf"}, train={"max_steps": 4, "save_steps": 4})
    for stage in ("data", "train", "evaluate", "merge"):
        pipeline.execute(run, stage)
    assert len(lines_of(run)) == 24


@pytest.mark.slow
def test_the_recipe_on_a_small_file(model: Path, tmp_path: Path) -> None:
    """Its settings, on another model and local files, as its comment says."""
    text = (RECIPES / "ner-wnut17.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    assert raw["data"]["columns"] == {"words": "tokens", "tags": "ner_tags"}
    train, test = (
        str(write_conll(tmp_path / name, rows)) for name, rows in (("a.conll", ROWS[24:]), ("b.conll", HELD_OUT))
    )
    raw["model"] = {"source": str(model)}
    raw["data"] |= {
        "train": [{"source": train}],
        "test": [{"source": test}],
        "columns": {},
        "ignore": [],
        "max_length": 32,
    }
    raw["train"] |= {"num_train_epochs": 30, "learning_rate": 3e-3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    run = Run.create(tmp_path / "run", load(tmp_path / "recipe.yaml"))
    for stage in STAGES:
        pipeline.execute(run, stage)
    check_gates(run)
    assert json_of(run, "evaluate", "scores.json")["scores"]["trained"]["score"] > 50


# --- outputs ----------------------------------------------------------------------------------------------------------


class Fixed(Encodes):
    """A model whose logits depend on the token alone. `scores`: of a CRF."""

    def __init__(self, table: Any, scores: Any = None):
        self.table = np.array(table, np.float32)
        self.scores = scores

    def logits(self, rows: Any) -> Iterator[Any]:
        return (self.table[list(row.input_ids)] for row in rows)

    def transitions(self) -> Any:
        return self.scores

    def memory_bytes(self) -> int:
        return 0


NAMES = ("O", "B-x", "I-x")
SENTENCE = TaggedRow(
    (TextRow([0, 1, 2], []), TextRow([0, 2], [])), (1, -1, 2, 4), ("a", "\ufe0f", "b", "c"), (1, 0, 2, 2)
)


def test_words_are_read_from_all_windows() -> None:
    runtime = Fixed([[9, 0, 0], [0, 5, 0], [0, 0, 5]])
    (prediction,) = Tagger(NAMES).predict(runtime, [SENTENCE])
    assert prediction.text == "B-x I-x I-x I-x"
    assert prediction.details == {"entities": ["x: a \ufe0f b c"]}
    (row,) = scores(runtime, [SENTENCE])
    assert row.full is not None and row.full.shape == (3, 3) and row.unit == "tags"
    best = 5 - math.log(math.exp(5) + 2)
    assert row.targets.tolist() == pytest.approx([best] * 3) and row.top1.tolist() == [1, 2, 2]


def test_a_crf_gives_valid_sequences_and_marginals() -> None:
    table = [[0, 0, 0], [0, 0, 5], [0, 0, 5]]
    zeros = {"pairs": np.zeros((3, 3), np.float32), "start": np.zeros(3, np.float32), "end": np.zeros(3, np.float32)}
    alone, crf = Fixed(table), Fixed(table, zeros)
    assert Tagger(NAMES).predict(alone, [SENTENCE])[0].text == "I-x I-x I-x I-x"
    assert Tagger(NAMES).predict(crf, [SENTENCE])[0].text == "B-x I-x I-x I-x"
    (plain,), (marginal,) = (list(log_probabilities(one, [SENTENCE])) for one in (alone, crf))
    assert np.allclose(plain, marginal, atol=1e-6)


def test_many_sentences_pass_a_crf_in_parts() -> None:
    rng = np.random.default_rng(0)
    scores_of = {"pairs": rng.normal(size=(3, 3)), "start": rng.normal(size=3), "end": rng.normal(size=3)}
    runtime = Fixed(rng.normal(size=(20, 3)), {name: array.astype(np.float32) for name, array in scores_of.items()})
    rows = []
    for length in rng.integers(1, 9, 150).tolist():
        ids = rng.integers(0, 20, length).tolist()
        rows.append(TaggedRow((TextRow(ids, []),), tuple(range(length)), ("w",) * length, (0,) * length))
    together = list(log_probabilities(runtime, rows))
    predicted = Tagger(NAMES).predict(runtime, rows)
    for row, full, prediction in list(zip(rows, together, predicted, strict=True))[::7]:
        (alone,) = log_probabilities(runtime, [row])
        assert np.allclose(alone, full, atol=1e-5) and np.allclose(np.exp(full).sum(1), 1, atol=1e-5)
        assert Tagger(NAMES).predict(runtime, [row])[0].text == prediction.text


def test_the_baseline_is_always_the_most_frequent_tag() -> None:
    (prediction,) = Tagger(NAMES).predict(MostFrequent([70, 20, 10]), [SENTENCE])
    assert prediction.text == "O O O O"
    (logp,) = log_probabilities(MostFrequent([70, 20, 10]), [SENTENCE])
    assert np.exp(logp[0]).tolist() == pytest.approx([0.7, 0.2, 0.1])


def test_a_task_says_what_is_right() -> None:
    task: Any = open_task("tag")
    assert task.correct("O B-x", ("O", "B-x"), None) is True and task.correct("O B-x", ("O", "O"), None) is False
    record = {"words": ["ban", *WORDS[:2]], "names": ["O", "B-x", "I-x"]}
    assert task.question(record) == "ban apple pear" and task.answer(record) == '["x: apple pear"]'
    assert task.answer({"words": ["ban"], "names": ["O"]}) == "[]"


def test_stored_scores_of_other_labels_are_refused(tmp_path: Path) -> None:
    from qkit.core.errors import ModelError

    config = transformers.AutoConfig.for_model(
        "distilbert", vocab_size=20, dim=8, n_layers=1, n_heads=1, hidden_dim=8, num_labels=3
    )
    made = transformers.AutoModelForTokenClassification.from_config(config)
    made.save_pretrained(tmp_path / "plain")
    assert transitions.of(made) is None
    transitions.add(made, tmp_path / "plain")
    torch.nn.init.normal_(made.crf.pairs)
    made.save_pretrained(tmp_path / "crf")
    config.num_labels = 4
    other = transformers.AutoModelForTokenClassification.from_config(config)
    with pytest.raises(ModelError, match="its CRF has 3 labels, and the data 4"):
        transitions.add(other, tmp_path / "crf")
    again = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "crf")
    transitions.add_stored(again, tmp_path / "crf")
    ours, theirs = transitions.of(made), transitions.of(again)
    assert ours is not None and theirs is not None and np.array_equal(ours["pairs"], theirs["pairs"])
    (tmp_path / "out").mkdir()
    transitions.write(again, tmp_path / "out")
    read = transitions.read(tmp_path / "out")
    assert read is not None and all(np.array_equal(read[name], ours[name]) for name in ours)
