"""The serve contract: a running server turns a conversation into the same tokens as training did, and stops at the same tokens.

The checks send requests for prompt ids, stop tokens and the context length. What requests cannot show (dtype, default sampling) is read from
the folder that the server names, if it is on this machine.

A folder that is not served is checked in the same way, through its tokenizer, template and generation config.
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
from qkit.merging.folder import dtype_of
from qkit.model import older_forms
from qkit.model.provenance import NOTE
from qkit.recipe.registry import split
from qkit.run.directory import Run
from qkit.tasks._conversation import request_forms
from qkit.tasks._conversation.prepared import PreparedConversations, conversations
from qkit.tensors.shards import SHARDS, read, shards, tensor_specs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qkit.measure.endpoint import Subject


OK, DIFFERS, NOTED, NOT_CHECKED = "ok", "differs", "noted", "not checked"
ROWS = 8
FORM_ROWS = 2  # rows that are also sent in the forms that users write; one has tools, if any row does
# Parameters that vLLM reads from generation_config.json if a request omits them, and vLLM's defaults.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by the variant of the export format


@dataclass(frozen=True)
class ContractCheck:
    """One property that must be the same in training and on the server. `status`: ok, differs, noted (not an error) or not checked."""

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
            message = f"{self.url} does not handle requests for {self.model} as training did\n{details}"
            raise ParityFailed(message, artifact=self.model, gate="contract")


def check(
    run: Run, url: str, model: str | None = None, rows: int = ROWS, headers: Mapping[str, str] | None = None
) -> Contract:
    """Compare a running OpenAI-compatible server with what the run was trained on, on `rows` of its held-out conversations.

    `model`: the name it is served under; default: the first one. `headers`: sent with each request, such as an API key.

    Raises:
        ServerError: no server answers at `url`, or it does not serve the model.
    """
    held_out = conversations(measure_held_out.held_out_of(run).records)
    with ServerSubject(url, model, headers) as server:
        return Contract(url, server.model, tuple(_checks(run, server, held_out, rows)))


def check_folder(run: Run, folder: Path, rows: int = ROWS) -> Contract:
    """Check a model folder: what programs do that load its tokenizer, template and generation config, older programs included."""
    held_out = conversations(measure_held_out.held_out_of(run).records)
    return Contract(str(folder), folder.name, (*_checks(run, FolderSubject(folder), held_out, rows), _older(folder)))


def offered(url: str) -> dict[str, Any]:
    """A server's description of its model: `id` and, if provided, `root` and `max_model_len`.

    Raises:
        ServerError: no server answers at `url`.
    """
    with ServerSubject(url, None) as server:
        return server.described


def _checks(run: Run, server: Subject, held_out: PreparedConversations, rows: int) -> Iterator[ContractCheck]:
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
    """At most `count` of the numbers, evenly spaced."""
    return [numbers[i * len(numbers) // count] for i in range(count)] if len(numbers) > count else list(numbers)


# --- the checks -----------------------------------------------------------------------------------------------------


def _prompts(run: Run, server: Subject, held_out: PreparedConversations, numbers: Sequence[int]) -> ContractCheck:
    """Check that each conversation becomes the token ids that training used up to the answer."""
    name = "prompt tokens"
    if not numbers:
        return ContractCheck(name, NOT_CHECKED, "the held-out rows are plain text, not conversations")
    for number in numbers:
        answer = server.prompt_ids(held_out.messages[number], held_out.tools[number], held_out.variables[number])
        if answer is None:
            return ContractCheck(name, NOT_CHECKED, "the server has no /tokenize endpoint that accepts messages")
        if isinstance(answer, str):
            return ContractCheck(name, DIFFERS, f"held-out row {number}: rejected: {answer}")
        if answer != list(held_out.prompts[number]):
            trained = held_out.prompts[number]
            return ContractCheck(name, DIFFERS, _difference(_tokenizer(run), f"held-out row {number}", trained, answer))
    tools = [number for number in numbers if held_out.tools[number]]
    variables = [held_out.variables[number] for number in numbers if held_out.variables[number]]
    example = f", such as {short(json.dumps(variables[0]))}, which clients must send" if variables else ""
    more = f", {len(variables)} with chat_template_kwargs{example}" if variables else ""
    detail = f"{len(numbers)} held-out conversations, {len(tools)} with tools{more}: same ids as in training"
    tried = [*tools[:1], *(number for number in numbers if number not in tools)][:FORM_ROWS]
    return _as_users_write(run, server, held_out, tried, ContractCheck(name, OK, detail))


def _as_users_write(
    run: Run, server: Subject, held_out: PreparedConversations, numbers: Sequence[int], plain: ContractCheck
) -> ContractCheck:
    """Check conversations in forms that users send but rows seldom contain. Returns `plain`, the result for the rows' form, if all agree."""
    tokenizer, kept, refused = _tokenizer(run), dict[str, None](), dict[str, str]()
    for number in numbers:
        variables = held_out.variables[number]
        for form in request_forms.forms(as_request(held_out.messages[number]), held_out.tools[number]):
            trained = request_forms.trained(tokenizer, form, variables)
            answer = None if trained is None else server.prompt_ids(form.messages, form.tools, variables)
            where = f"held-out row {number}, with {form.description}"
            if isinstance(answer, list) and trained is not None and answer != trained:
                return ContractCheck(plain.name, DIFFERS, _difference(tokenizer, where, trained, answer))
            kept |= {form.description: None} if isinstance(answer, list) else {}
            refused |= {form.description: answer} if isinstance(answer, str) else {}
        if not held_out.tools[number] and (problem := _without_tools(server, held_out, number)):
            return ContractCheck(plain.name, DIFFERS, problem)
    more = f"; same ids also for {', '.join(kept)}" if kept else ""
    more += "".join(f"; {form} is rejected: {reason[:100]}" for form, reason in refused.items())
    return replace(plain, detail=plain.detail + more)


def _without_tools(server: Subject, held_out: PreparedConversations, number: int) -> str:
    """The problem with an empty list of tools, if any: it must be rejected or be treated as no tools."""
    count = server.prompt_length(held_out.messages[number], held_out.variables[number])
    expected = len(held_out.prompts[number])
    if count in (None, expected):
        return ""
    return f"held-out row {number}, with tools: []: {count} prompt tokens; training had {expected} without tools"


def _tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer of training."""
    from qkit.model.tokenizer import tokenizer_of

    return tokenizer_of(run.recipe.model)


def _difference(tokenizer: PreTrainedTokenizerBase, where: str, trained: Sequence[int], served: Sequence[int]) -> str:
    """The first difference of two prompts, as token index and as text."""
    place = first_difference(trained, served) or 0
    expected, actual = (tokenizer.decode(list(ids[place : place + 12])) for ids in (trained, served))
    return (
        f"{where}: {len(served)} prompt tokens; training had {len(trained)}. From token {place} on, "
        f"training had {expected!r}, this has {actual!r}: {_why(tokenizer)}"
    )


def _why(tokenizer: PreTrainedTokenizerBase) -> str:
    """The likely cause of a difference between prompts."""
    from qkit.chat.template import date_formats, texts

    if any(date_formats(text) for text in texts(tokenizer)):
        return "the template writes today's date, or it has changed since training; set model.chat_template to a copy without the date"
    return "the template or the tokenizer has changed since training"


def _stop(run: Run, server: Subject, held_out: PreparedConversations) -> ContractCheck:
    """Check that an answer ends at the tokens that ended it in training: each is forced, and generation must stop."""
    name = "stop tokens"
    trained: list[int] = read_json(run.need("data", "tokens.json"))["stop"]
    continues = [token for token in trained if not server.stops_at(held_out.prompts[0], token)]
    if continues:
        return ContractCheck(
            name,
            DIFFERS,
            f"generation does not stop at token {continues[0]}, which ended every answer in training: "
            "eos_token_id in the served generation_config.json must name it",
        )
    return ContractCheck(name, OK, f"an answer ends at {', '.join(map(str, trained))}, as in training")


def _length(run: Run, server: Subject, held_out: PreparedConversations) -> ContractCheck:
    name = "length"
    if server.max_model_len is None:
        return ContractCheck(name, NOT_CHECKED, "the server does not report its context length")
    trained = [length for length, *_ in read_json(run.need("data", "summary.json")).get("lengths", ())]
    longest = max(min(max(trained, default=0), run.recipe.data.max_length), *map(len, held_out.rows))
    detail = f"the context is {server.max_model_len} tokens, the longest training row has {longest}"
    if server.max_model_len < longest:
        return ContractCheck(name, DIFFERS, f"{detail}: raise serve.max_model_len")
    return ContractCheck(name, OK, detail)


def _dtype(run: Run, served: Path | None) -> ContractCheck:
    name = "dtype"
    if served is None:
        return ContractCheck(name, NOT_CHECKED, "the server does not say where on this machine its model is")
    if not any(served.glob("*.safetensors")):
        return ContractCheck(name, NOT_CHECKED, "its weights are not safetensors")
    config, note = read_if_there(served / "config.json"), read_if_there(served / NOTE)
    dtype = config.get("dtype", config.get("torch_dtype"))
    kind, variant = split(note.get("format", ""))
    always_bf16 = kind == "bnb" or (kind, variant) == ("safetensors", "")
    expected = "bfloat16" if always_bf16 else DTYPES.get(variant, dtype_of(run))
    detail = f"config.json says {dtype}, the run wrote {expected}"
    return ContractCheck(name, OK if dtype == expected else DIFFERS, detail)


def _head(served: Path | None) -> ContractCheck:
    """Check for a tied head with different weights on disk: vLLM uses the embedding as the head, transformers the stored head."""
    name = "tied head"
    if served is None or not any(served.glob(SHARDS)):
        return ContractCheck(name, NOT_CHECKED, "no safetensors on this machine")
    if not read_if_there(served / "config.json").get("tie_word_embeddings"):
        return ContractCheck(name, OK, "the head is not tied to the embedding")
    names = [tensor for shard in shards(served) for tensor in tensor_specs(shard)]
    pair = [tensor for tensor in names if tensor.endswith(("embed_tokens.weight", "lm_head.weight"))]
    matrices = [matrix for _, matrix in read(served, pair)]
    if len(matrices) > 1 and not matrices[0].equal(matrices[1]):
        detail = f"config.json ties the head to the embedding, but {pair[0]} and {pair[1]} differ, so runtimes use different heads"
        return ContractCheck(name, DIFFERS, f"{detail}; set tie_word_embeddings to false")
    return ContractCheck(name, OK, "embedding and head are the same matrix")


def _older(folder: Path) -> ContractCheck:
    """Check that transformers 4, and programs that read the same files, find what they need. The rules come from trials with it."""
    name = "transformers 4"
    problems = list(older_forms.unreadable(folder))
    if problems:
        return ContractCheck(
            name,
            DIFFERS,
            f"{'; '.join(problems)}: transformers 4, older vLLM, mlx-lm and llama.cpp's converter would reject it or use a default "
            "instead; create the folder again",
        )
    return ContractCheck(name, OK, "settings with a newer name are also present under the older name")


def _sampling(served: Path | None) -> ContractCheck:
    """Report the server's default sampling: evaluation was greedy, but the server decides for requests without a temperature."""
    name = "default sampling"
    if served is None:
        return ContractCheck(name, NOT_CHECKED, "the server does not say where on this machine its model is")
    config = read_if_there(served / "generation_config.json")
    configured = {key: config[key] for key in SAMPLING if config.get(key) is not None}
    values = {**SAMPLING, **configured}
    lasting = {key: value for key, value in configured.items() if key == "repetition_penalty" and value != 1}
    if values["temperature"] == 0 and not lasting:
        return ContractCheck(name, OK, "greedy, as in evaluation")
    defaults = ", ".join(
        f"{key} {value:g}" for key, value in values.items() if value != SAMPLING[key] or key == "temperature"
    )
    more = ", repetition_penalty=1" if lasting else ""
    return ContractCheck(
        name,
        NOTED,
        f"a request without sampling parameters gets {defaults}; evaluation was greedy: send temperature=0{more}",
    )


def _tools(server: Subject, held_out: PreparedConversations, rows: int) -> ContractCheck:
    """Check that the server's parser reads the tool calls from the trained text: the server's answer is forced to be that text."""
    name = "tool calls"
    numbers = _spread([n for n, calls in enumerate(held_out.calls) if calls and held_out.tools[n]], rows)
    if not numbers:
        return ContractCheck(name, NOT_CHECKED, "no held-out answer contains tool calls")
    for number in numbers:
        prompt = held_out.messages[number], held_out.tools[number], held_out.variables[number]
        answer = server.parsed_message(*prompt, held_out.answers[number])
        if isinstance(answer, str):
            return ContractCheck(name, NOT_CHECKED, f"the server does not parse tool calls: {answer}")
        expected = [_named(call) for call in held_out.calls[number]]
        if (parsed := [_named(call) for call in answer.get("tool_calls") or ()]) != expected:
            return ContractCheck(
                name,
                DIFFERS,
                f"held-out row {number}: from {short(repr(held_out.answers[number]))} the server's parser reads {short(parsed or 'no call')}, "
                f"the row contains {short(expected)}: use the --tool-call-parser that fits this template",
            )
    return ContractCheck(name, OK, f"{len(numbers)} trained answers: the server's parser returns the rows' calls")


def _named(call: Mapping[str, Any]) -> tuple[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or {}
    return function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments


# --- on a screen ----------------------------------------------------------------------------------------------------


def screen(contract: Contract) -> str:
    """The checks as text, one per line."""
    width = max(len(check.name) for check in contract.checks)
    lines = [f"{check.name:<{width}}  {check.status}: {check.detail}" for check in contract.checks]
    return "\n".join([f"{contract.url} serves {contract.model}", *lines])
