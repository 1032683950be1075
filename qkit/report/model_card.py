"""The model card: README.md beside the merged weights and in every export, written from what the run measured.

It is no stage and no stage's result: it is rewritten as figures come in, and left out of the hashed outputs.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from qkit.core import files
from qkit.core.errors import MissingArtifact
from qkit.core.files import write_text
from qkit.core.sources import is_hub_id
from qkit.measure import candidates
from qkit.measure.evidence import differences, is_current, read_evidence
from qkit.merging.folder import dtype_of
from qkit.model.provenance import NOTE, is_traced
from qkit.recipe.schema import Recipe, Serve
from qkit.report import screen, summary
from qkit.run.directory import Run

FILE = "README.md"
# What reads a folder -> the library that the hub names for it.
LIBRARIES = {"transformers": "transformers", "adapter": "peft", "gguf": "gguf", "onnx": "onnx"}
JUDGED = ("scores", "parity")
ONTO = {"dequantized": "the dequantized 4-bit base that the adapter was trained on", "16bit": "the 16-bit base"}
PROVENANCE = ("data", "train", "merge")  # the stages whose files made these weights


def write(run: Run) -> None:
    """Write the card into `merge/`, and into every folder of `export/`.

    Raises:
        MissingArtifact: there is no merged model, or a file of the run is damaged.
    """
    merged = run.folder("merge")
    if not merged.is_dir():
        raise MissingArtifact(f"{merged} is missing: `qkit merge {run.root}` makes it")
    write_text(merged / FILE, render(run))
    for folder in sorted(run.folder("export").glob("*/")):
        write_text(folder / FILE, render(run, folder.name))


def render(run: Run, export: str | None = None) -> str:
    """The card's text, for the merged model or an export by its format's name: YAML front matter, then Markdown."""
    from importlib import resources

    import jinja2

    figures = _current(run, summary.summary(run))
    said = (files.read(run.folder("export") / export / NOTE) or {}) if export else {}
    onnx = [folder.name for folder in sorted(run.folder("export").glob("onnx*/"))]
    environment = jinja2.Environment(
        autoescape=False,  # Markdown, not HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(screen.TEXTS, cell=_cell)
    template = environment.from_string(
        resources.files("qkit.report").joinpath("modelcard.md.j2").read_text(encoding="utf-8")
    )
    return template.render(
        front=_front(run.recipe, export),
        export=export,
        kind="traced" if export and is_traced(run.folder("export") / export) else kind_of(export),
        prompts=_prompts_of(run, export),
        other_prompts=[name for name in onnx if differences(run.folder("export") / name)],
        name=run.root.resolve().name,
        run=run,
        recipe=run.recipe,
        dtype=dtype_of(run),
        onto=_onto(run, export),
        served=said.get("served_otherwise"),
        unstopped=said.get("unstopped"),
        figures=figures,
        show=summary,
        data=files.read(run.folder("data") / "summary.json") or {},
        messages=json.dumps(_messages(run.recipe), ensure_ascii=False),
        curl=_curl(run),
        outputs=list(_outputs(run.manifest())),
    )


def _current(run: Run, figures: summary.Summary) -> dict[str, Any]:
    """The figures without those of weights that were made again after they were measured."""
    manifest, stale = run.manifest(), read_evidence(run.root).stale
    judged = {key: {name: entry for name, entry in figures[key].items() if name not in stale} for key in JUDGED}
    speeds = {
        key: [record for record in figures[key] if is_current(manifest, "bench", record["artifact"])]
        for key in ("bench", "bench_open")
    }
    return {**figures, **judged, **speeds}


def _prompts_of(run: Run, export: str | None) -> list[str] | None:
    """How onnxruntime-genai's prompts from this export differ from training's; None where nobody has looked."""
    return differences(run.folder("export") / export) if export else None


def _onto(run: Run, export: str | None) -> str | None:
    """Onto which of the base's weights these were merged, in words; None of an adapter, or where it is not known."""
    if kind_of(export) == "adapter":
        return None
    folder = run.folder("export") / export if export else run.folder("merge")
    made = files.read(folder / (NOTE if export else candidates.FILE)) or {}
    name = made.get("base" if export else "chosen")
    return ONTO[candidates.Candidate.from_name(name).base] if name else None


def kind_of(export: str | None) -> str:
    """By what an export is used: one of LIBRARIES."""
    if export == "vllm-adapter":
        return "adapter"
    kind = (export or "").partition("-")[0]
    return kind if kind in LIBRARIES else "transformers"


def _front(recipe: Recipe, export: str | None) -> str:
    """YAML front matter as the hub reads it. The license is the base model's to say, so it is left out."""
    import yaml

    front: dict[str, Any] = {"library_name": LIBRARIES[kind_of(export)], "pipeline_tag": "text-generation"}
    if is_hub_id(recipe.model.source):
        relation = "adapter" if kind_of(export) == "adapter" else "finetune"
        front |= {"base_model": recipe.model.source, "base_model_relation": relation}
    if known := [source.source for source in recipe.data.train if is_hub_id(source.source)]:
        front["datasets"] = known
    front["tags"] = ["qkit", "lora", *(["qlora"] if recipe.quantization.load_in_4bit else []), recipe.task]
    return yaml.safe_dump(front, sort_keys=False).strip()


def _messages(recipe: Recipe) -> list[dict[str, str]]:
    """A conversation such as the model was trained on, its question left open."""
    system = [{"role": "system", "content": recipe.data.system}] if recipe.data.system else []
    return [*system, {"role": "user", "content": "Ask here as the training data does."}]


def _curl(run: Run) -> str:
    """A line that asks the server of `qkit serve`, ready for a shell."""
    section, server = run.recipe.serve, files.read(run.folder("serve") / "server.json") or {}
    port = section.port or Serve.model_fields["port"].default  # 0 takes a free one, which no card can know
    body = {
        "model": server.get("model", run.root.resolve().name),
        "messages": _messages(run.recipe),
        "max_tokens": run.recipe.evaluate.max_new_tokens,
    }
    url = f"http://{section.host}:{port}/v1/chat/completions"
    return f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def _outputs(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The files that led to these weights, and the weights: name and sha256."""
    for stage in PROVENANCE:
        for name, output in manifest["stages"].get(stage, {"outputs": {}})["outputs"].items():
            yield name, output["sha256"]


def _cell(text: object) -> str:
    """Text that stays in its cell of a Markdown table."""
    return " ".join(str(text).replace("|", "\\|").split())
