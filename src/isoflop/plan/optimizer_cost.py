"""What an optimizer keeps, computes and sends: AdamW, and Muon for the matrices of the decoder layers."""

from __future__ import annotations

from isoflop.config.recipe import Gpt2Model, Model
from isoflop.config.recipe_optimizer import Optimizer
from isoflop.plan.shape import head_parameters, matmul_parameters, parameters, shape_of

# Steps of `train.muon`, which needs torch; a test keeps them equal.
NEWTON_SCHULZ_STEPS = 4


def hidden_matrices(model: Model) -> list[tuple[int, int]]:
    """Return rows and columns of every matrix of the decoder layers, as transformers stores them."""
    s = shape_of(model)
    h, a, k, f = s.hidden_size, s.num_heads * s.head_dim, s.num_key_value_heads * s.head_dim, s.intermediate_size
    attention = [(h, 3 * h), (h, h)] if isinstance(model, Gpt2Model) else [(a, h), (k, h), (k, h), (h, a)]
    return s.num_layers * (attention + (2 if s.gated else 1) * [(f, h)] + [(h, f)])


def moments_bytes(model: Model, optimizer: Optimizer) -> int:
    """Return the bytes of the optimizer's state: 8 a parameter under AdamW, 4 under Muon; half of that in bfloat16."""
    of_muon = matmul_parameters(model) - head_parameters(model) if optimizer.name == "muon" else 0
    float32 = 8 * (parameters(model) - of_muon) + 4 * of_muon
    return float32 if optimizer.moments_dtype == "float32" else float32 // 2


def update_flops(model: Model, optimizer: Optimizer) -> int:
    """Return the FLOPs of one update's matrix products.

    Muon's iteration on an r x c matrix (r <= c) multiplies X X', the square of that, and their sum by X: 4 r^2 c + 2 r^3.
    AdamW's element-wise update has none.
    """
    if optimizer.name != "muon":
        return 0
    pairs = [(min(pair), max(pair)) for pair in hidden_matrices(model)]
    return NEWTON_SCHULZ_STEPS * sum(4 * r * r * c + 2 * r**3 for r, c in pairs)


def exchanged_bytes(model: Model, optimizer: Optimizer, num_ranks: int, shards: int, gpu: bool) -> int:
    """Return the bytes that a rank sends so that one rank orthogonalizes each matrix: bf16 elements on a GPU, fp32 on a CPU.

    The rows of a replica's matrices go to their owners and back: 2 / ranks of the elements. Replicas then gather each other's.
    """
    if optimizer.name != "muon":
        return 0
    elements = sum(rows * columns for rows, columns in hidden_matrices(model))
    replicas = num_ranks // shards
    to_owners_and_back = 2 * elements // num_ranks * (shards - 1) // shards
    return (2 if gpu else 4) * (to_owners_and_back + elements // shards * (replicas - 1) // replicas)
