"""Launch configs, read from `accelerate_configs/` as far as memory and time depend on them.

Entered by `known_launches`. A user's own configs lie in `accelerate_configs/` of the working directory; the package ships others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isoflop.config.loading import MOST_YAML_BYTES, parse_yaml
from isoflop.config.shipped import Kind, find, shipped
from isoflop.plan.cost import Engine, Launch
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import read_text, shown

FOLDER: Kind = "accelerate_configs"
TRAINED = "trained here are one process, DDP, DeepSpeed ZeRO stage 1 and FSDP2, in fp32, bf16 or fp8"


@dataclass(frozen=True)
class Launches:
    """Launches that a plan covers."""

    launches: tuple[Launch, ...]
    """CPU first, then by number of processes."""
    configs: dict[str, Path]
    """Config file by a launch's name; launches without one are predictions only."""
    skipped: tuple[str, ...]
    """Why a config is left out, one line each."""

    def for_gpus(self, num_gpus: int) -> Launch:
        """Return the launch on `num_gpus` GPUs whose config shards most; DDP where there is no config."""
        configured = [x for x in self.launches if x.gpu and x.num_processes == num_gpus and x.name in self.configs]
        ddp = Launch(f"{num_gpus}gpu_ddp", "ddp", num_gpus, gpu=True)
        return max(configured, key=lambda launch: launch.shards, default=ddp)


def known_launches(num_gpus: int, optimizer: str = "adamw") -> Launches:
    """Return the launch configs that train with an optimizer, and every engine on `num_gpus` GPUs that no config covers.

    A config that cannot be planned, e.g. of an engine that is not trained here, is skipped with a message.
    """
    names = {*shipped(FOLDER), *(path.stem for path in Path(FOLDER).glob("*.yaml"))}
    launches, configs, skipped = [], {}, []
    for name in sorted(names):
        path = find(FOLDER, f"{FOLDER}/{name}.yaml")
        try:
            launches.append(read_launch(path))
        except UserError as error:
            skipped.append(f"launch config left out: {error}")
        else:
            configs[name] = path
    covered = {(launch.engine, launch.num_processes) for launch in launches if launch.gpu}
    engines: tuple[Engine, ...] = ("ddp", "zero1", "fsdp2") if num_gpus > 1 else ("single",)
    for engine in engines:
        if (engine, num_gpus) not in covered:
            shards = 1 if engine in ("single", "ddp") else num_gpus
            name = f"{num_gpus}gpu" if engine == "single" else f"{num_gpus}gpu_{engine}"
            name += "_predicted" if name in configs else ""
            launches.append(Launch(name, engine, num_gpus, True, shards, gpu=True))
    if optimizer == "muon":  # DeepSpeed's partitions cut matrices apart
        launches = [launch for launch in launches if launch.engine != "zero1"]
    in_order = sorted(launches, key=lambda launch: (launch.gpu, launch.num_processes))
    return Launches(tuple(in_order), configs, tuple(skipped))


def read_launch(path: Path) -> Launch:
    """Read one launch config. Raises `UserError` where it is broken, or asks for what is not trained here."""
    config = _read(path)
    kind, precision = str(config.get("distributed_type", "NO")), str(config.get("mixed_precision", "no"))
    if precision not in ("no", "False", "bf16", "fp8"):  # YAML reads an unquoted `no` as false
        raise UserError(f"{path}: mixed_precision = {shown(precision)} has no memory prediction; {TRAINED}")
    processes = _positive_int(config, "num_processes", path)
    gpu = not (config.get("use_cpu") is True or str(config.get("use_cpu")).lower() == "true" or kind == "MULTI_CPU")
    engine, shards = _engine(config, kind, processes, path)
    machines = _positive_int(config, "num_machines", path)
    return Launch(path.stem, engine, processes, precision in ("bf16", "fp8"), shards, gpu, num_machines=machines)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = parse_yaml(read_text(path, MOST_YAML_BYTES, "give a config that `accelerate config` wrote"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a mapping; give a config that `accelerate config` wrote")
    return config


def _engine(config: dict[str, Any], kind: str, processes: int, path: Path) -> tuple[Engine, int]:
    """Return the engine of a config, and the ranks that its states are sharded over."""
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return ("ddp" if processes > 1 else "single"), 1
    if kind == "DEEPSPEED":
        section = _section(config, "deepspeed_config", path)
        if section.get("zero_stage") == 1 and section.get("offload_optimizer_device", "none") == "none":
            return "zero1", processes
        asked = f"deepspeed_config.zero_stage = {shown(section.get('zero_stage'))}"
        if section.get("zero_stage") == 1:
            asked = f"deepspeed_config.offload_optimizer_device = {shown(section['offload_optimizer_device'])}"
        raise UserError(f"{path}: {asked} has no memory prediction; {TRAINED}")
    if kind != "FSDP":
        raise UserError(f"{path}: distributed_type = {shown(kind)} has no memory prediction; {TRAINED}")
    if (version := _section(config, "fsdp_config", path).get("fsdp_version", 1)) != 2:
        raise UserError(f"{path}: fsdp_config.fsdp_version = {shown(version)} has no memory prediction; {TRAINED}")
    replicas = _positive_int(_section(config, "parallelism_config", path), "parallelism_config_dp_replicate_size", path)
    if processes % replicas:
        raise UserError(f"{path}: parallelism_config_dp_replicate_size = {replicas} does not divide num_processes = {processes}")
    return "fsdp2", processes // replicas


def _section(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name} = {shown(section)} is not a section of keys")
    return section


def _positive_int(section: dict[str, Any], name: str, path: Path) -> int:
    value = section.get(name, 1)
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: {name} = {shown(value)} is not a positive integer")
    return value
