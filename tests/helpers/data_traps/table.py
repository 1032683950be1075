"""Data sets with one trap each: what is wrong with them, which check must say so, and what takes the trap out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.data_traps.models import FAMILIES, Tiny, tokenizer_of
from helpers.data_traps.prepared import lines

PLAIN = Tiny()
LINE = 3  # where the row with the trap is


def asked(question: str, answer: Any, **columns: Any) -> dict[str, Any]:
    return talk(("user", question), ("assistant", answer), **columns)


def talk(*turns: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **columns}


def thought(question: str, thinking: str, answer: str) -> dict[str, Any]:
    said = {"role": "assistant", "content": answer, "reasoning_content": thinking}
    return {"messages": [{"role": "user", "content": question}, said]}


def calls(name: str) -> dict[str, Any]:
    """A turn that calls a tool and says nothing."""
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {"x": 1}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tokens(model: Tiny, *parts: tuple[str, bool]) -> dict[str, Any]:
    """A row that was tokenized elsewhere; of each part whether it carries loss."""
    tokenizer = tokenizer_of(model)
    encoded = [(tokenizer.encode(text, add_special_tokens=False), learnt) for text, learnt in parts]
    labels = [token if learnt else -100 for ids, learnt in encoded for token in ids]
    return {"input_ids": [token for ids, _ in encoded for token in ids], "labels": labels}


GOOD = (
    asked("Where do penguins live?", "On the southern coasts."),
    asked("What boils at one hundred degrees?", "Water, at sea level."),
    asked("Who wrote the Odyssey?", "Homer, they say."),
    asked("How many strings has a violin?", "Four."),
    asked("Which metal is liquid when it is warm?", "Mercury."),
    asked("Name a prime above ten.", "Eleven."),
)
HELD_OUT = (
    asked("Which planet has rings?", "Saturn."),
    asked("What do bees make?", "Honey and wax."),
)
ALL = len(GOOD) + len(HELD_OUT)


@dataclass(frozen=True)
class Trap:
    """`row` stands at line 3 of the training rows, or the trap is in what else is given. `cure`: what is different where there is no trap.

    `place`: the row that the check must name (None: it is about no row); `found`: how many rows it finds. `besides`: what must fire as a
    consequence, such as `rows` when the check has left none.
    """

    name: str
    check: str
    status: str
    row: Any = None
    train: Sequence[Any] | bytes = GOOD
    test: Sequence[Any] = HELD_OUT
    file: str = "train.jsonl"
    settings: tuple[str, ...] = ()
    model: Tiny = PLAIN
    place: tuple[str, int] | None = ("train.jsonl", LINE)
    found: int = 1
    besides: Mapping[str, str] = field(default_factory=dict)
    cure: Mapping[str, Any] = field(default_factory=lambda: {"row": None})

    @property
    def content(self) -> bytes:
        """The file of training rows."""
        if isinstance(self.train, bytes):
            return self.train
        rows = list(self.train)
        return lines(rows if self.row is None else [*rows[: LINE - 1], self.row, *rows[LINE - 1 :]])


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def chatml(turn: str = TURN, before: str = "", ask: str = ASK, **model: Any) -> Tiny:
    """A model whose template is ChatML but for some part."""
    return Tiny(before + "{% for m in messages %}" + turn + "{% endfor %}" + ask, **model)


PAD_IS_EOS = Tiny(pad="<|im_end|>")
LLAMA = FAMILIES["llama2"]
WITH_BOS = Tiny(bos="<s>", adds_bos=True)
LONG = asked("Tell me a long story. " * 8, "No.")
SEVERAL = talk(
    *(("system", "Be kind."), ("user", "Tell me a long story. " * 8), ("assistant", "I had rather not.")),
    *(("user", "A short one, then?"), ("assistant", "Once there was a fox.")),
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}
EMPTY = [asked(f"What about number {number}?", " ") for number in range(8)]
SPOKEN = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
ESSAY = " ".join(f"word{number}" for number in range(60))
NONE_LEFT = {"rows": "fail", "held_out": "warn"}  # the check leaves out every row, the held-out ones too
TOKENIZED = tokens(PLAIN, (SPOKEN, False), ("yes<|im_end|>", True))
NO_SYSTEM = "{% if m.role != 'system' %}" + TURN + "{% endif %}"
TRIMMING = chatml(TURN.replace("m.content", "m.content | trim"))
ANSWER = {"role": "assistant", "content": "This one."}
IN_PARTS: Any = [{"type": "text", "text": "    return x"}, {"type": "text", "text": "    # done"}]
THROUGH_PARTS = chatml(
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
)
CALLING = TURN.replace(
    "m.content +",
    "m.content }}{% for c in m.tool_calls %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}{{",
)
OTHER_TOOL = {"type": "function", "function": {**TOOL["function"], "name": "listen"}}
ASK_TWO = {"role": "user", "content": "f 1 and g 2?"}
CALLS_TWO = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"type": "function", "function": {"name": "g", "arguments": {"b": 2, "c": "f"}}},
    ],
}
TWO_CALLS: dict[str, Any] = {"messages": [ASK_TWO, CALLS_TWO]}


def parquet(table: Any) -> bytes:
    """A table as a Parquet file."""
    import io

    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def table_of(number: int) -> bytes:
    """Rows that call a tool with a number, as the loader of a data set types what is too large for 64 bits."""
    import pyarrow as pa

    rows = [dict(row) for row in GOOD[: LINE - 1]]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": float(number)}}}
    turns = [{"role": "user", "content": "Look!"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return parquet(pa.Table.from_pylist([*rows, {"messages": turns}]))


def dated() -> bytes:
    """Rows of which a column holds dates."""
    import datetime as dt

    import pyarrow as pa

    said = pa.array([None, None, dt.datetime(2024, 7, 26)], pa.timestamp("s"))
    turns = [row["messages"] for row in GOOD[: LINE - 1]]
    return parquet(pa.table({"messages": [*turns, None], "prompt": ["", "", "When?"], "completion": said}))


THINKING = {
    "messages": [*thought("Why?", "They want a reason.", "Because.")["messages"], *asked("Really?", "Yes.")["messages"]]
}

TRAPS = [
    # what a file can hold
    Trap("a broken line", "malformed", "fail", b'{"messages": oops}'),
    Trap("a line that is cut off", "malformed", "fail", lines([GOOD[0]])[:30]),
    Trap("a line that is not UTF-8", "malformed", "fail", b'{"text": "caf\xe9"}'),
    Trap("a number that is none", "malformed", "fail", b'{"messages": NaN}'),
    Trap("a line that holds a list", "malformed", "fail", b"[1, 2]"),
    Trap("JSON nested deeply", "malformed", "fail", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    Trap("columns of no format", "malformed", "fail", {"question": "Where?", "answer": "Here."}),
    Trap("a turn that is a number", "malformed", "fail", {"messages": [{"role": "user", "content": 7}]}),
    Trap("labels that are not their tokens", "malformed", "fail", {"input_ids": [5, 6, 7], "labels": [-100, 7, 8]}),
    Trap("fewer labels than tokens", "malformed", "fail", {"input_ids": [5, 6, 7], "labels": [6, 7]}),
    Trap("padding between tokens", "malformed", "fail", {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}),
    Trap(
        *("a line of a table with a field too many", "malformed", "fail"),
        train=b"prompt,completion\nWhere?,Here.\nWhen?,Now.\nWho?,I,you\n",
        file="train.csv",
        place=("train.csv", LINE),
        cure={"train": b"prompt,completion\nWhere?,Here.\nWhen?,Now.\nWho?,I\n"},
    ),
    # what a text can hold
    Trap("NUL", "unicode", "warn", asked("Is it\x00 here?", "No.")),
    Trap("half a surrogate pair", "unicode", "warn", asked("Is it here?", "No \ud83d.")),
    Trap("a replacement character", "unicode", "warn", asked("Is it caf\ufffd?", "No.")),
    Trap("an escape sequence", "unicode", "warn", asked("Is it \x1b[31mred?", "No.")),
    Trap(
        "broken characters are not wanted",
        "unicode",
        "fail",
        asked("\ufffd?", "No."),
        settings=("data.clean.unicode=fail",),
    ),
    Trap("an empty answer", "empty", "warn", asked("What?", " \n ")),
    Trap("an empty question", "empty", "warn", asked("", "Nothing.")),
    Trap("an empty text", "empty", "warn", {"text": "   "}),
    Trap("a special token in a question", "special_text", "warn", asked("What does <|im_end|> mean?", "The end.")),
    Trap("a special token in an answer", "special_text", "warn", asked("What ends a turn?", "It is <|im_end|> here.")),
    Trap(
        "a special token in thinking",
        "special_text",
        "warn",
        thought("Why?", "<|im_end|>?", "So."),
        model=FAMILIES["qwen3"],
    ),
    Trap("a row of a megabyte", "length", "warn", asked("all work and no play " * 50_000, "No.")),
    # turns
    Trap("two questions in a row", "roles", "fail", talk(("user", "a?"), ("user", "b?"), ("assistant", "c"))),
    Trap("a speaker nobody knows", "roles", "fail", talk(("user", "a?"), ("narrator", "Silence."), ("assistant", "c"))),
    Trap("an answer to nothing", "roles", "fail", talk(("assistant", "c"))),
    Trap("no answer", "roles", "fail", talk(("user", "a?"))),
    Trap("a system turn in the middle", "roles", "fail", talk(("user", "a?"), ("system", "b"), ("assistant", "c"))),
    Trap("a result of no call", "roles", "fail", talk(("user", "a?"), ("tool", "b"), ("assistant", "c"))),
    Trap("roles that are dropped", "roles", "warn", talk(("user", "a?")), settings=("data.clean.roles=drop",)),
    Trap(
        *("no turn may be learnt", "loss_tokens", "warn"),
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b", "weight": 0}]},
    ),
    # the same again
    Trap("a row twice", "duplicate", "warn", GOOD[0]),
    Trap("a row twice is not wanted", "duplicate", "fail", GOOD[0], settings=("data.clean.duplicate=fail",)),
    Trap(
        *("a row nearly twice", "near_duplicate", "warn", asked(ESSAY.replace("word30", "another"), "Yes.")),
        train=(asked(ESSAY, "Yes."), *GOOD),
    ),
    Trap(
        *("a held-out question in training, in other case and space", "overlap", "fail"),
        asked("WHICH  planet\thas Rings? ", "Saturn, of course."),
    ),
    Trap(
        *("some overlap is allowed", "overlap", "warn", HELD_OUT[0]),
        settings=("data.max_overlap=0.5",),
    ),
    Trap(
        *(
            "a held-out row nearly in training",
            "near_overlap",
            "warn",
            asked(ESSAY.replace("word30", "another"), "Yes."),
        ),
        test=(*HELD_OUT, asked(ESSAY, "Yes.")),
    ),
    Trap(
        *(
            "too many held-out rows nearly in training",
            "near_overlap",
            "fail",
            asked(ESSAY.replace("word30", "another"), "Yes."),
        ),
        test=(*HELD_OUT, asked(ESSAY, "Yes.")),
        settings=("data.max_near_overlap=0.05",),
    ),
    # the chat template
    Trap(
        "a system turn that is lost",
        "system",
        "fail",
        talk(("system", "Be brief."), ("user", "a?"), ("assistant", "b")),
        model=chatml(NO_SYSTEM),
    ),
    Trap(
        *(
            "a system turn that is refused",
            "template",
            "fail",
            talk(("system", "Be brief."), ("user", "a?"), ("assistant", "b")),
        ),
        model=chatml("{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TURN),
    ),
    Trap(
        *("a conversation that begins with an answer", "template", "fail"),
        talk(("assistant", "Hello!"), ("user", "a?"), ("assistant", "b")),
        model=FAMILIES["gemma"],
    ),
    Trap(
        *("an earlier question that is left out", "content", "fail", THINKING),
        model=Tiny("{% for m in messages[-1 if add_generation_prompt else -2 :] %}" + TURN + "{% endfor %}" + ASK),
        besides={"prefix_stable": "warn"},  # the earlier answer is left out with it
    ),
    Trap(
        *("thinking that is cut out of the answer", "content", "fail", asked("Why?", "<think>hm</think>Because.")),
        model=chatml(TURN.replace("m.content", "m.content.split('</think>')[-1]")),
    ),
    Trap(
        "tools that are left out", "tools", "fail", asked("Is it dark?", "I cannot see.", tools=[TOOL]), model=chatml()
    ),
    Trap(
        *("a call that is written as nothing", "tool_calls", "fail"),
        {"messages": [{"role": "user", "content": "Look!"}, calls("look")]},
        model=chatml(),
    ),
    Trap(
        *("the second of two calls at once", "tool_calls", "fail", TWO_CALLS),
        model=chatml(CALLING.replace("m.tool_calls", "(m.tool_calls or [])[:1]")),
        cure={"model": chatml(CALLING)},
    ),
    Trap(
        *(
            "a call beside words",
            "tool_calls",
            "fail",
            TWO_CALLS | {"messages": [ASK_TWO, CALLS_TWO | {"content": "Wait."}]},
        ),
        model=chatml(CALLING.replace("{% for c in m.tool_calls %}", "{% for c in m.tool_calls if not m.content %}")),
        cure={"model": chatml(CALLING)},
    ),
    Trap(
        *("the second of two arguments", "tool_calls", "fail", TWO_CALLS),
        model=chatml(
            CALLING.replace("(c.function.arguments | tojson)", "(c.function.arguments.values() | first | string)")
        ),
        cure={"model": chatml(CALLING)},
    ),
    Trap(
        *("the second of two tools", "tools", "fail", asked("Is it dark?", "I cannot see.", tools=[TOOL, OTHER_TOOL])),
        model=chatml(before="{{ tools[0].function.name if tools }}"),
        cure={"model": chatml(before="{% for t in tools or [] %}{{ t.function.name }}{% endfor %}")},
    ),
    Trap(
        *("answers that are written differently than their prompt", "generation_prompt", "fail"),
        model=chatml(ask=ASK.replace("assistant\n", "assistant\n<think>\n")),
        place=("train.jsonl", 1),
        found=ALL,
        besides=NONE_LEFT,
        cure={"model": chatml()},
    ),
    Trap(
        *("thinking that is left out of earlier turns", "prefix_stable", "warn", THINKING),
        model=FAMILIES["qwen3"],
        settings=("data.loss=assistant",),
    ),
    Trap(
        *("thinking under a template that writes none", "content", "fail"),
        row=thought("Why?", "They want a reason.", "Because."),
        cure={"model": FAMILIES["qwen3"]},
    ),
    Trap(
        *("indentation of code that the template trims", "content", "warn"),
        row=asked("Complete: def f(x):", "    return x"),
        model=TRIMMING,
        cure={"model": PLAIN},
    ),
    Trap(
        *("indentation that stands in the question as well", "content", "warn"),
        row=asked("What comes after def f(x): return or    return x?", "    return x"),
        model=TRIMMING,
        cure={"model": PLAIN},
    ),
    Trap(
        *("a line end before an answer, where the template puts one too", "content", "warn"),
        row=asked("Go on", "\nreturn x"),
        model=TRIMMING,
        cure={"model": PLAIN},
    ),
    Trap(
        *("a tab before an answer", "content", "warn", asked("Go on", "\treturn x")),
        model=TRIMMING,
        cure={"model": PLAIN},
    ),
    Trap(
        *("indentation of an answer in parts", "content", "warn", asked("Go on", IN_PARTS)),
        model=TRIMMING,
        cure={"model": PLAIN},
    ),
    Trap(
        *("indentation of an answer in parts, under a template that goes through them", "content", "warn"),
        row=asked("Go on", IN_PARTS),
        model=THROUGH_PARTS,
        cure={"row": asked("Go on", [{"type": "text", "text": "return x"}, {"type": "text", "text": "# done"}])},
    ),
    Trap(
        *("white space after an answer", "content", "warn", asked("Go on", "return x\n\n")),
        model=TRIMMING,
        cure={"model": PLAIN},
    ),
    Trap(
        *("line ends inside an answer", "content", "warn", asked("Go on", "def f(x):\n    return x")),
        model=chatml(TURN.replace("m.content", "m.content.split() | join(' ')")),
        cure={"model": PLAIN},
    ),
    Trap(
        *("indentation of thinking", "content", "warn", thought("Why?", "    so:\n    x", "Because.")),
        model=FAMILIES["qwen3"],
        cure={"row": thought("Why?", "so:\n    x", "Because.")},
    ),
    Trap(
        *("indentation before code, after an empty line", "content", "warn", asked("Go on", "\n\n    return x")),
        model=TRIMMING,
        cure={"row": asked("Go on", "return x")},
    ),
    Trap(
        *(
            "an answer that is left out, and said in the question",
            "content",
            "fail",
            asked("Is it Yes. or No.?", "Yes."),
        ),
        model=chatml(
            "{% if not (m.role == 'assistant' and m.content == 'Yes.') %}"
            + TURN
            + "{% else %}{{ '<|im_start|>assistant\n<|im_end|>\n' }}{% endif %}"
        ),
        cure={"model": PLAIN},
    ),
    # what nothing reads
    *(
        Trap(name, "unused", "warn", row)
        for name, row in (
            ("a column that nothing reads", asked("Which?", "This.", note="from a friend")),
            ("a misspelt column", asked("Which?", "This.", sytem="Be brief.")),
            ("a label beside a text", {"text": "a good film", "label": "positive"}),
            ("a verdict on an answer", {"prompt": "Which?", "completion": "This.", "label": False}),
            ("a variable that the template does not read", asked("Which?", "This.", enable_thinking=False)),
            (
                "a kwarg that it does not read",
                asked("Which?", "This.", chat_template_kwargs={"enable_thinking": False}),
            ),
            ("masks of another tool", {**TOKENIZED, "completion_mask": [1] * len(TOKENIZED["labels"])}),
            ("a key of a turn", {"messages": [{"role": "user", "content": "Which?", "images": ["a.png"]}, ANSWER]}),
            (
                "a user's turn that is to be learnt",
                {"messages": [{"role": "user", "content": "a?", "train": True}, ANSWER]},
            ),
            (
                "a key of ShareGPT's",
                {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b", "thougt": "c"}]},
            ),
        )
    ),
    Trap(
        *("a number that its table has rounded", "rounded", "warn"),
        train=table_of(2**64),
        file="train.parquet",
        place=("train.parquet", LINE),
        model=FAMILIES["qwen3"],
        cure={"train": table_of(2**53)},
    ),
    Trap(
        *("a date where text should be", "malformed", "fail"),
        train=dated(),
        file="train.parquet",
        place=("train.parquet", LINE),
        cure={"train": lines(GOOD), "file": "train.jsonl"},
    ),
    Trap(
        *("today's date", "date", "warn"),
        model=chatml(before="{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}"),
        place=None,
        found=0,
        cure={"model": chatml(before="{{ '<|im_start|>system\nToday is a day.<|im_end|>\n' }}")},
    ),
    Trap(
        *("turns that no special token ends", "turn_end", "fail"),
        model=Tiny(
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
        ),
        place=("train.jsonl", 1),
        found=ALL,
        cure={"model": PLAIN},
    ),
    # tokens
    Trap(
        "an end that is masked like the padding",
        "turn_end",
        "fail",
        tokens(PAD_IS_EOS, (SPOKEN, False), ("yes", True), ("<|im_end|>", False)),
        model=PAD_IS_EOS,
    ),
    Trap(
        "a question that is learnt",
        "headers",
        "warn",
        tokens(PLAIN, ("<|im_start|>system\nBe brief.<|im_end|>\n", False), (SPOKEN + "yes<|im_end|>", True)),
    ),
    Trap("every label masked", "empty", "warn", tokens(PLAIN, (SPOKEN, False), ("yes<|im_end|>", False))),
    Trap("only the first token carries loss", "loss_tokens", "warn", {"input_ids": [5, 6], "labels": [5, -100]}),
    Trap("tokens of another model", "vocabulary", "fail", {"input_ids": [5, 6, 99_999], "labels": [-100, 6, 99_999]}),
    Trap("a beginning twice, in a text", "bos", "fail", {"text": "<s>Once upon a time."}, model=LLAMA),
    Trap(
        "a beginning twice, in tokens",
        "bos",
        "fail",
        tokens(LLAMA, ("<s><s>[INST] a [/INST]", False), (" b </s>", True)),
        model=LLAMA,
    ),
    Trap(
        "no beginning, in tokens",
        "bos",
        "fail",
        tokens(LLAMA, ("[INST] a [/INST]", False), (" b </s>", True)),
        model=LLAMA,
    ),
    Trap(
        *("a template that writes no beginning", "bos", "fail"),
        model=WITH_BOS,
        place=("train.jsonl", 1),
        found=ALL,
        cure={"model": chatml(before="{{ bos_token }}", bos="<s>", adds_bos=True)},
    ),
    Trap(
        *("tokens that merge where the answer begins", "joins", "warn", asked("What grows on trees?", "apples")),
        model=Tiny(
            "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}",
            merges=(("Ġ", "a"),),
        ),
    ),
    Trap(
        *("padding that ends turns", "padding", "warn"),
        settings=("model.pad_token=<|im_end|>",),
        place=None,
        found=0,
        cure={"settings": ("model.pad_token=<|endoftext|>",)},
    ),
    Trap(
        "no other token to pad with",
        "padding",
        "warn",
        model=chatml(special=(), pad=None),
        place=None,
        found=0,
        cure={"model": PLAIN},
    ),
    # lengths
    Trap("too long", "length", "warn", LONG, settings=("data.max_length=128",)),
    Trap(
        "nothing left of the answer",
        "length",
        "warn",
        LONG,
        settings=("data.max_length=128", "data.too_long=truncate_completion"),
    ),
    Trap(
        "too long by its last question alone",
        "length",
        "warn",
        LONG,
        settings=("data.max_length=128", "data.too_long=truncate_prompt"),
    ),
    Trap(
        *("the end of the answer is cut", "answer_cut", "warn", asked("Tell me a story!", "It was long ago. " * 20)),
        settings=("data.max_length=128", "data.too_long=truncate_completion"),
    ),
    Trap(
        "the oldest turns are cut",
        "prompt_cut",
        "warn",
        SEVERAL,
        settings=("data.max_length=192", "data.too_long=truncate_prompt"),
    ),
    Trap("more tokens than the model has positions", "positions", "fail", LONG, model=Tiny(positions=128)),
    Trap("more tokens than are served", "served_length", "warn", LONG, settings=("serve.max_model_len=128",)),
    # what is left
    Trap(
        *("most rows are dropped", "rows", "warn"),
        train=(*GOOD[: LINE - 1], *EMPTY),
        found=len(EMPTY),
        besides={"empty": "warn"},  # the reason
        cure={"train": GOOD},
    ),
    Trap(
        "no row is left",
        "rows",
        "fail",
        train=EMPTY,
        place=("train.jsonl", 1),
        found=len(EMPTY),
        besides={"empty": "warn"},
        cure={"train": GOOD},
    ),
    Trap("nothing is held out", "held_out", "warn", test=(), place=None, found=0, cure={"test": HELD_OUT}),
    Trap(
        *("texts are held out", "held_out", "fail"),
        test=(HELD_OUT[0], {"text": "A text has no answer."}),
        place=("test.jsonl", 2),
        cure={"test": HELD_OUT},
    ),
]


@dataclass(frozen=True)
class Harmless:
    """A file that looks odd and holds the same rows as `rows`."""

    name: str
    file: str
    content: bytes
    rows: Sequence[Mapping[str, Any]] = GOOD


EMOJI = (asked("A family?", "👨‍👩‍👧 and a flag 🇨🇭."), asked("日本語?", "はい。"))
QUOTED = [{"prompt": 'Say "yes",\nthen stop.', "completion": "yes"}, {"prompt": "a, b?", "completion": "NA"}]
PADDED = {
    "input_ids": [0, *TOKENIZED["input_ids"], 0, 0],
    "labels": [-100, *TOKENIZED["labels"], -100, -100],
    "attention_mask": [0, *[1] * len(TOKENIZED["labels"]), 0, 0],
}
HARMLESS = [
    Harmless("line ends of Windows", "train.jsonl", lines(GOOD).replace(b"\n", b"\r\n")),
    Harmless("a byte order mark", "train.jsonl", b"\xef\xbb\xbf" + lines(GOOD)),
    Harmless("blank lines", "train.jsonl", b"\n" + lines(GOOD).replace(b"\n", b"\n\n")),
    Harmless("an array in a file of lines", "train.jsonl", json.dumps(GOOD, indent=1).encode()),
    Harmless("lines in a file called json", "train.json", lines(GOOD)),
    Harmless("an object that holds the rows", "train.json", json.dumps({"version": 1, "data": GOOD}).encode()),
    Harmless(
        "emoji", "train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in EMOJI).encode(), EMOJI
    ),
    Harmless("padding around tokens", "train.jsonl", lines([PADDED]), [TOKENIZED]),
    Harmless(
        *("quotes, commas and line ends in a table", "train.csv"),
        b'prompt,completion\r\n"Say ""yes"",\nthen stop.",yes\r\n"a, b?",NA\r\n',
        QUOTED,
    ),
]
