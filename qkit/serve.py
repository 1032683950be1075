"""The stage `serve`, and `qkit serve`: a server on what a run has made, on any model folder, or on a model of the hub.

What is served is chosen, its memory planned, and the server started below a guard, watched, drained and ended.

serve/server.json   url, argv, start-up seconds. What it answers is checked by `verify`.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qkit import adapters, cards, contract, model, plan, server
from qkit.artifacts import MERGED, Artifact
from qkit.device import Device, detect
from qkit.errors import DoesNotFit, MissingArtifact, MissingExtra, ModelError, NotDeployable, ParityFailed, ServerError
from qkit.export._traced import is_traced
from qkit.memory import kv_bytes
from qkit.recipe import Recipe
from qkit.run import Peak, Run, made_of, make_folder, read_json, write_json
from qkit.runtimes import vllm
from qkit.served_adapter import is_adapter
from qkit.server import Server
from qkit.shape import shape_of
from qkit.source import cache_dir, is_hub_id
from qkit.tensor_files import SHARDS

RUNTIMES = ("vllm", "onnxruntime")
ONNX_SEQS = 4  # as many as onnxruntime-genai's own default
ONNX_CACHE_BYTES = 4  # of a number in the cache
ONNX_BYTES = 460 << 20
ONNX_NEEDS = ("onnxruntime_genai", "fastapi", "uvicorn", "prometheus_client", "transformers")
# Options of the runtime that are not taken after `--`, and how qkit is told the same.
OWN = {
    "--host": "write --set serve.host=ADDRESS",
    "--port": "write --set serve.port=NUMBER",
    "--uds": "it asks its servers over TCP; write --set serve.port=NUMBER",
    "--api-key": "write --api-key-file FILE, or set VLLM_API_KEY: command lines can be read by everybody on the machine",
    "--model": "name the model as what is to be served",
    "--served-model-name": "write --name NAME",
}
BACK_OFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # before the first, second ... start after an end
STEADY_SECONDS = 600.0  # a server that has run so long begins with the shortest wait again
WATCH_SECONDS = 0.2


def run(run: Run, out: Path) -> Peak:
    """Serve for the other stages of `qkit run` until it closes our standard input. Returns the server's peak memory."""
    section = run.recipe.serve.model_copy(update={"port": 0, "host": "127.0.0.1"})
    log = run.log("serve").with_name("vllm.log")
    log.unlink(missing_ok=True)
    with _ready(vllm.Server(run.need("export", "vllm"), run.root.name, section, detect(), log)) as running:
        write_json(out / "server.json", running.describe())  # from now on verify and bench find it
        while os.read(0, 4096):
            continue
        peak_bytes = running.meter.sample()
    return Peak(peak_bytes, "rss_tree")


@contextmanager
def _ready(running: Server) -> Iterator[Server]:
    """Wait for it; none of its processes is left afterwards."""
    try:
        running.wait()
        yield running
    finally:
        running.stop()


# --- what is served -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the command line says beyond the target and its recipe. `adapters`: name=RUN. `force`: also what failed its gate.

    `name`: what requests give as `model`; None: the folder's name. `rest`: options for vLLM, none of them one that qkit gives itself.
    `contract`: whether the server is asked, once it answers, whether it does with conversations what training did.
    """

    runtime: str = "vllm"
    artifact: str | None = None
    name: str | None = None
    adapters: tuple[str, ...] = ()
    runtime_adapters: bool = False
    key: str = field(default="", repr=False)
    rest: tuple[str, ...] = ()
    force: bool = False
    contract: bool = True


@dataclass(frozen=True)
class Serving:
    """A server that can be started. `model`: a folder or a hub id. `chosen`: which artifact, and why; empty for a foreign model.

    `logs`: the folder for its log. Servers on one run, or on folders of one name, may run at once, so a log is named for its port.
    """

    model: str
    name: str
    how: Recipe
    device: Device
    logs: Path
    runtime: str
    extras: vllm.Extras
    chosen: str = ""
    run: Run | None = None
    contract: bool = True

    @property
    def log(self) -> Path:
        return self.logs / f"serve-{self.how.serve.port}.log"

    @property
    def names(self) -> list[str]:
        """What a request may give as `model`."""
        return [self.name, *(adapter.name for adapter in self.extras.adapters)]


def of_run(run: Run, asked: Asked) -> Serving:
    """The artifact of a run: the one that is asked for, else the best that passed its gate.

    Raises:
        MissingArtifact: the run has nothing for this runtime.
        NotDeployable: what it has is not served.
        ParityFailed: all that it has failed.
    """
    artifact, why = pick(run, asked)
    name = asked.name or run.root.resolve().name
    logs = (
        run.root / "logs" if os.access(run.root, os.W_OK) else cache_dir() / "logs"
    )  # it may be mounted to be read only
    made = Serving(
        str(artifact.path), name, run.recipe, detect(), logs, asked.runtime, vllm.Extras(), why, run, asked.contract
    )
    return _completed(made, asked)


def of_model(source: str, how: Recipe, asked: Asked) -> Serving:
    """Any model folder, or a model of the hub.

    Raises:
        ModelError: it is neither. NotDeployable: the runtime does not load it.
    """
    folder = Path(source)
    if asked.runtime == "onnxruntime":
        _need_genai(folder)
    needed = {"vllm": "config.json", "onnxruntime": "genai_config.json"}[asked.runtime]
    if folder.is_dir() and not (folder / needed).is_file():
        raise ModelError(
            f"{source}: holds no {needed}, so it is nothing that {asked.runtime} serves, nor a run directory"
        )
    if not folder.is_dir() and (asked.runtime != "vllm" or not is_hub_id(source)):
        raise ModelError(f"{source}: no such run directory or model folder; a model of the hub is written owner/name")
    if asked.runtime == "vllm" and folder.is_dir():
        _need_loader(folder)
    name = asked.name or (folder.resolve().name if folder.is_dir() else source)
    place, logs = str(folder.resolve()) if folder.is_dir() else source, cache_dir() / "logs"
    return _completed(Serving(place, name, how, detect(), logs, asked.runtime, vllm.Extras()), asked)


def _completed(made: Serving, asked: Asked) -> Serving:
    """With adapters checked against the model, and the cache's size."""
    refuse_own(asked.rest)
    if asked.runtime != "vllm" and (asked.adapters or asked.runtime_adapters):
        raise NotDeployable(f"--runtime {asked.runtime} serves no adapters apart from their base; serve the run itself")
    base = Path(made.model) if Path(made.model).is_dir() else None
    chosen = [adapters.parse(text) for text in asked.adapters]
    names = [made.name, *(name for name, _ in chosen)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ServerError(f"--adapter: the name {', '.join(twice)} is given twice, or is the base's own")
    beside = _beside(made, chosen, base)
    extras = vllm.Extras(beside, asked.runtime_adapters, asked.key, _cache_bytes(made.how), asked.rest)
    return replace(made, extras=extras)


def _beside(made: Serving, chosen: Sequence[tuple[str, Path]], base: Path | None) -> tuple[adapters.Adapter, ...]:
    """The adapters, each seen to belong to the base. A run's export has the run's own adapter in it, so those of others seldom do."""
    try:
        return tuple(adapters.checked(name, place, base) for name, place in chosen)
    except ModelError as error:
        if made.run is None:
            raise
        base_model = made.run.recipe.model
        source = base_model.source if is_hub_id(base_model.source) else model.resolve(base_model)
        words = " ".join(f"--adapter {name}={place}" for name, place in chosen)
        raise ModelError(
            f"{error}\nWhat {made.run.root} exports has its own adapter merged in; beside each other adapters go on their base: "
            f"`qkit serve {source} --adapter {made.name}={made.run.root} {words}`"
        ) from None


def refuse_own(rest: Sequence[str]) -> None:
    """Options that qkit gives the runtime itself: a second value would be obeyed by the runtime and by nothing around it.

    Raises:
        ServerError: there is one; the message says how qkit is told instead.
    """
    for word in rest:
        option = word.partition("=")[0].replace("_", "-")
        if said := [
            how for own, how in OWN.items() if len(option) > 2 and own.startswith(option)
        ]:  # vLLM takes `--hos` too
            raise ServerError(f"`-- {option}`: qkit gives this option itself, and counts on it; {said[0]}")


def pick(run: Run, asked: Asked) -> tuple[Artifact, str]:
    """Which artifact of a run a runtime serves, and a line on why."""
    found = [artifact for artifact in _made(run) if artifact.runtime == asked.runtime]
    if asked.artifact:
        found = [artifact for artifact in found if artifact.name == asked.artifact]
    else:  # the adapter apart is slower than what it was merged into: served where it is asked for, or nothing else is there
        found = [artifact for artifact in found if not is_adapter(artifact.path)] or found
    if not found:
        wanted = asked.artifact or {"vllm": "vllm", "onnxruntime": "onnx-fp32 or onnx-int4"}[asked.runtime]
        raise MissingArtifact(
            f"{run.root}: has no export {wanted} for --runtime {asked.runtime}: "
            f"name it in export.formats, then `qkit run {run.root}` makes it"
        )
    known = _verified(run, found)
    good = [artifact for artifact in found if asked.force or _status(known, artifact) != "failed"]
    if not good:
        raise ParityFailed(
            f"{run.root}: {', '.join(artifact.name for artifact in found)} failed the gate, so it is not served; "
            f"`qkit show {run.root}` says by how much, --force serves it all the same"
        )
    best = max(good, key=lambda artifact: _merit(known, artifact, run.recipe.merge.choose))
    if asked.runtime == "onnxruntime":
        _need_genai(best.path)
    return best, f"{best.name} ({_status(known, best)}, of {', '.join(artifact.name for artifact in found)})"


def _need_loader(folder: Path) -> None:
    """Raise NotDeployable for weights quantized in a way that the installed vLLM does not load."""
    config = read_json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and vllm.methods() and method not in vllm.methods():
        raise NotDeployable(
            f"{folder}: its weights are quantized by {method}, which the installed vLLM does not load (it knows "
            f"{', '.join(sorted(vllm.methods()))}); serve a format made for it, such as vllm-w4a16"
        )


def _need_genai(folder: Path) -> None:
    """Raise NotDeployable for an ONNX graph that onnxruntime-genai's builder has not made."""
    if is_traced(folder):
        raise NotDeployable(
            f"{folder}: its graph was traced, since onnxruntime-genai's builder does not know the architecture, and onnxruntime-genai, "
            "which serves, opens only what its builder makes. ONNX Runtime itself opens it, as README.md there shows; "
            "to serve the model name vllm in export.formats"
        )


def _made(run: Run) -> list[Artifact]:
    """The exports of a run that are there and are whole models."""
    named = [Artifact(name, run.folder("export") / name) for name in run.recipe.export.formats if name != MERGED]
    signs = ("config.json", "genai_config.json", "adapter_config.json")
    return [a for a in named if any((a.path / file).is_file() for file in signs)]


def _verified(run: Run, found: Sequence[Artifact]) -> Mapping[str, Any]:
    """What verify said of these artifacts; nothing of one that has been made anew since."""
    file, manifest = run.folder("verify") / "parity.json", run.manifest()
    if not file.is_file():
        return {"parity": {}, "scores": {}}
    same = {one.name for one in found if made_of(manifest, "verify", f"{one.path.relative_to(run.root)}/")}
    said = read_json(file)
    return {key: {name: entry for name, entry in said[key].items() if name in same} for key in ("parity", "scores")}


def _status(known: Mapping[str, Any], artifact: Artifact) -> str:
    """What verify said of it: passed, failed, measured; or unverified."""
    entry: Mapping[str, Any] = known["parity"].get(artifact.name, {})
    return str(entry.get("status", "unverified"))


def _merit(known: Mapping[str, Any], artifact: Artifact, rule: str) -> tuple[bool, float, float]:
    """Passed before not judged; then the nearer to what was trained (a few points of a score are chance), or by `rule` the better score."""
    score = known["scores"].get(artifact.name, {}).get("score", float("-inf"))
    nearness = -known["parity"].get(artifact.name, {}).get("kl_mean", float("inf"))
    passed = _status(known, artifact) == "passed"
    return (passed, score, nearness) if rule == "score" else (passed, nearness, score)


# --- does it fit --------------------------------------------------------------------------------------------------------


def _cache_bytes(how: Recipe) -> int:
    """What serve.concurrency conversations of full length need; 0 when the model's shape cannot be had."""
    try:
        return how.serve.concurrency * kv_bytes(shape_of(how.model), how.serve.max_model_len)
    except (ModelError, MissingExtra):
        return 0


def planned(serving: Serving) -> plan.Plan | None:
    """The memory plan; None when the model's shape cannot be had. Weights on this disk count as what they are there.

    Raises:
        DoesNotFit: it needs more than the device has; the message says what to change.
    """
    try:
        made = _onnx_plan(serving) if serving.runtime == "onnxruntime" else _vllm_plan(serving)
    except (ModelError, MissingExtra):
        return None
    if not made.fits:
        raise DoesNotFit(f"{serving.name}: {plan.refusal(made)}")
    return made


def _vllm_plan(serving: Serving) -> plan.Plan:
    made = plan.plan(serving.how, device=serving.device, stage="serve")
    size = _file_bytes(serving)
    if not size:
        return made
    on_disk = f"{size:,} bytes of {Path(serving.model).name} on disk"
    weights = plan.MemoryItem("weights", size, True, on_disk)
    return _of_items(made, [weights if item.name == "weights" else item for item in made.items])


def _onnx_plan(serving: Serving) -> plan.Plan:
    """The engine keeps a cache of the model's full length for each request that runs."""
    decoder = (model := read_json(Path(serving.model) / "genai_config.json")["model"])["decoder"]
    section, size = serving.how.serve, _file_bytes(serving)
    many, length = section.max_num_seqs or ONNX_SEQS, model["context_length"]
    width = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * ONNX_CACHE_BYTES
    items = [
        plan.MemoryItem("weights", size, True, f"{size:,} bytes of {Path(serving.model).name} on disk"),
        plan.MemoryItem("kv_cache", many * length * width, True, f"{many} x {length:,} tokens x {width:,} bytes"),
        plan.MemoryItem("runtime", ONNX_BYTES, False, "measured: the interpreter with transformers and ONNX Runtime"),
    ]
    limit = serving.device.memory_bytes
    remedy = plan.Remedy(
        (f"serve.max_num_seqs={max(1, many // 2)}",), (many - many // 2) * length * width, "fewer at once"
    )
    made = plan.Plan(True, cards.title(serving.device), limit, 0, "serve", (), (remedy,) if many > 1 else ())
    return _of_items(made, items)


def _of_items(made: plan.Plan, items: Sequence[plan.MemoryItem]) -> plan.Plan:
    peak = sum(item.bytes for item in items)
    return replace(made, items=tuple(items), peak_bytes=peak, fits=peak <= made.device_bytes)


def _file_bytes(serving: Serving) -> int:
    """Of the weights, as far as they are on this disk."""
    if is_adapter(Path(serving.model)):
        return 0  # its base's weights are what counts, and they are elsewhere
    return sum(file.stat().st_size for kind in (SHARDS, "*.onnx.data") for file in Path(serving.model).glob(kind))


# --- starting and ending ------------------------------------------------------------------------------------------------


def start(serving: Serving) -> Server:
    """Start the server; it is not ready yet.

    Raises:
        MissingExtra, ServerError: each says what to do.
    """
    section = serving.how.serve
    if serving.runtime == "vllm":
        return vllm.Server(serving.model, serving.name, section, serving.device, serving.log, serving.extras)
    if missing := [name for name in ONNX_NEEDS if find_spec(name) is None]:
        raise MissingExtra(f"--runtime onnxruntime needs {', '.join(missing)}: pip install 'qkit[onnx]'")
    port = server.free_port(section)
    program = server.Program("the ONNX server", tuple(onnx_argv(serving, port)), {server.KEY: serving.extras.key})
    return Server(program, serving.name, section, port, serving.log)


def onnx_argv(serving: Serving, port: int) -> list[str]:
    """The command line of qkit's own server, in vLLM's words."""
    section = serving.how.serve
    options = [
        ("model", serving.model),
        ("served-model-name", serving.name),
        ("host", section.host),
        ("port", str(port)),
        ("max-model-len", str(section.max_model_len)),
        ("max-num-seqs", str(section.max_num_seqs or ONNX_SEQS)),
    ]
    return [sys.executable, "-m", "qkit.onnx_server", *server.command(options), *serving.extras.rest]


def argv(serving: Serving, port: int) -> list[str]:
    """The command line that would be started."""
    if serving.runtime != "vllm":
        return onnx_argv(serving, port)
    return vllm.argv(serving.model, serving.name, serving.how.serve, port, serving.device, serving.extras)


def serve(
    serving: Serving,
    ready: Callable[[Server], None],
    wait: Callable[[Server], None],
    restart: Callable[[str, float], None] | None = None,
) -> None:
    """Serve for a person: call `ready` when it answers, then `wait`, which returns or raises when it is to end; then drain and end it.

    `restart`: told why a server that was ready ended by itself, and how many seconds are waited before the next start; None: none follows.

    Raises:
        ServerError: it ended by itself, or could not be started.
        ParityFailed: it does not do with conversations what training did.
    """
    server.need_key(serving.how.serve.host, serving.extras.key)
    fixed, ends = _with_port(serving), 0
    make_folder(fixed.logs)
    fixed.log.unlink(missing_ok=True)
    while True:
        begin = 0.0
        try:
            with _drained(start(fixed)) as running:
                keep_contract(fixed, running)
                begin = time.monotonic()
                ready(running)
                wait(running)
                return
        except ServerError as error:
            if restart is None or not (begin or ends):  # one that was never ready would not be ready the next time
                raise
            ends = 1 if begin and time.monotonic() - begin > STEADY_SECONDS else ends + 1
            pause = BACK_OFF_SECONDS[min(ends, len(BACK_OFF_SECONDS)) - 1]
            restart(str(error), pause)
            time.sleep(pause)


def keep_contract(serving: Serving, running: Server) -> None:
    """See that a run's server makes the trained prompt tokens, stops where training stopped, and so on; on a few held-out rows.

    Raises:
        ParityFailed: it does not.
    """
    if serving.run is None or not serving.contract:
        return
    found = contract.check(serving.run, running.url, running.name, headers=running.headers)
    found.enforce()


def _with_port(serving: Serving) -> Serving:
    """With the port settled, so that a server that is started again is where it was."""
    section = serving.how.serve.model_copy(update={"port": server.free_port(serving.how.serve)})
    return replace(serving, how=serving.how.model_copy(update={"serve": section}))


@contextmanager
def _drained(running: Server) -> Iterator[Server]:
    """Ready inside; on the way out new requests are refused, those in work get their time, and no process is left."""
    with _ready(running):
        try:
            yield running
        finally:
            running.drain()


def watch(running: Server) -> None:
    """Return only by an exception.

    Raises:
        ServerError: the server, or a process of its engine, is gone; within a second of it.
    """
    while not running.ended():
        time.sleep(WATCH_SECONDS)
    raise ServerError(f"{running.program.title} ended by itself: {running.ending()}")


# --- saying -------------------------------------------------------------------------------------------------------------

HELLO = {"role": "user", "content": "Hello"}


def curl(running: Server) -> str:
    """A line to paste into a shell. The key stays where it is: in the shell's environment."""
    body = json.dumps({"model": running.name, "messages": [HELLO], "max_tokens": 64})
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if running.headers else ""
    return f"curl {running.url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"


def python(running: Server) -> str:
    """The same for Python, in one line."""
    key = 'os.environ["VLLM_API_KEY"]' if running.headers else '"none"'
    modules = "os, openai" if running.headers else "openai"
    client = f'openai.OpenAI(base_url="{running.url}/v1", api_key={key})'
    asked = f"model={json.dumps(running.name)}, messages={json.dumps([HELLO])}"
    return f"import {modules}; print({client}.chat.completions.create({asked}).choices[0].message.content)"


def describe(running: Server, names: Sequence[str]) -> dict[str, Any]:
    """The same, for `--json`."""
    return {**running.describe(), "models": list(names), "curl": curl(running), "python": python(running)}
