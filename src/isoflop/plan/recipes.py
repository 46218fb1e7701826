"""Every number of one recipe: what it is, what it costs, what it needs, and what the laws promise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from isoflop import cost, hardware
from isoflop.data.manifest import FILE_NAME, read_manifest
from isoflop.errors import UserError
from isoflop.plan.launches import config_of, known_launches
from isoflop.recipe import Model, Optimizer, Recipe, Training
from isoflop.recipe_data import HubSource
from isoflop.scaling.laws import PUBLISHED, Law, critical_batch_tokens, effective_tokens, load_law

# Tokens of a dataset's training split as its card states them (by another tokenizer: a few percent off), until it is prepared.
STATED_TOKENS = {
    ("DKYoon/SlimPajama-6B", None): 6e9,
    ("cerebras/SlimPajama-627B", None): 627e9,
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): 10e9,
    ("HuggingFaceFW/fineweb-edu", "sample-100BT"): 100e9,
}
SHOWN_GPUS = ("rtx5090", "a6000", "a100", "h20", "h100", "h200")
COMPUTE_OPTIMAL = 20  # tokens per parameter: the rule of thumb from Hoffmann et al. 2022, table 3
LAYERS_ON = {  # who keeps which activations
    "one GPU, DDP": cost.Launch("", "single", gpu=True),
    "ZeRO-1, FSDP2": cost.Launch("", "fsdp2", gpu=True),
    "CPU": cost.Launch("", "single", bf16=False),
    "CPU in bf16": cost.Launch("", "single"),
}
WORTH_SAYING_NATS = 0.01  # about what two seeds of one run differ by
FAR_ABOVE_CRITICAL = 2  # twice the critical batch: three times the tokens of a small-batch run (1 + B / B_crit)


class Machine(NamedTuple):
    """One kind of GPU as the user described it."""

    name: str
    peak_flops_per_s: float
    memory_bytes: int | None
    mfu: float | None = None
    """As given or measured; the table's where None."""
    mfu_source: str = "given"

    def mfu_for(self, parameters: float) -> tuple[float | None, str]:
        """MFU and where it comes from; none for hardware that is not known."""
        if self.mfu is not None:
            return self.mfu, self.mfu_source
        if self.name not in hardware.GPUS:
            return None, "n/a: not known for this hardware; give --mfu, or add --measure there"
        row = hardware.mfu_row(self.name, parameters)
        return row.mfu, row.source

    def link_seconds(self, count: float) -> float | None:
        """Seconds that sending so many bytes to the other GPUs of the machine takes; None for hardware that is not known."""
        gpu = hardware.GPUS.get(self.name)
        return gpu and count / (hardware.LINK_SHARE_REACHED * gpu.link_bytes_per_s)

    def hours(self, flops: float, parameters: float, num_gpus: int = 1) -> float | None:
        """Hours of a run, None where the MFU is not known."""
        mfu, _ = self.mfu_for(parameters)
        return mfu and hardware.train_hours(flops, self.peak_flops_per_s, num_gpus, mfu)


def machines(name: str | None, peak_tflops: float | None, mfu: float | None) -> list[Machine]:
    """The GPU that the user named, or described by its peak; the usual ones where neither."""
    if peak_tflops is not None:
        if name in hardware.GPUS:
            peak = hardware.GPUS[name].peak_bf16_flops / 1e12
            raise UserError(
                f"--peak-tflops {peak_tflops:g}: {name} is known with {peak:g}; leave it out, or give --gpu another name"
            )
        return [Machine(name or "this GPU", peak_tflops * 1e12, None, mfu)]
    names = [hardware.gpu_name(name)] if name is not None else SHOWN_GPUS
    return [Machine(kind, hardware.GPUS[kind].peak_bf16_flops, hardware.GPUS[kind].memory_bytes, mfu) for kind in names]


def plan_recipe(
    recipe: Recipe, name: str, law: Law, kinds: list[Machine], num_gpus: int = 2, price_per_gpu_hour: float | None = None
) -> dict[str, Any]:
    """All numbers of a recipe, at full precision, with their units in the keys."""
    plan = {"recipe": name} | size(recipe)
    tokens = plan["tokens"]
    losses = {known: promised(load_law(known), recipe, tokens) for known in PUBLISHED}
    losses[law.name] = promised(law, recipe, tokens)
    plan |= {
        "repeated_data": repeated_data(recipe, tokens, law),
        "law": law.name,
        "predicted_loss": losses[law.name]["predicted_loss"],
        "predicted_loss_interval": losses[law.name]["predicted_loss_interval"],
        "laws": losses,
        "uniform_loss": math.log(recipe.model.vocab_size),
        "critical_batch_tokens": critical_batch_tokens(
            min(losses[law.name]["predicted_loss"], math.log(recipe.model.vocab_size))
        ),
    }
    return plan | needs(recipe, plan, kinds, num_gpus, price_per_gpu_hour) | {"warnings": warnings(plan, law)}


def size(recipe: Recipe) -> dict[str, Any]:
    """Parameters, FLOPs, tokens and steps."""
    model, training = recipe.model, recipe.training
    classes, parameters = cost.parameters_by_class(model), cost.parameters(model)
    steps = training.num_steps(parameters)
    tokens = steps * training.tokens_per_step
    flops_per_token = cost.flops_per_token(model, training.sequence_length)
    return {
        "model": shape(model),
        "parameters": {"total": parameters, "without_embedding": parameters - classes["embedding"] - classes["position"]}
        | classes,
        "sequence_length": training.sequence_length,
        "micro_batch_size": training.micro_batch_size,
        "micro_batch_tokens": training.micro_batch_size * training.sequence_length,
        "activation_bytes_per_token_and_layer": {
            who: cost.layer_activation_bytes(model, training.sequence_length, on.arithmetic, on.compiles(training))
            for who, on in LAYERS_ON.items()
        },
        "moments_bytes_per_parameter": cost.optimizer_bytes_per_parameter(recipe.optimizer),
        "activation_checkpointing": training.activation_checkpointing,
        "matmul_parameters": cost.matmul_parameters(model),
        "flops_per_token": flops_per_token,
        "flops_per_token_6n": 6 * parameters,
        "flops": tokens * flops_per_token,
        "tokens_per_step": training.tokens_per_step,
        "steps": steps,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "tokens_at_20_per_parameter": COMPUTE_OPTIMAL * parameters,
        "steps_at_20_per_parameter": -(-COMPUTE_OPTIMAL * parameters // training.tokens_per_step),
    }


def shape(model: Model) -> dict[str, Any]:
    """A shape under transformers' LLaMA names, for either class."""
    s = cost.shape_of(model)
    return {
        "model_type": model.model_type,
        "num_hidden_layers": s.num_layers,
        "hidden_size": s.hidden_size,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_key_value_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.intermediate_size,
        "vocab_size": s.vocab_size,
        "tie_word_embeddings": s.tied,
    }


def promised(law: Law, recipe: Recipe, tokens: float) -> dict[str, Any]:
    """What a law says of a recipe, and of the best split of as many FLOPs (C = 6 N D)."""
    n = law.size(recipe.model)
    best_n, best_d = law.optimum(6 * n * tokens)
    return {
        "predicted_loss": float(law.loss(n, tokens)),
        "predicted_loss_interval": law.promise(recipe.model, tokens).interval,
        "counted_parameters": n,
        "optimal_parameters": best_n,
        "optimal_tokens": best_d,
        "optimal_tokens_per_parameter": best_d / best_n,
        "optimal_predicted_loss": float(law.loss(best_n, best_d)),
        "extrapolates": law.extrapolates(n, tokens),
    }


def repeated_data(recipe: Recipe, tokens: int, law: Law) -> dict[str, Any] | None:
    """Epochs, and what the repetition costs; None where the dataset's size is not known before it is prepared."""
    unique, source = dataset_tokens(recipe)
    if unique is None:
        return None
    worth = float(effective_tokens(tokens, unique))
    return {
        "unique_tokens": unique,
        "unique_tokens_source": source,
        "epochs": tokens / unique,
        "effective_tokens": worth,
        "predicted_loss": float(law.loss(law.size(recipe.model), worth)),
    }


def dataset_tokens(recipe: Recipe) -> tuple[float | None, str]:
    """Training tokens of a recipe's data: counted where it is prepared, as its card states them where it is not."""
    path = Path(recipe.data.prepared_dir) / FILE_NAME
    if path.is_file():
        manifest = read_manifest(recipe.data.prepared_dir)
        return manifest.windows("train") * manifest.sequence_length, f"counted, {path}"
    source = recipe.data.source
    stated = STATED_TOKENS.get((source.name, source.config)) if isinstance(source, HubSource) else None
    return stated, f"stated on the card of {getattr(source, 'name', 'this data')}"


def needs(
    recipe: Recipe, plan: dict[str, Any], kinds: list[Machine], num_gpus: int, price_per_gpu_hour: float | None
) -> dict[str, Any]:
    """Memory of every launch, the largest micro-batch on every GPU, hours, and dollars."""
    model, training, optimizer = recipe.model, recipe.training, recipe.optimizer
    launches = known_launches(num_gpus)
    parts = {x.name: cost.predicted_memory(model, training, optimizer, x) for x in launches}
    on_gpu = [launch for launch in launches if launch.gpu]
    n, flops = plan["parameters"]["total"], plan["flops"]
    gpu_hours = {kind.name: kind.hours(flops, n) for kind in kinds}
    return {
        "launches": {
            x.name: {
                "engine": x.engine,
                "num_processes": x.num_processes,
                "config": str(config_of(x)) if config_of(x).is_file() else None,
            }
            for x in launches
        },
        "memory_bytes": {name: memory.total for name, memory in parts.items()},
        "memory_by_part_bytes": {name: memory._asdict() for name, memory in parts.items()},
        "largest_micro_batch": {
            launch.name: {
                kind.name: cost.largest_micro_batch(model, training, optimizer, launch, kind.memory_bytes)
                for kind in kinds
                if kind.memory_bytes is not None
            }
            for launch in on_gpu
        },
        "communication": communication(model, training, optimizer, on_gpu, kinds),
        "mfu": mfu_of(kinds, n),
        "peak_flops_per_s": {kind.name: kind.peak_flops_per_s for kind in kinds},
        # MFU is of bf16 products: what fp32 takes is not predicted.
        "hours": {x.name: {kind.name: kind.hours(flops, n, x.num_processes) for kind in kinds} for x in on_gpu if x.bf16},
        "gpu_hours": gpu_hours,
        "dollars": dollars_of(gpu_hours, price_per_gpu_hour),
    }


def communication(
    model: Model, training: Training, optimizer: Optimizer, launches: list[cost.Launch], kinds: list[Machine]
) -> list[dict[str, Any]]:
    """Of every launch of several GPUs in one machine: what each GPU sends in a step, memory, and on each kind of GPU how long it
    takes and computes beside it, nothing overlapping. FSDP2 with either reduction, and for which kinds `auto` chooses it."""
    rows = []
    for launch in launches:
        windows, rest = divmod(
            training.tokens_per_step, training.micro_batch_size * training.sequence_length * launch.num_processes
        )
        if launch.num_processes == 1 or rest or not windows or "node" in launch.name:
            continue
        reductions: tuple[cost.Reduction, ...] = ("step", "micro_batch") if launch.engine == "fsdp2" else ("step",)
        for reduction in reductions:
            variant = launch._replace(reduction=reduction)
            sent = cost.communicated_bytes(model, training, variant)
            row: dict[str, Any] = {"launch": launch.name, "reduction": reduction, "bytes_per_step": sent}
            row["memory_bytes"] = cost.predicted_memory(model, training, optimizer, variant).total
            row["seconds_per_step"] = {kind.name: kind.link_seconds(sent) for kind in kinds}
            row["chosen"] = [
                kind.name
                for kind in kinds
                if kind.memory_bytes
                and cost.with_reduction(launch, model, training, optimizer, kind.memory_bytes).reduction == reduction
            ]
            rows.append(row)
    return rows


def mfu_of(kinds: list[Machine], parameters: float) -> dict[str, dict[str, Any]]:
    """MFU of each kind of GPU, and where it comes from."""
    found = {kind.name: kind.mfu_for(parameters) for kind in kinds}
    return {name: {"mfu": mfu, "source": source} for name, (mfu, source) in found.items()}


def dollars_of(gpu_hours: dict[str, float | None], price_per_gpu_hour: float | None) -> dict[str, float | None] | None:
    """What the hours of each kind of GPU cost, where a price was given."""
    if price_per_gpu_hour is None:
        return None
    return {name: hours and hours * price_per_gpu_hour for name, hours in gpu_hours.items()}


def warnings(plan: dict[str, Any], law: Law) -> list[str]:
    """What a user should know before three weeks of GPU time."""
    found = []
    promise, repeated, batch = plan["laws"][law.name], plan["repeated_data"], plan["tokens_per_step"]
    if (lost := promise["predicted_loss"] - promise["optimal_predicted_loss"]) > WORTH_SAYING_NATS:
        found.append(
            f"D/N {plan['tokens_per_parameter']:.1f}: the same FLOPs split by law {law.name}, {promise['optimal_parameters']:.3g}"
            f" parameters on {promise['optimal_tokens']:.3g} tokens, would reach a loss {lost:.4f} nats lower"
        )
    if repeated and repeated["epochs"] > 1:
        extra = repeated["predicted_loss"] - plan["predicted_loss"]
        found.append(
            f"{repeated['epochs']:.2f} epochs: {plan['tokens']:,} tokens of {repeated['unique_tokens']:,.0f}"
            f" ({repeated['unique_tokens_source']}) are worth {repeated['effective_tokens']:,.0f} fresh ones: {extra:+.4f} nats"
        )
    if batch > FAR_ABOVE_CRITICAL * (critical := plan["critical_batch_tokens"]):
        found.append(
            f"training.tokens_per_step = {batch:,} is {batch / critical:.1f} times the critical batch of {critical:,.0f} tokens:"
            f" the same loss takes {1 + batch / critical:.1f} times the tokens of a small-batch run; lower it"
        )
    if plan["predicted_loss"] > plan["uniform_loss"]:
        found.append(
            f"law {law.name} promises {plan['predicted_loss']:.2f} nats, more than the {plan['uniform_loss']:.2f} ="
            " ln(vocabulary) of guessing: it says nothing about runs as small as this one; fit a law to some"
        )
    if beyond := promise["extrapolates"]:
        found.append(f"law {law.name} is extrapolated: {'; '.join(beyond)}")
    return found
