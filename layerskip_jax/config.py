"""Every setting of the project, typed, checked when it is made, and documented where it stands.

A `Config` is one experiment. Files under ``configs/`` return one from ``get_config()``, the command line
overrides single fields (`layerskip_jax.command_line`), and the resolved result is saved in every checkpoint.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from layerskip_jax.checks import check_fields, check_type, require
from layerskip_jax.compiler_options import parse_options
from layerskip_jax.errors import UserError, nearest

T = TypeVar("T")


def setting(default: T, doc: str) -> T:
    """Declare a dataclass field with its default and the line that ``--help`` prints (units in brackets)."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    num_layers: int = setting(12, "blocks L")
    dim: int = setting(256, "width of the residual stream D")
    num_heads: int = setting(4, "query heads N; dim is divided among them, unless head_width is given")
    num_kv_heads: int = setting(4, "key and value heads K; divides num_heads")
    ffn_dim: int = setting(688, "hidden width of the feed-forward part F")
    vocab_size: int = setting(4096, "tokens in the vocabulary V; must be the tokenizer's")
    rope_base: float = setting(10_000.0, "base of the rotary position frequencies")
    norm_epsilon: float = setting(1e-5, "added to the mean square in RMSNorm")
    tied_embedding: bool = setting(False, "use the embedding, transposed, as the head")
    head_width: int = setting(0, "width of a head H; 0 is dim / num_heads")
    rope_scaling: Literal["none", "linear", "llama3"] = setting(
        "none", "lower rotary frequencies, for longer texts: linear lowers all, llama3 (as Llama 3.1) the low ones"
    )
    rope_factor: float = setting(8.0, "linear and llama3: what frequencies are divided by")
    rope_low_turns: float = setting(1.0, "llama3: frequencies of fewer turns in rope_original_length are divided")
    rope_high_turns: float = setting(4.0, "llama3: frequencies of more turns stay; those between are blended")
    rope_original_length: int = setting(8192, "llama3: length of texts before the scaling [tokens]")
    context_length: int = setting(
        0, "longest text that the model is made for, in evaluations and exports; 0 is data.sequence_length [tokens]"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "type of activations and matrix products; auto is bfloat16 on TPU and GPU, float32 on CPU"
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = setting(
        "auto", "attention in training: splash is a TPU kernel, cudnn a GPU one; auto takes the device's, where it fits"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size"):
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.head_width > 0 or self.dim % (2 * self.num_heads) == 0,
            f"model.dim {self.dim} must be a multiple of 2 * model.num_heads = {2 * self.num_heads} (rotary pairs)",
        )
        even = self.head_width >= 0 and self.head_width % 2 == 0
        require(even, f"model.head_width must be even (rotary pairs), or 0 for dim / num_heads, not {self.head_width}")
        require(self.context_length >= 0, f"model.context_length must not be negative, but is {self.context_length}")
        ordered = self.rope_factor > 0 and 0 < self.rope_low_turns < self.rope_high_turns
        require(
            ordered and self.rope_original_length >= 1,
            "model.rope_factor and model.rope_original_length must be positive, and 0 < rope_low_turns < "
            f"rope_high_turns: {self.rope_factor}, {self.rope_original_length}, {self.rope_low_turns}, "
            f"{self.rope_high_turns}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads {self.num_kv_heads} must divide model.num_heads {self.num_heads}",
        )
        for name in ("rope_base", "norm_epsilon"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"model.{name} must be positive and finite, not {value}")

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class LayerDropoutConfig:
    """LayerSkip eq. 1-4: block l is skipped, for a whole sequence, with probability S(t) D(l) p_max."""

    p_max: float = setting(0.0, "drop probability of the last block at full time scale [0..1); 0 turns dropout off")
    layer_scale: Literal["exponential", "linear"] = setting(
        "exponential", "D(l): exponential 2^(l/(L-1)) - 1 (eq. 3), or linear l/(L-1)"
    )
    time_scale: Literal["exponential", "constant", "decaying"] = setting(
        "exponential", "S(t): exponential 2^(t/(T-1)) - 1 (eq. 4, scratch), constant 1, or decaying 1 - t/(T-1)"
    )
    rescale: bool = setting(False, "scale a kept block's output by 1/(1-p) in training (not in the paper)")
    form: Literal["masked", "skipping"] = setting(
        "masked", "masked computes every block and multiplies by 0 or 1; skipping does not compute what is dropped"
    )
    row_groups: int = setting(4, "skipping: the batch is skipped in this many row groups; divides a device's rows")

    def __post_init__(self) -> None:
        require(0 <= self.p_max < 1, f"layer_dropout.p_max must be in [0, 1), not {self.p_max}")
        require(self.row_groups >= 1, f"layer_dropout.row_groups must be at least 1, not {self.row_groups}")


@dataclasses.dataclass(frozen=True)
class EarlyExitConfig:
    """LayerSkip eq. 5-6: a weighted cross-entropy at the exits that the curriculum turns on."""

    curriculum: Literal["rotational", "gradual", "all", "none"] = setting(
        "none", "which exits have a loss at a step; none is the last layer only (an ordinary language model)"
    )
    dilation: int = setting(8, "R of the rotational curriculum: every R-th layer, shifted by one each step")
    e_scale: float = setting(1.0, "e_scale of eq. 6, for all exits; 0 leaves the ordinary loss of the last")
    always_last: bool = setting(True, "rotational: the last layer has a loss at every step")

    def __post_init__(self) -> None:
        require(self.e_scale >= 0, f"early_exit.e_scale must not be negative, but is {self.e_scale}")
        require(self.dilation >= 1, f"early_exit.dilation must be at least 1, not {self.dilation}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes fixed-length sequences."""

    source: Literal["python_stdlib", "tfds", "text", "jsonl", "tokens"] = setting(
        "python_stdlib",
        "python_stdlib: this machine's standard library; tfds: a TFDS dataset; text: a folder of text files; "
        "jsonl: a folder or file of JSON lines; tokens: what `python -m layerskip_jax data pretokenize` wrote",
    )
    name: str = setting("", "tfds: the dataset, as in wikipedia/20230601.en:1.0.0")
    path: str = setting("", "text, jsonl and tokens: the folder or file; local or gs://")
    data_dir: str = setting("data", "where prepared TFDS datasets live; local or gs://")
    text_key: str = setting("text", "tfds and jsonl: the field that holds the text, or the response to a prompt")
    prompt_key: str = setting("", "tfds and jsonl: the field of a prompt that the text answers, itself without a loss")
    train_split: str = setting("train", "split to train on; TFDS slicing such as train[:90%] works for tfds")
    validation_split: str = setting("validation", "split held out for evaluation")
    tokenizer: str = setting("data/tokenizer.model", "SentencePiece model file, or a tokenizer.json")
    sequence_length: int = setting(256, "predicted tokens in a training sequence T")
    cross_document_attention: bool = setting(False, "let attention cross document boundaries inside a sequence")
    shuffle_window: int = setting(2048, "packed sequences shuffled together, beyond the shuffle of documents")
    workers: int = setting(0, "processes that prepare data; 0 does it in a thread of the training process")

    def __post_init__(self) -> None:
        require(self.sequence_length >= 2, f"data.sequence_length must be at least 2, not {self.sequence_length}")
        require(self.shuffle_window >= 1, f"data.shuffle_window must be at least 1, not {self.shuffle_window}")
        require(self.workers >= 0, f"data.workers must not be negative, but is {self.workers}")
        needs_path = self.source in ("text", "jsonl", "tokens")
        require(not needs_path or bool(self.path), f"data.source {self.source!r} needs data.path")
        require(self.source != "tfds" or bool(self.name), "data.source 'tfds' needs data.name, such as 'lm1b'")
        for name in ("name", "train_split", "validation_split"):
            value = getattr(self, name)
            leaves = value.startswith(("/", "~")) or ".." in value.split("/")
            require(not leaves, f"data.{name} must be a name, not a path that leads elsewhere: {value!r}")
        pairs = not self.prompt_key or self.source in ("tfds", "jsonl")
        require(pairs, f"data.prompt_key needs data.source tfds or jsonl, which have fields, not {self.source!r}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optax optimizer and its schedule: linear warmup, then cosine decay."""

    name: Literal["adamw", "lion", "adafactor", "sgd"] = setting("adamw", "optax optimizer")
    learning_rate: float = setting(3e-4, "peak learning rate")
    warmup_steps: int = setting(100, "linear warmup [optimizer steps]")
    final_fraction: float = setting(0.1, "learning rate at the end, as a fraction of the peak")
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only (adamw and lion)")
    beta1: float = setting(0.9, "decay of the first moment (adamw and lion); momentum of sgd")
    beta2: float = setting(0.95, "decay of the second moment (adamw and lion)")
    clip_norm: float = setting(1.0, "gradients are scaled down to this global norm")

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        require(self.clip_norm > 0, f"optimizer.clip_norm must be positive, not {self.clip_norm}")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps must not be negative, but is {self.warmup_steps}")
        require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction must be in [0, 1]: {self.final_fraction}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each mesh axis; `layerskip_jax.sharding` says what each axis splits."""

    data: int = setting(-1, "copies of the model, each with its part of the batch, across slices; -1 is what is left")
    fsdp: int = setting(1, "devices that share one copy's parameters, and split the batch too")
    sequence: int = setting(1, "devices that split each sequence, for long contexts, and share parameters too")
    tensor: int = setting(1, "devices that split heads, feed-forward width and vocabulary")

    def __post_init__(self) -> None:
        require(self.data == -1 or self.data >= 1, f"mesh.data must be -1 or at least 1, not {self.data}")
        for name in ("fsdp", "sequence", "tensor"):
            require(getattr(self, name) >= 1, f"mesh.{name} must be at least 1, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run, one a host, find each other: no part of the experiment, and never saved with it."""

    coordinator_address: str = setting("", "HOST:PORT of process 0; none: TPU pods, GKE, Slurm and Open MPI say it")
    num_processes: int = setting(0, "processes of the run; 0: as the cluster says, 1: this one alone")
    process_id: int = setting(-1, "which of them this one is, from 0; -1: as the cluster says")
    timeout: int = setting(300, "how long the processes wait for each other at the start [seconds]")
    heartbeat: int = setting(100, "silence after which a process is given up, and the others end [seconds]")

    def __post_init__(self) -> None:
        address, count, process = self.coordinator_address, self.num_processes, self.process_id
        for name in ("timeout", "heartbeat"):
            require(getattr(self, name) >= 1, f"distributed.{name} must be at least 1, not {getattr(self, name)}")
        if address:
            host, _, port = address.rpartition(":")
            require(
                bool(host) and port.isdigit(), f"distributed.coordinator_address must be HOST:PORT, not {address!r}"
            )
            require(
                0 <= process < count,
                f"distributed.coordinator_address wants distributed.num_processes too, and distributed.process_id "
                f"below it from 0 on, not {count} and {process}",
            )
        else:
            require(
                count in (0, 1) and process == -1,
                "distributed.num_processes and distributed.process_id want distributed.coordinator_address too",
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run: how long, how large a step, what is written and when."""

    run_dir: str = setting("runs/default", "folder of this run: checkpoints, metrics, plots; local or gs://")
    steps: int = setting(1000, "optimizer steps T")
    batch_size: int = setting(8, "sequences in an optimizer step, over all devices")
    accumulate: int = setting(1, "microbatches that one optimizer step is computed in; divides batch_size")
    seed: int = setting(0, "of initialisation, dropout and data order")
    init_from: str = setting("", "weights a new run starts from: a run, or a folder of a Hugging Face Llama")
    remat: Literal["none", "dots", "full", "offload"] = setting(
        "none",
        "what the backward pass computes again. none: nothing, all is kept; dots: all but the products with weights, "
        "which are kept: about the same time, half the memory or less; full: each block, of which only the input is "
        "kept: up to a third more time; offload: as full, with the inputs kept in the host's memory",
    )
    compiler_options: str = setting(
        "", "XLA options of the step, beside the TPU's own: name=value,...; off removes one"
    )
    loss_chunk: int = setting(256, "positions of a sequence unembedded at once in the loss; divides sequence_length")
    log_every: int = setting(10, "steps between lines of metrics")
    evaluate_every: int = setting(200, "steps between evaluations of every exit; the last step always has one")
    evaluate_batches: int = setting(16, "batches in an evaluation")
    checkpoint_every: int = setting(200, "steps between checkpoints; the last step always has one")
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept")
    keep_every: int = setting(0, "checkpoints of steps that this divides are kept for good; 0 is none")
    damaged_checkpoint: Literal["go_back", "stop"] = setting(
        "go_back", "the newest checkpoint is damaged: go_back to the one before, which is said loudly, or stop"
    )
    failed_save: Literal["stop", "go_on"] = setting(
        "stop", "a checkpoint cannot be written: stop, or (one process alone) go_on and try again at the next one"
    )
    bad_steps: int = setting(5, "steps in a row that are not applied (a loss that is not finite) before the run stops")
    skip_spikes: float = setting(0.0, "skip a step whose loss exceeds its moving mean this many times; 0 skips none")
    sample_every: int = setting(0, "steps between sample generations; 0 is never")
    sample_prompt: str = setting("", "text that sample generations continue")
    profile_step: int = setting(0, "first step of a profiler trace in RUN_DIR/profile; 0 is none (SIGUSR1 starts one)")
    profile_steps: int = setting(3, "steps in a profiler trace")
    wandb_project: str = setting("", "Weights & Biases project that gets the metrics too; none is off")
    hang_seconds: int = setting(1800, "print all stacks once if no step finishes for so long; 0 is never [seconds]")

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "loss_chunk", "log_every", "evaluate_every", "evaluate_batches")
        for name in (*counts, "checkpoint_every", "keep_checkpoints", "profile_steps", "bad_steps"):
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("sample_every", "profile_step", "hang_seconds", "keep_every"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative, but is {getattr(self, name)}")
        parse_options(self.compiler_options)
        require(0 <= self.seed < 2**32, f"train.seed must be in 0..{2**32 - 1}, not {self.seed}")
        spikes, batch, parts = self.skip_spikes, self.batch_size, self.accumulate
        require(spikes == 0 or spikes > 1, f"train.skip_spikes must be 0 (off) or more than 1, not {spikes}")
        require(batch % parts == 0, f"train.batch_size {batch} must be a multiple of train.accumulate {parts}")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How text is generated."""

    mode: Literal["self_speculative", "autoregressive", "prompt_lookup", "early_exit"] = setting(
        "self_speculative",
        "self_speculative: lossless, early layers draft and the rest verify; autoregressive: all layers, one token "
        "at a time; prompt_lookup: lossless, the text so far drafts; early_exit: lossy, every token leaves at "
        "exit_layer, or at the first of exits where it passes exit_threshold",
    )
    policy: Literal["fixed", "confidence", "adaptive"] = setting(
        "fixed",
        "self_speculative: fixed exit_layer and draft_length; confidence: drafting also stops after a token below "
        "draft_threshold; adaptive: exit (of exits) and draft length (up to draft_length) chosen before every round",
    )
    exit_layer: int = setting(0, "E: blocks that draft (or all that run, with early_exit), 1..L; 0 is a quarter of L")
    draft_length: int = setting(4, "d: tokens drafted in a round, at most")
    exits: tuple[int, ...] = setting((), "candidate exits; none is L/8, L/4, L/2 and exit_layer")
    draft_threshold: float = setting(0.5, "policy confidence: probability below which drafting stops")
    exit_threshold: float = setting(0.0, "mode early_exit: probability at which a token leaves; 0 is at exit_layer")
    start_cost: float = setting(0.0, "policy adaptive: what drafting at all adds to a round's time [plain tokens]")
    width_cost: float = setting(0.0, "policy adaptive: what each drafted token adds to it; sweep measures both")
    weights: Literal["full", "int8"] = setting("full", "int8: weights rounded to 8 bits, not the full model's text")
    max_new_tokens: int = setting(128, "tokens generated after each prompt, at most")
    temperature: float = setting(0.0, "0 is greedy")
    top_k: int = setting(0, "sample among the k likeliest tokens only; 0 is all")
    top_p: float = setting(1.0, "sample among the likeliest tokens that hold this probability only; 1 is all")
    seed: int = setting(0, "of the sampling, in which each batch of prompts draws for itself")
    ignore_eos: bool = setting(False, "do not stop at the end-of-text token (for timing)")
    stop: tuple[str, ...] = setting((), "strings that end the text; they are not part of it")
    stream_every: int = setting(1, "rounds between two looks at the text, for streaming [rounds]")

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.exit_layer >= 0, f"exit_layer must be 0 (automatic) or in 1..L, not {self.exit_layer}")
        require(1 <= self.draft_length < 64, f"draft_length must be in 1..63, not {self.draft_length}")
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        sampled = 1e-6 <= self.temperature <= 1e6
        require(sampled or self.temperature == 0, f"temperature must be 0 or in [1e-6, 1e6], not {self.temperature}")
        require(-(2**31) <= self.seed < 2**32, f"seed must be in {-(2**31)}..{2**32 - 1}, not {self.seed}")
        require(self.top_k >= 0, f"top_k must be 0 (off) or positive, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")
        require("" not in self.stop, "a stop string must not be empty")
        rising = list(self.exits) == sorted(set(self.exits)) and min(self.exits, default=1) >= 1
        require(rising, f"exits must rise from 1 on, not {' '.join(map(str, self.exits))}")
        for name in ("draft_threshold", "exit_threshold"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], not {getattr(self, name)}")
        for name in ("start_cost", "width_cost"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be 0 or more, and finite, not {value}")
        require(self.stream_every >= 1, f"stream_every must be at least 1, not {self.stream_every}")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig = ModelConfig()
    layer_dropout: LayerDropoutConfig = LayerDropoutConfig()
    early_exit: EarlyExitConfig = EarlyExitConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        chunk, length = self.train.loss_chunk, self.data.sequence_length
        require(length % min(chunk, length) == 0, f"train.loss_chunk {chunk} must divide data.sequence_length {length}")
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        require(warmup <= steps, f"optimizer.warmup_steps {warmup} must not exceed train.steps {steps}")
        early, layers = self.early_exit, self.model.num_layers
        alone = early.curriculum == "rotational" and not early.always_last  # block 0 weighs nothing: e(0) = 0
        require(
            not alone or (early.dilation < max(layers, 2) and (early.e_scale > 0 or early.dilation == 1)),
            f"early_exit.always_last false leaves steps without a loss: early_exit.dilation, {early.dilation}, must be "
            f"less than model.num_layers, {layers}, and early_exit.e_scale, {early.e_scale}, positive",
        )
        for name, exits in (("exit_layer", (self.decode.exit_layer,)), ("exits", self.decode.exits)):
            require(
                max(exits, default=1) <= self.model.num_layers,
                f"decode.{name} {' '.join(map(str, exits))} must be in 1..{self.model.num_layers} (model.num_layers)",
            )
        microbatch = self.train.batch_size // self.train.accumulate
        skips = self.layer_dropout.p_max > 0 and self.layer_dropout.form == "skipping"
        require(
            not skips or microbatch % self.layer_dropout.row_groups == 0,
            f"layer_dropout.row_groups {self.layer_dropout.row_groups} must divide the microbatch of {microbatch} "
            "sequences (train.batch_size / train.accumulate)",
        )


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as nested dictionaries of plain values, ready for JSON."""
    return dataclasses.asdict(config)


def experiment(config: Config) -> dict[str, Any]:
    """Return `to_dict` without what belongs to the machines of the moment: what a checkpoint keeps."""
    return {group: settings for group, settings in to_dict(config).items() if group != "distributed"}


def from_dict(values: Mapping[str, Any], kind: type[T], where: str = "") -> T:
    """Rebuild a config from `to_dict`'s output; an unknown or ill-typed key raises `UserError`."""
    require(isinstance(values, Mapping), f"{where.removesuffix('.') or 'a config'} must be settings by name")
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(typing.cast(Any, kind))}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown setting {where}{key}{nearest(key, known)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            arguments[key] = from_dict(value, typing.cast(type, hint), f"{where}{key}.")
        else:
            arguments[key] = check_type(value, hint, f"{where}{key}")
    return kind(**arguments)
