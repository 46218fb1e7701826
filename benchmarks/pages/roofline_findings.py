"""The cases of docs/roofline.md and the paragraphs that say what follows from them, every number computed."""

from __future__ import annotations

from pathlib import Path

import roofline_model as roofline
from roofline_model import Case, Machine, Time, Variant

from isoflop.config.loading import load_recipe
from isoflop.plan import cost, hardware
from isoflop.utils.tables import markdown

RECIPES_FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = ("llama2_1.36b", "modern_124m", "llama3_1.5b")
VARIANTS: tuple[Variant, ...] = ("before", "eager", "compiled")
PCIE_BYTES_PER_S = roofline.LINK_SHARE * hardware.GPUS["a6000"].link_bytes_per_s
BRIDGE_BYTES_PER_S = roofline.LINK_SHARE * roofline.NVLINK_BRIDGE_BYTES_PER_S
NVLINK_BYTES_PER_S = roofline.LINK_SHARE * hardware.GPUS["h100"].link_bytes_per_s
H100 = Machine("one H100 SXM", "h100", 1, NVLINK_BYTES_PER_S)
H100_PAIR = Machine("two H100 SXM over NVLink", "h100", 2, NVLINK_BYTES_PER_S)
A6000_PAIR = Machine("two A6000 over PCIe 4", "a6000", 2, PCIE_BYTES_PER_S)


def case_of(name: str, machine: Machine) -> Case:
    """A recipe on a machine, by the launch config that suits it: one GPU, DDP for the 124M, FSDP2 for what two A6000 share."""
    recipe, two = load_recipe(RECIPES_FOLDER / f"{name}.yaml"), machine.num_gpus
    if two == 1:
        launch = cost.Launch("1gpu", "single")
    elif name == "modern_124m":
        launch = cost.Launch("2gpu_ddp", "ddp", two)
    else:
        launch = cost.Launch("2gpu_fsdp2", "fsdp2", two, True, two)
    return Case(name, recipe, machine, launch)


def cases() -> list[Case]:
    """All that the page shows."""
    return [case_of(name, machine) for name in RECIPES for machine in (H100, A6000_PAIR)]


def times(case: Case, variant: Variant) -> dict[str, Time]:
    """Time by component."""
    return roofline.step_times(case.machine, roofline.step_costs(case, variant))


def computing_s(case: Case) -> float:
    """A step of compiled layers without communication."""
    return sum(time.seconds for name, time in times(case, "compiled").items() if name != roofline.COMMUNICATION)


def findings() -> str:
    """A paragraph for each, with its numbers."""
    paragraphs = (elementwise_finding, loss_finding, attention_finding, weights_finding, communication_finding, host_finding,
                  optimizer_finding, reports_finding)  # fmt: skip
    return "\n\n".join(paragraph() for paragraph in paragraphs)


def share(by_component: dict[str, Time], component: str) -> float:
    """Of the step's time."""
    return by_component[component].seconds / roofline.step_s(by_component)


def elementwise_finding() -> str:
    """Compile by default."""
    rows = []
    for name in RECIPES:
        case = case_of(name, H100)
        cells = [f"`{name}`"]
        both = [times(case, variant) for variant in ("eager", "compiled")]
        for by_component in both:
            moved = by_component[roofline.ELEMENTWISE].bytes / case.recipe.training.tokens_per_step
            cells += [f"{moved / 1e6:.1f}", f"{share(by_component, roofline.ELEMENTWISE):.0%}"]
        rows.append([*cells, f"{roofline.step_s(both[0]) / roofline.step_s(both[1]):.2f}"])
    header = ["recipe", "MB a token, eager", "share of the step", "compiled", "share of the step", "times as fast"]
    return (
        "**Compile layers by default on a GPU.** Norms, rotary positions, SwiGLU and casts compute next to nothing and are bound"
        " by memory. Two thirds of the eager bytes of the hidden size belong to the two RMSNorms in fp32: 28 bytes a dimension"
        " forward and 104 backward, where compiled ones need 6 and 27. FSDP2's bf16 stream needs a quarter less than autocast's"
        " fp32 one. The price is compilation in the first step. On one H100:\n\n" + markdown(header, rows)
    )


def loss_finding() -> str:
    """Larger chunks and a compiled softmax."""
    modern, llama3 = case_of("modern_124m", H100), case_of("llama3_1.5b", H100)
    old, rest = times(modern, "before")[roofline.LOSS], times(modern, "compiled")
    new, m = rest[roofline.LOSS], modern.micro_batches
    others = roofline.step_s(rest) - new.seconds
    old3, new3 = (times(llama3, variant)[roofline.LOSS] for variant in ("before", "eager"))
    big, launches_s = llama3.micro_batches, old3.kernels * roofline.LAUNCH_S
    products_s = sum(work.flops for work in roofline.loss(llama3, "eager")) / H100.flops_per_s(roofline.LOSS)
    table = llama3.shape.hidden_size * llama3.shape.vocab_size
    sums_s = 24 * table / H100.memory_bytes_per_s
    return (
        "**Make the loss's chunks large and its softmax one compiled function.** On one H100, in a micro-batch of `modern_124m`"
        f" (vocabulary 50,304), the old loss launched {old.kernels / m:,.0f} kernels: {1e3 * old.seconds / m:.0f} ms of launches"
        f" beside {1e3 * others / m:.0f} ms for everything else with compiled layers. Now it launches {new.kernels / m:.0f} and"
        f" takes {1e3 * new.seconds / m:.0f} ms, bound by arithmetic. In one of `llama3_1.5b` (128,256) the old loss was bound by"
        f" memory: {old3.bytes / big / 1e9:.0f} GB, {1e3 * old3.seconds / big:.0f} ms (its launches alone"
        f" {1e3 * launches_s / big:.0f} ms) for products of {1e3 * products_s:.0f} ms. Now it moves"
        f" {new3.bytes / big / 1e9:.0f} GB and takes {1e3 * new3.seconds / big:.0f} ms. Of what is left, the head's fp32"
        f" gradient is set to zero, scaled by the incoming gradient and added to the weight's: {24 * table / 1e9:.0f} GB,"
        f" {1e3 * sums_s:.1f} ms."
    )


def attention_finding() -> str:
    """What causality does to MFU."""
    case = case_of("llama2_1.36b", H100)
    works = roofline.step_costs(case, "compiled")
    executed = sum(work.flops for work in works if work.component == roofline.ATTENTION)
    counted = sum(work.counted_flops or 0 for work in works if work.component == roofline.ATTENTION)
    flops, rate = sum(work.flops for work in works), H100.flops_per_s(roofline.ATTENTION)
    credited = flops - executed + counted
    return (
        "**Attention's count flatters MFU a little.** The FLOP count does not halve attention for causality. A causal kernel"
        f" executes 1 of 2 products forward and 2.5 of 4 backward, {executed / counted:.0%} of the count. `llama2_1.36b` executes"
        f" {flops / 1e12:,.0f} TFLOP a step and is credited with {credited / 1e12:,.0f}, so its MFU is {credited / flops - 1:.1%}"
        f" higher than the share of the peak that runs. Attention still loses time. At {rate / 1e12:.0f} TFLOP/s executed"
        f" ({rate * counted / executed / 1e12:.0f} as counted) it takes {share(times(case, 'compiled'), roofline.ATTENTION):.0%}"
        f" of the compiled step for {executed / flops:.0%} of its arithmetic. FlashAttention-3 is worth trying on an H100."
    )


def weights_finding() -> str:
    """What every micro-batch costs whatever its size."""
    case = case_of("llama2_1.36b", H100)
    by_component = times(case, "compiled")
    time = by_component[roofline.WEIGHTS]
    moved, milliseconds = time.bytes / case.micro_batches, 1e3 * time.seconds / case.micro_batches
    return (
        "**A micro-batch has a fixed cost: make it as large as fits.** Under autocast each one casts the weights to bf16, casts"
        " their gradients to fp32 and adds them up: 24 bytes a parameter, which compiling layers does not change. For"
        f" `llama2_1.36b` on an H100 that is {moved / 1e9:.0f} GB and {milliseconds:.1f} ms with the embedding,"
        f" {share(by_component, roofline.WEIGHTS):.1%} of the compiled step at micro-batch"
        f" {case.recipe.training.micro_batch_size} and nearly twice that at half of it. Adding to the fp32 gradient inside the"
        " matrix product, as the loss does for the head, would need 8 bytes where writing, casting and adding take 20."
    )


def communication_finding() -> str:
    """Reduce once a step where it fits."""
    case, pair = case_of("llama2_1.36b", A6000_PAIR), case_of("llama2_1.36b", H100_PAIR)
    sent = roofline.traffic(case, "fsdp2", 2, case.micro_batches)
    before, once, kept = (moved / PCIE_BYTES_PER_S for moved in sent)
    n, over_nvlink = case.parameters, sent.each_micro_batch / NVLINK_BYTES_PER_S
    return (
        "**Reduce gradients once a step where whole gradients fit.** With gradients reduced after each of"
        f" {case.micro_batches} micro-batches, FSDP2 on two A6000 over PCIe sends {sent.each_micro_batch / 1e9:.0f} GB a step for"
        f" `llama2_1.36b`: {before:.1f} s beside {computing_s(case):.1f} s of computing. Reduced once it is {once:.1f} s, for"
        f" {4 * n / 1e9:.1f} GB of memory. What remains are gathers of bf16 weights, twice a micro-batch, about as many bytes as"
        f" the reductions were. Keeping the weights gathered between micro-batches leaves {kept:.2f} s, for {2 * n / 1e9:.1f} GB"
        " more. FSDP2 then shards master weights and moments alone, as ZeRO-1 does. ZeRO-1 and DDP reduce once already. Between"
        f" two H100 over NVLink the first of these is {over_nvlink:.2f} s beside {computing_s(pair):.1f} s: there it hardly"
        " matters. Overlap hides a part of each of these times."
    )


def host_finding() -> str:
    """Launches and waits."""
    parts = [f"{launching(case_of(name, H100))} for `{name}`" for name in RECIPES]
    modern = case_of("modern_124m", H100)
    training = modern.recipe.training.model_copy(update={"micro_batch_size": 1})
    smallest = modern._replace(recipe=modern.recipe.model_copy(update={"training": training}))
    return (
        "**Wait for the device once a step, and never between micro-batches.** With the new loss and compiled layers the host"
        f" stays ahead of one H100. Launching the kernels of a micro-batch takes {', '.join(parts)}. With one window a"
        f" micro-batch `modern_124m` would need {launching(smallest)}: there launches bind. The lead is lost at every wait, since"
        " the queue is empty when loss and gradient norm have been read. Read together at the end of a step, they cost one gap: a"
        " transfer and a launch, tens of microseconds, and what the host does before the next forward pass. A wait in every"
        " micro-batch would cost that each time. Where several ranks train, a garbage collection of Python in one of them stalls"
        " all."
    )


def launching(case: Case) -> str:
    """Host time of a compiled micro-batch beside the device's."""
    every = times(case, "compiled").values()
    host_s, device_s = sum(time.kernels for time in every) * roofline.LAUNCH_S, sum(time.device_s for time in every)
    return f"{1e3 * host_s / case.micro_batches:.1f} ms beside {1e3 * device_s / case.micro_batches:.1f} ms of the device"


def optimizer_finding() -> str:
    """The optimizer is not worth work."""
    shares = [share(times(case, "compiled"), roofline.OPTIMIZER) for case in cases()]
    return (
        "**Leave the optimizer as it is.** Clipping and fused AdamW move 40 bytes a parameter a step:"
        f" {min(shares):.1%} to {max(shares):.1%} of the time."
    )


def reports_finding() -> str:
    """Beside measured MFU."""
    h100, a6000 = case_of("llama2_1.36b", H100), case_of("llama2_1.36b", A6000_PAIR)
    eager, compiled = (roofline.mfu(h100, roofline.step_s(times(h100, variant))) for variant in ("eager", "compiled"))
    slow = roofline.mfu(a6000, roofline.step_s(times(a6000, "eager")))
    measured, reported = hardware.mfu_row("h100", 1316e6).mfu, hardware.mfu_row("a6000", a6000.parameters).mfu
    return (
        f"**How far off may it be?** llm-foundry reports an MFU of {measured:.1%} for a 1.3B model of its own on 8 H100, where"
        f" this page has {eager:.1%} eager and {compiled:.1%} compiled for `llama2_1.36b` on one: {measured / compiled:.0%} of"
        f" the latter. Users of that recipe report {reported:.1%} on two A6000 with another trainer, where this page has"
        f" {slow:.1%} eager with nothing overlapped: {reported / slow:.0%} of it."
    )
