"""The checks over rows of conversations: what they find, how serious it is, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from qkit.plugins.checks import COMMON, Kind

# In the order in which they are shown. The code that examines a row describes what it finds there; these texts say what that means.
CONVERSATION_CHECKS: Mapping[str, Kind] = {
    "malformed": COMMON["malformed"],
    "roles": Kind(
        "every conversation has a valid order of turns",
        "have an invalid order of turns",
        "fail",
        "fix them, or drop them with data.clean.roles=drop",
    ),
    "unicode": COMMON["unicode"],
    "empty": COMMON["empty"],
    "duplicate": COMMON["duplicate"],
    "near_duplicate": COMMON["near_duplicate"],
    "template": Kind(
        "the chat template accepts every conversation",
        "are rejected by the chat template",
        "fail",
        "use a template that supports these roles (model.chat_template), or change the rows",
    ),
    "system": Kind(
        "the chat template writes every system message",
        "lose their system message: the chat template omits it",
        "fail",
        "use a template that writes system messages (model.chat_template), or move the text to the user message",
    ),
    "content": Kind(
        "the chat template writes the text of every message",
        "lose text in the chat template",
        "fail",
        "use a template that writes every message, reasoning included (model.chat_template), or ignore the reasoning "
        "(data.ignore='[messages.reasoning_content]', or the name that it has in your rows)",
    ),
    "tools": Kind(
        "the chat template writes every tool",
        "offer tools that the chat template omits",
        "fail",
        "use a template that writes tools (model.chat_template), or describe them in the system message",
    ),
    "tool_calls": Kind(
        "the chat template writes every tool call",
        "contain tool calls that the chat template omits",
        "fail",
        "use a template that writes tool_calls (model.chat_template), or write the call as the text of the message",
    ),
    "generation_prompt": Kind(
        "the prompt that a server sends is a prefix of every training row",
        "do not begin with the prompt that a server would send",
        "fail",
        "use a template whose generation prompt is exactly what it writes before an answer (model.chat_template)",
    ),
    "turn_end": Kind(
        "the end-of-turn token carries loss in every trained turn",
        "do not teach the model to stop: the end-of-turn token carries no loss",
        "fail",
        "end the assistant's turn with a special token in the template; in rows tokenized elsewhere, unmask that token (masking the "
        "padding masks it too when both are the same token)",
    ),
    "bos": Kind(
        "every text has the beginning-of-sequence token that the model expects",
        "have two beginning-of-sequence tokens, or none",
        "fail",
        "write the token once: either in the template or in the text",
    ),
    "mask": Kind(
        "the tokens that carry loss are the turns to train on",
        "carry loss on other tokens than the turns to train on",
        "fail",
        "this is a bug in qkit: please report it together with the row",
    ),
    "headers": Kind(
        "no user or system turn carries loss",
        "carry loss on the start of a turn: the model learns to speak for the user",
        "warn",
        "mask everything except the assistant's turns",
    ),
    "joins": Kind(
        "tokens do not change where an answer follows its prompt",
        "have different tokens where an answer follows its prompt",
        "warn",
        "qkit trains on the tokens that a server would send; in other tools, tokenize prompt and answer separately",
    ),
    "prefix_stable": Kind(
        "turns do not change as the conversation continues",
        "contain turns that the template writes differently once the conversation continues (without the reasoning, for example)",
        "warn",
        "qkit trains on such a turn in a separate row, with the prompt that a server would send; this takes more tokens",
    ),
    "rounded": COMMON["rounded"],
    "special_text": Kind(
        "no text contains a special token",
        "contain the text of a special token, which the model reads as the token itself",
        "warn",
        "remove it from the text unless it is intended",
    ),
    "vocabulary": COMMON["vocabulary"],
    "length": Kind(
        "every row fits data.max_length",
        "are longer than data.max_length and dropped",
        "warn",
        "raise data.max_length, or set data.too_long=truncate_prompt (for plain text: split)",
    ),
    "prompt_cut": Kind(
        "no prompt is truncated", "lose their oldest turns to data.max_length", "warn", "raise data.max_length"
    ),
    "answer_cut": Kind(
        "no answer is truncated",
        "have a truncated answer, and do not teach the model to stop there",
        "warn",
        "raise data.max_length, or set data.too_long=drop or truncate_prompt",
    ),
    "loss_tokens": Kind(
        "every row has tokens that carry loss",
        "have no token that carries loss",
        "warn",
        "check their labels, weights or train marks",
    ),
}


# Findings under these names are milder forms of another check: they are reported as warnings and stop nothing.
LESSER_CHECKS: Mapping[str, tuple[str, Kind]] = {
    "white_space": (
        "content",
        Kind(
            "",
            "lose white space in the chat template, such as the indentation of code: training sees the text without it",
            "warn",
            "use a template that writes messages unchanged (model.chat_template), or strip the rows if white space does not matter",
        ),
    )
}
