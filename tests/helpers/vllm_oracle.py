"""What the installed vLLM makes of conversations, by its own code and without a server: a program, since importing vLLM takes ten seconds.

It reads {"model": FOLDER of a tokenizer, "templates": {name: text}, "requests": {name: body of a chat request}} and writes, for each template,
whether it is given parts ("openai") or one text ("string"), and for each request the prompt as text, or null where it is refused.
"""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import Any


def main() -> None:
    logging.disable(logging.WARNING)
    from transformers import AutoTokenizer

    asked = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    told = {name: _of_template(tokenizer, text, asked["requests"]) for name, text in asked["templates"].items()}
    sys.stdout.write("\n" + json.dumps(told))


def _of_template(tokenizer: Any, text: str, requests: dict[str, Any]) -> dict[str, Any]:
    from vllm.renderers.hf import _detect_content_format

    form = _detect_content_format(text, default="string")
    return {"form": form, "prompts": {name: _prompt(tokenizer, text, form, body) for name, body in requests.items()}}


def _prompt(tokenizer: Any, text: str, form: str, body: dict[str, Any]) -> str | None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMError
    from vllm.renderers.chat_utils import parse_chat_messages
    from vllm.renderers.hf import safe_apply_chat_template

    config: Any = SimpleNamespace(
        multimodal_config=None,
        enable_prompt_embeds=False,
        hf_config=SimpleNamespace(model_type="llama"),
    )
    try:
        request = ChatCompletionRequest.model_validate(json.loads(json.dumps({"model": "m", **body})))
        tools = [tool.model_dump() for tool in request.tools] if request.tools is not None else None
        turns, *_ = parse_chat_messages(request.messages, config, content_format=form)
        options = request.build_chat_params(text, form).get_apply_chat_template_kwargs() | {"tokenize": False}
        return str(safe_apply_chat_template(config, tokenizer, turns, tools=tools, **options))
    except (ValueError, VLLMError):  # pydantic's errors are of the first kind
        return None


if __name__ == "__main__":
    main()
