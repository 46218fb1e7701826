"""Setup of a run: everything that is checked, built or loaded before the first step.

Entered by `check_data`, then `build_job`. Whatever is wrong raises a `UserError` here, with nothing written.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import PreTrainedModel

from isoflop.checkpoint.manager import CheckpointManager
from isoflop.config.recipe import Evaluation, Recipe, differences, gradient_accumulation_steps
from isoflop.data.manifest import Manifest, data_settings, read_manifest, validation_statistics, verify_shards
from isoflop.data.notes import data_notes
from isoflop.data.order import Order, permute, rank_micro_batches
from isoflop.data.tokenizers import open_tokenizer, tokenizer_hash
from isoflop.data.windows import Windows
from isoflop.modeling.documents import document_bounds, document_positions
from isoflop.modeling.loss import TrainingModel
from isoflop.plan import cost, hardware
from isoflop.publish.background import BackgroundPush
from isoflop.scaling.laws import Law, NoPrediction, Prediction, load_law
from isoflop.train.cpu import describe_cpu
from isoflop.train.devices import lacks_bf16
from isoflop.train.engines import configure_accumulation, launch_of, prepare, require_supported
from isoflop.train.metrics import peak_memory_bytes
from isoflop.train.optimizers import build_optimizer
from isoflop.train.parametrization import parameter_scales
from isoflop.train.run_ahead import Ahead, Throttle, updates_unless_flagged
from isoflop.train.run_folder import RunFolder
from isoflop.train.signals import StopRequest, grace_s
from isoflop.train.training_model import build_training_model
from isoflop.utils.errors import UserError

logger = logging.getLogger(__name__)
# Up to this size every byte of the prepared data is hashed at each start (seconds); beyond it only sizes are compared.
VERIFY_FULLY_BELOW_BYTES = 16 * 2**30
# Assumption: speed of writing, syncing and hashing a checkpoint.
SAVE_BYTES_PER_S = 5e8


@dataclass(frozen=True)
class Job:
    """All that a step needs, set up once."""

    recipe: Recipe
    folder: RunFolder
    manifest: Manifest
    accelerator: Accelerator
    launch: cost.Launch
    """The launch of this process, as far as memory and speed depend on it."""
    stop: StopRequest
    tokenizer: Any
    train_windows: Windows
    order: Order
    """Order in which training reads the windows."""
    validation_windows: Windows
    checkpoints: CheckpointManager
    training_model: TrainingModel
    model: torch.nn.Module
    """`training_model`, wrapped by the engine."""
    optimizer: torch.optim.Optimizer
    num_steps: int
    accumulation: int
    """Micro-batches per rank in one optimizer step."""
    push: BackgroundPush | None
    """On the main process, where the recipe names a repository."""
    downstream: Any
    """`evaluate.harness.Downstream` where the recipe names tasks, else None: lm-eval takes seconds to import."""
    law: Law | None
    """The scaling law whose prediction the run is compared with."""
    memory_before_bytes: int
    """Peak memory of the process before the model was built: interpreter and libraries on a CPU, nothing on a GPU."""
    throttle: Throttle = field(default_factory=Throttle)
    ahead: Ahead = field(default_factory=Ahead)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside the training model."""
        return self.training_model.causal_lm

    @property
    def flags_updates(self) -> bool:
        """Whether a flag on the device can skip the update, so that the host need not read loss and norm first.

        Loss spikes are detected on the host, and DeepSpeed updates inside the backward pass.
        """
        decided_on_host = self.recipe.anomalies.spike_sigmas is not None or self.launch.engine == "zero1"
        return not decided_on_host and updates_unless_flagged(self.inner_optimizer)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step's gradients are enqueued before the host reads the values of the previous step. A CPU has no queue."""
        return self.flags_updates and self.accelerator.device.type == "cuda"

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer inside Accelerate's wrapper, whose state a checkpoint holds."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def batch(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Return the model's arguments for each micro-batch of this rank in a 0-based step, on its device.

        `input_ids` are (micro_batch_size, sequence_length). Document masking adds the documents' bounds, `cu_seq_lens`.
        """
        training, accelerator = self.recipe.training, self.accelerator
        indices = self.order.of_step(step, training.tokens_per_step // training.sequence_length)
        mine = rank_micro_batches(indices, training.micro_batch_size, accelerator.num_processes, accelerator.process_index)
        ids = torch.from_numpy(self.train_windows.take(mine.reshape(-1))).view(*mine.shape, training.sequence_length)
        micro_batches = [{"input_ids": on_device} for on_device in to_device(ids, accelerator.device)]
        if (end := self.training_model.eos_token_id) is not None:
            for arguments, on_host in zip(micro_batches, ids, strict=True):
                bounds = document_bounds(document_positions(on_host, end))
                arguments["cu_seq_lens"] = to_device(bounds, accelerator.device)
        return micro_batches

    def say(self, text: str) -> None:
        """Log a message, on the main process."""
        if self.accelerator.is_main_process:
            logger.info("%s", text)

    def mean_loss(self, loss_sum: float) -> float:
        """Return the mean loss of a step from the sum over the micro-batches of all ranks."""
        micro_batches: int = self.accumulation * self.accelerator.num_processes
        return loss_sum / micro_batches

    def validation_order(self) -> NDArray[np.int64]:
        """Return the validation windows: the same for every run on this data, from each source by its share."""
        data, sizes = self.recipe.data, [split.windows for split in self.manifest.split("validation")]
        shares = list(data.shares().values())
        total = math.floor(min(size / share for size, share in zip(sizes, shares, strict=True)))
        total = min(total, self.recipe.evaluation.max_windows or total)
        counts = [max(1, round(share * total)) for share in shares]
        parts = [permute(np.arange(min(pair)), pair[1], data.split_seed, epoch=0) for pair in zip(counts, sizes, strict=True)]
        return np.concatenate([sum(sizes[:number]) + part for number, part in enumerate(parts)])

    @property
    def validation_statistics(self) -> tuple[float, float]:
        """Bytes per token and unigram entropy (nats) of the validation text."""
        return validation_statistics(self.manifest, self.recipe.data.shares())

    def predicted_memory(self) -> cost.Memory:
        """Return the predicted peak of this process's tensors, by part; `memory_before_bytes` comes on top."""
        recipe = self.recipe
        return cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, self.launch)

    def predicted(self) -> Prediction | NoPrediction | None:
        """Return the final validation loss that the recipe's law predicts, or why it predicts none; None without a law."""
        tokens = self.num_steps * self.recipe.training.tokens_per_step
        return None if self.law is None else self.law.predict(self.recipe.model, tokens, self.recipe.optimizer.name)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Return the share of the datasheet FLOP/s of all devices that a speed uses; None where the hardware is not known."""
        if self.accelerator.device.type != "cuda":
            return None
        peak = hardware.peak_bf16_flops(torch.cuda.get_device_name(self.accelerator.device))
        flops_per_token = cost.flops_per_token(self.recipe.model, self.recipe.training.sequence_length)
        return peak and tokens_per_s * flops_per_token / (peak * self.accelerator.num_processes)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the host without waiting for the device."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def check_data(recipe: Recipe, every_byte: bool) -> Manifest:
    """Return the manifest of the prepared data, compared with the recipe and, with `every_byte`, with the files."""
    prepared_dir = recipe.data.prepared_dir
    manifest = read_manifest(prepared_dir)
    if changes := differences(manifest.made_from, data_settings(recipe)):
        raise UserError(
            f"data.prepared_dir = {prepared_dir!r} was prepared from other values ({'; '.join(changes)}); set another"
            " data.prepared_dir and run `isoflop prepare`, or undo the change"
        )
    if list(manifest.sources) != list(recipe.data.shares()):
        raise UserError(
            f"data.prepared_dir = {prepared_dir!r} holds the sources {', '.join(manifest.sources)}, and the recipe names"
            f" {', '.join(recipe.data.shares())}; copy the folder again, or prepare another one"
        )
    if manifest.tokenizer.num_ids > recipe.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {recipe.model.vocab_size} is smaller than the tokenizer's {manifest.tokenizer.num_ids} ids:"
            f" an id beyond the embedding would fail hours later; set model.vocab_size to {manifest.tokenizer.num_ids} or more"
        )
    tokenizer = Path(prepared_dir) / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() or tokenizer_hash(tokenizer) != manifest.tokenizer.sha256:
        raise UserError(f"{tokenizer}/tokenizer.json is not the one the windows were made with; copy the prepared folder again")
    if every_byte:
        total = sum(shard.bytes for shard in manifest.shards())
        full = total <= VERIFY_FULLY_BELOW_BYTES
        logger.info("data: %s: checking %s of %s bytes", prepared_dir, "every byte" if full else "file sizes", f"{total:,}")
        verify_shards(prepared_dir, manifest, full)
    return manifest


def build_job(recipe: Recipe, manifest: Manifest, accelerator: Accelerator, stop: StopRequest) -> Job:
    """Build model, optimizer and data of a run. Raises `UserError` where launch and recipe do not fit."""
    launch = launch_of(accelerator, recipe)
    require_supported(recipe, launch.engine, accelerator.mixed_precision)
    law = load_law(recipe.law) if recipe.law else None
    accumulation = gradient_accumulation_steps(recipe.training, accelerator.num_processes)
    configure_accumulation(accelerator, recipe, accumulation, launch)
    before = peak_memory_bytes(accelerator.device)
    tokens = manifest.tokenizer
    tokenizer = open_tokenizer(recipe.data.prepared_dir)
    training_model = build_training_model(recipe, tokens.eos_token_id, tokens.bos_token_id, accelerator.device)
    downstream = build_downstream(recipe.evaluation, training_model, tokenizer, accelerator, stop)
    causal_lm = training_model.causal_lm
    scales = parameter_scales(causal_lm, recipe)
    optimizer = build_optimizer(causal_lm, recipe.optimizer, accelerator.device, scales, fp32=not launch.bf16)
    model, optimizer = prepare(training_model, optimizer, accelerator)
    prepared_dir = recipe.data.prepared_dir
    return Job(
        recipe=recipe,
        folder=RunFolder(recipe.output.run_dir),
        manifest=manifest,
        accelerator=accelerator,
        launch=launch,
        stop=stop,
        tokenizer=tokenizer,
        train_windows=Windows(prepared_dir, manifest.shards("train"), manifest.sequence_length, tokens.num_ids),
        order=manifest.order(recipe.data.shares(), recipe.seed),
        validation_windows=Windows(prepared_dir, manifest.shards("validation"), manifest.sequence_length, tokens.num_ids),
        checkpoints=CheckpointManager(Path(recipe.output.run_dir) / "checkpoints"),
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


def build_downstream(
    evaluation: Evaluation, training_model: TrainingModel, tokenizer: Any, accelerator: Accelerator, stop: StopRequest
) -> Any:
    """Return the recipe's downstream tasks with their datasets loaded; None where it names none."""
    if not evaluation.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"evaluation.tasks = {evaluation.tasks}: lm-eval is not installed; run: pip install 'lm_eval>=0.4.13', or set"
            " evaluation.tasks={}"
        )
    from isoflop.evaluate.harness import Downstream, InMemory

    return Downstream(evaluation, InMemory(training_model.causal_lm, tokenizer, accelerator, stop.should_stop))


def describe(job: Job) -> list[str]:
    """Return what will be trained, how it was launched and what it needs, each number with its formula."""
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
    """Return notes on compilation, gradient reduction, the CPU, the law's prediction, the launch and the schedule."""
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
    elif job.accelerator.mixed_precision == "no" and lacks_bf16() is None:
        found.append("note: fp32 matrix products on a GPU that has bf16; a launch config such as 1gpu trains in bf16")
    if job.law:
        tokens = job.num_steps * recipe.training.tokens_per_step
        found.append(f"law: {job.law.describe(recipe.model, tokens, recipe.optimizer.name)}")
    if cost.checkpoint_bytes(recipe.model, recipe.optimizer) / SAVE_BYTES_PER_S > grace_s():
        found.append(
            f"note: {grace_s():.0f} s after a signal this launcher ends its processes, and a checkpoint may take longer; set"
            " TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 in its environment"
        )
    if recipe.schedule.warmup_steps >= job.num_steps:
        found.append(
            f"note: schedule.warmup_steps = {recipe.schedule.warmup_steps} covers the entire run: the learning rate never decays"
        )
    return found + [f"note: {one}" for one in data_notes(recipe, job.manifest)]


def shares_of_run(job: Job) -> list[str]:
    """Return what the run reads of each source: its actual share of the tokens, and its epochs."""
    per_step = job.recipe.training.tokens_per_step // job.recipe.training.sequence_length
    counts = job.order.counts(job.num_steps * per_step)
    lines = []
    for (name, share), count, size in zip(job.recipe.data.shares().items(), counts, job.order.sizes, strict=True):
        of = f"{name} {count / sum(counts):.4%} of the tokens (asked for {share:.2%}), " if len(counts) > 1 else ""
        lines.append(f"{of}{count / size:.2f} epochs of {size:,} windows")
    return lines


def require_disk(job: Job) -> None:
    """Refuse to start a run whose checkpoints and model would not fit on the disk."""
    output, there = job.recipe.output, len(job.checkpoints.available())
    kept = min(output.keep_last, -(-job.num_steps // output.checkpoint_every)) + 1
    kept += 1  # that with the least validation loss
    kept += len(output.checkpoint_at) + (job.num_steps // output.keep_every if output.keep_every else 0)
    checkpoint_bytes = cost.checkpoint_bytes(job.recipe.model, job.recipe.optimizer)
    needed = max(1, kept - there) * checkpoint_bytes + 4 * cost.parameters(job.recipe.model)
    if (free := job.folder.free_bytes()) < needed:
        raise UserError(
            f"output.run_dir = {str(job.folder.path)!r}: {free:,} bytes are free, {kept} checkpoints of {checkpoint_bytes:,}"
            f" ({there} are there) and the model need {needed:,}; free some space, lower output.keep_last, or set another run_dir"
        )
