"""Plan a recipe: what it costs, what each launch needs, how long it takes, and what the laws predict.

Entered by `plan`, which reads a recipe and returns a `Plan`; nothing is trained, and no GPU is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.config.recipe_data import HubSource
from isoflop.data.manifest import FILE_NAME, Manifest, read_manifest
from isoflop.data.notes import data_notes
from isoflop.plan import cost, hardware
from isoflop.plan.gpus import GpuOptions, GpuSpec
from isoflop.plan.hyperparameter_comparison import compare_hyperparameters
from isoflop.plan.launches import known_launches
from isoflop.plan.optimizer_cost import hidden_matrices, moments_bytes, update_flops
from isoflop.plan.results import (
    Communication,
    GpuCost,
    LaunchNeeds,
    LawPrediction,
    MemoryAndTime,
    Plan,
    RepeatedData,
    TrainingStats,
)
from isoflop.scaling.laws import (
    DEFAULT_LAW,
    PUBLISHED,
    Law,
    critical_batch_tokens,
    effective_tokens,
    load_law,
    prediction_json,
)
from isoflop.utils.errors import UserError

# Tokens of a dataset's training split by its card (of another tokenizer: a few percent off), until it is prepared.
STATED_TOKENS = {
    ("DKYoon/SlimPajama-6B", None): 6e9,
    ("cerebras/SlimPajama-627B", None): 627e9,
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): 10e9,
    ("HuggingFaceFW/fineweb-edu", "sample-100BT"): 100e9,
}
ACTIVATIONS_ON = {  # launches that keep different activations
    "one GPU, DDP": cost.Launch("", "single", gpu=True),
    "ZeRO-1, FSDP2": cost.Launch("", "fsdp2", gpu=True),
    "CPU": cost.Launch("", "single", bf16=False),
    "CPU in bf16": cost.Launch("", "single"),
}
WORTH_A_WARNING_NATS = 0.01  # about the random seed noise of two runs
FIT_A_LAW = "fit one to small runs of your own (isoflop sweep), and name it by --law"
FAR_ABOVE_CRITICAL = 2  # twice the critical batch: three times the tokens of a small-batch run (1 + B / B_crit)


def plan(
    recipe: Recipe | str | Path,
    overrides: Iterable[str] = (),
    *,
    law: Law | str | Path | None = None,
    gpu: str | None = None,
    num_gpus: int | None = None,
    mfu: float | None = None,
    peak_tflops: float | None = None,
    price_per_gpu_hour: float | None = None,
    measure: bool = False,
) -> Plan:
    """Return every number of a recipe: a file, the name of a shipped one, or a loaded `Recipe`.

    overrides: `section.key=value`, as on the command line. law: a published law or a file; default: the recipe's, else hoffmann.
    gpu: a name of `hardware.GPUS`; default: six usual ones. num_gpus: default: tables of 1, 2, 4 and 8. mfu: share of the peak;
    default: the table's. peak_tflops: dense bf16 TFLOP/s of a GPU that is not in the table. measure: run some micro-batches here.

    Raises `UserError` for a recipe, law, GPU or number that is refused.
    """
    options = GpuOptions(gpu, num_gpus, mfu, peak_tflops, price_per_gpu_hour)
    arguments: tuple[str, ...] = ()
    if not isinstance(recipe, Recipe):
        arguments = (str(recipe), *overrides)
        recipe = load_recipe(recipe, list(overrides := arguments[1:]))
    elif list(overrides):
        raise UserError(f"overrides = {list(overrides)} are for a file; change a loaded recipe by recipe.model_copy(update=...)")
    if measure and mfu is not None:
        raise UserError(f"--mfu {mfu:g} and --measure both set the MFU; leave one out")
    own_law = get_law(law if law is not None else recipe.law)
    name = arguments[0] if arguments else "recipe"
    if not measure:
        return replace(plan_recipe(recipe, name, own_law, options), arguments=arguments)
    from isoflop.plan.step_benchmark import StepBenchmark, benchmark_step  # torch: only where steps are run

    measured: StepBenchmark = benchmark_step(recipe)
    specs = _with_measured_mfu(options, measured.device, measured.flops_per_s, measured.mfu)
    return replace(plan_recipe(recipe, name, own_law, options, specs), arguments=arguments, measured=measured)


def get_law(law: Law | str | Path | None) -> Law:
    """Return a law by itself, its name or its file; default: hoffmann."""
    return law if isinstance(law, Law) else load_law(str(law or DEFAULT_LAW))


def plan_recipe(
    recipe: Recipe, name: str, law: Law, options: GpuOptions, specs: list[GpuSpec] | None = None, num_gpus: int = 2
) -> Plan:
    """Return the plan of a loaded recipe; `num_gpus` is the default of the options' count."""
    stats = training_stats(recipe)
    laws = {known: law_prediction(load_law(known), recipe, stats.tokens) for known in PUBLISHED}
    laws[law.name] = law_prediction(law, recipe, stats.tokens)
    by_formula = float(law.loss(law.model_size(recipe.model), stats.tokens))
    plan = Plan(
        recipe=recipe,
        name=name,
        arguments=(),
        options=options,
        stats=stats,
        repeated_data=repeated_data(recipe, stats.tokens, law),
        law=law.name,
        laws=laws,
        critical_batch_tokens=critical_batch_tokens(min(by_formula, math.log(recipe.model.vocab_size))),
        memory_and_time=memory_and_time(recipe, stats, options, specs or options.specs(), num_gpus),
        hyperparameters=compare_hyperparameters(recipe, stats.tokens, law),
        recipe_warnings=(),
    )
    return replace(plan, recipe_warnings=(*_warnings(plan), *data_notes(recipe, prepared_manifest(recipe))))


def _with_measured_mfu(options: GpuOptions, device: str, flops_per_s: float, mfu: float | None) -> list[GpuSpec]:
    """Return the GPUs with the measured MFU for this machine's: by its name, or as the user described it."""
    specs = options.specs()
    if options.peak_tflops is not None:
        mfu, name = flops_per_s / specs[0].peak_flops_per_s, specs[0].name
    elif mfu is None:
        return specs
    else:
        name = hardware.gpu_name(device)
    this = next((spec for spec in specs if spec.name == name), None) or GpuOptions(gpu=name).specs()[0]
    others = [spec for spec in specs if spec.name != name]
    return [this._replace(mfu=mfu, mfu_source="measured just now on this machine, one device"), *others]


def training_stats(recipe: Recipe) -> TrainingStats:
    """Return parameters, FLOPs, tokens and steps."""
    model, training = recipe.model, recipe.training
    return TrainingStats(
        parameters_by_class=cost.parameters_by_class(model),
        sequence_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size,
        activation_bytes_per_token_and_layer={
            kind: cost.layer_activation_bytes(model, training.sequence_length, launch.arithmetic, launch.compiles(training))
            for kind, launch in ACTIVATIONS_ON.items()
        },
        moments_bytes=moments_bytes(model, recipe.optimizer),
        update_flops=update_flops(model, recipe.optimizer),
        muon_matrices=len(hidden_matrices(model)) if recipe.optimizer.name == "muon" else 0,
        activation_checkpointing=training.activation_checkpointing,
        matmul_parameters=cost.matmul_parameters(model),
        flops_per_token=cost.flops_per_token(model, training.sequence_length),
        tokens_per_step=training.tokens_per_step,
        steps=training.num_steps(cost.parameters(model)),
    )


def law_prediction(law: Law, recipe: Recipe, tokens: float) -> LawPrediction:
    """Return a law's prediction for a recipe, and its best split of as many FLOPs."""
    n, model = law.model_size(recipe.model), recipe.model
    best_n, best_d = law.optimum(6 * n * tokens)
    known = law.outside(best_n, best_d, model.vocab_size) is None
    return LawPrediction(
        **prediction_json(law.predict(model, tokens, recipe.optimizer.name)),
        counted_parameters=n,
        optimal_parameters=best_n if known else None,
        optimal_tokens=best_d if known else None,
        optimal_tokens_per_parameter=best_d / best_n if known else None,
        optimal_predicted_loss=float(law.loss(best_n, best_d)) if known else None,
        extrapolates=law.extrapolates(n, tokens, cost.shape_of(model).num_layers),
    )


def repeated_data(recipe: Recipe, tokens: int, law: Law) -> RepeatedData | None:
    """Return epochs and their cost; None where the dataset's size is not known before it is prepared."""
    unique, source = dataset_tokens(recipe)
    if unique is None:
        return None
    effective = float(effective_tokens(tokens, unique))
    n, vocab_size = law.model_size(recipe.model), recipe.model.vocab_size
    known = all(law.outside(n, count, vocab_size, recipe.optimizer.name) is None for count in (tokens, effective))
    return RepeatedData(unique, source, tokens / unique, effective, float(law.loss(n, effective)) if known else None)


def dataset_tokens(recipe: Recipe) -> tuple[float | None, str]:
    """Return the training tokens of a recipe's data and their source: counted where prepared, else stated on its card."""
    if manifest := prepared_manifest(recipe):
        return manifest.windows("train") * manifest.sequence_length, f"counted, {Path(recipe.data.prepared_dir) / FILE_NAME}"
    source = recipe.data.source
    stated = STATED_TOKENS.get((source.name, source.config)) if isinstance(source, HubSource) else None
    return stated, f"stated on the card of {getattr(source, 'name', 'this data')}"


def prepared_manifest(recipe: Recipe) -> Manifest | None:
    """Return the manifest of a recipe's prepared data; None where it is not prepared."""
    prepared = (Path(recipe.data.prepared_dir) / FILE_NAME).is_file()
    return read_manifest(recipe.data.prepared_dir) if prepared else None


def memory_and_time(
    recipe: Recipe, stats: TrainingStats, options: GpuOptions, specs: list[GpuSpec], num_gpus: int = 2
) -> MemoryAndTime:
    """Return memory of every launch, the largest micro-batch on every GPU, hours, and dollars."""
    model, training, optimizer = recipe.model, recipe.training, recipe.optimizer
    known = known_launches(options.num_gpus or num_gpus, optimizer.name)
    rows = []
    for launch in known.launches:
        largest = {
            spec.name: cost.largest_micro_batch(model, training, optimizer, launch, spec.memory_bytes)
            for spec in specs
            if launch.gpu and spec.memory_bytes is not None
        }
        # MFU is of bf16 matrix products: the time of fp32 is not predicted.
        timed = specs if launch.gpu and launch.bf16 else []
        hours = {spec.name: spec.recipe_hours(stats, launch.num_processes) for spec in timed}
        memory = cost.predicted_memory(model, training, optimizer, launch)
        rows.append(LaunchNeeds(launch, known.configs.get(launch.name), memory, largest, hours))
    price = options.price_per_gpu_hour
    return MemoryAndTime(
        launches=tuple(rows),
        communication=tuple(communication(recipe, [launch for launch in known.launches if launch.gpu], specs)),
        gpus=tuple(gpu_cost(spec, spec.recipe_hours(stats), stats.parameters, price) for spec in specs),
        price_per_gpu_hour=price,
        skipped_launches=known.skipped,
    )


def gpu_cost(spec: GpuSpec, hours: float | None, parameters: float, price_per_gpu_hour: float | None) -> GpuCost:
    """Return MFU, GPU-hours and dollars of a run of so many hours on one GPU."""
    mfu, source = spec.mfu_for(parameters)
    dollars = None if price_per_gpu_hour is None else hours and hours * price_per_gpu_hour
    return GpuCost(spec, mfu, source, hours, dollars)


def communication(recipe: Recipe, launches: list[cost.Launch], specs: list[GpuSpec]) -> list[Communication]:
    """Return what each GPU sends in a step, for every launch of several GPUs in one machine.

    FSDP2 has a row for either gradient reduction, with the GPUs for which `auto` chooses it.
    """
    model, training, optimizer = recipe.model, recipe.training, recipe.optimizer
    rows = []
    for launch in launches:
        windows, rest = divmod(
            training.tokens_per_step, training.micro_batch_size * training.sequence_length * launch.num_processes
        )
        if launch.num_processes == 1 or launch.num_machines > 1 or rest or not windows:
            continue
        reductions: tuple[cost.Reduction, ...] = ("step", "micro_batch") if launch.engine == "fsdp2" else ("step",)
        for reduction in reductions:
            variant = launch._replace(reduction=reduction)
            sent = cost.communicated_bytes(model, training, variant, optimizer)
            memory = cost.predicted_memory(model, training, optimizer, variant).total
            chosen = [
                spec.name
                for spec in specs
                if spec.memory_bytes
                and cost.with_reduction(launch, model, training, optimizer, spec.memory_bytes).reduction == reduction
            ]
            seconds = {spec.name: spec.link_seconds(sent) for spec in specs}
            rows.append(Communication(launch.name, reduction, sent, memory, seconds, chosen))
    return rows


def _warnings(plan: Plan) -> list[str]:
    """Return what to know before weeks of GPU time, one line each."""
    found = []
    own, repeated, batch = plan.prediction, plan.repeated_data, plan.stats.tokens_per_step
    if own.predicted_loss is None:
        found.append(f"law {plan.law} has no prediction: {own.outside}; {FIT_A_LAW}")
    elif own.optimal_predicted_loss and (lost := own.predicted_loss - own.optimal_predicted_loss) > WORTH_A_WARNING_NATS:
        found.append(
            f"D/N {plan.stats.tokens_per_parameter:.1f}: the same FLOPs split by law {plan.law}, {own.optimal_parameters:.3g}"
            f" parameters on {own.optimal_tokens:.3g} tokens, would reach a loss {lost:.4f} nats lower"
        )
    if repeated and repeated.epochs > 1:
        worse = ""
        if repeated.predicted_loss and own.predicted_loss:
            worse = f": {repeated.predicted_loss - own.predicted_loss:+.4f} nats"
        found.append(
            f"{repeated.epochs:.2f} epochs: {plan.stats.tokens:,} tokens of {repeated.unique_tokens:,.0f}"
            f" ({repeated.unique_tokens_source}) are worth {repeated.effective_tokens:,.0f} fresh ones{worse}"
        )
    if batch > FAR_ABOVE_CRITICAL * (critical := plan.critical_batch_tokens):
        found.append(
            f"training.tokens_per_step = {batch:,} is {batch / critical:.1f} times the critical batch of {critical:,.0f} tokens:"
            f" the same loss takes {1 + batch / critical:.1f} times the tokens of a small-batch run; lower it"
        )
    if own.extrapolates and own.outside is None:
        found.append(f"law {plan.law} is extrapolated: {'; '.join(own.extrapolates)}")
    return found
