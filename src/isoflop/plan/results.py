"""Results of a plan: what a recipe costs, what each launch needs, and what the laws predict.

`Plan` is what `isoflop.plan.planner.plan` returns. Numbers are at full precision, with units in their names; `to_dict` gives the
keys of `--json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoflop.config.recipe import Recipe
from isoflop.plan import cost
from isoflop.plan.gpus import GpuOptions, GpuSpec
from isoflop.plan.hyperparameter_comparison import HyperparameterComparison
from isoflop.plan.search import COMPUTE_OPTIMAL
from isoflop.utils.html import html_table

if TYPE_CHECKING:
    import pandas

    from isoflop.plan.step_benchmark import StepBenchmark


@dataclass(frozen=True)
class TrainingStats:
    """Parameters, FLOPs, tokens and steps of a recipe."""

    parameters_by_class: dict[str, int]
    sequence_length: int
    micro_batch_size: int
    activation_bytes_per_token_and_layer: dict[str, int]
    """By kind of launch."""
    moments_bytes: int
    """The optimizer's state."""
    update_flops: int
    """Matrix products of Muon's update in a step; 0 under AdamW."""
    muon_matrices: int
    """Matrices that Muon updates."""
    activation_checkpointing: bool
    matmul_parameters: int
    flops_per_token: int
    tokens_per_step: int
    steps: int

    @property
    def parameters(self) -> int:
        """N, all of them; tied ones count once."""
        return sum(self.parameters_by_class.values())

    @property
    def moments_bytes_per_parameter(self) -> float:
        """8 under AdamW in float32."""
        return self.moments_bytes / self.parameters

    @property
    def parameters_without_embedding(self) -> int:
        """N without token and position embeddings."""
        return self.parameters - self.parameters_by_class["embedding"] - self.parameters_by_class["position"]

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def tokens(self) -> int:
        """D."""
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> int:
        """C = D x FLOPs per token."""
        return self.tokens * self.flops_per_token

    @property
    def flops_per_token_6n(self) -> int:
        """6N, the usual approximation of FLOPs per token."""
        return 6 * self.parameters

    @property
    def tokens_per_parameter(self) -> float:
        """D/N."""
        return self.tokens / self.parameters

    @property
    def tokens_at_20_per_parameter(self) -> int:
        """20N."""
        return COMPUTE_OPTIMAL * self.parameters

    @property
    def steps_at_20_per_parameter(self) -> int:
        """Steps that reach 20N."""
        return -(-self.tokens_at_20_per_parameter // self.tokens_per_step)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        return {
            "parameters": {"total": self.parameters, "without_embedding": self.parameters_without_embedding}
            | self.parameters_by_class,
            "sequence_length": self.sequence_length,
            "micro_batch_size": self.micro_batch_size,
            "micro_batch_tokens": self.micro_batch_tokens,
            "activation_bytes_per_token_and_layer": self.activation_bytes_per_token_and_layer,
            "moments_bytes_per_parameter": self.moments_bytes_per_parameter,
            "update_flops": self.update_flops,
            "activation_checkpointing": self.activation_checkpointing,
            "matmul_parameters": self.matmul_parameters,
            "flops_per_token": self.flops_per_token,
            "flops_per_token_6n": self.flops_per_token_6n,
            "flops": self.flops,
            "tokens_per_step": self.tokens_per_step,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_parameter": self.tokens_per_parameter,
            "tokens_at_20_per_parameter": self.tokens_at_20_per_parameter,
            "steps_at_20_per_parameter": self.steps_at_20_per_parameter,
        }


@dataclass(frozen=True)
class RepeatedData:
    """Epochs over a dataset, and what the repetition costs."""

    unique_tokens: float
    unique_tokens_source: str
    epochs: float
    effective_tokens: float
    """Fresh tokens that are worth as much (Muennighoff et al. 2023)."""
    predicted_loss: float | None

    @property
    def is_counted(self) -> bool:
        """Whether the data are prepared, so that their tokens are counted."""
        return self.unique_tokens_source.startswith("counted")


@dataclass(frozen=True)
class LawPrediction:
    """A law's prediction for a recipe, and its best split of as many FLOPs (C = 6ND); None where it has none."""

    predicted_loss: float | None
    predicted_loss_interval: tuple[float, float] | None
    outside: str | None
    """Why the law has no prediction."""
    counted_parameters: int
    """N as the law counts it."""
    optimal_parameters: float | None
    optimal_tokens: float | None
    optimal_tokens_per_parameter: float | None
    optimal_predicted_loss: float | None
    extrapolates: list[str]
    """Values of the recipe beyond the runs that the law was fitted to."""


@dataclass(frozen=True)
class LaunchNeeds:
    """Memory and time of one launch: a row of a plan."""

    launch: cost.Launch
    config: Path | None
    """The launch config; None for an engine that no config covers."""
    memory: cost.Memory
    """Per device, at the recipe's micro-batch."""
    largest_micro_batch: dict[str, int | None]
    """By GPU of known memory; 0: none fits, None: the ranks do not divide a step's windows. Empty on a CPU."""
    hours: dict[str, float | None]
    """By GPU. Empty on a CPU and in fp32, whose time is not predicted."""


@dataclass(frozen=True)
class Communication:
    """What each GPU of a launch in one machine sends in a step."""

    launch: str
    reduction: cost.Reduction
    bytes_per_step: int
    memory_bytes: int
    seconds_per_step: dict[str, float | None]
    """By GPU, nothing overlapping with compute."""
    chosen: list[str]
    """GPUs for which `training.gradient_reduction: auto` chooses this reduction."""


@dataclass(frozen=True)
class GpuCost:
    """A run on one GPU model: MFU, GPU-hours and dollars."""

    spec: GpuSpec
    mfu: float | None
    mfu_source: str
    gpu_hours: float | None
    dollars: float | None
    """None without a price or an MFU."""


@dataclass(frozen=True)
class MemoryAndTime:
    """Memory of every launch, the largest micro-batch on every GPU, hours, and dollars."""

    launches: tuple[LaunchNeeds, ...]
    communication: tuple[Communication, ...]
    gpus: tuple[GpuCost, ...]
    price_per_gpu_hour: float | None
    skipped_launches: tuple[str, ...]
    """Launch configs that cannot be planned, and why."""

    def of(self, launch: str) -> LaunchNeeds:
        """Return the row of a launch."""
        return next(row for row in self.launches if row.launch.name == launch)

    def gpu(self, name: str) -> GpuCost:
        """Return the row of a GPU."""
        return next(row for row in self.gpus if row.spec.name == name)

    @property
    def timed(self) -> list[LaunchNeeds]:
        """Launches whose time is predicted."""
        return [row for row in self.launches if row.hours]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        rows = {row.launch.name: row for row in self.launches}
        on_gpu = {name: row for name, row in rows.items() if row.launch.gpu}
        return {
            "launches": {
                name: {
                    "engine": row.launch.engine,
                    "num_processes": row.launch.num_processes,
                    "config": row.config and str(row.config),
                }
                for name, row in rows.items()
            },
            "memory_bytes": {name: row.memory.total for name, row in rows.items()},
            "memory_by_part_bytes": {name: row.memory._asdict() for name, row in rows.items()},
            "largest_micro_batch": {name: row.largest_micro_batch for name, row in on_gpu.items()},
            "communication": [asdict(row) for row in self.communication],
            "mfu": mfu_dict(self.gpus),
            "peak_flops_per_s": {row.spec.name: row.spec.peak_flops_per_s for row in self.gpus},
            "hours": {row.launch.name: row.hours for row in self.timed},
            "gpu_hours": {row.spec.name: row.gpu_hours for row in self.gpus},
            "dollars": dollars_dict(self.gpus, self.price_per_gpu_hour),
        }


def mfu_dict(gpus: Sequence[GpuCost]) -> dict[str, Any]:
    """Return MFU and source by GPU."""
    return {row.spec.name: {"mfu": row.mfu, "source": row.mfu_source} for row in gpus}


def dollars_dict(gpus: Sequence[GpuCost], price_per_gpu_hour: float | None) -> dict[str, float | None] | None:
    """Return dollars by GPU; None without a price."""
    return None if price_per_gpu_hour is None else {row.spec.name: row.dollars for row in gpus}


@dataclass(frozen=True)
class Plan:
    """Every number of one recipe. `print(plan)` shows the summary of `isoflop plan`."""

    recipe: Recipe
    name: str
    arguments: tuple[str, ...]
    """The recipe's file and its overrides, for the commands to type next; empty where there is no file."""
    options: GpuOptions
    """The GPUs that were asked for."""
    stats: TrainingStats
    repeated_data: RepeatedData | None
    """None where the dataset's size is not known before it is prepared."""
    law: str
    laws: dict[str, LawPrediction]
    critical_batch_tokens: float
    memory_and_time: MemoryAndTime
    hyperparameters: HyperparameterComparison
    """The recipe's learning rate, batch and decay beside a law's."""
    recipe_warnings: tuple[str, ...]
    measured: StepBenchmark | None = None

    @property
    def prediction(self) -> LawPrediction:
        """Prediction of the plan's own law."""
        return self.laws[self.law]

    @property
    def warnings(self) -> list[str]:
        """What to know before the run starts: of the recipe, and of launch configs that are left out."""
        return [*self.recipe_warnings, *self.memory_and_time.skipped_launches]

    @property
    def measured_hours(self) -> float | None:
        """Hours of the run at the measured pace."""
        return self.stats.tokens / self.measured.tokens_per_s / 3600 if self.measured else None

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values of `--json`."""
        own = self.prediction
        answer = {"recipe": self.name, "model": cost.shape_dict(self.recipe.model)} | self.stats.to_dict()
        answer |= {
            "repeated_data": self.repeated_data and asdict(self.repeated_data),
            "law": self.law,
            "predicted_loss": own.predicted_loss,
            "predicted_loss_interval": own.predicted_loss_interval,
            "outside": own.outside,
            "laws": {name: asdict(prediction) for name, prediction in self.laws.items()},
            "uniform_loss": math.log(self.recipe.model.vocab_size),
            "critical_batch_tokens": self.critical_batch_tokens,
            "hyperparameters": self.hyperparameters.to_dict(),
        }
        answer |= self.memory_and_time.to_dict() | {"warnings": self.warnings}
        if self.measured:
            answer["measured"] = self.measured.to_dict() | {"hours": self.measured_hours}
        return answer

    def to_frame(self) -> pandas.DataFrame:
        """Return a table with a row per launch: memory per device by part, and per GPU the largest micro-batch and hours."""
        import pandas

        return pandas.DataFrame([
            {"launch": row.launch.name, "engine": row.launch.engine, "num_processes": row.launch.num_processes}
            | {f"{part}_bytes": count for part, count in row.memory._asdict().items()}
            | {"memory_bytes": row.memory.total}
            | {f"largest_micro_batch_{gpu}": size for gpu, size in row.largest_micro_batch.items()}
            | {f"hours_{gpu}": hours for gpu, hours in row.hours.items()}
            for row in self.memory_and_time.launches
        ])  # fmt: skip

    def __str__(self) -> str:
        from isoflop.plan.summary import summary_text  # which builds on this module

        return summary_text(self)

    def _repr_html_(self) -> str:
        from isoflop.plan.summary import launch_table, model_and_loss

        header, *rows = launch_table(self)
        return html_table(header, rows, caption="; ".join(model_and_loss(self)))
