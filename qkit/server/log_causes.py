"""Why a server ended, from what it logged."""

from __future__ import annotations

KILLED = (
    "a process of the engine was killed, by the system's out-of-memory killer as a rule; "
    "lower serve.max_model_len or serve.concurrency"
)
SHOT = (
    "the engine was killed from outside, by the system's out-of-memory killer as a rule; "
    "lower serve.max_model_len or serve.concurrency"
)
NO_KERNEL = (
    "the engine has no kernel for this processor (illegal instruction); "
    "another build of vLLM, or another machine, is needed"
)


# What a line of a server's log means, and what to do. The first that is found, from the end of the log, wins.
EXPLAINED = {
    "address already in use": "the port is in use; choose another with --set serve.port=0",
    "No available memory for the cache blocks": "weights leave no room for the KV cache; raise serve.gpu_memory_utilization, "
    "or serve a quantized export",
    "larger than the maximum number of tokens that can be stored in KV cache": "the KV cache is too small; lower serve.max_model_len",
    "larger than the available KV cache memory": "the KV cache is too small; lower serve.max_model_len or serve.concurrency",
    "out of memory": "the device ran out of memory; lower serve.gpu_memory_utilization or serve.max_model_len",
    "Cannot allocate memory": "the machine ran out of memory; lower serve.max_model_len or serve.concurrency",
    "Free memory on device": "other programs hold the device's memory; lower serve.gpu_memory_utilization or end them",
    "exit code: -9": SHOT,
    "': -9": SHOT,  # of a process of the engine while it starts: {'EngineCore': -9}
    "exit code: -4": NO_KERNEL,
    "': -4": NO_KERNEL,
    "Bfloat16 is only supported on GPUs with compute capability": "this GPU has no bfloat16; add `-- --dtype float16`",
    "no kernel image is available": "vLLM's build has no kernels for this GPU; install the build for it",
    "torch.bfloat16 is not supported": "this model is not served in bfloat16 here; add `-- --dtype float16`",
    "is not supported for quantization method": "this quantized format does not go with that dtype or device; serve another artifact",
    "is greater than the derived max_model_len": "the model was made for shorter texts; lower serve.max_model_len",
    "greater than max_lora_rank": "the adapter's rank is above the server's; start it with this adapter, so that the rank is raised",
    "died unexpectedly": KILLED,
    "No module named": "a package is missing; `make quickstart` installs the set that works, `qkit doctor` names it",
}
ANSWERED = "code=4"  # requests that were wrong are logged as errors
AFTERMATH = (
    ANSWERED,
    "EngineDeadError",
    "EngineCore encountered an issue",
    "Engine core initialization failed",
    "RuntimeError: cancelled",
    "RuntimeError: Executor failed",
)


def explain(log: str) -> str:
    """The cause of an end: what we know of the last line that says it, else the last error line that is no echo of another."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return known_causes(log) or (error_lines(log) or lines or ["it said nothing"])[-1][-300:]


def error_lines(log: str) -> list[str]:
    """The lines that tell of an error of their own."""
    return [
        line.strip() for line in log.splitlines() if "Error" in line and not any(sign in line for sign in AFTERMATH)
    ]


def known_causes(log: str) -> str:
    """What we know of the last line that says something known; empty when there is none."""
    for line in reversed(log.splitlines()):
        for sign, meaning in EXPLAINED.items():
            if sign.lower() in line.lower():
                return f"{meaning} ({line.strip()[-200:]})"
    return ""
