"""A recipe: everything that determines the trained model, checked before any work.

Read from a file by `isoflop.config.loading`. Imports neither torch nor transformers, so that planning starts at once. How a run
is launched (processes, precision, sharding) is in `accelerate_configs/`, not here.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from isoflop.config.recipe_data import ConfigFile, Data, Section, Tokenizer, require_one_of
from isoflop.config.recipe_optimizer import Fraction, Optimizer, Parametrization, Schedule, require_base_width
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import shown

# Keys of `training` on how a step is executed: they change memory, speed, and the last bits of sums.
_EXECUTION = ("compile", "kernels", "gradient_reduction")
LARGEST_TRIED = 65_536  # values tried in a search for the nearest valid one


class _Model(Section):
    vocab_size: PositiveInt
    """Rows of the token embedding; at least the tokenizer's number of ids."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial matrices and embeddings."""
    depth_scaled_init: bool = True
    """Divide the standard deviation of residual output projections by sqrt(2 x layers), as GPT-2 did."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "sdpa"
    """The attention kernel, by transformers' name. Flash attention needs its package, or `kernels`, which downloads it;
    `sdpa` is torch's choice among its kernels, which include FlashAttention-2 and cuDNN's."""


class Gpt2Model(_Model):
    """Fields of `transformers.GPT2Config`; dropout is off by default."""

    model_type: Literal["gpt2"]
    n_positions: PositiveInt
    n_embd: PositiveInt
    n_layer: PositiveInt
    n_head: PositiveInt
    n_inner: PositiveInt | None = None
    """Width of the feed-forward layer; default: 4 x n_embd."""
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"] = "gelu_pytorch_tanh"
    layer_norm_epsilon: PositiveFloat = 1e-5
    resid_pdrop: Fraction = 0.0
    embd_pdrop: Fraction = 0.0
    attn_pdrop: Fraction = 0.0
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _require_head_sizes(self) -> Self:
        _require_multiple("n_embd", self.n_embd, "n_head", self.n_head)
        return self

    @property
    def max_positions(self) -> int:
        """Longest sequence of the position embedding, in tokens."""
        return self.n_positions


class LlamaModel(_Model):
    """Fields of `transformers.LlamaConfig`."""

    model_type: Literal["llama"]
    max_position_embeddings: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    """Heads of keys and values (grouped-query attention); default: num_attention_heads."""
    head_dim: PositiveInt | None = None
    """Size of one head; default: hidden_size / num_attention_heads."""
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-5
    hidden_act: Literal["silu", "gelu", "relu"] = "silu"
    attention_dropout: Fraction = 0.0
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _require_head_sizes(self) -> Self:
        _require_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        key_value_heads = self.num_key_value_heads or self.num_attention_heads
        _require_multiple("num_attention_heads", self.num_attention_heads, "num_key_value_heads", key_value_heads)
        _require_pairs(self.head_dim or self.hidden_size // self.num_attention_heads)
        return self

    @property
    def max_positions(self) -> int:
        """Longest sequence that the rotary positions are declared for, in tokens."""
        return self.max_position_embeddings


# `modeling.configuration_hybrid`, which imports nothing of the package, has them too; a test checks that they are equal.
HYBRID_PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "positions": "learned", "norm": "layernorm", "norm_bias": True, "norm_position": "pre", "mlp": "gelu_tanh",
        "attention_bias": True, "mlp_bias": True, "qk_norm": False, "final_logit_softcapping": None, "tie_word_embeddings": True,
    },
    "llama": {
        "positions": "rope", "norm": "rmsnorm", "norm_bias": False, "norm_position": "pre", "mlp": "swiglu",
        "attention_bias": False, "mlp_bias": False, "qk_norm": False, "final_logit_softcapping": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


class HybridModel(_Model):
    """A decoder with each choice between GPT-2 and LLaMA made separately; default: the preset's choice."""

    model_type: Literal["hybrid"]
    preset: Literal["gpt2", "llama"] = "gpt2"
    """The family whose choices are the defaults; the defaults below are those of gpt2."""
    max_position_embeddings: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    """Heads of keys and values (grouped-query attention); default: num_attention_heads."""
    head_dim: PositiveInt | None = None
    """Size of one head, independent of the width; default: hidden_size / num_attention_heads."""
    positions: Literal["learned", "rope", "none"] = "learned"
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary angles, where positions are `rope`."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_bias: bool = True
    norm_position: Literal["pre", "post"] = "pre"
    """`pre` normalizes the inputs of attention and MLP; `post` the residual stream after each, as GPT-1, with no final norm."""
    norm_eps: PositiveFloat = 1e-5
    mlp: Literal["gelu", "gelu_tanh", "swiglu", "relu2"] = "gelu_tanh"
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    """Normalize each head's queries and keys."""
    final_logit_softcapping: PositiveFloat | None = None
    """c in logits = c tanh(logits / c)."""
    attention_dropout: Fraction = 0.0
    residual_dropout: Fraction = 0.0
    embedding_dropout: Fraction = 0.0
    tie_word_embeddings: bool = True

    @model_validator(mode="before")
    @classmethod
    def _choices_of_the_preset(cls, given: Any) -> Any:
        return HYBRID_PRESETS.get(str(given.get("preset", "gpt2")), {}) | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _require_head_sizes(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            near = max(1, self.hidden_size // self.num_attention_heads)
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = {self.num_attention_heads}; set"
                f" head_dim, which is free here ({near} is nearest)"
            )
        key_value_heads = self.num_key_value_heads or self.num_attention_heads
        _require_multiple("num_attention_heads", self.num_attention_heads, "num_key_value_heads", key_value_heads)
        if self.positions == "rope":
            _require_pairs(self.head_dim or self.hidden_size // self.num_attention_heads)
        return self

    @property
    def max_positions(self) -> int:
        """Longest sequence, in tokens: of the position embedding, or what other positions are declared for."""
        return self.max_position_embeddings


Model = Annotated[Gpt2Model | LlamaModel | HybridModel, Field(discriminator="model_type")]


def _require_pairs(head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(
            f"head_dim = {head_dim} is odd, and rotary positions rotate pairs of dimensions; nearest: {head_dim - 1 or 2} or"
            f" {head_dim + 1}"
        )


def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    if value % of:
        divisors = [d for d in range(1, min(value, LARGEST_TRIED) + 1) if value % d == 0]
        close = sorted(sorted(divisors, key=lambda d: abs(d - of))[:2])
        raise ValueError(f"{name} = {value} is not a multiple of {of_name} = {of}; nearest {of_name} that divide: {close}")


class Training(Section):
    """Sizes of a step, and the duration: exactly one of max_steps, max_tokens, tokens_per_parameter."""

    sequence_length: Annotated[int, Field(ge=2)]
    """Tokens in a window."""
    tokens_per_step: PositiveInt
    """Tokens in one optimizer step over all ranks; gradient accumulation follows from it."""
    micro_batch_size: PositiveInt
    """Windows in one forward pass per rank. Changes memory and speed, never the tokens per step."""
    max_steps: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    tokens_per_parameter: PositiveFloat | None = None
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory for about a third more compute."""
    compile: Literal[True, False, "auto"] = "auto"
    """torch.compile each decoder layer: the first step takes about a minute, later ones less. `auto`: on a GPU, not on a CPU."""
    kernels: Literal["torch", "liger"] = "torch"
    """`liger`: Liger's RMSNorm, rotary positions, SwiGLU and fused cross-entropy, on a GPU (`pip install liger-kernel`)."""
    gradient_reduction: Literal["auto", "step", "micro_batch"] = "auto"
    """FSDP2: reduce gradients over the ranks once a step, with unsharded gradients in memory (4 bytes a parameter), or after each
    micro-batch. `auto`: once a step if the predicted memory fits the device. Other engines always reduce once a step."""
    document_masking: bool = False
    """Attention stays within a document and positions restart at each, in training and validation; targets are unchanged."""

    @model_validator(mode="after")
    def _require_sizes_and_duration(self) -> Self:
        require_one_of(self, "max_steps", "max_tokens", "tokens_per_parameter")
        try:
            gradient_accumulation_steps(self, num_processes=1)
        except UserError as error:  # pydantic gathers a ValueError with the other errors of the file
            raise ValueError(str(error)) from None
        return self

    def num_steps(self, parameters: int) -> int:
        """Return the optimizer steps of the run, rounded up so that the given tokens are reached."""
        if self.max_steps is not None:
            return self.max_steps
        tokens = self.max_tokens if self.max_tokens is not None else (self.tokens_per_parameter or 0) * parameters
        return math.ceil(tokens / self.tokens_per_step)


def gradient_accumulation_steps(training: Training, num_processes: int) -> int:
    """Return the gradient-accumulation steps that make `tokens_per_step`. Raises `UserError` where they are not an integer."""
    unit = training.sequence_length * training.micro_batch_size * num_processes
    if training.tokens_per_step % unit == 0:
        return training.tokens_per_step // unit
    below, above = training.tokens_per_step // unit * unit, (training.tokens_per_step // unit + 1) * unit
    windows = training.tokens_per_step // (training.sequence_length * num_processes)
    tried = range(1, min(windows, LARGEST_TRIED) + 1)
    fitting = [m for m in tried if training.tokens_per_step % (training.sequence_length * m * num_processes) == 0]
    near = sorted(sorted(fitting, key=lambda m: abs(m - training.micro_batch_size))[:2])
    raise UserError(
        f"training.tokens_per_step = {training.tokens_per_step} is not a multiple of {unit} = sequence_length"
        f" {training.sequence_length} x micro_batch_size {training.micro_batch_size} x {num_processes} process(es);"
        f" nearest that are: {f'{below} and ' if below else ''}{above}"
        + (f"; or keep it and set training.micro_batch_size to {' or '.join(map(str, near))}" if near else "")
    )


class Anomalies(Section):
    """How to handle a step whose loss or gradient norm is not finite, or spikes far above its recent values."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """`stop` the run; `skip` the step's update; `rollback` to the newest checkpoint and resume after this step's batch."""
    spike_sigmas: PositiveFloat | None = None
    """A spike is this many standard deviations above the mean of the last 128 steps (6 in OLMo 2); default: only non-finite
    values count."""
    limit: PositiveInt = 10
    """Anomalies skipped or rolled back in one run; the next one stops it."""


class Evaluation(Section):
    """Evaluation while training. Every `..._every` counts optimizer steps; the final step is always evaluated."""

    validate_every: PositiveInt = 250
    max_windows: PositiveInt | None = None
    """Validation windows used; default: all."""
    tasks: dict[str, PositiveInt] = {}
    """Tasks of lm-eval, or suites of eval/, each with the steps between evaluations: {hellaswag: 250}."""
    task_documents: PositiveInt | None = None
    """Documents used per task; default: all."""
    sample_every: PositiveInt | None = None
    """Steps between samples of text; default: only at the end."""
    sample_prompts: list[Annotated[str, Field(min_length=1)]] = ["The"]
    sample_tokens: PositiveInt = 64
    """New tokens of a sample; a long prompt is cut to the remaining positions."""


class Output(Section):
    """The run folder, and which checkpoints it keeps."""

    run_dir: str
    checkpoint_every: PositiveInt = 1000
    """Optimizer steps between checkpoints; the final step always has one."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep, in addition to the one with the lowest validation loss."""
    keep_every: PositiveInt | None = None
    """Keep checkpoints at multiples of this many steps permanently."""
    checkpoint_at: list[PositiveInt] = []
    """More steps with a permanent checkpoint: a sweep's shorter runs branch off from its longest one there."""
    trackers: list[str] = []
    """Experiment trackers by Accelerate's names: tensorboard, trackio, wandb, mlflow ..."""
    trackers_required: bool = True
    """Refuse to start when a tracker is not installed; false runs without it."""
    layer_norms: bool = False
    """Write gradient and parameter norms of every layer to the metrics."""


class Hub(Section):
    """Repository on the Hub for checkpoints during training, and for the finished model."""

    repo_id: str | None = None
    """user/name; default: nothing is pushed."""
    private: bool = True
    push_every: PositiveInt | None = None
    """Push only checkpoints of steps that this divides, each as revision step-N; default: all."""
    license: str | None = None
    """The model's license by the Hub's identifier (apache-2.0, mit, odc-by ...); default: `unknown`."""


class Recipe(ConfigFile):
    """A complete run."""

    model: Model
    tokenizer: Tokenizer
    data: Data
    training: Training
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    parametrization: Parametrization = Parametrization()
    anomalies: Anomalies = Anomalies()
    evaluation: Evaluation = Evaluation()
    output: Output
    hub: Hub = Hub()
    law: str | None = None
    """A law that `fit` wrote, or a published one by name: its prediction is compared with the run."""
    seed: NonNegativeInt = 1337
    """Random seed of the initial weights, the order of the windows and dropout."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.training.sequence_length > self.model.max_positions:
            raise ValueError(
                f"training.sequence_length = {self.training.sequence_length} is beyond the model's"
                f" {self.model.max_positions} positions; shorten it or raise the model's positions"
            )
        if self.evaluation.sample_tokens >= self.model.max_positions:
            raise ValueError(
                f"evaluation.sample_tokens = {self.evaluation.sample_tokens} leaves no room for a prompt in the model's"
                f" {self.model.max_positions} positions; sample fewer tokens"
            )
        if self.training.kernels == "liger" and not isinstance(self.model, LlamaModel):
            raise ValueError(
                f"training.kernels = 'liger' is for model_type llama, this is {self.model.model_type}; set training.kernels=torch"
            )
        wanted = self.tokenizer.train_vocab_size
        if wanted is not None and wanted > self.model.vocab_size:
            raise ValueError(
                f"tokenizer.train_vocab_size = {wanted} is beyond model.vocab_size = {self.model.vocab_size};"
                " ids beyond the embedding would fail hours later: lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _parametrization_has_rules_for_the_model(self) -> Self:
        model, name = self.model, self.parametrization.name
        if isinstance(model, HybridModel) and model.norm_position == "post" and name != "standard":
            raise ValueError(
                f"parametrization.name = {name!r} has no rule for model.norm_position = 'post', whose norms undo the scale of"
                " residual branches; set model.norm_position=pre or parametrization.name=standard"
            )
        if isinstance(model, Gpt2Model):
            require_base_width(self.parametrization, "n_embd", model.n_embd, model.n_head)
        else:
            require_base_width(self.parametrization, "hidden_size", model.hidden_size, model.num_attention_heads)
        return self

    def identity_fields(self) -> dict[str, Any]:
        """Return the values that determine the final weights, by dotted key: a run folder belongs to these values."""
        execution = ("micro_batch_size", "activation_checkpointing", *_EXECUTION)
        free = {"data.prepared_dir", "tokenizer.max_unknown_fraction", *(f"training.{key}" for key in execution)}
        fields = self.model_dump(mode="json", exclude={"anomalies", "evaluation", "output", "hub", "law"})
        return {key: value for key, value in flatten(fields).items() if key not in free}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every value that changed."""
    return [f"{key}: {shown(old.get(key))} -> {shown(new.get(key))}" for key in sorted(old | new) if old.get(key) != new.get(key)]
