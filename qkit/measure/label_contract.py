"""The serve contract of a model with labels: text in, the tokens of training, and the labels that its artifact gives for them.

A folder is checked as a server or `transformers.pipeline` would open it: with its own tokenizer and its own config.json. A running server is
sent held-out texts; its answers are compared with those that its artifact, opened here, gives for the token ids of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from qkit.core.device import detect
from qkit.core.errors import short
from qkit.core.files import read_json
from qkit.core.sequences import first_difference
from qkit.measure import contract
from qkit.measure import held_out as measure_held_out
from qkit.measure.artifacts import artifacts
from qkit.measure.contract import DIFFERS, NOT_CHECKED, OK, Contract, ContractCheck
from qkit.measure.endpoint import START_SERVER
from qkit.plugins.runtime import TextRow, open_runtime
from qkit.plugins.task import Losses, Prepared, Service, Task, open_task, read_labels
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.server.client import Client

ROWS = 64
WHAT = {  # by column of a prepared row
    "input_ids": "from token {} on, the ids",
    "token_type_ids": "from token {} on, the token types",
    "further": "beyond data.max_length, from token {} on, the ids",
    "starts": "from word {} on, the tokens at which words begin",
}
FAR_TOLERANCE = 0.1  # of a probability, where the server's artifact is not on this machine and may be a quantized one


def check_folder(run: Run, folder: Path, rows: int = ROWS) -> Contract:
    """Check a model folder against the run's held-out rows and labels."""
    held_out = measure_held_out.held_out_of(run)
    config = read_json(folder / "config.json")
    return Contract(str(folder), folder.name, tuple(_checks(run, folder, config, held_out.records[:rows])))


def check_server(run: Run, url: str, model: str | None = None, headers: Mapping[str, str] | None = None) -> Contract:
    """Check the server of a run with whichever kind of head: conversations, or texts with labels.

    `model`: the name it is served under; default: the first one. `headers`: sent with each request, such as an API key.

    Raises:
        ServerError: no server answers at `url`, or it does not serve the model.
    """
    if open_task(run.recipe.task).HEAD.generates:
        return contract.check(run, url, model, headers=headers)
    with Client(url, headers, remedy=START_SERVER) as client:
        entry = client.entry(model)
        return Contract(url, str(entry["id"]), tuple(_server_checks(run, client, entry)))


# --- the checks of a server -------------------------------------------------------------------------------------------


def _server_checks(run: Run, client: Client, entry: Mapping[str, Any]) -> Iterator[ContractCheck]:
    task, served = open_task(run.recipe.task), Path(str(entry.get("root") or "-"))
    is_here = served.is_dir()
    folder = served if is_here else artifacts(run)[0].path
    service = task.service(folder, run.recipe.data.max_length)
    assert service is not None, run.recipe.task
    asked, rows = _askable(run, task, entry)
    if not asked:
        yield ContractCheck("answers", NOT_CHECKED, "this server takes no request that a held-out row makes")
        return
    yield _served_tokens(client, entry, asked, rows)
    if is_here:
        yield _labels(read_json(folder / "config.json"), read_labels(run.need("data", "summary.json").parent))
    tolerance = (task.GATES["exact"].max_difference or 0.0) if is_here else FAR_TOLERANCE
    given = _asked(client, task, entry, asked)
    expected = _expected(task, service, folder, asked, rows)
    yield _served_answers(service, expected, given, folder.name, tolerance)


def _askable(run: Run, task: Task, entry: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[TextRow]]:
    """Requests of held-out rows, and the rows, of each its first window. vLLM takes no pairs, and refuses texts that training cut."""
    held_out = measure_held_out.held_out_of(run)
    requests = [task.request(record, {}) for record in held_out.records[:ROWS]]
    is_ours, limit = "task" in entry, run.recipe.data.max_length
    pairs = [
        (request, row)
        for request, row in zip(requests, (row.windows[0] for row in held_out.rows), strict=False)
        if is_ours or (isinstance(_input(request), str) and len(row.input_ids) < limit)
    ]
    return [request for request, _ in pairs], [row for _, row in pairs]


def _input(request: Mapping[str, Any]) -> Any:
    """A request as an entry of `input`: one text as itself, which vLLM understands too."""
    text, *more = request.values()
    return text if isinstance(text, str) and not more else dict(request)


def _served_tokens(
    client: Client, entry: Mapping[str, Any], asked: Sequence[Mapping[str, Any]], rows: Sequence[TextRow]
) -> ContractCheck:
    """Check that the server makes the trained ids of each text; a long text may have become several rows."""
    for number, (request, row) in enumerate(zip(asked, rows, strict=True)):
        answer = client.send("POST", "/tokenize", {"model": entry["id"], "prompt": _input(request)})
        if answer.status_code != 200:
            return ContractCheck("tokens", NOT_CHECKED, "the server does not show the token ids of such texts")
        served = client.read(answer, lambda document: document.get("rows") or [document["tokens"]])
        if list(row.input_ids) not in served:
            place = first_difference(row.input_ids, served[0])
            detail = f"from token {place} on, the ids differ from training: {short(repr(dict(request)))}"
            return ContractCheck("tokens", DIFFERS, f"held-out row {number}: {detail}")
    return ContractCheck("tokens", OK, f"{len(asked)} held-out texts: same ids as in training")


def _asked(
    client: Client, task: Task, entry: Mapping[str, Any], asked: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The server's answers to all requests, sent at once, so that it batches them."""
    body = {"model": entry["id"], "input": [_input(request) for request in asked], **task.WHOLE}
    return list(client.read(client.request("POST", task.ENDPOINT, body), lambda document: document["data"]))


def _expected(
    task: Task, service: Service, folder: Path, asked: Sequence[Mapping[str, Any]], rows: Sequence[TextRow]
) -> list[dict[str, Any]]:
    """The answers of the artifact itself. Where a request has one row, that is the row of training."""
    prepared = [one for one in service.prepare([{**one, **task.WHOLE} for one in asked]) if isinstance(one, Prepared)]
    trained = [replace(one, rows=[row]) if len(one.rows) == 1 else one for one, row in zip(prepared, rows, strict=True)]
    runtime = "onnxruntime" if (folder / "model.onnx").is_file() else "transformers"
    with open_runtime(runtime, folder, detect(), head=task.HEAD) as opened:
        logits = iter(list(opened.logits([row for one in trained for row in one.rows])))
        return [service.answer(one, [next(logits) for _ in one.rows]) for one in trained]


def _served_answers(
    service: Service,
    expected: Sequence[Mapping[str, Any]],
    given: Sequence[Mapping[str, Any]],
    artifact: str,
    tolerance: float,
) -> ContractCheck:
    for number, (ours, theirs) in enumerate(zip(expected, given, strict=True)):
        if difference := service.difference(ours, theirs, tolerance):
            return ContractCheck("answers", DIFFERS, f"held-out row {number}: {difference}, as {artifact} has it")
    detail = f"{len(given)} held-out texts, sent as text: answers as {artifact} gives them for the ids of training, within {tolerance:g}"
    return ContractCheck("answers", OK, detail)


# --- the checks of a folder -------------------------------------------------------------------------------------------


def _checks(
    run: Run, folder: Path, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> Iterator[ContractCheck]:
    yield _tokens(folder, records, run.recipe)
    yield _labels(config, read_labels(run.need("data", "summary.json").parent))
    yield _padding(config, int(read_json(run.need("data", "tokens.json"))["pad"]))


def _tokens(folder: Path, records: Sequence[Mapping[str, Any]], recipe: Recipe) -> ContractCheck:
    from transformers import AutoTokenizer

    tokenizer, task = AutoTokenizer.from_pretrained(str(folder)), open_task(recipe.task)
    of_labels: Losses = cast(Losses, task)
    for number, record in enumerate(records):
        for name, values in of_labels.encoded(tokenizer, record, recipe.data):
            if (place := first_difference(record[name], values)) is not None:
                what = WHAT[name].format(place)
                detail = f"{what} differ from training: {short(repr(task.question(record)))}"
                return ContractCheck("tokens", DIFFERS, f"held-out row {number}: {detail}")
    return ContractCheck("tokens", OK, f"{len(records)} held-out texts: same ids as in training")


def _labels(config: Mapping[str, Any], trained: Sequence[str]) -> ContractCheck:
    """Check the names that a server answers with."""
    served = [name for _, name in sorted((int(number), name) for number, name in config.get("id2label", {}).items())]
    if (place := first_difference(trained, served)) is not None:
        pair = [short(repr(names[place])) if place < len(names) else "no label" for names in (trained, served)]
        return ContractCheck("labels", DIFFERS, f"label {place} is {pair[0]} in training, {pair[1]} in config.json")
    return ContractCheck("labels", OK, f"{len(trained)} labels with the names of training")


def _padding(config: Mapping[str, Any], pad: int) -> ContractCheck:
    """Check the id that fills batches: a head on a decoder reads the last token that is not padding."""
    if config.get("pad_token_id") != pad:
        detail = f"config.json has pad_token_id={config.get('pad_token_id')}, training padded with {pad}"
        return ContractCheck("padding", DIFFERS, detail)
    return ContractCheck("padding", OK, f"batches are padded with token {pad}, as in training")
