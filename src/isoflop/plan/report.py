"""Plans as text for a terminal: each number with its formula."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from isoflop.plan import cost, hardware
from isoflop.plan.budgets import BudgetPlan, GpuHours, RankedShape
from isoflop.plan.families import PublishedModel
from isoflop.plan.models import TargetShape
from isoflop.plan.optimizer_cost import NEWTON_SCHULZ_STEPS
from isoflop.plan.results import GpuCost, Plan
from isoflop.plan.search import COMPUTE_OPTIMAL, NEAR_20N, NEAR_OPTIMAL_NATS
from isoflop.utils.tables import short, table

GIB = hardware.GIB
NO_PREDICTION = "has no prediction: "  # printed above the warnings
MINUTE = 1 / 60  # of an hour


def gib(num_bytes: float) -> str:
    """Return bytes as GiB."""
    return f"{num_bytes / GIB:.2f}" if num_bytes >= GIB / 10 else f"{num_bytes / GIB:.4f}"


def duration(hours: float | None) -> str:
    """Return hours in days, hours, minutes or seconds."""
    if hours is None:
        return "n/a"
    if hours >= 48:
        return f"{hours / 24:,.1f} d"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= MINUTE else f"{hours * 3600:.2f} s"


def span(interval: tuple[float, float] | None) -> str:
    """Return a loss interval, 5th to 95th percentile."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-"


def loss_text(loss: float | None) -> str:
    """Return a predicted loss, or a dash."""
    return "-" if loss is None else f"{loss:.4f}"


def no_predictions(outside: Iterable[tuple[str, str | None]]) -> list[str]:
    """Return a line for each law without a prediction."""
    return [f"  {name} has no prediction: {reason}" for name, reason in outside if reason]


def recipe_text(plan: Plan) -> str:
    """Return all of a recipe's plan."""
    blocks = [
        _size(plan),
        _predictions(plan),
        "\n".join(plan.hyperparameters.lines()),
        _memory(plan),
        _communication(plan),
        _time(plan),
    ]
    if plan.measured:
        blocks.append(benchmark_text(plan))
    blocks.append("\n".join(f"warning: {warning}" for warning in plan.warnings))
    return "\n\n".join(block for block in blocks if block)


def _size(plan: Plan) -> str:
    stats, s, data = plan.stats, cost.shape_of(plan.recipe.model), plan.repeated_data
    counts, width = stats.parameters_by_class, s.num_heads * s.head_dim
    classes = ", ".join(f"{name} {counts[name]:,}" for name in ("embedding", "position", "attention", "ffn", "norm", "head"))
    epochs = f"\nepochs: {data.epochs:.2f} of {data.unique_tokens:,.0f} tokens ({data.unique_tokens_source})" if data else ""
    return (
        f"{plan.name}: {plan.recipe.model.model_type}, {s.num_layers} layers x {s.hidden_size},"
        f" {s.num_heads} heads ({s.num_key_value_heads} key-value) of {s.head_dim}, feed-forward"
        f" {s.intermediate_size}, vocabulary {s.vocab_size:,}{', tied' if s.tied else ''}\n"
        f"parameters N: {stats.parameters:,} = {classes}; without embedding {stats.parameters_without_embedding:,}\n"
        f"FLOPs per token: {stats.flops_per_token:,} = 3 x (2 x {stats.matmul_parameters:,} in matrix products"
        f" + 4 x {stats.sequence_length} x {width} x {s.num_layers} layers); 6N = {stats.flops_per_token_6n:,}\n"
        + (
            f"Muon: {stats.update_flops:,} FLOPs an update in {NEWTON_SCHULZ_STEPS} Newton-Schulz steps of"
            f" {stats.muon_matrices} matrices,"
            f" {stats.update_flops / (stats.tokens_per_step * stats.flops_per_token):.2%} of a step's\n"
            if stats.update_flops
            else ""
        )
        + f"tokens D: {stats.tokens:,} = {stats.steps:,} steps x {stats.tokens_per_step:,};"
        f" {stats.flops:.4g} FLOPs = D x FLOPs per token\n"
        f"D/N: {stats.tokens_per_parameter:.2f}; {COMPUTE_OPTIMAL}N = {stats.tokens_at_20_per_parameter:,} tokens ="
        f" {stats.steps_at_20_per_parameter:,} steps{epochs}\n"
        f"tokens per step: {stats.tokens_per_step:,}; critical batch 2e8 / loss^(1/0.21) ="
        f" {plan.critical_batch_tokens:,.0f} tokens, so 1 + B/B_crit ="
        f" {1 + stats.tokens_per_step / plan.critical_batch_tokens:.2f} times the tokens of a small-batch run"
    )


def _predictions(plan: Plan) -> str:
    rows = [
        [
            ("* " if name == plan.law else "  ") + name,
            loss_text(law.predicted_loss),
            span(law.predicted_loss_interval),
            *(short(value) if value else "-" for value in (law.optimal_parameters, law.optimal_tokens)),
            f"{law.optimal_tokens_per_parameter:.1f}" if law.optimal_tokens_per_parameter else "-",
            loss_text(law.optimal_predicted_loss),
        ]
        for name, law in plan.laws.items()
    ]
    header = ["  law", "loss", "5% to 95%", "best N", "best D", "best D/N", "loss there"]
    return (
        "predicted loss, nats per token of the law's own data and tokenizer; best: the same FLOPs split by the law (C = 6ND)\n"
        + "\n".join([table(header, rows), *no_predictions((name, law.outside) for name, law in plan.laws.items())])
    )


def _memory(plan: Plan) -> str:
    rows, stats, launches = [], plan.stats, plan.memory_and_time.launches
    gpus = [row.spec.name for row in plan.memory_and_time.gpus if row.spec.memory_bytes is not None]
    for row in launches:
        largest = [row.largest_micro_batch.get(gpu) for gpu in gpus]
        name = row.launch.name + ("" if row.config else " *")
        fits = ["-" if size is None else str(size) for size in largest]
        rows.append([name, *map(gib, row.memory), gib(row.memory.total), *fits])
    header = ["launch", "weights", "grads", "moments", "copies", "activations", "loss", "total", *gpus]
    moments, layers = f"{stats.moments_bytes_per_parameter:.3g}", cost.shape_of(plan.recipe.model).num_layers
    of_layers = f"{layers} layers x {stats.micro_batch_tokens:,} tokens x"
    if stats.activation_checkpointing:
        activations = f"each layer's input, {of_layers} hidden size x 4 bytes (2 under ZeRO-1, FSDP2)"
    else:
        by_kind = stats.activation_bytes_per_token_and_layer.items()
        activations = f"{of_layers} " + ", ".join(f"{count:,} bytes ({kind})" for kind, count in by_kind)
    every = all(row.config for row in launches)
    zero1 = "" if stats.muon_matrices else f" ZeRO-1 2N + 4N/GPUs, 4N, {moments}N/GPUs;"
    return "\n".join([
        f"memory per device, GiB, at micro-batch {stats.micro_batch_size}; under each GPU the largest micro-batch that fits"
        " (0: none; -: the GPUs do not divide a step's windows)",
        table(header, rows),
        f"  weights, gradients, moments: one process and DDP 4N, 4N, {moments}N;{zero1}"
        f" FSDP2 4N, 4N, {moments}N, all over GPUs; on one GPU and under FSDP2 gradients come as activations go where a"
        " step is one micro-batch",
        "  every row has its launch config" if every else "  *: predicted only, accelerate_configs/ has no file for it",
        "  copies: bf16 weights of autocast, 2 x matmul parameters; FSDP2: the layers gathered at once",
        f"  activations: {activations}",
        "  loss: last norm to cross-entropy, the head's gradient and one chunk of logits",
        "  total: the peak of tensors; it fits under 95% of what the GPU has less 1 GiB for the CUDA context",
    ])  # fmt: skip


def _communication(plan: Plan) -> str:
    step_flops, needs = plan.stats.tokens_per_step * plan.stats.flops_per_token, plan.memory_and_time
    rows = []
    for row in needs.communication:
        choice = any(other.launch == row.launch and other is not row for other in needs.communication)
        cells = []
        for gpu, seconds in row.seconds_per_step.items():
            mfu, peak = needs.gpu(gpu).mfu, needs.gpu(gpu).spec.peak_flops_per_s
            processes = needs.of(row.launch).launch.num_processes
            share = f" ({seconds / (step_flops / (processes * mfu * peak)):.0%})" if mfu and seconds else ""
            chosen = "*" if choice and gpu in row.chosen else ""
            cells.append("n/a" if seconds is None else f"{seconds:.2f} s{share}{chosen}")
        when = "once a step" if row.reduction == "step" else "every micro-batch"
        rows.append([row.launch, when, gib(row.memory_bytes), f"{row.bytes_per_step / 1e9:.1f}", *cells])
    if not rows:
        return ""
    return "\n".join([
        "between GPUs of one machine, a step: GB that each sends; seconds = GB /"
        f" ({hardware.LINK_SHARE_REACHED:.0%} of the link's datasheet rate, an assumption), in brackets over the time that it"
        " computes; part of it overlaps",
        table(["launch", "gradients reduced", "GiB", "GB", *(row.spec.name for row in needs.gpus)], rows),
        "  *: what training.gradient_reduction = auto chooses: once a step where unsharded gradients, 4N bytes, fit",
    ])  # fmt: skip


def _time(plan: Plan) -> str:
    by_count = {row.launch.num_processes: row for row in plan.memory_and_time.timed}
    rows = [
        [
            gpu.spec.name,
            f"{gpu.spec.peak_flops_per_s / 1e12:g}",
            mfu_text(gpu),
            f"{gpu.mfu * gpu.spec.peak_flops_per_s / plan.stats.flops_per_token:,.0f}" if gpu.mfu else "n/a",
            *(duration(row.hours[gpu.spec.name]) for row in by_count.values()),
            f"{gpu.gpu_hours:,.1f}" if gpu.gpu_hours else "n/a",
            money(gpu),
        ]
        for gpu in plan.memory_and_time.gpus
    ]
    counts = [f"{count} GPU{'s' if count > 1 else ''}" for count in by_count]
    header = ["GPU", "peak TFLOP/s", "MFU", "tokens/s each", *counts, "GPU-hours", "cost"]
    formula = "time = D x FLOPs per token / (MFU x peak x GPUs); tokens/s = MFU x peak / FLOPs per token"
    return "\n".join([formula, table(header, rows), mfu_sources(plan.memory_and_time.gpus)])


def money(gpu: GpuCost) -> str:
    """Return the dollars of a run, or a dash without a price."""
    return f"{gpu.dollars:,.0f} $" if gpu.dollars else "-"


def mfu_text(gpu: GpuCost) -> str:
    """Return the MFU of a GPU."""
    return f"{gpu.mfu:.1%}" if gpu.mfu else "n/a"


def mfu_sources(gpus: Sequence[GpuCost]) -> str:
    """Return the source of each MFU, one line each."""
    return "\n".join(f"  MFU of {gpu.spec.name}: {gpu.mfu_source}" for gpu in gpus)


def benchmark_text(plan: Plan) -> str:
    """Return speed and memory as measured on this machine."""
    m = plan.measured
    assert m is not None
    mfu = f"{m.mfu:.1%}" if m.mfu else "n/a"
    return (
        f"measured on this machine ({m.device}, {m.arithmetic}, {m.micro_batches} micro-batches of"
        f" {m.micro_batch_size} x {m.sequence_length}): {m.tokens_per_s:,.0f} tokens/s, MFU {mfu};"
        f" the full run takes {duration(plan.measured_hours)} at that pace\n"
        f"memory: predicted {m.predicted_memory_bytes:,} bytes of tensors; PyTorch's tracker over fake tensors"
        f" {m.tracked_memory_bytes:,} ({m.predicted_memory_bytes / m.tracked_memory_bytes - 1:+.2%});"
        f" {m.peak_memory_kind} {m.peak_memory_bytes:,}"
    )


def budget_text(plan: BudgetPlan, full: bool) -> str:
    """Return the best shapes for a budget; with `full` the source of each MFU, too."""
    line = f"budget: {plan.flops:.4g} FLOPs"
    if isinstance(spent := plan.budget, GpuHours):
        mfu, _ = spent.spec.mfu_for(plan.best.candidate.parameters)
        line += (
            f" = {spent.num_gpus} x {spent.spec.name} x {spent.gpu_hours / spent.num_gpus:,.1f} h x"
            f" {spent.spec.peak_flops_per_s / 1e12:g} TFLOP/s x MFU {mfu:.1%}"
        )
    title = f"D/N from {plan.constraint[0]:g} to {plan.constraint[1]:g}" if plan.constraint else "any D/N"
    lines = [
        line,
        f"family {plan.family.name}, windows of {plan.family.sequence_length}; {plan.num_shapes} shapes, each with D = FLOPs /"
        f" FLOPs per token\nchosen by {plan.chosen_by}"
        + (f"; law {plan.law} has no prediction: {plan.outside}" if plan.outside else ""),
        f"\nbest with {title}" + ("" if plan.outside else f", and all within {NEAR_OPTIMAL_NATS} nats of it"),
        shapes_text(plan.near_optimal),
    ]
    if plan.near_20_tokens_per_parameter:
        low, high = NEAR_20N
        lines += [
            f"\nbest with D near 20N ({low:g} to {high:g} tokens a parameter)",
            shapes_text(plan.near_20_tokens_per_parameter),
        ]
    by_law = {name: best for name, best in plan.best_by_law.items() if best.outside is None}
    lines += ["\nwhat each law would choose"] if plan.best_by_law else []
    lines += [shapes_text(list(by_law.values()), list(by_law))] if by_law else []
    lines += no_predictions((name, best.outside) for name, best in plan.best_by_law.items())
    lines.append("\n" + _gpu_hours(plan.gpus, full))
    if warnings := [warning for warning in plan.warnings if plan.outside is None or NO_PREDICTION not in warning]:
        lines.append("\n" + "\n".join(f"warning: {warning}" for warning in warnings))
    return "\n".join(lines)


def _gpu_hours(gpus: Sequence[GpuCost], full: bool) -> str:
    """Return the GPU-hours of the best shape, with the sources of the MFU where `full`."""
    if all(gpu.gpu_hours is not None and gpu.gpu_hours < MINUTE for gpu in gpus):
        return "the best takes a GPU under a minute; on a CPU, --measure times the written recipe"
    rows = [
        [gpu.spec.name, "n/a" if gpu.gpu_hours is None else f"{gpu.gpu_hours:,.1f}", mfu_text(gpu), money(gpu)] for gpu in gpus
    ]
    title = "the best takes FLOPs / (MFU x peak)" + ("" if full else "; --full says where each MFU comes from")
    return "\n".join([title, table(["GPU", "GPU-hours", "MFU", "cost"], rows), *([mfu_sources(gpus)] if full else [])])


def shapes_text(shapes: Sequence[RankedShape], names: list[str] | None = None) -> str:
    """Return a table of shapes, with a name before each where `names` are given."""
    header = ["layers", "width", "heads (kv)", "head dim", "FFN", "N", "D", "D/N", "loss", "5% to 95%", "edge"]
    rows = []
    for shape in shapes:
        found, s = shape.candidate, cost.shape_of(shape.candidate.model)
        rows.append([
            str(s.num_layers),
            str(s.hidden_size),
            f"{s.num_heads} ({s.num_key_value_heads})",
            str(s.head_dim),
            str(s.intermediate_size),
            short(found.parameters, 4),
            short(found.tokens, 4),
            f"{found.tokens_per_parameter:.1f}",
            loss_text(shape.predicted_loss),
            span(shape.predicted_loss_interval),
            "yes" if found.on_grid_edge else "no",
        ])  # fmt: skip
    if names is None:
        return table(header, rows)
    return table(["law", *header], [[name, *row] for name, row in zip(names, rows, strict=True)])


def target_text(target: TargetShape) -> str:
    """Return the shape for a parameter target."""
    s, name = cost.shape_of(target.model), target.family.name
    return (
        f"family {name}: {s.num_layers} layers, d_model {s.hidden_size}, {s.num_heads}"
        f" heads of {s.head_dim}, feed-forward {s.intermediate_size}\n12 layers width^2 ="
        f" {target.parameters_12_layers_width_squared:,}; parameters of the {name} shape with its vocabulary:"
        f" {target.parameters:,}"
    )


def compare_text(plans: list[Plan], num_gpus: int) -> str:
    """Return a table with a row per recipe, and the warnings of each."""
    first = plans[0].memory_and_time
    gpus = [row.spec.name for row in first.gpus]
    launches = [row.launch.name for row in first.timed if row.launch.num_processes in (1, num_gpus)]
    header = ["recipe", "N", "D", "20N", "D/N", "steps to 20N", "loss", *(f"{name}, GiB" for name in launches)]
    header += [f"{num_gpus}x {gpu}" for gpu in gpus]
    rows = []
    for plan in plans:
        stats, needs = plan.stats, plan.memory_and_time
        hours = needs.of(launches[-1]).hours
        costs = {gpu: f" {money(needs.gpu(gpu))}" if needs.price_per_gpu_hour is not None else "" for gpu in gpus}
        rows.append([
            plan.name.rsplit("/", 1)[-1].removesuffix(".yaml"),
            f"{stats.parameters:,}",
            f"{stats.tokens / 1e9:.2f}B",
            f"{stats.tokens_at_20_per_parameter / 1e9:.2f}B",
            f"{stats.tokens_per_parameter:.1f}",
            f"{stats.steps_at_20_per_parameter:,}",
            loss_text(plan.prediction.predicted_loss),
            *(gib(needs.of(launch).memory.total) for launch in launches),
            *(duration(hours[gpu]) + costs[gpu] for gpu in gpus),
        ])  # fmt: skip
    warnings = [f"warning: {plan.name}: {warning}" for plan in plans for warning in plan.recipe_warnings]
    warnings += [f"warning: {skipped}" for skipped in first.skipped_launches]
    return (
        f"loss by law {plans[0].law}; memory per GPU at each recipe's micro-batch; time on {num_gpus} GPU(s) = D x FLOPs per"
        f" token / (MFU x peak x GPUs), each MFU as `plan.py RECIPE` shows it\n{table(header, rows)}\n\n" + "\n".join(warnings)
    )


def models_text(models: Iterable[PublishedModel]) -> str:
    """Return a table of the published models."""
    header = ["model", "layers", "width", "heads (kv)", "FFN", "context", "vocabulary", "N", "D", "D/N", "FLOPs", "6ND"]
    rows = []
    for published in models:
        s, tokens = cost.shape_of(published.model), published.training_tokens
        known = ["-"] * 4
        if tokens:
            n, flops = published.parameters, tokens * published.flops_per_token
            known = [f"{tokens / 1e12:g}T", f"{tokens / n:.1f}", f"{flops:.3g}", f"{6 * n * tokens:.3g}"]
        heads, context = f"{s.num_heads} ({s.num_key_value_heads})", f"{published.model.max_positions:,}"
        sizes = [str(s.num_layers), str(s.hidden_size), heads, str(s.intermediate_size), context, f"{s.vocab_size:,}"]
        rows.append([published.name, *sizes, f"{published.parameters:,}", *known])
    return table(header, rows) + "\nany of these is a --family; isoflop plan models NAME plans one, --write makes it a recipe"
