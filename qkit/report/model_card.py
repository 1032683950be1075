"""The model card: README.md in the merged model's folder and in every export, with the figures that the run measured.

It is not an output of a stage: it is rewritten whenever figures are added, and excluded from the hashed outputs.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qkit.core import files
from qkit.core.errors import MissingArtifact, MissingExtra
from qkit.core.files import write_text
from qkit.core.sources import is_hub_id
from qkit.measure import candidates
from qkit.measure.evidence import differences, is_current, read_evidence
from qkit.merging.folder import dtype_of
from qkit.model.provenance import NOTE, is_traced
from qkit.plugins.sections import Table
from qkit.plugins.task import open_task
from qkit.recipe.registry import MERGED, TRAINED, is_unmerged
from qkit.recipe.schema import WHOLE, Recipe, Serve
from qkit.report import further, summary
from qkit.report._templates import template
from qkit.run.directory import Run

FILE = "README.md"
# How a folder is loaded -> the name of the library on the hub.
LIBRARIES = {"transformers": "transformers", "adapter": "peft", "gguf": "gguf", "onnx": "onnx"}
JUDGED = ("scores", "parity")
ONTO = {"dequantized": "the dequantized 4-bit base that the adapter was trained on", "16bit": "the 16-bit base"}
PROVENANCE = ("data", "train", "merge")  # the stages whose outputs the weights depend on


def write(run: Run) -> None:
    """Write the card into `merge/`, and into every folder of `export/`.

    Raises:
        MissingArtifact: the merged model is missing, or a file of the run is damaged.
    """
    merged = run.folder("merge")
    if merged.is_dir():
        write_text(merged / FILE, render(run))
    elif not is_unmerged(run.recipe):
        raise MissingArtifact(f"{merged} is missing: `qkit merge {run.root}` makes it")
    for folder in sorted(run.folder("export").glob("*/")):
        write_text(folder / FILE, render(run, folder.name))


def render(run: Run, export: str | None = None) -> str:
    """The text of the card, for the merged model or for the export of a format: YAML front matter, then Markdown.

    Raises:
        MissingExtra: huggingface_hub is not installed.
    """
    figures = _current(run, summary.summary(run))
    note = (files.read(run.folder("export") / export / NOTE) or {}) if export else {}
    onnx = [folder.name for folder in sorted(run.folder("export").glob("onnx*/"))]
    return template("modelcard.md.j2").render(
        front=_front_matter(run, export, figures),
        export=export,
        kind="traced" if export and is_traced(run.folder("export") / export) else kind_of(export),
        prompts=_prompts_of(run, export),
        other_prompts=[name for name in onnx if differences(run.folder("export") / name)],
        name=run.root.resolve().name,
        run=run,
        recipe=run.recipe,
        dtype=dtype_of(run),
        method=_method(run.recipe),
        usage=open_task(run.recipe.task).usage(kind_of(export), run.recipe),
        onto=_onto(run, export),
        served=note.get("served_otherwise"),
        unstopped=note.get("unstopped"),
        figures=figures,
        show=summary,
        further=further,
        trained=figures["scores"].get(run.recipe.trained_as, {}),
        tables=_tables(run),
        data=files.read(run.folder("data") / "summary.json") or {},
        messages=json.dumps(_messages(run.recipe), ensure_ascii=False),
        curl=_curl(run),
        outputs=list(_outputs(run.manifest())),
    )


def _tables(run: Run) -> list[Table]:
    """The tables that the task has for the card."""
    parts = (part for section in further.sections(run) for part in section.parts)
    return [part for part in parts if isinstance(part, Table) and part.on_card]


def _current(run: Run, figures: summary.Summary) -> dict[str, Any]:
    """The figures without those of artifacts that have changed since they were measured."""
    manifest, stale = run.manifest(), read_evidence(run.root).stale
    judged = {key: {name: entry for name, entry in figures[key].items() if name not in stale} for key in JUDGED}
    speeds = {
        key: [record for record in figures[key] if is_current(manifest, "bench", record["artifact"])]
        for key in ("bench", "bench_open")
    }
    return {**figures, **judged, **speeds}


def _prompts_of(run: Run, export: str | None) -> list[str] | None:
    """Differences between onnxruntime-genai's prompts from this export and those of training; None if they were not compared."""
    return differences(run.folder("export") / export) if export else None


def _onto(run: Run, export: str | None) -> str | None:
    """A description of the base weights that the adapter was merged into; None for an adapter, or if unknown."""
    if kind_of(export) == "adapter" or run.recipe.method in WHOLE:
        return None
    folder = run.folder("export") / export if export else run.folder("merge")
    entry = files.read(folder / (NOTE if export else candidates.FILE)) or {}
    name = entry.get("base" if export else "chosen")
    base = candidates.Candidate.from_name(name).base if name else None
    if base == "16bit" and not open_task(run.recipe.task).HEAD.generates:
        return "the base as it is published"
    return ONTO[base] if base else None


def kind_of(export: str | None) -> str:
    """How an export is loaded: a key of LIBRARIES."""
    if export == "vllm-adapter":
        return "adapter"
    kind = (export or "").partition("-")[0]
    return kind if kind in LIBRARIES else "transformers"


def _front_matter(run: Run, export: str | None, figures: Mapping[str, Any]) -> str:
    """YAML metadata for the hub. It has no license, which depends on the base model.

    Raises:
        MissingExtra: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import ModelCardData
    except ImportError:
        raise MissingExtra("the model card needs huggingface_hub: pip install 'qkit[train]'") from None
    recipe, kind = run.recipe, kind_of(export)
    on_hub = is_hub_id(recipe.model.source)
    base = (
        {"base_model": recipe.model.source, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
        if on_hub
        else {}
    )
    scores = (
        {"model_name": run.root.resolve().name, "eval_results": results}
        if (results := _eval_results(run, export, figures))
        else {}
    )
    card = ModelCardData(
        library_name=LIBRARIES[kind],
        pipeline_tag=open_task(recipe.task).HEAD.pipeline_tag,
        datasets=[source.source for source in recipe.data.train if is_hub_id(source.source)] or None,
        tags=["qkit", run.recipe.method, *(["qlora"] if recipe.quantization.load_in_4bit else []), recipe.task],
        **base,
        **scores,
    )
    return str(card.to_yaml()).strip()


def _eval_results(run: Run, export: str | None, figures: Mapping[str, Any]) -> list[Any]:
    """The score and the task's further figures for the hub's model-index, one result each: the artifact's own, or nothing if not measured.

    Shares are of 100, as the score is.
    """
    from huggingface_hub import EvalResult

    trained = next((name for name in TRAINED if name in figures["scores"]), "")
    score = figures["scores"].get(trained if export == "vllm-adapter" else export or MERGED)
    if score is None or score["score"] is None:
        return []
    task, metric = open_task(run.recipe.task), figures["metric"] or "score"
    where = {"task_type": task.HEAD.pipeline_tag, **_data_set(run.recipe)}
    results = [
        EvalResult(**where, metric_type=metric.replace(" ", "_"), metric_name=metric, metric_value=score["score"])
    ]
    for figure in task.FIGURES:
        values = score.get("metrics", {}).get(figure.name, {"value": None})
        if values["value"] is not None:
            results.append(
                EvalResult(
                    **where,
                    metric_type=figure.metric,
                    metric_name=figure.title,
                    metric_value=values["value"] * (100 if figure.share else 1),
                    metric_args={"average": figure.average} if figure.average else None,
                )
            )
    return results


def _data_set(recipe: Recipe) -> dict[str, str | None]:
    """The held-out rows, as the hub names data sets."""
    section = recipe.data
    source = next(iter(section.test or section.validation or section.train), None)
    if source is None:
        return {"dataset_type": "held-out rows", "dataset_name": "held-out rows", "dataset_split": "test"}
    name, on_hub = Path(source.source).name, is_hub_id(source.source)
    is_own_split = bool(section.test) and on_hub  # else the rows were split by us
    return {
        "dataset_type": source.source if on_hub else name,
        "dataset_name": f"{name}, held-out rows",
        "dataset_config": source.name if on_hub else None,
        "dataset_split": (source.split if is_own_split else None) or "test",
        "dataset_revision": source.revision if on_hub else None,
    }


def _method(recipe: Recipe) -> str:
    """What was trained, for people."""
    if recipe.method == "full":
        return "all weights"
    if recipe.method == "head":
        return "the new head alone"
    if recipe.method == "peft":
        return ", ".join(f"{name} {value}" for name, value in recipe.peft.items())
    if is_unmerged(recipe):
        adapter = recipe.bottleneck
        return f"bottlenecks ({recipe.method}), reduction factor {adapter.reduction_factor}, {adapter.non_linearity}"
    section, modules = recipe.lora, recipe.lora.target_modules
    names = [modules] if isinstance(modules, str) else modules
    return ", ".join([f"LoRA, rank {section.r}", f"alpha {section.lora_alpha}", *names, *section.target_parameters])


def _messages(recipe: Recipe) -> list[dict[str, str]]:
    """A conversation in the form of the training data, with a placeholder for the question."""
    system = [{"role": "system", "content": recipe.data.system}] if recipe.data.system else []
    return [*system, {"role": "user", "content": "Ask here as the training data does."}]


def _curl(run: Run) -> str:
    """A shell command that sends a request to the server of `qkit serve`."""
    section, server = run.recipe.serve, files.read(run.folder("serve") / "server.json") or {}
    port = section.port or Serve.model_fields["port"].default  # 0 stands for any free port
    body = {
        "model": server.get("model", run.root.resolve().name),
        "messages": _messages(run.recipe),
        "max_tokens": run.recipe.evaluate.max_new_tokens,
    }
    url = f"http://{section.host}:{port}/v1/chat/completions"
    return f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def _outputs(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and sha256 of the files that the weights depend on, and of the weights."""
    for stage in PROVENANCE:
        for name, output in manifest["stages"].get(stage, {"outputs": {}})["outputs"].items():
            yield name, output["sha256"]
