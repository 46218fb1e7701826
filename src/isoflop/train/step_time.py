"""Time of traced optimizer steps: device busy and idle, by category, by kernel or operator, and the host's launches and waits.

Entered by `summarize`, with the events of torch.profiler. On a GPU it counts kernels and copies on the device; on a CPU the self
time of operators on the host.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEvent

from isoflop.utils.tables import markdown, table

COMMUNICATION, OPTIMIZER, LOSS, ATTENTION = "communication", "optimizer and clipping", "loss and head", "attention"
PRODUCTS, COPIES, PYTHON, OTHER = "matrix products", "copies and fills", "Python", "norms, element-wise, other"
_TOP = 10  # kernels or operators of the summary
_LAUNCHES = re.compile("^(cudaLaunchKernel|cuLaunchKernel|cudaGraphLaunch|hipLaunchKernel|hipExtLaunchKernel)")
_WAITS = re.compile("^(cuda|hip)(Device|Stream|Event)Synchronize")


class _Rule(NamedTuple):
    """Category whose `pattern` is searched in a name and its direct caller's, or with `any_caller` in those of all callers."""

    category: str
    pattern: re.Pattern[str]
    any_caller: bool


def _rule(category: str, pattern: str, any_caller: bool) -> _Rule:
    return _Rule(category, re.compile(pattern, re.IGNORECASE), any_caller)


# The first match counts. Communication, optimizer and loss include what they call: the loss has the head's matrix products.
# Attention comes before matrix products, since its kernels are named after CUTLASS too (`fmha_cutlassF_bf16`,
# `flash_fwd_kernel<... cutlass::bfloat16_t>`). Names of operators and regions are torch's (aten, `Optimizer.step#`, `FSDP::`),
# those of kernels cuBLAS's (nvjet on Hopper), cuDNN's and Triton's (`triton_tem`, a template).
_RULES = (
    _rule(COMMUNICATION, r"nccl|rccl|gloo:|c10d::|fsdp::|ddp::reducer", True),
    _rule(OPTIMIZER, r"optimizer\.|multi_tensor_apply|_foreach_|adamw?|muon", True),
    _rule(LOSS, r"cross_?entropy|nll_loss|log_?softmax|logsumexp", True),
    _rule(ATTENTION, r"attention|flash|fmha|sdpa|compute_dot_do_o|convert_dq", True),
    _rule(
        PRODUCTS, r"gemm|gemv|cutlass|nvjet|xmma|splitk|triton_tem|scaled_mm|aten::(linear|matmul|b?mm|add[mb]?mm|baddbmm)", False
    ),
    _rule(COPIES, r"memcpy|memset|copy_kernel|catarray|fillfunctor|aten::(_to_copy|copy_|cat|fill_|zero_)", False),
    _rule(PYTHON, r"^profilerstep", False),
)


class Span(NamedTuple):
    """Start and end on the trace's clock."""

    start_us: float
    end_us: float


@dataclass(frozen=True)
class TimeRow:
    """A kernel, an operator or a category: time and calls per step, and share of the time of all rows."""

    name: str
    ms: float
    share: float
    calls: float


@dataclass(frozen=True)
class GpuUse:
    """How a GPU and its host share a step, on the average: launches and synchronizations are per step."""

    busy_share: float
    exposed_communication_share: float  # of the time in which the GPU communicates and computes nothing
    kernel_launches: float
    synchronizations: float
    synchronization_ms: float  # in which the host waits


@dataclass(frozen=True)
class StepProfile:
    """Where the time of `num_steps` traced steps went, per step; `gpu` is None on a CPU."""

    num_steps: int
    step_ms: float
    fastest_step_ms: float
    slowest_step_ms: float
    gpu: GpuUse | None
    categories: tuple[TimeRow, ...]
    top: tuple[TimeRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return every field, as JSON has it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return sentences: time per step, GPU busy and idle, launches and synchronizations."""
        lines = [
            f"{self.step_ms:,.1f} ms per step over {self.num_steps} traced (fastest {self.fastest_step_ms:,.1f}, slowest"
            f" {self.slowest_step_ms:,.1f}; tracing adds to them)"
        ]
        if self.gpu is None:
            return [*lines, "no GPU: times are self times of operators on the CPU"]
        exposed = self.gpu.exposed_communication_share
        lines.append(
            f"GPU busy {self.gpu.busy_share:.1%} of the time, idle {1 - self.gpu.busy_share:.1%}"
            + (f"; {exposed:.1%} is communication that no computation overlaps" if exposed else "")
        )
        return [
            *lines,
            f"host: {self.gpu.kernel_launches:,.0f} kernel launches per step; it waits {self.gpu.synchronization_ms:,.1f} ms in"
            f" {self.gpu.synchronizations:,.0f} synchronizations",
        ]

    def text(self) -> str:
        """Return the summary for a terminal."""
        return "\n".join([*self.lines(), *self._tables(table)])

    def page(self) -> str:
        """Return the summary as a Markdown page."""
        return "\n\n".join(["# Where a step's time goes", *self.lines(), *self._tables(markdown)]) + "\n"

    def _tables(self, layout: Callable[[list[str], Iterable[list[str]]], str]) -> Iterator[str]:
        for what, rows in (("category", self.categories), ("kernel" if self.gpu else "operator", self.top)):
            yield layout(
                [what, "ms per step", "share", "calls per step"],
                [[_short(row.name), f"{row.ms:,.2f}", f"{row.share:.1%}", f"{row.calls:,.0f}"] for row in rows],
            )


def summarize(events: Sequence[FunctionEvent], num_steps: int) -> StepProfile | None:
    """Summarize the first `num_steps` traced steps; return None where the events hold no step.

    Steps are the profiler's `ProfilerStep#N` regions on the host, behind which a GPU may run its last kernels. Those of the last
    step count, unless a further step began, whose kernels look the same.
    """
    regions = [_span(e) for e in events if _on_host(e) and e.name.startswith("ProfilerStep")]
    steps = sorted(regions)[:num_steps]
    if not steps:
        return None
    # Regions that the host names (`ProfilerStep`, `nccl:all_reduce`) appear on the device too, as spans around their kernels.
    annotations = {e.name for e in events if e.is_user_annotation}
    device = [e for e in events if e.device_type != DeviceType.CPU and e.name not in annotations]
    end_us = steps[-1].end_us
    if len(regions) == len(steps):
        end_us = max([end_us, *(e.time_range.end for e in device)])
    window = Span(steps[0].start_us, end_us)
    host = [e for e in events if _on_host(e) and _starts_in(e, window)]
    device = [e for e in device if _starts_in(e, window)]
    times = _device_times(device, host) if device else _host_times(host)
    step_ms = [_duration_us(step) / 1e3 for step in steps]
    return StepProfile(
        num_steps=len(steps),
        step_ms=_duration_us(window) / 1e3 / len(steps),
        fastest_step_ms=min(step_ms),
        slowest_step_ms=max(step_ms),
        gpu=_gpu_use(device, host, window, len(steps)) if device else None,
        categories=_rows(((time.category, time) for time in times), len(steps)),
        top=_rows(((time.name, time) for time in times), len(steps))[:_TOP],
    )


def busy_us(spans: Iterable[Span], window: Span) -> float:
    """Return the length of the spans' union within a window."""
    busy, reached = 0.0, window.start_us
    for start, end in sorted(spans):
        start, end = max(start, reached), min(end, window.end_us)
        if end > start:
            busy, reached = busy + end - start, end
    return busy


@functools.lru_cache(maxsize=10_000)
def category_of(name: str, callers: tuple[str, ...] = ()) -> str:
    """Return the category of a kernel or operator with its callers, the direct one first."""
    near, all_names = "\n".join((name, *callers[:1])), "\n".join((name, *callers))
    return next((r.category for r in _RULES if r.pattern.search(all_names if r.any_caller else near)), OTHER)


class _Time(NamedTuple):
    name: str
    category: str
    us: float
    calls: float


def _host_times(host: Sequence[FunctionEvent]) -> list[_Time]:
    """Return self times of operators; that of a step's region is Python between them."""
    times = []
    for event in host:
        category = category_of(event.name, _callers(event))
        times.append(_Time(PYTHON if category == PYTHON else event.name, category, event.self_cpu_time_total, 1))
    return times


def _device_times(device: Sequence[FunctionEvent], host: Sequence[FunctionEvent]) -> list[_Time]:
    """Return time of kernels by name and category.

    The profiler lists a kernel with the operator that launched it, which gives the kernel's callers; it lists those of a CUDA
    graph nowhere, whose category follows from the kernel's name.
    """
    calls, total_us = Counter(e.name for e in device), defaultdict[str, float](float)
    for event in device:
        total_us[event.name] += event.time_range.end - event.time_range.start
    launched_us = defaultdict[str, dict[str, float]](lambda: defaultdict(float))
    for event in host:
        for kernel in event.kernels:
            launched_us[kernel.name][category_of(kernel.name, (event.name, *_callers(event)))] += kernel.duration
    times = []
    for name, us in total_us.items():
        parts = launched_us[name]
        if (rest_us := us - sum(parts.values())) > 1e-3:  # less is rounding
            parts[category_of(name)] += rest_us
        whole = sum(parts.values()) or 1.0
        times += [_Time(name, category, us * part / whole, calls[name] * part / whole) for category, part in parts.items()]
    return times


def _gpu_use(device: Sequence[FunctionEvent], host: Sequence[FunctionEvent], window: Span, num_steps: int) -> GpuUse:
    spans = [(_span(e), category_of(e.name) == COMMUNICATION) for e in device]
    busy = busy_us((span for span, _ in spans), window)
    computing = busy_us((span for span, communicates in spans if not communicates), window)
    waits = [_span(e) for e in host if _WAITS.match(e.name)]
    return GpuUse(
        busy_share=busy / _duration_us(window),
        exposed_communication_share=(busy - computing) / _duration_us(window),
        kernel_launches=sum(bool(_LAUNCHES.match(e.name)) for e in host) / num_steps,
        synchronizations=len(waits) / num_steps,
        synchronization_ms=sum(map(_duration_us, waits)) / 1e3 / num_steps,
    )


def _rows(times: Iterable[tuple[str, _Time]], num_steps: int) -> tuple[TimeRow, ...]:
    """Return sums by name, the longest first."""
    us_of, calls_of = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, time in times:
        us_of[name] += time.us
        calls_of[name] += time.calls
    total_us = sum(us_of.values()) or 1.0
    return tuple(
        TimeRow(name, us / 1e3 / num_steps, us / total_us, calls_of[name] / num_steps)
        for name, us in sorted(us_of.items(), key=lambda item: -item[1])
    )


def _span(event: FunctionEvent) -> Span:
    return Span(event.time_range.start, event.time_range.end)


def _duration_us(span: Span) -> float:
    return span.end_us - span.start_us


def _on_host(event: FunctionEvent) -> bool:
    return bool(event.device_type == DeviceType.CPU and not event.is_async)


def _starts_in(event: FunctionEvent, window: Span) -> bool:
    return bool(window.start_us <= event.time_range.start < window.end_us)


def _callers(event: FunctionEvent) -> tuple[str, ...]:
    names = []
    while (event := event.cpu_parent) is not None:  # type: ignore[assignment]
        names.append(event.name)
    return tuple(names)


def _short(name: str) -> str:
    """Return a kernel's name without its return type, cut to a column: templates have hundreds of characters."""
    name = name.removeprefix("void ")
    return name if len(name) <= 72 else f"{name[:71]}…"
