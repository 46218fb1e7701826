"""Plans as text for a terminal: each number with its formula."""

from __future__ import annotations

from typing import Any

from isoflop import hardware
from isoflop.plan.recipes import COMPUTE_OPTIMAL
from isoflop.search import NEAR_20N, NEAR_OPTIMAL_NATS
from isoflop.tables import table

GIB = hardware.GIB


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / GIB:.2f}" if count >= GIB / 10 else f"{count / GIB:.4f}"


def duration(hours: float | None) -> str:
    """Hours as what a reader takes in at once."""
    if hours is None:
        return "n/a"
    if hours >= 48:
        return f"{hours / 24:,.1f} d"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.2f} s"


def span(interval: tuple[float, float] | None) -> str:
    """A loss interval, 5th to 95th percentile."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-"


def recipe_text(plan: dict[str, Any]) -> str:
    """The whole of one recipe's plan."""
    blocks = [_size(plan), _promise(plan), _memory(plan), _communication(plan), _time(plan), warnings_text(plan)]
    if plan.get("measured"):
        blocks.insert(5, _measured(plan))
    return "\n\n".join(block for block in blocks if block)


def _size(plan: dict[str, Any]) -> str:
    m, p, s = plan["model"], plan["parameters"], plan["sequence_length"]
    width = m["num_attention_heads"] * m["head_dim"]
    classes = ", ".join(f"{name} {p[name]:,}" for name in ("embedding", "position", "attention", "ffn", "norm", "head"))
    data = plan["repeated_data"]
    epochs = (
        f"\nepochs: {data['epochs']:.2f} of {data['unique_tokens']:,.0f} tokens ({data['unique_tokens_source']})" if data else ""
    )
    return (
        f"{plan['recipe']}: {m['model_type']}, {m['num_hidden_layers']} layers x {m['hidden_size']},"
        f" {m['num_attention_heads']} heads ({m['num_key_value_heads']} key-value) of {m['head_dim']}, feed-forward"
        f" {m['intermediate_size']}, vocabulary {m['vocab_size']:,}{', tied' if m['tie_word_embeddings'] else ''}\n"
        f"parameters N: {p['total']:,} = {classes}; without embedding {p['without_embedding']:,}\n"
        f"FLOPs per token: {plan['flops_per_token']:,} = 3 x (2 x {plan['matmul_parameters']:,} in matrix products"
        f" + 4 x {s} x {width} x {m['num_hidden_layers']} layers); 6N = {plan['flops_per_token_6n']:,}\n"
        f"tokens D: {plan['tokens']:,} = {plan['steps']:,} steps x {plan['tokens_per_step']:,};"
        f" {plan['flops']:.4g} FLOPs = D x FLOPs per token\n"
        f"D/N: {plan['tokens_per_parameter']:.2f}; {COMPUTE_OPTIMAL}N = {plan['tokens_at_20_per_parameter']:,} tokens ="
        f" {plan['steps_at_20_per_parameter']:,} steps{epochs}\n"
        f"tokens per step: {plan['tokens_per_step']:,}; critical batch 2e8 / loss^(1/0.21) ="
        f" {plan['critical_batch_tokens']:,.0f} tokens, so 1 + B/B_crit ="
        f" {1 + plan['tokens_per_step'] / plan['critical_batch_tokens']:.2f} times the tokens of a small-batch run"
    )


def _promise(plan: dict[str, Any]) -> str:
    rows = [
        [
            ("* " if name == plan["law"] else "  ") + name,
            f"{law['predicted_loss']:.4f}",
            span(law["predicted_loss_interval"]),
            f"{law['optimal_parameters']:.3g}",
            f"{law['optimal_tokens']:.3g}",
            f"{law['optimal_tokens_per_parameter']:.1f}",
            f"{law['optimal_predicted_loss']:.4f}",
        ]
        for name, law in plan["laws"].items()
    ]
    header = ["  law", "loss", "5% to 95%", "best N", "best D", "best D/N", "loss there"]
    return (
        "predicted loss, nats per token of the law's own data and tokenizer; best: the same FLOPs split by the law (C = 6ND)\n"
        + table(header, rows)
    )


def _memory(plan: dict[str, Any]) -> str:
    kinds = list(next(iter(plan["largest_micro_batch"].values())))
    rows = []
    for launch, parts in plan["memory_by_part_bytes"].items():
        largest = plan["largest_micro_batch"].get(launch, {})
        fits = ["-" if largest.get(kind) is None else str(largest[kind]) for kind in kinds]
        mark = "" if plan["launches"][launch]["config"] else " *"
        rows.append([launch + mark, *map(gib, parts.values()), gib(plan["memory_bytes"][launch]), *fits])
    header = ["launch", "weights", "grads", "moments", "copies", "activations", "loss", "total", *kinds]
    moments, configs = plan["moments_bytes_per_parameter"], [launch["config"] for launch in plan["launches"].values()]
    layers, tokens = plan["model"]["num_hidden_layers"], plan["micro_batch_tokens"]
    if plan["activation_checkpointing"]:
        activations = f"each layer's input, {layers} layers x {tokens:,} tokens x hidden size x 4 bytes (2 under ZeRO-1, FSDP2)"
    else:
        activations = f"{layers} layers x {tokens:,} tokens x " + ", ".join(
            f"{count:,} bytes ({who})" for who, count in plan["activation_bytes_per_token_and_layer"].items()
        )
    return "\n".join([
        f"memory per device, GiB, at micro-batch {plan['micro_batch_size']}; under each GPU the largest micro-batch that fits"
        " (0: none; -: the GPUs do not divide a step's windows)",
        table(header, rows),
        f"  weights, gradients, moments: one process and DDP 4N, 4N, {moments}N; ZeRO-1 2N + 4N/GPUs, 4N, {moments}N/GPUs;"
        f" FSDP2 4N, 4N, {moments}N, all over GPUs; on one GPU and under FSDP2 gradients come as activations go where a"
        " step is one micro-batch",
        "  *: predicted only, accelerate_configs/ has no file for it" if None in configs else "  every row has its launch config",
        "  copies: bf16 weights of autocast, 2 x matmul parameters; FSDP2: the layers that are whole",
        f"  activations: {activations}",
        "  loss: last norm to cross-entropy, the head's gradient and one chunk of logits",
        "  total: the peak of tensors; it fits under 95% of what the GPU has less 1 GiB for the CUDA context",
    ])  # fmt: skip


def _communication(plan: dict[str, Any]) -> str:
    kinds, flops = list(plan["gpu_hours"]), plan["tokens_per_step"] * plan["flops_per_token"]
    rows = []
    for row in plan["communication"]:
        cells = []
        for kind, seconds in row["seconds_per_step"].items():
            mfu, processes = plan["mfu"][kind]["mfu"], plan["launches"][row["launch"]]["num_processes"]
            share = f" ({seconds / (flops / (processes * mfu * plan['peak_flops_per_s'][kind])):.0%})" if mfu and seconds else ""
            chosen = (
                "*" if kind in row["chosen"] and row["launch"] in {x["launch"] for x in plan["communication"] if x != row} else ""
            )
            cells.append("n/a" if seconds is None else f"{seconds:.2f} s{share}{chosen}")
        when = "once a step" if row["reduction"] == "step" else "every micro-batch"
        rows.append([row["launch"], when, gib(row["memory_bytes"]), f"{row['bytes_per_step'] / 1e9:.1f}", *cells])
    if not rows:
        return ""
    return "\n".join([
        "between GPUs of one machine, a step: GB that each sends; seconds = GB /"
        f" ({hardware.LINK_SHARE_REACHED:.0%} of the link's datasheet rate, an assumption), in brackets over the time that it"
        " computes; part of it overlaps",
        table(["launch", "gradients reduced", "GiB", "GB", *kinds], rows),
        "  *: what training.gradient_reduction = auto chooses: once a step where unsharded gradients, 4N bytes, fit",
    ])  # fmt: skip


def _time(plan: dict[str, Any]) -> str:
    on_gpu = {launch: plan["launches"][launch]["num_processes"] for launch in plan["hours"]}
    by_count = {count: launch for launch, count in on_gpu.items()}
    rows = []
    for kind, gpu_hours in plan["gpu_hours"].items():
        mfu, peak = plan["mfu"][kind]["mfu"], plan["peak_flops_per_s"][kind]
        hours = [plan["hours"][launch][kind] for launch in by_count.values()]
        rows.append([
            kind,
            f"{peak / 1e12:g}",
            mfu_text(plan, kind),
            f"{mfu * peak / plan['flops_per_token']:,.0f}" if mfu else "n/a",
            *map(duration, hours),
            f"{gpu_hours:,.1f}" if gpu_hours else "n/a",
            money(plan["dollars"], kind),
        ])  # fmt: skip
    header = [
        "GPU",
        "peak TFLOP/s",
        "MFU",
        "tokens/s each",
        *(f"{count} GPU{'s' if count > 1 else ''}" for count in by_count),
        "GPU-hours",
        "cost",
    ]
    formula = "time = D x FLOPs per token / (MFU x peak x GPUs); tokens/s = MFU x peak / FLOPs per token"
    return "\n".join([formula, table(header, rows), sources(plan)])


def money(dollars: dict[str, float | None] | None, kind: str) -> str:
    """Dollars on one kind of GPU, where a price was given."""
    value = dollars and dollars[kind]
    return f"{value:,.0f} $" if value else "-"


def sources(plan: dict[str, Any]) -> str:
    """Where each MFU comes from."""
    return "\n".join(f"  MFU of {kind}: {mfu['source']}" for kind, mfu in plan["mfu"].items())


def _measured(plan: dict[str, Any]) -> str:
    m = plan["measured"]
    mfu = f"{m['mfu']:.1%}" if m["mfu"] else "n/a"
    return (
        f"measured on this machine ({m['device']}, {m['arithmetic']}, {m['micro_batches']} micro-batches of"
        f" {m['micro_batch_size']} x {m['sequence_length']}): {m['tokens_per_s']:,.0f} tokens/s, MFU {mfu};"
        f" the whole run takes {duration(m['hours'])} at that pace\n"
        f"memory: predicted {m['predicted_memory_bytes']:,} bytes of tensors; PyTorch's tracker over fake tensors"
        f" {m['tracked_memory_bytes']:,} ({m['predicted_memory_bytes'] / m['tracked_memory_bytes'] - 1:+.2%});"
        f" {m['peak_memory_kind']} {m['peak_memory_bytes']:,}"
    )


def warnings_text(plan: dict[str, Any]) -> str:
    """One line each."""
    return "\n".join(f"warning: {warning}" for warning in plan["warnings"])


def budget_text(plan: dict[str, Any]) -> str:
    """The whole of a search."""
    spent = plan["budget"]
    line = f"budget: {plan['flops']:.4g} FLOPs"
    if "gpu" in spent:
        line += (
            f" = {spent['num_gpus']} x {spent['gpu']} x {spent['hours']:,.1f} h x {spent['peak_flops_per_s'] / 1e12:g} TFLOP/s"
            f" x MFU {spent['mfu']:.1%}"
        )
    held = plan["tokens_per_parameter_constraint"]
    title = f"D/N from {held[0]:g} to {held[1]:g}" if held else "any D/N"
    lines = [
        line,
        f"family {plan['family']}, windows of {plan['sequence_length']}, law {plan['law']}; {plan['num_shapes']} shapes,"
        " D of each = FLOPs / FLOPs per token",
        f"\nbest with {title}, and all within {NEAR_OPTIMAL_NATS} nats of it",
        candidates_text(plan["near_optimal"]),
    ]
    if plan["near_20_tokens_per_parameter"]:
        low, high = NEAR_20N
        lines += [
            f"\nbest with D near 20N ({low:g} to {high:g} tokens a parameter)",
            candidates_text(plan["near_20_tokens_per_parameter"]),
        ]
    if by_law := plan["best_by_law"]:
        lines += ["\nwhat each law would choose", candidates_text(list(by_law.values()), list(by_law))]
    hours = [
        [kind, "n/a" if value is None else f"{value:,.1f}", mfu_text(plan, kind), money(plan["dollars"], kind)]
        for kind, value in plan["gpu_hours"].items()
    ]
    lines += ["\nthe best takes FLOPs / (MFU x peak)", table(["GPU", "GPU-hours", "MFU", "cost"], hours), sources(plan)]
    if plan["warnings"]:
        lines.append("\n" + warnings_text(plan))
    return "\n".join(lines)


def mfu_text(plan: dict[str, Any], kind: str) -> str:
    """MFU of one kind of GPU."""
    mfu = plan["mfu"][kind]["mfu"]
    return f"{mfu:.1%}" if mfu else "n/a"


def target_text(shape: dict[str, Any], family: str) -> str:
    """A shape for a parameter target."""
    return (
        f"family {family}: {shape['num_hidden_layers']} layers, d_model {shape['hidden_size']}, {shape['num_attention_heads']}"
        f" heads of {shape['head_dim']}, feed-forward {shape['intermediate_size']}\n12 layers width^2 ="
        f" {shape['parameters_12_layers_width_squared']:,}; parameters of the {family} shape with its vocabulary:"
        f" {shape['parameters']:,}"
    )


def candidates_text(candidates: list[dict[str, Any]], names: list[str] | None = None) -> str:
    """Shapes, one a row."""
    header = ["layers", "width", "heads (kv)", "head dim", "FFN", "N", "D", "D/N", "loss", "5% to 95%", "edge"]
    rows = [
        [
            str(c["num_hidden_layers"]),
            str(c["hidden_size"]),
            f"{c['num_attention_heads']} ({c['num_key_value_heads']})",
            str(c["head_dim"]),
            str(c["intermediate_size"]),
            f"{c['parameters'] / 1e9:.4f}B",
            f"{c['tokens'] / 1e9:.3f}B",
            f"{c['tokens_per_parameter']:.1f}",
            f"{c['predicted_loss']:.4f}",
            span(c["predicted_loss_interval"]),
            "yes" if c["on_grid_edge"] else "no",
        ]
        for c in candidates
    ]
    if names is None:
        return table(header, rows)
    return table(["law", *header], [[name, *row] for name, row in zip(names, rows, strict=True)])


def compare_text(plans: list[dict[str, Any]], num_gpus: int) -> str:
    """The founding comparison: one row a recipe."""
    kinds = list(plans[0]["gpu_hours"])
    launches = [name for name in plans[0]["hours"] if plans[0]["launches"][name]["num_processes"] in (1, num_gpus)]
    header = ["recipe", "N", "D", "20N", "D/N", "steps to 20N", "loss", *(f"{name}, GiB" for name in launches)]
    header += [f"{num_gpus}x {kind}" for kind in kinds]
    rows = [
        [
            plan["recipe"].rsplit("/", 1)[-1].removesuffix(".yaml"),
            f"{plan['parameters']['total']:,}",
            f"{plan['tokens'] / 1e9:.2f}B",
            f"{plan['tokens_at_20_per_parameter'] / 1e9:.2f}B",
            f"{plan['tokens_per_parameter']:.1f}",
            f"{plan['steps_at_20_per_parameter']:,}",
            f"{plan['predicted_loss']:.4f}",
            *(gib(plan["memory_bytes"][launch]) for launch in launches),
            *(
                duration(plan["hours"][launches[-1]][kind]) + (f" {money(plan['dollars'], kind)}" if plan["dollars"] else "")
                for kind in kinds
            ),
        ]
        for plan in plans
    ]
    return (
        f"loss by law {plans[0]['law']}; memory per GPU at each recipe's micro-batch; time on {num_gpus} GPU(s) = D x FLOPs per"
        f" token / (MFU x peak x GPUs), each MFU as `plan.py RECIPE` shows it\n{table(header, rows)}\n\n"
        + "\n".join(f"warning: {plan['recipe']}: {warning}" for plan in plans for warning in plan["warnings"])
    )


def models_text(models: list[dict[str, Any]]) -> str:
    """The published shapes."""
    header = ["model", "layers", "width", "heads (kv)", "FFN", "context", "vocabulary", "N", "D", "D/N", "FLOPs", "6ND"]
    rows = [
        [
            m["name"],
            str(m["num_hidden_layers"]),
            str(m["hidden_size"]),
            f"{m['num_attention_heads']} ({m['num_key_value_heads']})",
            str(m["intermediate_size"]),
            f"{m['context']:,}",
            f"{m['vocab_size']:,}",
            f"{m['parameters']:,}",
            f"{m['tokens'] / 1e12:g}T" if m["tokens"] else "-",
            f"{m['tokens_per_parameter']:.1f}" if m["tokens"] else "-",
            f"{m['flops']:.3g}" if m["tokens"] else "-",
            f"{m['flops_6nd']:.3g}" if m["tokens"] else "-",
        ]
        for m in models
    ]
    return table(header, rows) + "\nany of these is a --family; plan.py models NAME shows one whole, --write makes it a recipe"
