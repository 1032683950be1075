"""Why a server ended, according to its log."""

from __future__ import annotations

KILLED = (
    "a process of the engine was killed, usually by the system's out-of-memory killer; "
    "lower serve.max_model_len or serve.concurrency"
)
KILLED_FROM_OUTSIDE = (
    "the engine was killed from outside, usually by the system's out-of-memory killer; "
    "lower serve.max_model_len or serve.concurrency"
)
ILLEGAL_INSTRUCTION = (
    "this build of vLLM uses an instruction that the processor does not have (illegal instruction); "
    "use another build of vLLM, or another machine"
)


# What a text in a server's log means, and what to do. The match that is nearest to the end of the log counts.
CAUSES = {
    "address already in use": "the port is in use; choose another with --set serve.port=0",
    "No available memory for the cache blocks": "the weights leave no room for the KV cache; raise serve.gpu_memory_utilization, "
    "or serve a quantized export",
    "larger than the maximum number of tokens that can be stored in KV cache": "the KV cache is too small; lower serve.max_model_len",
    "larger than the available KV cache memory": "the KV cache is too small; lower serve.max_model_len or serve.concurrency",
    "out of memory": "the device ran out of memory; lower serve.gpu_memory_utilization or serve.max_model_len",
    "Cannot allocate memory": "the machine ran out of memory; lower serve.max_model_len or serve.concurrency",
    "Free memory on device": "other programs use the device's memory; lower serve.gpu_memory_utilization or stop them",
    "exit code: -9": KILLED_FROM_OUTSIDE,
    "': -9": KILLED_FROM_OUTSIDE,  # a process of the engine, while it starts: {'EngineCore': -9}
    "exit code: -4": ILLEGAL_INSTRUCTION,
    "': -4": ILLEGAL_INSTRUCTION,
    "Bfloat16 is only supported on GPUs with compute capability": "this GPU has no bfloat16; add `-- --dtype float16`",
    "no kernel image is available": "this build of vLLM has no kernels for this GPU; install the build for it",
    "torch.bfloat16 is not supported": "this model cannot be served in bfloat16 here; add `-- --dtype float16`",
    "is not supported for quantization method": "this quantized format does not support the dtype or the device; serve another artifact",
    "is greater than the derived max_model_len": "the model has a shorter context; lower serve.max_model_len",
    "greater than max_lora_rank": "the adapter's rank is above the server's; start the server with this adapter, so that the rank is raised",
    "died unexpectedly": KILLED,
    "No module named": "a package is missing; `qkit doctor` names it, `make quickstart` installs the tested set",
}
CLIENT_ERROR = "code=4"  # the server logs invalid requests as errors
AFTERMATH = (
    CLIENT_ERROR,
    "EngineDeadError",
    "EngineCore encountered an issue",
    "Engine core initialization failed",
    "RuntimeError: cancelled",
    "RuntimeError: Executor failed",
)


def explain(log: str) -> str:
    """Why the server ended: the last known cause, otherwise the last error that does not follow from another one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return known_causes(log) or (error_lines(log) or lines or ["its log is empty"])[-1][-300:]


def error_lines(log: str) -> list[str]:
    """The lines with an error that does not follow from another one."""
    return [
        line.strip() for line in log.splitlines() if "Error" in line and not any(text in line for text in AFTERMATH)
    ]


def known_causes(log: str) -> str:
    """The meaning of the last line that has a known one; empty if there is none."""
    for line in reversed(log.splitlines()):
        for text, meaning in CAUSES.items():
            if text.lower() in line.lower():
                return f"{meaning} ({line.strip()[-200:]})"
    return ""
