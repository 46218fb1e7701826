"""How runs are launched, read from `accelerate_configs/`, as far as memory and time depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isoflop.cost import Engine, Launch
from isoflop.errors import UserError
from isoflop.recipe_file import parse_yaml

FOLDER = Path("accelerate_configs")


def read_launch(path: Path) -> Launch:
    """One launch config. Raises `UserError` for an engine that has no memory prediction."""
    config: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"))
    kind, processes = str(config["distributed_type"]), int(config.get("num_processes", 1))
    bf16, gpu = config.get("mixed_precision") in ("bf16", "fp8"), "cpu" not in path.stem  # configs for a CPU say so in their name
    if kind == "FSDP":
        replicas = int(config.get("parallelism_config", {}).get("parallelism_config_dp_replicate_size", 1))
        return Launch(path.stem, "fsdp2", processes, bf16, processes // replicas, gpu)
    if kind == "DEEPSPEED" and config.get("deepspeed_config", {}).get("zero_stage") == 1:
        return Launch(path.stem, "zero1", processes, bf16, processes, gpu)
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return Launch(path.stem, "ddp" if processes > 1 else "single", processes, bf16, gpu=gpu)
    raise UserError(f"{path}: distributed_type {kind} is neither one process, DDP, DeepSpeed ZeRO stage 1 nor FSDP")


def config_of(launch: Launch) -> Path:
    """Where a launch's config lies, if it has one."""
    return FOLDER / f"{launch.name}.yaml"


def known_launches(num_gpus: int) -> list[Launch]:
    """The launch configs of this checkout, and every engine on `num_gpus` GPUs that none of them has."""
    launches = [read_launch(path) for path in sorted(FOLDER.glob("*.yaml"))]
    there = {(launch.engine, launch.num_processes) for launch in launches if launch.gpu}
    engines: tuple[Engine, ...] = ("ddp", "zero1", "fsdp2") if num_gpus > 1 else ("single",)
    for engine in engines:
        if (engine, num_gpus) not in there:
            shards = 1 if engine in ("single", "ddp") else num_gpus
            name = f"{num_gpus}gpu" if engine == "single" else f"{num_gpus}gpu_{engine}"
            launches.append(Launch(name, engine, num_gpus, True, shards, gpu=True))
    return sorted(launches, key=lambda launch: (launch.gpu, launch.num_processes))
