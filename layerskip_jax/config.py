"""All settings: typed, documented and checked in one place.

A `Config` describes one run. A file in ``configs/`` returns one from ``get_config()``. The command line overrides
single fields (`layerskip_jax.command_line`). Every checkpoint stores the result.
"""

import dataclasses
from functools import partial
from typing import Literal

from layerskip_jax.checks import check_fields, require, setting
from layerskip_jax.compiler_options import parse_options
from layerskip_jax.decode_config import DecodeConfig
from layerskip_jax.mixture import parse_mixture
from layerskip_jax.recipe_config import EarlyExitConfig, LayerDropoutConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    num_layers: int = setting(12, "blocks L")
    dim: int = setting(256, "width of the residual stream D")
    num_heads: int = setting(4, "query heads N; each is dim / num_heads wide, unless head_width is set")
    num_kv_heads: int = setting(4, "key and value heads K; divides num_heads")
    ffn_dim: int = setting(688, "hidden width of the feed-forward part F")
    vocab_size: int = setting(4096, "tokens in the vocabulary V; must match the tokenizer")
    rope_base: float = setting(10_000.0, "base of the rotary position frequencies", "(0, inf)")
    norm_epsilon: float = setting(1e-5, "added to the mean square in RMSNorm", "(0, inf)")
    tied_embedding: bool = setting(False, "use the transposed embedding as the head")
    head_width: int = setting(0, "width of a head H; 0 is dim / num_heads", "[0, inf)")
    rope_scaling: Literal["none", "linear", "llama3"] = setting(
        "none",
        "scaling of rotary frequencies for long contexts: linear scales all, llama3 (Llama 3.1) only the low ones",
    )
    rope_factor: float = setting(8.0, "linear and llama3: divisor of the frequencies", "(0, inf)")
    rope_low_freq_factor: float = setting(
        1.0, "llama3: divide frequencies with fewer turns than this in rope_original_length", "(0, inf)"
    )
    rope_high_freq_factor: float = setting(
        4.0, "llama3: keep frequencies with more turns than this; interpolate in between", "(0, inf)"
    )
    rope_original_length: int = setting(8192, "llama3: context length before the scaling [tokens]")
    context_length: int = setting(
        0, "context length, for evaluations and exports; 0 is data.sequence_length [tokens]", "[0, inf)"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "dtype of activations and matmuls; auto is bfloat16 on TPU and GPU, float32 on CPU"
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = setting(
        "auto", "attention backend in training: splash (TPU), cudnn (GPU) or xla; auto takes the fastest that fits"
    )

    def __post_init__(self) -> None:
        check_fields(self, "model")
        require(
            self.head_width > 0 or self.dim % (2 * self.num_heads) == 0,
            f"model.dim {self.dim} must be a multiple of 2 * model.num_heads = {2 * self.num_heads} (rotary pairs)",
        )
        even = self.head_width % 2 == 0
        require(even, f"model.head_width must be even (rotary pairs), or 0 for dim / num_heads, got {self.head_width}")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        require(low < high, f"model.rope_low_freq_factor {low} must be less than model.rope_high_freq_factor {high}")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads {self.num_kv_heads} must divide model.num_heads {self.num_heads}",
        )

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus, the tokenizer, and how documents are packed into fixed-length sequences."""

    source: Literal["python_stdlib", "tfds", "text", "jsonl", "tokens"] = setting(
        "python_stdlib",
        "python_stdlib: this machine's standard library; tfds: a TFDS dataset; text: a folder of text files; "
        "jsonl: a folder or file of JSON lines; tokens: what `layerskip data pretokenize` wrote",
    )
    name: str = setting("", "tfds: name of the dataset, such as wikipedia/20230601.en:1.0.0")
    path: str = setting("", "text, jsonl and tokens: the folder or file; local or gs://")
    mixture: tuple[str, ...] = setting((), "several corpora instead of source, name and path: WEIGHT=SOURCE:PLACE each")
    data_dir: str = setting("data", "folder of prepared TFDS datasets; local or gs://")
    text_key: str = setting("text", "tfds and jsonl: field of the text, or of the response to a prompt")
    prompt_key: str = setting("", "tfds and jsonl: field of the prompt; prompts have no loss")
    train_split: str = setting("train", "split to train on; TFDS slicing such as train[:90%] works for tfds")
    validation_split: str = setting("validation", "split held out for evaluation")
    tokenizer: str = setting("data/tokenizer.model", "SentencePiece model file, or a tokenizer.json")
    sequence_length: int = setting(256, "predicted tokens in a training sequence T", "[2, inf)")
    cross_document_attention: bool = setting(False, "let attention cross document boundaries inside a sequence")
    shuffle_window: int = setting(2048, "packed sequences shuffled together, beyond the shuffle of documents")
    workers: int = setting(0, "processes that prepare data; 0: the training process, between steps", "[0, inf)")

    def __post_init__(self) -> None:
        check_fields(self, "data")
        one_place = not (self.mixture and (self.name or self.path))
        require(one_place, "data.mixture names the corpora: set --data.name '' and --data.path ''")
        if self.mixture:
            self.components  # noqa: B018 (checks each)
            return
        needs_path = self.source in ("text", "jsonl", "tokens")
        require(not needs_path or bool(self.path), f"data.source {self.source!r} needs data.path")
        require(self.source != "tfds" or bool(self.name), "data.source 'tfds' needs data.name, such as 'lm1b'")
        for name in ("name", "train_split", "validation_split"):
            value = getattr(self, name)
            leaves = value.startswith(("/", "~")) or ".." in value.split("/")
            require(not leaves, f"data.{name} must be a name, not a path that leads elsewhere: {value!r}")
        has_fields = not self.prompt_key or self.source in ("tfds", "jsonl")
        require(has_fields, f"data.prompt_key needs data.source tfds or jsonl, which have fields, not {self.source!r}")

    @property
    def components(self) -> dict[str, "DataConfig"]:
        """One `DataConfig` per corpus of ``mixture``, by name; without a mixture, this config under the name ``""``."""
        parsed = parse_mixture(self.mixture)
        replace = partial(dataclasses.replace, self, mixture=())
        return {name: replace(**parsed[name].settings) for name in parsed} or {"": self}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optax optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "lion", "muon", "adafactor", "sgd"] = setting(
        "adamw", "optax optimizer. muon: for the matrices of the blocks; adamw for the other parameters"
    )
    learning_rate: float = setting(
        3e-4, "peak learning rate; adafactor: relative to the RMS of each parameter", "(0, inf)"
    )
    warmup_steps: int = setting(100, "linear warmup [optimizer steps]", "[0, inf)")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine",
        "learning rate after the warmup: cosine or linear decay to the last step; constant; wsd (warmup, stable, "
        "decay): constant, then a linear decay over the last decay_fraction of the steps",
    )
    decay_fraction: float = setting(0.2, "wsd: part of the steps in which the learning rate decays", "[0, 1]")
    final_fraction: float = setting(0.1, "learning rate at the end, as a fraction of the peak", "[0, 1]")
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only (adamw, lion and muon)", "[0, inf)")
    beta1: float = setting(0.9, "decay of the first moment (adamw, lion and muon); momentum of sgd", "[0, 1)")
    beta2: float = setting(0.95, "decay of the second moment (adamw, lion and muon)", "[0, 1)")
    clip_norm: float = setting(1.0, "clip gradients to this global norm", "(0, inf)")

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; `layerskip_jax.sharding` defines what each axis shards."""

    data: int = setting(
        -1, "data parallelism: model replicas, also across slices; -1 uses the remaining devices", "[-1, inf)"
    )
    fsdp: int = setting(1, "fully sharded data parallelism: shards parameters and the batch")
    sequence: int = setting(1, "sequence parallelism, for long contexts: shards each sequence, and parameters")
    tensor: int = setting(1, "tensor parallelism: shards heads, feed-forward width and vocabulary")

    def __post_init__(self) -> None:
        check_fields(self, "mesh")
        require(self.data != 0, "mesh.data must be -1 or at least 1, not 0")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Connects the processes of a run, one for each host. Checkpoints do not store it."""

    coordinator_address: str = setting("", "HOST:PORT of process 0; not needed on TPU pods, GKE, Slurm and Open MPI")
    num_processes: int = setting(
        0, "processes of the run; 0: detect the cluster, 1: train in this process alone", "[0, inf)"
    )
    process_id: int = setting(-1, "index of this process, from 0; -1: detect the cluster", "[-1, inf)")
    timeout: int = setting(300, "how long processes wait for each other at startup [seconds]")
    heartbeat: int = setting(
        100, "time without a heartbeat after which a process counts as lost and the others exit [seconds]"
    )

    def __post_init__(self) -> None:
        check_fields(self, "distributed")
        address, count, process = self.coordinator_address, self.num_processes, self.process_id
        if address:
            host, _, port = address.rpartition(":")
            valid = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
            require(valid, f"distributed.coordinator_address must be HOST:PORT, not {address!r}")
            require(
                0 <= process < count,
                f"distributed.coordinator_address needs distributed.num_processes, and distributed.process_id in "
                f"0..num_processes - 1, got {count} and {process}",
            )
        else:
            require(
                count in (0, 1) and process == -1,
                "distributed.num_processes and distributed.process_id need distributed.coordinator_address",
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run, size of a step, and what the run writes when."""

    run_dir: str = setting("runs/default", "run folder: checkpoints, metrics, plots; local or gs://")
    steps: int = setting(1000, "optimizer steps, the T of S(t)")
    batch_size: int = setting(8, "sequences in an optimizer step, over all devices")
    accumulate: int = setting(1, "gradient accumulation: microbatches of a step; divides batch_size")
    seed: int = setting(0, "seed of initialization, dropout and data order", "[0, 4294967295]")
    init_from: str = setting("", "initial weights of a new run: another run, or the folder of a Hugging Face Llama")
    remat: Literal["none", "dots", "full", "offload"] = setting(
        "none",
        "what the backward pass recomputes. none: nothing (layer_dropout.form skipping: as dots); dots: everything but "
        "matmuls with weights and attention kernels: about the same time, half the memory or less; full: each block "
        "from its input: up to a third more time; offload: as full, with the inputs in host memory",
    )
    compiler_options: str = setting(
        "", "XLA options of the step, added to those for the TPU: name=value,...; the value off removes one"
    )
    loss_chunk: int = setting(
        256, "positions of a sequence whose logits the loss computes at once; divides sequence_length"
    )
    log_every: int = setting(10, "steps between records of metrics")
    evaluate_every: int = setting(200, "steps between evaluations of all exits; the last step always has one")
    evaluate_batches: int = setting(16, "batches in an evaluation")
    checkpoint_every: int = setting(200, "steps between checkpoints; the last step always has one")
    keep_checkpoints: int = setting(2, "newest checkpoints to keep")
    keep_every: int = setting(0, "keep the checkpoints of steps divisible by this permanently; 0: off", "[0, inf)")
    damaged_checkpoint: Literal["go_back", "stop"] = setting(
        "go_back", "if the newest checkpoint is damaged: go_back to the one before, with a warning, or stop"
    )
    failed_save: Literal["stop", "go_on"] = setting(
        "stop", "if a checkpoint cannot be written: stop, or (one process only) go_on, and try again at the next one"
    )
    bad_steps: int = setting(
        5,
        "steps in a row that are not applied (not finite, a loss spike, or no token with a loss) before the run stops",
    )
    skip_spikes: float = setting(
        0.0, "skip a step whose loss exceeds its moving average by this factor; 0: off", "[0, inf)"
    )
    sample_every: int = setting(0, "steps between sample generations; 0: off", "[0, inf)")
    sample_prompt: str = setting("", "prompt of sample generations")
    profile_step: int = setting(
        0, "first step of a profiler trace in RUN_DIR/profile; 0: none (SIGUSR1 starts one at any time)", "[0, inf)"
    )
    profile_steps: int = setting(3, "steps in a profiler trace")
    wandb_project: str = setting("", "Weights & Biases project that receives the metrics too; empty: none")
    hang_seconds: int = setting(
        1800,
        "print the stacks of all threads once if no step finishes for this long; 0: off. Another process may take "
        "over the run folder if its owner gives no sign of life for this long (0: 1800) [seconds]",
        "[0, inf)",
    )

    def __post_init__(self) -> None:
        check_fields(self, "train")
        parse_options(self.compiler_options)
        spikes, batch, parts = self.skip_spikes, self.batch_size, self.accumulate
        require(spikes == 0 or spikes > 1, f"train.skip_spikes must be 0 (off) or more than 1, not {spikes}")
        require(batch % parts == 0, f"train.batch_size {batch} must be a multiple of train.accumulate {parts}")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    layer_dropout: LayerDropoutConfig = LayerDropoutConfig()  # noqa: RUF009 (frozen)
    early_exit: EarlyExitConfig = EarlyExitConfig()  # noqa: RUF009 (frozen)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()  # noqa: RUF009 (frozen)
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        chunk, length = self.train.loss_chunk, self.data.sequence_length
        require(length % min(chunk, length) == 0, f"train.loss_chunk {chunk} must divide data.sequence_length {length}")
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        require(warmup <= steps, f"optimizer.warmup_steps {warmup} must not exceed train.steps {steps}")
        decay = self.optimizer.decay_fraction
        require(
            self.optimizer.schedule != "wsd" or warmup + decay * steps <= steps,
            f"optimizer.decay_fraction {decay} of {steps} train.steps must leave the {warmup} steps of the warmup",
        )
        early, layers = self.early_exit, self.model.num_layers
        skips_last = early.curriculum == "rotational" and not early.always_last
        # Without always_last, some step has no loss in three cases. R > L: no exit is on. R = L: only exit 1 is on, and
        # e(0) = 0. e_scale = 0: all inner exits have weight 0, so only R = 1 is valid, which always has the last exit.
        require(
            not skips_last or (early.dilation < max(layers, 2) and (early.e_scale > 0 or early.dilation == 1)),
            f"early_exit.always_last false leaves steps without a loss: early_exit.dilation, {early.dilation}, must be "
            f"less than model.num_layers, {max(layers, 2)}, and early_exit.e_scale, {early.e_scale}, positive",
        )
        require(not early.exits or layers > 1, "early_exit.exits needs model.num_layers of at least 2")
        last = {"decode.exit_layer": layers, "decode.exits": layers, "early_exit.exits": layers - 1}
        chosen = (self.decode.exit_layer,), self.decode.exits, early.exits
        for (name, most), exits in zip(last.items(), chosen, strict=True):
            require(
                max(exits, default=1) <= max(most, 1),
                f"{name} {' '.join(map(str, exits))} must be in 1..{most} (model.num_layers is {layers})",
            )

    @property
    def decode_settings(self) -> DecodeConfig:
        """``decode``, which drafts from `trained_draft_exit` unless it names another exit."""
        trained, decode = self.early_exit.trained_exits, self.decode
        exit_layer = decode.exit_layer or self.trained_draft_exit
        return dataclasses.replace(decode, exit_layer=exit_layer, exits=decode.exits or trained)

    @property
    def trained_draft_exit(self) -> int:
        """Of `EarlyExitConfig.trained_exits`, the one nearest to a quarter of the layers; 0 if there are none."""
        quarter, trained = self.model.num_layers / 4, self.early_exit.trained_exits
        return min(trained, key=lambda exit_layer: (abs(exit_layer - quarter), exit_layer), default=0)
