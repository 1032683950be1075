"""The serve contract: a running server turns a conversation into the same tokens as training did, and stops at the same tokens.

The checks send requests: for the ids of a prompt, for what ends an answer, for the longest context. Only what no request can show (dtype,
default sampling) is read from the folder that the server names, if that is on this machine.

A folder that no server has loaded is checked the same way, through its own tokenizer, template and generation config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ParityFailed, short
from qkit.core.files import read_json
from qkit.core.sequences import first_difference
from qkit.measure import held_out as measure_held_out
from qkit.measure.endpoint import FolderSubject, ServerSubject, as_request, read_if_there
from qkit.measure.held_out import HeldOut
from qkit.merging.folder import dtype_of
from qkit.model import older_forms
from qkit.model.provenance import NOTE
from qkit.recipe.registry import split
from qkit.run.directory import Run
from qkit.tasks._conversation import request_forms
from qkit.tensors.shards import SHARDS, read, shards, tensor_specs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qkit.measure.endpoint import Subject


OK, DIFFERS, NOTED, NOT_CHECKED = "ok", "differs", "noted", "not checked"
ROWS = 8
FORM_ROWS = 2  # of them are tried in the forms that users write, one with tools where there is one
# What vLLM takes from generation_config.json for requests that do not name it, and its own value where that does not either.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by a format's variant


@dataclass(frozen=True)
class ContractCheck:
    """One thing in which training and server must agree. `status`: ok, differs, noted (worth knowing, not an error) or not checked."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Contract:
    """The checks of the model `model` that the server at `url` offers, or that is in the folder `url`."""

    url: str
    model: str
    checks: tuple[ContractCheck, ...]

    @property
    def broken(self) -> tuple[ContractCheck, ...]:
        return tuple(check for check in self.checks if check.status == DIFFERS)

    def enforce(self) -> None:
        """Raise ParityFailed (gate `contract`) if anything differs."""
        if self.broken:
            details = "\n".join(f"{check.name}: {check.detail}" for check in self.broken)
            message = f"{self.url} does not handle conversations with {self.model} as training did\n{details}"
            raise ParityFailed(message, artifact=self.model, gate="contract")


def check(
    run: Run, url: str, model: str | None = None, rows: int = ROWS, headers: Mapping[str, str] | None = None
) -> Contract:
    """Compare a running OpenAI-compatible server with what the run was trained on, on `rows` of its held-out conversations.

    `model`: the name it is served under; default: the only one there is. `headers`: what the server wants with each request, such as a key.

    Raises:
        ServerError: no server answers there, or it does not know the model.
    """
    held_out = measure_held_out.read_held_out(run.need("data", "test.parquet"))
    with ServerSubject(url, model, headers) as server:
        return Contract(url, server.model, tuple(_checks(run, server, held_out, rows)))


def check_folder(run: Run, folder: Path, rows: int = ROWS) -> Contract:
    """The same of a model folder: what any program will do that loads its tokenizer, template and generation config, an older one too."""
    held_out = measure_held_out.read_held_out(run.need("data", "test.parquet"))
    return Contract(str(folder), folder.name, (*_checks(run, FolderSubject(folder), held_out, rows), _older(folder)))


def offered(url: str) -> dict[str, Any]:
    """What a server says of the model it serves: `id`, and where it says so `root` and `max_model_len`.

    Raises:
        ServerError: no server answers there.
    """
    with ServerSubject(url, None) as server:
        return server.described


def _checks(run: Run, server: Subject, held_out: HeldOut, rows: int) -> Iterator[ContractCheck]:
    numbers = _spread([n for n, messages in enumerate(held_out.messages) if messages], rows)
    served = server.folder()
    yield _prompts(run, server, held_out, numbers)
    yield _stop(run, server, held_out)
    yield _length(run, server, held_out)
    yield _dtype(run, served)
    yield _head(served)
    yield _sampling(served)
    yield _tools(server, held_out, rows)


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced."""
    return [numbers[i * len(numbers) // count] for i in range(count)] if len(numbers) > count else list(numbers)


# --- the checks -----------------------------------------------------------------------------------------------------


def _prompts(run: Run, server: Subject, held_out: HeldOut, numbers: Sequence[int]) -> ContractCheck:
    """Whether each conversation becomes the token ids that training saw up to the answer."""
    name = "prompt tokens"
    if not numbers:
        return ContractCheck(name, NOT_CHECKED, "the held-out rows are plain text, not conversations")
    for number in numbers:
        answer = server.prompt_ids(held_out.messages[number], held_out.tools[number], held_out.variables[number])
        if answer is None:
            return ContractCheck(name, NOT_CHECKED, "the server has no /tokenize that takes messages")
        if isinstance(answer, str):
            return ContractCheck(name, DIFFERS, f"held-out row {number}: refused: {answer}")
        if answer != list(held_out.rows[number].prompt):
            trained = held_out.rows[number].prompt
            return ContractCheck(name, DIFFERS, _parting(_tokenizer(run), f"held-out row {number}", trained, answer))
    tools = [number for number in numbers if held_out.tools[number]]
    given = [held_out.variables[number] for number in numbers if held_out.variables[number]]
    such = f", such as {short(json.dumps(given[0]))}, which its clients have to send" if given else ""
    more = f", {len(given)} with chat_template_kwargs{such}" if given else ""
    said = f"{len(numbers)} held-out conversations, {len(tools)} with tools{more}: the ids that training saw"
    tried = [*tools[:1], *(number for number in numbers if number not in tools)][:FORM_ROWS]
    return _as_users_write(run, server, held_out, tried, ContractCheck(name, OK, said))


def _as_users_write(
    run: Run, server: Subject, held_out: HeldOut, numbers: Sequence[int], plain: ContractCheck
) -> ContractCheck:
    """The same of conversations in forms that rows seldom hold; `plain`, which their own form gave, where these agree as well."""
    tokenizer, kept, refused = _tokenizer(run), dict[str, None](), dict[str, str]()
    for number in numbers:
        variables = held_out.variables[number]
        for form in request_forms.forms(as_request(held_out.messages[number]), held_out.tools[number]):
            trained = request_forms.trained(tokenizer, form, variables)
            answer = None if trained is None else server.prompt_ids(form.messages, form.tools, variables)
            where = f"held-out row {number}, with {form.description}"
            if isinstance(answer, list) and trained is not None and answer != trained:
                return ContractCheck(plain.name, DIFFERS, _parting(tokenizer, where, trained, answer))
            kept |= {form.description: None} if isinstance(answer, list) else {}
            refused |= {form.description: answer} if isinstance(answer, str) else {}
        if not held_out.tools[number] and (words := _without_tools(server, held_out, number)):
            return ContractCheck(plain.name, DIFFERS, words)
    more = f"; the ids that training makes also of {', '.join(kept)}" if kept else ""
    more += "".join(f"; {words} is refused: {why[:100]}" for words, why in refused.items())
    return replace(plain, detail=plain.detail + more)


def _without_tools(server: Subject, held_out: HeldOut, number: int) -> str:
    """What is wrong with an empty list of tools: it is refused, or no tools at all."""
    made = server.prompt_length(held_out.messages[number], held_out.variables[number])
    wanted = len(held_out.rows[number].prompt)
    if made in (None, wanted):
        return ""
    return f"held-out row {number}, with tools: []: it makes {made} prompt tokens where training saw {wanted} of no tools at all"


def _tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The one that training had."""
    from qkit.model.tokenizer import tokenizer_of

    return tokenizer_of(run.recipe.model)


def _parting(tokenizer: PreTrainedTokenizerBase, where: str, trained: Sequence[int], served: Sequence[int]) -> str:
    """The first difference of two prompts, as token index and as text."""
    place = first_difference(trained, served) or 0
    expected, actual = (tokenizer.decode(list(ids[place : place + 12])) for ids in (trained, served))
    return (
        f"{where}: it makes {len(served)} prompt tokens where training saw {len(trained)}; from token {place} on "
        f"training saw {expected!r}, it writes {actual!r}: {_why(tokenizer)}"
    )


def _why(tokenizer: PreTrainedTokenizerBase) -> str:
    """The likely cause of a difference between prompts."""
    from qkit.chat.template import date_formats, texts

    if any(date_formats(text) for text in texts(tokenizer)):
        return "the template writes today's date, or it changed on the way; a copy with the date left out, as model.chat_template, lasts"
    return "the template or the tokenizer changed on the way"


def _stop(run: Run, server: Subject, held_out: HeldOut) -> ContractCheck:
    """Whether an answer ends with the tokens that ended it in training: each is made the likeliest by far, and must be the last."""
    name = "stop tokens"
    trained: list[int] = read_json(run.need("data", "tokens.json"))["stop"]
    continues = [token for token in trained if not server.stops_at(held_out.rows[0].prompt, token)]
    if continues:
        return ContractCheck(
            name,
            DIFFERS,
            f"generation does not stop at token {continues[0]}, which ended every answer in training: "
            "eos_token_id in the served generation_config.json must name it",
        )
    return ContractCheck(name, OK, f"an answer ends at {', '.join(map(str, trained))}, as in training")


def _length(run: Run, server: Subject, held_out: HeldOut) -> ContractCheck:
    name = "length"
    if server.max_model_len is None:
        return ContractCheck(name, NOT_CHECKED, "the server does not report its context length")
    trained = [length for length, *_ in read_json(run.need("data", "summary.json")).get("lengths", ())]
    longest = max(
        min(max(trained, default=0), run.recipe.data.max_length), *(len(row.input_ids) for row in held_out.rows)
    )
    said = f"it takes {server.max_model_len} tokens, the longest row of training has {longest}"
    if server.max_model_len < longest:
        return ContractCheck(name, DIFFERS, f"{said}: raise serve.max_model_len")
    return ContractCheck(name, OK, said)


def _dtype(run: Run, served: Path | None) -> ContractCheck:
    name = "dtype"
    if served is None:
        return ContractCheck(name, NOT_CHECKED, "the server does not say where on this machine its model is")
    if not any(served.glob("*.safetensors")):
        return ContractCheck(name, NOT_CHECKED, "its weights are not safetensors")
    config, note = read_if_there(served / "config.json"), read_if_there(served / NOTE)
    found = config.get("dtype", config.get("torch_dtype"))
    kind, variant = split(note.get("format", ""))
    always_bf16 = kind == "bnb" or (kind, variant) == ("safetensors", "")
    wanted = "bfloat16" if always_bf16 else DTYPES.get(variant, dtype_of(run))
    said = f"its config says {found}, the run made {wanted}"
    return ContractCheck(name, OK if found == wanted else DIFFERS, said)


def _head(served: Path | None) -> ContractCheck:
    """A config that ties the head to the embedding beside weights that hold another head: vLLM takes the one, transformers the other."""
    name = "tied head"
    if served is None or not any(served.glob(SHARDS)):
        return ContractCheck(name, NOT_CHECKED, "no safetensors on this machine")
    if not read_if_there(served / "config.json").get("tie_word_embeddings"):
        return ContractCheck(name, OK, "the head is not tied to the embedding")
    names = [found for shard in shards(served) for found in tensor_specs(shard)]
    pair = [found for found in names if found.endswith(("embed_tokens.weight", "lm_head.weight"))]
    held = [tensor for _, tensor in read(served, pair)]
    if len(held) > 1 and not held[0].equal(held[1]):
        said = f"config.json ties the head to the embedding, and {pair[0]} and {pair[1]} differ: runtimes will not agree on the head"
        return ContractCheck(name, DIFFERS, f"{said}; set tie_word_embeddings to false")
    return ContractCheck(name, OK, "one matrix is embedding and head")


def _older(folder: Path) -> ContractCheck:
    """Whether transformers 4, and what is built on it or reads the same files, finds what it needs: a rule for what was tried with it."""
    name = "transformers 4"
    found = list(older_forms.unreadable(folder))
    if found:
        return ContractCheck(
            name,
            DIFFERS,
            f"{'; '.join(found)}: transformers 4, older vLLM, mlx-lm and llama.cpp's converter would refuse it or take a default in its "
            "place; make the folder again",
        )
    return ContractCheck(name, OK, "what it says in newer words it says in the older ones as well")


def _sampling(served: Path | None) -> ContractCheck:
    """Evaluation was greedy. What a request gets that names no temperature is the server's choice, so it is said."""
    name = "default sampling"
    if served is None:
        return ContractCheck(name, NOT_CHECKED, "the server does not say where on this machine its model is")
    own = read_if_there(served / "generation_config.json")
    found = {key: own[key] for key in SAMPLING if own.get(key) is not None}
    values = {**SAMPLING, **found}
    lasting = {key: value for key, value in found.items() if key == "repetition_penalty" and value != 1}
    if values["temperature"] == 0 and not lasting:
        return ContractCheck(name, OK, "greedy, as in evaluation")
    said = ", ".join(
        f"{key} {value:g}" for key, value in values.items() if value != SAMPLING[key] or key == "temperature"
    )
    more = ", repetition_penalty=1" if lasting else ""
    return ContractCheck(
        name, NOTED, f"a request that names none gets {said}; evaluation was greedy: send temperature=0{more}"
    )


def _tools(server: Subject, held_out: HeldOut, rows: int) -> ContractCheck:
    """Whether the server's parser reads the calls back from the text that training taught: the server is made to say just that text."""
    name = "tool calls"
    numbers = _spread([n for n, calls in enumerate(held_out.calls) if calls and held_out.tools[n]], rows)
    if not numbers:
        return ContractCheck(name, NOT_CHECKED, "no held-out answer holds tool calls")
    for number in numbers:
        prompt = held_out.messages[number], held_out.tools[number], held_out.variables[number]
        answer = server.parsed_message(*prompt, held_out.answers[number])
        if isinstance(answer, str):
            return ContractCheck(name, NOT_CHECKED, f"the server parses no tool calls: {answer}")
        wanted = [_named(call) for call in held_out.calls[number]]
        if (parsed := [_named(call) for call in answer.get("tool_calls") or ()]) != wanted:
            return ContractCheck(
                name,
                DIFFERS,
                f"held-out row {number}: from {short(repr(held_out.answers[number]))} the server's parser reads {short(parsed or 'no call')}, "
                f"the row holds {short(wanted)}: another --tool-call-parser fits this template",
            )
    return ContractCheck(
        name, OK, f"{len(numbers)} trained answers: the server's parser returns the calls that the rows hold"
    )


def _named(call: Mapping[str, Any]) -> tuple[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or {}
    return function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments


# --- on a screen ----------------------------------------------------------------------------------------------------


def screen(found: Contract) -> str:
    """The checks as text, one per line."""
    width = max(len(check.name) for check in found.checks)
    lines = [f"{check.name:<{width}}  {check.status}: {check.detail}" for check in found.checks]
    return "\n".join([f"{found.url} serves {found.model}", *lines])
