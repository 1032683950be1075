"""A program that runs `vllm bench serve` once per line of standard input, with qkit's streaming client in place of the tool's own.

A line holds the tool's arguments as a JSON list. The reply on standard output is one JSON object: `doubts`, or `problem` if it failed.
What the tool prints goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from qkit.bench.stream import StreamClient


def main() -> None:
    """Run one benchmark per line until standard input closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.benchmarks import serve
    from vllm.benchmarks.lib import endpoint_request_func

    client = StreamClient(endpoint_request_func.RequestFuncOutput)
    endpoint_request_func.ASYNC_REQUEST_FUNCS.update({"openai": client.completions, "openai-chat": client.chat})
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    for line in sys.stdin:
        client.doubts.clear()
        reply: dict[str, object]
        try:
            serve.main(parser.parse_args(json.loads(line)))
            reply = {"doubts": dict(client.doubts)}
        except Exception as error:
            reply = {"problem": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
