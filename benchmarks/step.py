"""Training steps beside the peers: python benchmarks/step.py gpt2 --nanogpt PATH [--bf16] (from the checkout's root).

The same model, tokens, precision, allocator and threads; each way is a process of its own that does a step at its turn, so the
ratios are of neighbours in time. `gpt2` and `llama` are 30M parameters, two minutes each on two cores; on a GPU name a recipe:

    python benchmarks/step.py recipes/llama2_1.36b.yaml --bf16 training.micro_batch_size=4 training.compile=true

nanoGPT is run from a checkout that you name, litgpt where it is installed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rows import alone, paired, parser_of, recipe_of, spread, write
from ways import Case, available, take_turns

from isoflop.plan import cost, hardware
from isoflop.prepare.run import prepare

WARMUP = 3  # steps that are not counted: allocation, moments, kernels
# Of the matrix product that rates are compared with. A GPU reaches its rate on large ones alone, and multiplies ones or zeros
# faster than random numbers, since fewer of their bits change.
GPU_MATRIX, CPU_MATRIX = 8192, 2048


def main() -> None:
    """Measure, and write a row for each way."""
    parser = parser_of(__doc__, rounds=12)
    parser.add_argument("model", help="gpt2, llama, or a recipe")
    parser.add_argument("overrides", nargs="*", help="values of the recipe, section.key=value")
    parser.add_argument("--bf16", action="store_true", help="bf16 matrix products over fp32 weights")
    parser.add_argument("--label", default="", help="added to the case's name, as for a changed value")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(given.model, given.overrides, folder)
        prepare(recipe)
        case = Case(recipe, given.bf16, given.nanogpt)
        matmul = alone(matmul_flops, case.bf16)
        seconds, facts = measure(case, given.rounds, Path(folder))
    name = f"{Path(given.model).stem} {'bf16' if case.bf16 else 'fp32'} {given.label}".rstrip()
    write(given, "step", [row_of(name, way, case, seconds, facts[way], matmul) for way in seconds])


def row_of(
    name: str, way: str, case: Case, seconds: dict[str, list[float]], facts: dict[str, Any], matmul: float
) -> dict[str, Any]:
    """One way's figures. The ratio is its time over the bare loop's, which does what no loop can leave out."""
    training, model = case.recipe.training, case.recipe.model
    rates = spread([training.tokens_per_step / one for one in seconds[way]])
    flops = rates[0] * cost.flops_per_token(model, training.sequence_length)
    peak = hardware.peak_bf16_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    sizes = {"parameters": cost.parameters(model), "micro_batch_size": training.micro_batch_size}
    return {"case": name, "way": way, **sizes, "tokens_per_step": training.tokens_per_step, "tokens_per_s": rates} | {
        "step_s": spread(seconds[way]), "time_of_bare": paired(seconds[way], seconds["bare"]), "rounds": len(seconds[way]),
        "mfu": peak and flops / peak, "share_of_matmul": flops / matmul, "matmul_flops": matmul, **facts,
    }  # fmt: skip


def measure(case: Case, rounds: int, folder: Path) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each way's steps, and what each says of itself at the end."""
    context, there = multiprocessing.get_context("spawn"), {}
    for way in available(case):  # one at a time, so that none is built or compiled beside another's first steps
        own, other = context.Pipe()
        own_case = case._replace(recipe=with_run_dir(case, folder / way))
        process = context.Process(target=take_turns, args=(way, own_case, other, str(folder / f"{way}.log")), daemon=True)
        process.start()
        other.close()
        there[way] = own
        answer(own, folder / f"{way}.log")
        for _ in range(WARMUP):
            turn(own, folder / f"{way}.log")
        print(f"{way} is ready", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {way: [] for way in there}
    for number in range(rounds):
        for way in list(there)[:: -1 if number % 2 else 1]:
            seconds[way].append(turn(there[way], folder / f"{way}.log"))
        print(
            f"round {number}: {', '.join(f'{way} {one[-1]:.3f} s' for way, one in seconds.items())}", file=sys.stderr, flush=True
        )
    facts = {}
    for way, connection in there.items():
        connection.send(False)
        facts[way] = answer(connection, folder / f"{way}.log")
    return seconds, facts


def with_run_dir(case: Case, folder: Path) -> Any:
    """The recipe with a run's folder of its own."""
    return case.recipe.model_copy(update={"output": case.recipe.output.model_copy(update={"run_dir": str(folder)})})


def turn(connection: Connection, log: Path) -> float:
    """Let a way do a step; how long it took."""
    connection.send(True)
    return float(answer(connection, log))


def answer(connection: Connection, log: Path) -> Any:
    """What a way says next. Ends the program where the way ended, with the end of its log."""
    try:
        return connection.recv()
    except EOFError:
        raise SystemExit(f"{log.stem} ended:\n{log.read_text(encoding='utf-8')[-3000:]}") from None


def matmul_flops(bf16: bool, size: int | None = None) -> float:
    """FLOP/s that large square matrices of random numbers in this precision reach here: the median of some products."""
    on_gpu = torch.cuda.is_available()
    size, device = size or (GPU_MATRIX if on_gpu else CPU_MATRIX), "cuda" if on_gpu else "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    return 2 * size**3 / statistics.median(seconds_of(lambda: torch.mm(left, right, out=out), 30 if on_gpu else 10))


def seconds_of(work: Callable[[], object], rounds: int, warmup: int = 3) -> list[float]:
    """Seconds of each round on the device; a GPU times itself, its queue never empty."""
    for _ in range(warmup):
        work()
    if not torch.cuda.is_available():
        taken = []
        for _ in range(rounds):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return taken
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(events)]


if __name__ == "__main__":
    main()
