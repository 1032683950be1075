"""Send a question to a model that `qkit serve RUN` serves, with the openai client.

python serve/client.py --url http://127.0.0.1:8000/v1 "Find the area of a triangle with a base of 10 and a height of 5."
"""

from __future__ import annotations

import argparse
import os
import sys

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--system", help="a system message, such as the functions that the model may call")
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key=os.environ.get("VLLM_API_KEY", "none"))
    messages = [{"role": "system", "content": options.system}] if options.system else []
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[*messages, {"role": "user", "content": options.question}],  # type: ignore[list-item]
        max_tokens=options.max_tokens,
        temperature=0,
        stream=True,
    )
    for chunk in answer:
        sys.stdout.write((chunk.choices[0].delta.content or "") if chunk.choices else "")
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
