"""The loss's time and memory beside transformers' own: python benchmarks/loss.py [VOCABxWIDTHxTOKENS ...] [--fp32].

From hidden states to the gradients of hidden states and head, under autocast as in training. Time: the ways in turn in one
process. Memory: each in a process of its own, whose allocator gives everything back, beyond the two gradients that both return.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from rows import alone, in_turn, memory_of, paired, parser_of, spread, write
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from isoflop.modeling.loss import IGNORE_INDEX, LossHead
from isoflop.train.cpu import tune_glibc_malloc

SHAPES = ("4096x2048x2048", "32000x2048x2048", "50304x768x4096", "128256x2048x2048")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class Case(NamedTuple):
    """A head and the tokens that go through it."""

    vocab_size: int
    hidden_size: int
    tokens: int
    bf16: bool

    def __str__(self) -> str:
        return f"{self.vocab_size}x{self.hidden_size}x{self.tokens} {'bf16' if self.bf16 else 'fp32'}"


def losses(case: Case) -> dict[str, Callable[[], None]]:
    """Each way's forward and backward; gradients are let go."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, case.tokens, case.hidden_size, generator=generator).to(device).requires_grad_()
    weight = nn.Parameter((torch.randn(case.vocab_size, case.hidden_size, generator=generator) * 0.02).to(device))
    ids = torch.randint(case.vocab_size, (1, case.tokens), generator=generator).to(device)
    heads = [head(case.hidden_size, case.vocab_size, bias=False, device="meta") for head in (LossHead, nn.Linear)]
    for head in heads:
        head.weight = weight

    def work(loss: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.bf16):
            value = loss()
        value.backward()
        value.item()  # waits for a GPU
        hidden.grad = weight.grad = None

    return {
        "isoflop": lambda: work(lambda: heads[0](hidden, F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)) / (case.tokens - 1)),
        "transformers": lambda: work(lambda: ForCausalLMLoss(heads[1](hidden), ids, case.vocab_size)),
    }


def extra_bytes(case: Case, way: str) -> int:
    """Peak of a way beyond its inputs and the gradients it returns."""
    returned = 4 * case.hidden_size * (case.vocab_size + case.tokens)
    if torch.cuda.is_available():
        work = losses(case)[way]
        work()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before - returned
    small = losses(case._replace(vocab_size=512, tokens=64))[way]
    small()  # libraries load, threads start
    work = losses(case)[way]
    return memory_of(work) - returned


def main() -> None:
    """Measure every shape, and write two rows for each."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="VOCABxWIDTHxTOKENS")
    parser.add_argument("--fp32", action="store_true", help="fp32 matrix products instead of bf16 ones")
    given = parser.parse_intermixed_args()
    rows = []
    for shape in given.shapes:
        vocab_size, hidden_size, tokens = map(int, shape.split("x"))
        case = Case(vocab_size, hidden_size, tokens, not given.fp32)
        os.environ |= GIVE_BACK
        extra = {way: alone(extra_bytes, case, way) for way in ("isoflop", "transformers")}
        for name in GIVE_BACK:
            del os.environ[name]
        seconds = alone(time_of, case, given.rounds)
        print(f"{case}: {extra}, {seconds}", file=sys.stderr, flush=True)
        for way, taken in seconds.items():
            ratio = paired(taken, seconds["transformers"])
            rows.append(
                {"case": str(case), "way": way, "seconds": spread(taken), "time_of_transformers": ratio, "rounds": len(taken)}
            )
            rows[-1] |= {"extra_bytes": extra[way], "memory_of_transformers": extra[way] / extra["transformers"]}
    write(given, "loss", rows)


def time_of(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, with memory kept for both."""
    tune_glibc_malloc()
    return in_turn(losses(case), rounds)


if __name__ == "__main__":
    main()
