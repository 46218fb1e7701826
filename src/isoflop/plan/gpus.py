"""The GPUs of a plan: named from the table of `hardware`, or described by a peak; their number, MFU and price.

Entered by `GpuOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from isoflop.plan import hardware
from isoflop.utils.errors import UserError

if TYPE_CHECKING:
    from isoflop.plan.results import TrainingStats

SHOWN_GPUS = ("rtx5090", "a6000", "a100", "h20", "h100", "h200")  # where the user names none
# Lowest (exclusive) and highest value of each number that a plan takes: wide, but so that nothing overflows.
BOUNDS = {
    "flops": (0, 1e30), "gpus": (0, 1e6), "days": (0, 1e5), "dollars": (0, 1e12), "price": (1e-6, 1e6), "mfu": (0, 1),
    "peak_tflops": (1e-3, 1e6), "sequence_length": (1, 1e8), "parameters": (0, 1e15), "width": (0, 1e6), "aspect": (0, 1e5),
    "parameters_without_vocabulary": (0, 1e15), "tokens": (0, 1e18), "micro_batch_size": (0, 1e6),
}  # fmt: skip


def check_bounds(**values: float | None) -> None:
    """Check numbers by the name of their option. Raises `UserError` for one outside `BOUNDS`; None is allowed."""
    for name, value in values.items():
        if value is None:
            continue
        option, (low, high) = f"--{name.replace('_', '-')}", BOUNDS[name]
        if not value > 0:
            raise UserError(f"{option} {value:g} is not a positive number; give one above 0")
        if not low < value <= high:
            raise UserError(f"{option} {value:g} is not within {low:g} to {high:g}; give one that is")


class GpuSpec(NamedTuple):
    """One GPU model as the user named or described it."""

    name: str
    peak_flops_per_s: float
    memory_bytes: int | None
    """None for a GPU that is described by its peak."""
    mfu: float | None = None
    """MFU as given or measured; None: the table's."""
    mfu_source: str = "given"

    def mfu_for(self, parameters: float) -> tuple[float | None, str]:
        """Return the MFU at a model size and its source; None for an unknown GPU."""
        if self.mfu is not None:
            return self.mfu, self.mfu_source
        if self.name not in hardware.GPUS:
            return None, "n/a: not known for this hardware; give --mfu, or add --measure there"
        row = hardware.mfu_row(self.name, parameters)
        return row.mfu, row.source

    def link_seconds(self, num_bytes: float) -> float | None:
        """Return the seconds to send so many bytes to the other GPUs of the machine; None for an unknown GPU."""
        gpu = hardware.GPUS.get(self.name)
        return gpu and num_bytes / (hardware.LINK_SHARE_REACHED * gpu.link_bytes_per_s)

    def hours(self, flops: float, parameters: float, num_gpus: int = 1) -> float | None:
        """Return the hours of a run; None where the MFU is not known."""
        mfu, _ = self.mfu_for(parameters)
        return mfu and hardware.train_hours(flops, self.peak_flops_per_s, num_gpus, mfu)

    def recipe_hours(self, stats: TrainingStats, num_gpus: int = 1) -> float | None:
        """Return the hours of a recipe; None where the MFU is not known.

        The table's MFU is of steps with AdamW, so Muon's matrix products are added; a given or measured one is of entire steps.
        """
        hours = self.hours(stats.flops, stats.parameters, num_gpus)
        if hours is None or self.mfu is not None:
            return hours
        seconds = hardware.update_seconds(stats.update_flops, stats.muon_matrices, self.peak_flops_per_s, num_gpus)
        return hours + stats.steps * seconds / 3600


@dataclass(frozen=True)
class GpuOptions:
    """The GPUs that a plan is made for, as the user gave them; None: not given."""

    gpu: str | None = None
    num_gpus: int | None = None
    mfu: float | None = None
    peak_tflops: float | None = None
    """Dense bf16 TFLOP/s of a GPU that is not in the table."""
    price_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        check_bounds(gpus=self.num_gpus, mfu=self.mfu, peak_tflops=self.peak_tflops, price=self.price_per_gpu_hour)

    @property
    def name(self) -> str | None:
        """Name of the one GPU that was named or described; None for the usual ones."""
        return self.gpu if self.peak_tflops is None else self.specs()[0].name

    def specs(self) -> list[GpuSpec]:
        """Return the GPU that was named or described, else the usual ones. Raises `UserError` for an unknown name."""
        if self.peak_tflops is not None:
            if self.gpu in hardware.GPUS:
                peak = hardware.GPUS[self.gpu].peak_bf16_flops / 1e12
                raise UserError(
                    f"--peak-tflops {self.peak_tflops:g}: {self.gpu} is known with {peak:g}; leave it out, or give --gpu another"
                    " name"
                )
            return [GpuSpec(self.gpu or "this GPU", self.peak_tflops * 1e12, None, self.mfu)]
        names = [hardware.gpu_name(self.gpu)] if self.gpu is not None else SHOWN_GPUS
        return [GpuSpec(name, hardware.GPUS[name].peak_bf16_flops, hardware.GPUS[name].memory_bytes, self.mfu) for name in names]
