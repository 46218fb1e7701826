"""Muon: matrices of the decoder layers are updated by their momentum, orthogonalized; all other weights by AdamW.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the update's size matched to AdamW's (Moonlight, arXiv:2502.16982).
`torch.optim.Muon` is that for matrices that are whole on one device. Here each matrix is orthogonalized once, by one rank, under
DDP, FSDP2 and HSDP too, and in four steps instead of five.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

# (a, b, c) of each step's polynomial a x + b x^3 + c x^5, as Polar Express has them (Amsel et al., arXiv:2505.16932): each is the
# one that keeps singular values nearest to 1, given the interval that the one before left of [0.003, 1]: 0.025 to 1.97, 0.10 to
# 1.90, 0.35 to 1.65, at last 0.80 to 1.20. Jordan's polynomial, which torch.optim.Muon takes five times, leaves 0.68 to 1.20.
COEFFICIENTS = (
    (8.3837, -24.7659, 18.3571),
    (4.0433, -3.0112, 0.5694),
    (3.51, -2.6315, 0.5268),
    (2.494, -1.8375, 0.4371),
)
# Polynomials grow fast beyond their interval: bf16's rounding must not carry the largest singular value there (its section 4.4).
MARGIN = 1.02
# Root mean square of an AdamW update at learning rate 1, as Moonlight measured it (section 2.2).
UPDATE_RMS = 0.2
# Elements that are orthogonalized at once. Assumption for GPUs: they fill one with small matrices, and buffers stay at 32 MB in
# fp32. On a CPU batches save calls where matrices are tiny; 15 of 192 x 512 took 57 ms together and 47 ms one by one.
GPU_BATCH_ELEMENTS, CPU_BATCH_ELEMENTS = 2**23, 2**15


def orthogonalize(
    matrices: Tensor, coefficients: Sequence[tuple[float, float, float]] = COEFFICIENTS, margin: float = MARGIN
) -> Tensor:
    """Return (batch, rows, columns) matrices with the same singular vectors and singular values near 1.

    A step maps X to (a + b XX' + c (XX')^2) X, in 4 r^2 c + 2 r^3 FLOPs where r <= c.
    """
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices if wide else matrices.mT
    x = x / (margin * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-7)  # spectral norm at most 1 / margin
    if x.dtype == torch.float32 and x.size(-1) > 1.5 * x.size(-2):  # fewer FLOPs; bf16 is too coarse for products of factors
        x = _factor(x @ x.mT, coefficients) @ x
    else:
        for a, b, c in coefficients:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _factor(gram: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """Return the product of all steps' factors P = a + b G + c G^2, of G = XX' alone, since the next step's G is P G P.

    Of four steps in all 26 r^3 FLOPs, and 4 r^2 c for G and the product with X: less than 16 r^2 c + 8 r^3 where c > 1.5 r.
    """
    product: Tensor | None = None
    for step, (a, b, c) in enumerate(coefficients, start=1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < len(coefficients):
            gram = factor @ gram @ factor
    assert product is not None
    return product


class Layout(NamedTuple):
    """How a matrix is spread over ranks: rows over `shards`, the same rows on each of `replicas`."""

    shards: dist.ProcessGroup | None
    replicas: dist.ProcessGroup | None

    @property
    def num_shards(self) -> int:
        """Ranks that share the rows of a matrix."""
        return self.shards.size() if self.shards else 1

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same rows."""
        return self.replicas.size() if self.replicas else 1


def layout_of(parameter: Tensor) -> Layout:
    """Return how a parameter is spread: a DTensor under FSDP2 and HSDP, else the same on every rank."""
    if not isinstance(parameter, DTensor):
        return Layout(None, dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None)
    groups: dict[bool, dist.ProcessGroup] = {}
    for dimension, placement in enumerate(parameter.placements):
        groups[isinstance(placement, Shard)] = parameter.device_mesh.get_group(dimension)
    return Layout(groups.get(True), groups.get(False))


class Exchange:
    """Orthogonalization of matrices of one shape and layout: each is gathered on its owner, which sends the rows back.

    A round has `batch` matrices of each of the `num_shards` x `num_replicas` owners. Owner o = (replica, shard) gathers its
    matrices from the shards of its own replica, orthogonalizes, scatters the rows in its replica, and the replicas gather each
    other's. A rank sends about 2 / num_shards of the round's elements, and receives as many.
    """

    def __init__(self, layout: Layout, rows: int, columns: int) -> None:
        self._layout, self._columns = layout, columns
        size = -(-rows // layout.num_shards)  # FSDP2 shards rows as torch.chunk does
        self._rows = [max(0, min(size, rows - shard * size)) for shard in range(layout.num_shards)]
        self._own_rows = self._rows[layout.shards.rank() if layout.shards else 0]

    def orthogonalize(self, parts: list[Tensor], batch: int) -> list[Tensor]:
        """Return this rank's rows of each orthogonalized matrix, given its rows of the matrices."""
        layout, own_shape = self._layout, (self._own_rows, self._columns)
        slots = layout.num_replicas * layout.num_shards * batch
        missing = [torch.zeros(own_shape, dtype=parts[0].dtype, device=parts[0].device)] * (slots - len(parts))
        together = torch.stack([*parts, *missing]) if slots > 1 else parts[0]
        by_owner = together.view(layout.num_replicas, layout.num_shards * batch, *own_shape)
        mine = by_owner[layout.replicas.rank() if layout.replicas else 0]
        rows = self._scatter(orthogonalize(self._gather(mine, batch)))
        if layout.replicas:
            gathered = rows.new_empty(slots, *own_shape)
            dist.all_gather_into_tensor(gathered, rows.contiguous(), group=layout.replicas)
            rows = gathered
        return list(rows[: len(parts)])

    def _gather(self, parts: Tensor, batch: int) -> Tensor:
        """Map this rank's rows of all shards' matrices (num_shards x batch, own_rows, columns) to its own whole matrices."""
        if not self._layout.shards:
            return parts
        counts = [batch * rows * self._columns for rows in self._rows]
        received = parts.new_empty(sum(counts))
        sent = [batch * self._own_rows * self._columns] * self._layout.num_shards
        dist.all_to_all_single(received, parts.reshape(-1), counts, sent, group=self._layout.shards)
        pieces = torch.split(received, counts)
        return torch.cat([p.view(batch, rows, self._columns) for p, rows in zip(pieces, self._rows, strict=True)], dim=1)

    def _scatter(self, matrices: Tensor) -> Tensor:
        """Map this rank's whole matrices (batch, rows, columns) to its rows of all shards' matrices; undoes `_gather`."""
        if not self._layout.shards:
            return matrices
        batch, shards = len(matrices), self._layout.num_shards
        counts = [batch * rows * self._columns for rows in self._rows]
        sent = torch.cat([piece.reshape(-1) for piece in torch.split(matrices, self._rows, dim=1)])
        received = sent.new_empty(shards * batch * self._own_rows * self._columns)
        own = [batch * self._own_rows * self._columns] * shards
        dist.all_to_all_single(received, sent, own, counts, group=self._layout.shards)
        return received.view(shards * batch, self._own_rows, self._columns)


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `algorithm` muon, and `adamw`, an optimizer made by `make_adamw`, for those with adamw.

    Every group has its own `lr` and `weight_decay`; muon groups have a `momentum`, and their state is `momentum_buffer`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make_adamw: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        moments_dtype: torch.dtype = torch.float32,
        iteration_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {})
        self.moments_dtype, self.iteration_dtype = moments_dtype, iteration_dtype
        self.adamw: Any = make_adamw(self._groups("adamw"))
        self.defaults = self.adamw.defaults

    def _groups(self, algorithm: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["algorithm"] == algorithm]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update. Where `found_inf` is set, as `GradScaler` does, a value of 1 leaves all as it is."""
        loss = closure() if closure else None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":  # known to the host at once
            if found_inf.item():
                return loss
            found_inf = None
        self._update_matrices(found_inf)
        self.adamw.param_groups, self.adamw.state = self._groups("adamw"), self.state  # accelerate replaces both
        if found_inf is not None:
            self.adamw.found_inf = found_inf
        try:
            self.adamw.step()
        finally:
            if found_inf is not None:
                del self.adamw.found_inf
        return loss

    def _update_matrices(self, found_inf: Tensor | None) -> None:
        """Update the matrices of all muon groups, in an order that is the same on every rank."""
        applied: Any = 1.0 if found_inf is None else 1.0 - found_inf
        matrices = [(p, group) for group in self._groups("muon") for p in group["params"] if p.grad is not None]
        matrices.sort(key=lambda pair: tuple(pair[0].shape))
        for shape, same in itertools.groupby(matrices, key=lambda pair: tuple(pair[0].shape)):
            alike = list(same)
            layout = layout_of(alike[0][0])
            exchange = Exchange(layout, *shape)
            ranks = layout.num_shards * layout.num_replicas
            most = GPU_BATCH_ELEMENTS if alike[0][0].is_cuda else CPU_BATCH_ELEMENTS
            batch = min(max(1, most // math.prod(shape)), -(-len(alike) // ranks))
            for start in range(0, len(alike), ranks * batch):
                some = alike[start : start + ranks * batch]
                directions = [self._direction(p, group["momentum"], found_inf) for p, group in some]
                for (p, group), update in zip(some, exchange.orthogonalize(directions, batch), strict=True):
                    weight, lr = local(p), group["lr"]
                    weight.mul_(1 - applied * (lr * group["weight_decay"]))
                    size = -lr * UPDATE_RMS * math.sqrt(max(shape))
                    if found_inf is None:
                        weight.add_(update, alpha=size)
                    else:
                        weight.addcmul_(update.float(), applied * size)

    def _direction(self, parameter: Tensor, momentum: float, found_inf: Tensor | None) -> Tensor:
        """Update the momentum and return Nesterov's direction, in the dtype that it is orthogonalized in."""
        gradient = local(parameter.grad).float()
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
        kept = local(state["momentum_buffer"])
        if found_inf is not None:
            gradient = torch.where(found_inf > 0, kept.float(), gradient)  # the average then stays as it is, to the bit
        average = kept.float().lerp_(gradient, 1 - momentum)  # in place where the average is kept in fp32
        if kept.dtype != torch.float32:
            kept.copy_(average)
        direction = gradient.lerp(average, momentum)
        return direction.to(self.iteration_dtype)


def local(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part
