"""Setting up a pretraining job: everything that is checked, built or loaded before the first step.

Entered by `check_data`, then `build_job`. Whatever is wrong ends here in a `UserError`, with nothing written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from numpy.typing import NDArray
from transformers import PreTrainedModel

from isoflop import cost, hardware
from isoflop.checkpoint.folder import list_checkpoints
from isoflop.checkpoint.saver import Saver
from isoflop.checkpoint.state import set_zero_weights
from isoflop.cpu import describe_cpu
from isoflop.data.manifest import Manifest, made_from, read_manifest, validation_facts, verify_shards
from isoflop.data.order import Order, permute, share_of_process
from isoflop.data.tokenizers import open_tokenizer, tokenizer_hash
from isoflop.data.windows import Windows
from isoflop.distributed import launch_of, set_step
from isoflop.errors import UserError
from isoflop.metrics import peak_memory_bytes
from isoflop.modeling.documents import document_bounds, document_positions
from isoflop.modeling.loss import TrainingModel
from isoflop.optim import build_optimizer
from isoflop.publish.background import BackgroundPush
from isoflop.recipe import Evaluation, Recipe, differences, require_whole_steps
from isoflop.run_ahead import Ahead, Throttle, updates_unless_flagged
from isoflop.run_folder import RunFolder
from isoflop.scaling.laws import Forecast, Law, load_law
from isoflop.stop import StopRequest, grace_s
from isoflop.training_model import build_training_model

# Up to here every byte of the prepared data is hashed at each start (seconds); beyond, sizes alone are compared.
VERIFY_FULLY_BELOW_BYTES = 16 * 2**30
# Assumption: what a disk takes of a checkpoint that is written, synced and hashed.
SAVE_BYTES_PER_S = 5e8


@dataclass(frozen=True)
class Job:
    """What a step needs, set up once."""

    recipe: Recipe
    folder: RunFolder
    manifest: Manifest
    accelerator: Accelerator
    launch: cost.Launch
    """How this process was launched, as memory and speed depend on it."""
    stop: StopRequest
    tokenizer: Any
    train_windows: Windows
    order: Order
    """In which order training sees them."""
    validation_windows: Windows
    saver: Saver
    training_model: TrainingModel
    model: torch.nn.Module
    """`training_model`, prepared by Accelerate for the engine."""
    optimizer: torch.optim.Optimizer
    num_steps: int
    accumulation: int
    """Micro-batches of one process in one optimizer step."""
    push: BackgroundPush | None
    """On the main process, where the recipe names a repository."""
    downstream: Any
    """`harness.Downstream` where the recipe names tasks, else None: lm-eval takes seconds to import."""
    law: Law | None
    """What the run is held against."""
    memory_before_bytes: int
    """Peak of the process before the model was built: on CPU interpreter and libraries, on a GPU nothing."""
    throttle: Throttle = field(default_factory=Throttle)
    ahead: Ahead = field(default_factory=Ahead)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The stock model inside."""
        return self.training_model.causal_lm

    @property
    def flags_updates(self) -> bool:
        """Whether a flag on the device keeps an update from happening, so that the host need not look first.

        How far a loss has jumped is judged on the host, and DeepSpeed updates inside the backward pass.
        """
        judged_on_host = self.recipe.anomalies.spike_sigmas is not None or self.launch.engine == "zero1"
        return not judged_on_host and updates_unless_flagged(self.inner_optimizer)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step's gradients are enqueued before the values of the step before are read. A CPU computes at once."""
        return self.flags_updates and self.accelerator.device.type == "cuda"

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer inside Accelerate's wrapper, whose state a checkpoint holds."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def batch(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Arguments of the model for each micro-batch of this rank in a 0-based step, on its device.

        `input_ids` are (micro_batch_size, sequence_length); with document masking come the documents' bounds, `cu_seq_lens`.
        """
        training, accelerator = self.recipe.training, self.accelerator
        indices = self.order.of_step(step, training.tokens_per_step // training.sequence_length)
        mine = share_of_process(indices, training.micro_batch_size, accelerator.num_processes, accelerator.process_index)
        ids = torch.from_numpy(self.train_windows.take(mine.reshape(-1))).view(*mine.shape, training.sequence_length)
        micro_batches = [{"input_ids": on_device} for on_device in to_device(ids, accelerator.device)]
        if (end := self.training_model.document_end) is not None:
            for arguments, on_host in zip(micro_batches, ids, strict=True):
                bounds = document_bounds(document_positions(on_host, end))
                arguments["cu_seq_lens"] = to_device(bounds, accelerator.device)
        return micro_batches

    def mean_loss(self, loss_sum: float) -> float:
        """Loss of a step from its sum over the micro-batches of all ranks."""
        micro_batches: int = self.accumulation * self.accelerator.num_processes
        return loss_sum / micro_batches

    def validation_order(self) -> NDArray[np.int64]:
        """The held-out windows to measure on: the same ones for every run over this data; of each source by its share."""
        data, sizes = self.recipe.data, [split.windows for split in self.manifest.split("validation")]
        shares = list(data.shares().values())
        total = math.floor(min(size / share for size, share in zip(sizes, shares, strict=True)))
        total = min(total, self.recipe.evaluation.max_windows or total)
        counts = [max(1, round(share * total)) for share in shares]
        parts = [permute(np.arange(min(pair)), pair[1], data.split_seed, epoch=0) for pair in zip(counts, sizes, strict=True)]
        return np.concatenate([sum(sizes[:number]) + part for number, part in enumerate(parts)])

    @property
    def validation_facts(self) -> tuple[float, float]:
        """Bytes per token and unigram entropy (nats) of the validation text."""
        return validation_facts(self.manifest, self.recipe.data.shares())

    def predicted_memory(self) -> cost.Memory:
        """Peak of this process's tensors, by part; what it held before the model comes on top."""
        recipe = self.recipe
        return cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, self.launch)

    def promised(self) -> Forecast | None:
        """The last validation loss that the law predicts."""
        tokens = self.num_steps * self.recipe.training.tokens_per_step
        return None if self.law is None else self.law.promise(self.recipe.model, tokens)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the datasheet FLOP/s of all devices that a rate makes use of; None where the hardware is not known."""
        if self.accelerator.device.type != "cuda":
            return None
        peak = hardware.peak_bf16_flops(torch.cuda.get_device_name(self.accelerator.device))
        flops_per_token = cost.flops_per_token(self.recipe.model, self.recipe.training.sequence_length)
        return peak and tokens_per_s * flops_per_token / (peak * self.accelerator.num_processes)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the host without waiting for the device."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def check_data(recipe: Recipe, every_byte: bool) -> Manifest:
    """The prepared data's manifest, after holding it against the recipe and, where asked to, the files against it."""
    prepared_dir = recipe.data.prepared_dir
    manifest = read_manifest(prepared_dir)
    if changes := differences(manifest.made_from, made_from(recipe)):
        raise UserError(
            f"data.prepared_dir = {prepared_dir!r} was prepared from other values ({'; '.join(changes)}); set another"
            " data.prepared_dir and run scripts/prepare.py, or undo the change"
        )
    if list(manifest.sources) != list(recipe.data.shares()):
        raise UserError(
            f"data.prepared_dir = {prepared_dir!r} holds the sources {', '.join(manifest.sources)}, and the recipe names"
            f" {', '.join(recipe.data.shares())}; copy the folder again, or prepare another one"
        )
    if manifest.tokenizer.num_ids > recipe.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {recipe.model.vocab_size} is smaller than the tokenizer's {manifest.tokenizer.num_ids} ids:"
            f" an id past the embedding would fail hours later; set model.vocab_size to {manifest.tokenizer.num_ids} or more"
        )
    tokenizer = Path(prepared_dir) / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() or tokenizer_hash(tokenizer) != manifest.tokenizer.sha256:
        raise UserError(f"{tokenizer}/tokenizer.json is not the one the windows were made with; copy the prepared folder again")
    if every_byte:
        total = sum(shard.bytes for shard in manifest.shards())
        full = total <= VERIFY_FULLY_BELOW_BYTES
        print(f"data: {prepared_dir}: checking {'every byte' if full else 'file sizes'} of {total:,} bytes", flush=True)
        verify_shards(prepared_dir, manifest, full)
    return manifest


def build_job(recipe: Recipe, manifest: Manifest, accelerator: Accelerator, stop: StopRequest) -> Job:
    """Model, optimizer and data of a run. Raises `UserError` when launch and recipe do not fit."""
    launch = launch_of(accelerator, recipe)
    require_engine_can(recipe, launch.engine, accelerator.mixed_precision)
    law = load_law(recipe.law) if recipe.law else None
    accumulation = require_whole_steps(recipe.training, accelerator.num_processes)
    set_step(accelerator, recipe, accumulation, launch)
    before = peak_memory_bytes(accelerator.device)
    facts = manifest.tokenizer
    tokenizer = open_tokenizer(recipe.data.prepared_dir)
    training_model = build_training_model(recipe, facts.eos_token_id, facts.bos_token_id, accelerator.device)
    downstream = build_downstream(recipe.evaluation, training_model, tokenizer, accelerator, stop)
    optimizer = build_optimizer(training_model, recipe.optimizer, accelerator.device)
    model, optimizer = prepare_for_engine(training_model, optimizer, accelerator)
    prepared_dir = recipe.data.prepared_dir
    return Job(
        recipe=recipe,
        folder=RunFolder(recipe.output.run_dir),
        manifest=manifest,
        accelerator=accelerator,
        launch=launch,
        stop=stop,
        tokenizer=tokenizer,
        train_windows=Windows(prepared_dir, manifest.shards("train"), manifest.sequence_length),
        order=manifest.order(recipe.data.shares(), recipe.seed),
        validation_windows=Windows(prepared_dir, manifest.shards("validation"), manifest.sequence_length),
        saver=Saver(Path(recipe.output.run_dir) / "checkpoints"),
        training_model=training_model,
        model=model,
        optimizer=optimizer,
        num_steps=recipe.training.num_steps(cost.parameters(recipe.model)),
        accumulation=accumulation,
        push=BackgroundPush(RunFolder(recipe.output.run_dir)) if recipe.hub.repo_id and accelerator.is_main_process else None,
        downstream=downstream,
        law=law,
        memory_before_bytes=before,
    )


def prepare_for_engine(
    training_model: TrainingModel, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Accelerate's `prepare`; under DeepSpeed the fp32 master weights are then the model's own, not its bf16 copies widened."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        model, optimizer = accelerator.prepare(training_model, optimizer)
        return model, optimizer
    weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in training_model.named_parameters()}
    with contextlib.redirect_stdout(None):  # it prints its memory, group by group
        model, optimizer = accelerator.prepare(training_model, optimizer)
    set_zero_weights(training_model, weights)
    return model, optimizer


def build_downstream(
    evaluation: Evaluation, training_model: TrainingModel, tokenizer: Any, accelerator: Accelerator, stop: StopRequest
) -> Any:
    """The recipe's downstream tasks, their datasets fetched; None where it names none."""
    if not evaluation.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"evaluation.tasks = {evaluation.tasks}: lm-eval is not installed; run: pip install 'lm_eval>=0.4.13', or set"
            " evaluation.tasks={}"
        )
    from isoflop.harness import Downstream, InMemory

    return Downstream(evaluation, InMemory(training_model.causal_lm, tokenizer, accelerator, stop.agreed))


def require_engine_can(recipe: Recipe, engine: cost.Engine, mixed_precision: str) -> None:
    """Refuse what DeepSpeed cannot do: it updates the weights inside the last backward pass, and hides the gradients. And float8
    where it would change nothing, or not be taken up."""
    if mixed_precision == "fp8" and (engine == "zero1" or recipe.model.model_type == "gpt2"):
        which = "DeepSpeed" if engine == "zero1" else "GPT2LMHeadModel, whose projections are no nn.Linear"
        raise UserError(
            f"mixed_precision: fp8 of the launch config: not with {which}; use a config of bf16, or another engine, or"
            " model_type hybrid with preset gpt2"
        )
    if engine != "zero1":
        return
    wanted = {
        "anomalies.policy = 'skip'": recipe.anomalies.policy == "skip",
        "output.layer_norms = true": recipe.output.layer_norms,
    }
    if asked := [key for key, value in wanted.items() if value]:
        raise UserError(
            f"{' and '.join(asked)}: not under DeepSpeed, which updates the weights before anyone sees the gradients; change it"
            " (anomalies.policy=rollback works), or launch with a config of DDP or FSDP2"
        )


def describe(job: Job) -> list[str]:
    """What will be trained, how it was launched and what it needs, each number with its arithmetic."""
    recipe, training, accelerator = job.recipe, job.recipe.training, job.accelerator
    parameters = cost.parameters(recipe.model)
    tokens = job.num_steps * training.tokens_per_step
    flops = cost.flops_per_token(recipe.model, training.sequence_length)
    device = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else accelerator.device.type
    memory = job.predicted_memory()
    parts = " + ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in memory._asdict().items() if count)
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    checkpoint_bytes = cost.checkpoint_bytes(recipe.model, recipe.optimizer)
    lines = [
        f"model: {recipe.model.model_type}, {parameters:,} parameters, {flops:,} FLOPs a token in training",
        f"tokens: {job.num_steps:,} steps x {training.tokens_per_step:,} = {tokens:,} (D/N {tokens / parameters:.2f}),"
        f" windows of {training.sequence_length}: {'; '.join(shares_of_run(job))}",
        f"launch: {accelerator.num_processes} process(es) ({accelerator.distributed_type.value}) on {device}, {precision} matrix"
        f" products, {torch.get_num_threads()} CPU thread(s) each;"
        f" {training.tokens_per_step:,} tokens a step = {training.sequence_length} x micro-batch {training.micro_batch_size}"
        f" x accumulation {job.accumulation} x {accelerator.num_processes}",
        f"memory: {memory.total + job.memory_before_bytes:,} bytes a process at the peak = {parts}"
        + (
            f" + {job.memory_before_bytes:,} of the process before the model was built; a CPU's"
            " allocator keeps some more for reuse"
            if job.memory_before_bytes
            else ""
        ),
        f"disk: a checkpoint takes about {checkpoint_bytes:,} bytes, {recipe.output.keep_last} are kept"
        f" and one more is being written; {job.folder.free_bytes():,} bytes are free at {job.folder.path}",
    ]
    return lines + notes(job)


def notes(job: Job) -> list[str]:
    """What was chosen for a CPU, what the law predicts, and what of the launch or the schedule may surprise."""
    recipe, found = job.recipe, []
    if job.launch.compiles(recipe.training):
        found.append("compile: decoder layers are compiled in the first step, which takes a minute or so longer")
    if job.launch.engine == "fsdp2":
        once = job.launch._replace(reduction="step")
        needed = cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, once).total
        when = "once a step" if job.launch.reduction == "step" else "after every micro-batch"
        found.append(
            f"gradients: reduced {when} (training.gradient_reduction = {recipe.training.gradient_reduction}); once a step takes"
            f" {needed:,} bytes a process at the peak"
        )
    if job.accelerator.device.type == "cpu":
        found.append(describe_cpu(bf16=job.accelerator.mixed_precision == "bf16"))
    if job.law and (promised := job.promised()):
        tokens = job.num_steps * recipe.training.tokens_per_step
        beyond = "; ".join(job.law.extrapolates(job.law.size(recipe.model), tokens))
        extrapolation = f"; an extrapolation: {beyond}" if beyond else ""
        found.append(f"law: {job.law.name} predicts a last validation loss of {told(promised)}{extrapolation}")
    if cost.checkpoint_bytes(recipe.model, recipe.optimizer) / SAVE_BYTES_PER_S > grace_s():
        found.append(
            f"note: {grace_s():.0f} s after a signal this launcher ends its processes, and a checkpoint may take longer; set"
            " TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 in its environment"
        )
    if recipe.schedule.warmup_steps >= job.num_steps:
        found.append(f"note: schedule.warmup_steps = {recipe.schedule.warmup_steps} covers the whole run: the rate never falls")
    return found


def told(forecast: Forecast) -> str:
    """A forecast with its interval."""
    interval = f" (90%: {forecast.interval[0]:.4f} to {forecast.interval[1]:.4f})" if forecast.interval else " (no interval)"
    return f"{forecast.loss:.4f}{interval}"


def shares_of_run(job: Job) -> list[str]:
    """What the run sees of each source: its share of the tokens as it comes out, and how often it is repeated."""
    per_step = job.recipe.training.tokens_per_step // job.recipe.training.sequence_length
    counts = job.order.counts(job.num_steps * per_step)
    lines = []
    for (name, share), count, size in zip(job.recipe.data.shares().items(), counts, job.order.sizes, strict=True):
        of = f"{name} {count / sum(counts):.4%} of the tokens (asked for {share:.2%}), " if len(counts) > 1 else ""
        lines.append(f"{of}{count / size:.2f} epochs of {size:,} windows")
    return lines


def require_disk(job: Job) -> None:
    """Refuse to start a run whose checkpoints and model would not find room."""
    output, there = job.recipe.output, len(list_checkpoints(job.folder.checkpoints))
    kept = min(output.keep_last, -(-job.num_steps // output.checkpoint_every)) + 1
    kept += 1  # the one with the least validation loss
    kept += len(output.checkpoint_at) + (job.num_steps // output.keep_every if output.keep_every else 0)
    checkpoint_bytes = cost.checkpoint_bytes(job.recipe.model, job.recipe.optimizer)
    needed = max(1, kept - there) * checkpoint_bytes + 4 * cost.parameters(job.recipe.model)
    if (free := job.folder.free_bytes()) < needed:
        raise UserError(
            f"output.run_dir = {str(job.folder.path)!r}: {free:,} bytes are free, {kept} checkpoints of {checkpoint_bytes:,}"
            f" ({there} are there) and the model need {needed:,}; free some space, lower output.keep_last, or set another run_dir"
        )
