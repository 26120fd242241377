"""The one training loop of all stages, on Accelerate: checkpoints, exact resume, averaging, logs. No stage logic.

What differs between stages is passed in: a model whose `forward` returns its loss first, a data set, and `prepare`,
which turns a batch into the arguments of `forward`.

Randomness is a function of (seed, progress, position in the global batch) and of nothing else: the order of the data,
the noise and the augmentation. So a resumed run is the same run bit for bit, and two processes see what one process
with twice the batch sees.
"""

import contextlib
import copy
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import get_args, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType, ProjectConfiguration
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, IterableDataset, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from .checkpoints import (
    TrainingState,
    drop_oldest,
    find_checkpoint,
    list_checkpoints,
    save_model,
    sole_run,
    write_json,
    write_text,
)
from .hub import BackgroundPush, redacted

logger = logging.getLogger(__name__)

# Those of `transformers.get_scheduler` that need no metric and no setting of their own.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
)  # fmt: skip


def option(default, help: str, **metadata):
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainingOptions:
    """What the loop can be told. Names are those of diffusers' example scripts."""

    output_dir: str = option("runs/stage", "folder for checkpoints, logs, samples and the final model")
    seed: int = option(0, "seed of everything random")
    max_train_steps: int = option(10_000, "optimizer steps")
    train_batch_size: int = option(64, "samples per process in one forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    lr_scheduler: str = option("cosine", f"{', '.join(SCHEDULES)}: as in transformers.get_scheduler")
    lr_warmup_steps: int = option(100, "steps of linear warm-up of the learning rate")
    gamma_lr_multiplier: float = option(10.0, "learning rate of a learned log_gamma, as a multiple of learning_rate")
    adam_beta1: float = option(0.9, "AdamW's beta1")
    adam_beta2: float = option(0.99, "AdamW's beta2")
    adam_weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(0.0, "clip the gradient to this norm; 0 leaves it alone")
    mixed_precision: str = option("no", "no | bf16 | fp16", choices=("no", "bf16", "fp16"))
    use_ema: bool = option(False, "keep an exponential moving average of the weights and save that as the model")
    ema_decay: float = option(0.999, "decay of the moving average (shorter during the first steps)")
    checkpointing_steps: int = option(1_000, "save a resumable checkpoint every so many steps")
    checkpoints_total_limit: int = option(2, "how many checkpoints to keep")
    resume_from_checkpoint: str | None = option(None, "'latest', or the folder of a checkpoint")
    strict_resume: bool = option(False, "refuse a damaged newest checkpoint instead of taking the one before it")
    logging_steps: int = option(50, "steps between two lines of stats.jsonl")
    sample_steps: int = option(0, "steps between two sample grids; 0 draws one at the end only")
    report_to: str = option("none", "none | tensorboard | any other tracker of Accelerate")
    dataloader_num_workers: int = option(0, "worker processes that read data")
    torch_compile: bool = option(False, "compile the model: pays back on long runs only")
    push_to_hub: bool = option(False, "upload to the Hub at each checkpoint and at the end; a failure loses nothing")
    hub_model_id: str | None = option(None, "repository to push to, 'name' or 'organisation/name'")
    hub_subfolder: str = option("", "folder in that repository (default: its root)")
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "write token of the Hub, if not logged in"}
    )
    hub_private_repo: bool = option(False, "create the repository as a private one")

    def __post_init__(self):
        self._check_types()
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
                     "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
                     "adam_epsilon"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("lr_warmup_steps", "max_grad_norm", "sample_steps", "dataloader_num_workers", "seed",
                     "gamma_lr_multiplier", "adam_weight_decay"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{entry.name} must be a finite number, got {value}.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}.")
        known = {"lr_scheduler": SCHEDULES, "report_to": ["none", *LoggerType]}
        for name, values in known.items():
            names = sorted(str(getattr(value, "value", value)) for value in values)
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id: name the repository, such as 'your-name/vaeplus-faces'.")
        if self.hub_model_id:
            validate_repo_id(self.hub_model_id)
        place = PurePosixPath(self.hub_subfolder)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"hub_subfolder must be a folder in the repository, got {self.hub_subfolder!r}.")

    def _check_types(self):
        for name, annotation in get_type_hints(type(self)).items():
            value, wanted = getattr(self, name), get_args(annotation) or (annotation,)
            wanted += (int,) if float in wanted else ()
            if isinstance(value, bool) != (bool in wanted) or not isinstance(value, wanted):
                names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in wanted)
                hint = " (YAML needs the dot in 1.0e-3)" if float in wanted and isinstance(value, str) else ""
                got = type(value).__name__ if name == "hub_token" else repr(value)
                raise ValueError(f"{name} must be {names}, got {got}{hint}.")


class TrainingDiverged(RuntimeError):
    """A loss, gradient or weight was not finite. The last good state is the newest checkpoint."""


class TrainingInterrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended the run after a step. The state has been saved; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


# ----------------------------------------------------------------------------------------------------- randomness


def derived_seed(*key: int) -> int:
    """A 63-bit seed that depends on the non-negative integers of `key`; a zero at the end does not count."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


class BatchNoise:
    """Standard normal noise of one forward pass: row i depends on (seed, pass, position in the global batch) alone."""

    def __init__(self, seed: int, forward_pass: int, batch_size: int, rank: int, world_size: int, device):
        self._generator = torch.Generator(device).manual_seed(derived_seed(seed, 1, forward_pass))
        self._global_batch, self._rows = batch_size * world_size, slice(rank * batch_size, (rank + 1) * batch_size)
        self._device = device

    def __call__(self, dim: int) -> torch.Tensor:
        """The next noise, of shape `(batch_size, dim)`."""
        noise = torch.randn(self._global_batch, dim, generator=self._generator, device=self._device)
        return noise[self._rows]


class GlobalBatchSampler(Sampler):
    """Indices of this process for the forward passes `first` to `last`, without end of epoch and without remainder.

    Pass t takes positions `t * world_size * batch_size` onwards of one endless sequence: permutation after permutation
    of the data set, permutation e drawn from (seed, e).
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int, world_size: int, first: int, last: int
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.first, self.last = rank, world_size, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, None
        for forward_pass in range(self.first, self.last):
            start = (forward_pass * self.world_size + self.rank) * self.batch_size
            indices = []
            while len(indices) < self.batch_size:
                wanted, offset = divmod(start + len(indices), self.num_samples)
                if wanted != epoch:
                    epoch, generator = wanted, torch.Generator().manual_seed(derived_seed(self.seed, 0, wanted))
                    order = torch.randperm(self.num_samples, generator=generator)
                indices += order[offset : offset + self.batch_size - len(indices)].tolist()
            yield indices


def _as_is(batch):  # `__getitems__` has made the batch
    return batch


def _loader(dataset, options: TrainingOptions, accelerator: Accelerator, first: int, last: int) -> DataLoader:
    place = dict(rank=accelerator.process_index, world_size=accelerator.num_processes)
    loading = dict(num_workers=options.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda")
    if isinstance(dataset, IterableDataset):
        dataset.set_position(first, options.train_batch_size, **place)
        return DataLoader(dataset, batch_size=None, **loading)
    if len(dataset) == 0:
        raise ValueError("the data set is empty.")
    sampler = GlobalBatchSampler(len(dataset), options.train_batch_size, options.seed, **place, first=first, last=last)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_as_is, **loading)


def _update_average(average: list[torch.Tensor], parameters: list[nn.Parameter], steps: int, decay: float):
    """The moving average after `steps` + 1 steps; the first weights are forgotten fast."""
    with torch.no_grad():
        if steps == 0:
            torch._foreach_copy_(average, parameters)
        else:
            torch._foreach_lerp_(average, parameters, 1 - min(decay, (1 + steps) / (10 + steps)))


# ----------------------------------------------------------------------------------------------------------- logs


class HealthWatch:
    """Says in words, once each, that a VAE is collapsing or its gamma at its floor. Fed with lines of stats.jsonl.

    Args:
        latent_dim: dimensions that could be active.
        first_step: before it no VAE counts as collapsed.
        min_gamma: the floor of gamma; 0 if it has none.
    """

    min_kl = 0.5  # nats: a posterior that says less than this about its input says nothing
    patience = 5  # lines

    def __init__(self, latent_dim: int, first_step: int, min_gamma: float = 0.0):
        self.latent_dim, self.first_step, self.min_gamma = latent_dim, first_step, min_gamma
        self.low_kl_lines, self.said = 0, set()

    def __call__(self, stats: dict) -> list[str]:
        """What, if anything, this line of statistics gives cause to say."""
        found = {}
        if stats.get("gamma", math.inf) <= 1.01 * self.min_gamma:  # an analytic gamma comes ever nearer to its floor
            found["floor"] = (
                f"note: gamma has reached its floor of {self.min_gamma:g} at step {stats['step']}: whatever varies by"
                " less than that counts as noise. This is as it should be where min_gamma was set for it; if not, the"
                " inputs are reproduced all but exactly: see whether they vary, or set a lower min_gamma."
            )
        if "kl" in stats and stats["step"] >= self.first_step:
            self.low_kl_lines = self.low_kl_lines + 1 if stats["kl"] < self.min_kl else 0
            if self.low_kl_lines >= self.patience:
                found["kl"] = (
                    f"warning: KL has stayed below {self.min_kl} nats up to step {stats['step']} ({stats['kl']:.3g}"
                    " now): the posterior equals the prior and this VAE has collapsed. Start gamma lower"
                    " (gamma_init=0.1) or use kl_warmup_steps."
                )
            elif stats["active_units"] < self.latent_dim / 4:
                found["units"] = (
                    f"warning: only {stats['active_units']:.0f} of {self.latent_dim} latent dimensions are active at"
                    f" step {stats['step']}. That is balanced regularization if the data has no more factors than"
                    f" that; if reconstructions are poor, gamma ({stats['gamma']:.3g}) lags behind the error and"
                    " prunes: use gamma='analytic' or a larger gamma_lr_multiplier."
                )
        new = [text for kind, text in found.items() if kind not in self.said]
        self.said.update(found)
        return new


def _drop_lines_after(path: Path, step: int):
    """Forget what a killed run logged after the checkpoint that it is resumed from, a half-written line included."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    write_text(path, "".join(line + "\n" for line in kept))


# ----------------------------------------------------------------------------------------------------------- loop


def train(
    model: PreTrainedModel,
    dataset,
    prepare: Callable[[dict, BatchNoise, int], dict],
    options: TrainingOptions,
    preview: Callable[[PreTrainedModel], Image.Image] | None = None,
    finish: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """Train `model` and leave in `options.output_dir`: the model, checkpoints, `stats.jsonl`, `samples/`.

    Args:
        model: its `forward(**prepare(batch, noise, step))` returns a `ModelOutput` with a scalar `loss`; every other
            scalar of the output is logged. Models with `log_gamma` as a parameter give it its own learning rate.
        dataset: a map-style data set with `__getitems__` that returns a batch (a dict of tensors), or an
            `IterableDataset` of batches with `set_position(first_batch, batch_size, rank, world_size)`.
        prepare: `(batch on the device, noise, step) -> keyword arguments of forward`.
        options: see [`TrainingOptions`].
        preview: draws a picture of what the model does, for `samples/`.
        finish: changes the trained model in place, once, before it is drawn and saved; the same in every process.

    Returns:
        The trained model, its moving average if `use_ema`, in evaluation mode.

    Raises:
        TrainingDiverged: a loss, gradient or weight was not finite; the newest checkpoint is the last good state.
        TrainingInterrupted: SIGTERM or Ctrl-C; the state is the newest checkpoint.
        FileExistsError: `output_dir` holds a run already and nothing says to resume it, or another process is
            training there.
        ValueError, FileNotFoundError: what `resume_from_checkpoint` names does not exist, is damaged or does not fit.
        ValueError: fp16 on a CPU.
    """
    # A stage may differ from the one before in its precision, and a bare `PartialState()` before this (unlike
    # `Accelerator`) ignores ACCELERATE_USE_CPU: two CPU processes would each train alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    output_dir = Path(options.output_dir)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    refuse_fp16_on_cpu(options, accelerator.device)
    alone = sole_run(output_dir) if accelerator.is_main_process else contextlib.nullcontext()
    with alone, _StopSignals() as stop:
        return _train(model, dataset, prepare, options, preview, finish, accelerator, output_dir, stop)


def _train(model, dataset, prepare, options, preview, finish, accelerator, output_dir, stop) -> PreTrainedModel:
    checkpoint = find_checkpoint(output_dir, options.resume_from_checkpoint, options.strict_resume)
    written = {**_public(options), "num_processes": accelerator.num_processes}
    if checkpoint is not None:
        _refuse_other_options(checkpoint.parent / "training_options.json", written)
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        for leftover in output_dir.glob(".checkpoint-*.partial"):
            shutil.rmtree(leftover)
        write_json(output_dir / "training_options.json", written)

    gamma = [parameter for name, parameter in model.named_parameters() if name == "log_gamma"]
    others = [parameter for name, parameter in model.named_parameters() if name != "log_gamma"]
    groups = [{"params": others}]
    if gamma:
        rate = options.learning_rate * options.gamma_lr_multiplier
        groups.append({"params": gamma, "lr": rate, "weight_decay": 0.0})
    model.to(accelerator.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,
    )
    scheduler = get_scheduler(options.lr_scheduler, optimizer, options.lr_warmup_steps, options.max_train_steps)
    ema = copy.deepcopy(model) if options.use_ema else None
    state = TrainingState(model, optimizer, scheduler, accelerator.scaler, ema)
    if checkpoint is not None:
        state.load(checkpoint)
        logger.info("resumed %s", checkpoint)
    if options.torch_compile:
        model.compile()
    wrapped, scaler = accelerator.prepare(model), accelerator.scaler
    if options.report_to != "none":
        settings = {
            n: value if isinstance(value, int | float) else str(value) for n, value in _public(options).items()
        }
        accelerator.init_trackers("vaeplus", config=settings)

    passes_per_step = options.gradient_accumulation_steps
    loader = _loader(
        dataset, options, accelerator, state.step * passes_per_step, options.max_train_steps * passes_per_step
    )
    batches = iter(loader)
    push = None
    if options.push_to_hub and accelerator.is_main_process:
        push = BackgroundPush(options.hub_model_id, options.hub_subfolder, options.hub_private_repo, options.hub_token)

    trained = model if ema is None else ema
    # Walks through the modules of a small model take as long as a tenth of its steps: once is enough.
    parameters, buffers = list(model.parameters()), list(model.buffers())
    average = [] if ema is None else [parameter.detach() for parameter in ema.parameters()]
    ema_buffers = [] if ema is None else list(ema.buffers())

    def snapshot(folder: Path):
        """What is pushed: the model as it would be saved now, and how it was made."""
        trained.save_pretrained(folder)
        write_json(folder / "training_options.json", {n: v for n, v in written.items() if n not in _LOCAL_OPTIONS})
        shutil.copy(output_dir / "stats.jsonl", folder)

    if accelerator.is_main_process:
        _drop_lines_after(output_dir / "stats.jsonl", state.step)
        (output_dir / "samples").mkdir(exist_ok=True)
    latent_dim = getattr(model.config, "latent_dim", 0)
    floor = model.config.min_gamma if getattr(model.config, "gamma", "fixed") != "fixed" else 0.0
    watch = HealthWatch(latent_dim, min(500, options.max_train_steps // 2), floor)
    progress = tqdm(
        total=options.max_train_steps,
        initial=state.step,
        desc=output_dir.name,
        disable=not accelerator.is_main_process,
    )
    wrapped.train()
    since, samples_since = time.perf_counter(), 0
    while state.step < options.max_train_steps:
        before = state.window, state.window_passes, [buffer.clone() for buffer in buffers]
        for number in range(passes_per_step):
            forward_pass = state.step * passes_per_step + number
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in next(batches).items()}
            noise = BatchNoise(
                options.seed,
                forward_pass,
                options.train_batch_size,
                accelerator.process_index,
                accelerator.num_processes,
                accelerator.device,
            )
            last = number == passes_per_step - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                output = wrapped(**prepare(batch, noise, state.step))
                one = 1 + 0 * output.loss.detach()  # NaN if the loss is not finite: then no gradient is, anywhere
                accelerator.backward(one * output.loss / passes_per_step)
            scalars = {name: value.detach() for name, value in output.items() if _is_scalar(value)}
            values = torch.stack([value.double() for value in scalars.values()])
            state.window = values if state.window is None else state.window + values
            state.window_passes += 1
        if scaler is not None:
            scaler.unscale_(optimizer)
        grad_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        # The gradient holds every process's loss, so all processes come to the same decision.
        if not math.isfinite(grad_norm):
            _stop_if_diverged(accelerator, state, before, options, list(scalars))
        elif 0 < options.max_grad_norm < grad_norm:
            clip_grads_with_norm_(parameters, options.max_grad_norm, grad_norm)
        if scaler is None:
            optimizer.step()
        else:  # leaves the step out if a gradient is not finite
            scaler.step(optimizer)
            scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            _update_average(average, parameters, state.step, options.ema_decay)
            for copied, buffer in zip(ema_buffers, buffers, strict=True):
                copied.copy_(buffer)
        state.step += 1
        samples_since += options.train_batch_size * passes_per_step * accelerator.num_processes
        progress.update()

        if state.step % options.logging_steps == 0 or state.step == options.max_train_steps:
            means = accelerator.reduce(state.window / state.window_passes, "mean").tolist()
            stats = {"step": state.step, **dict(zip(scalars, means, strict=True))}
            stats["grad_norm"] = float(grad_norm) if math.isfinite(grad_norm) else None  # a step that fp16 skipped
            stats["learning_rate"] = scheduler.get_last_lr()[0]
            state.window, state.window_passes = None, 0
            speed, since, samples_since = samples_since / (time.perf_counter() - since), time.perf_counter(), 0
            if accelerator.is_main_process:
                with open(output_dir / "stats.jsonl", "a") as file:
                    file.write(json.dumps(stats) + "\n")
                progress.set_postfix(_postfix(stats, speed))
                for sentence in watch(stats):
                    progress.write(sentence, file=sys.stderr)
            trackers = {**stats, "grad_norm": float(grad_norm), "samples_per_second": speed}  # they know no null
            accelerator.log(trackers, step=state.step)
        if state.step % options.checkpointing_steps == 0 or state.step == options.max_train_steps:
            _save(accelerator, state, options)
            if push is not None and state.step < options.max_train_steps:
                push(snapshot, f"{output_dir.name}: step {state.step} of {options.max_train_steps}")
        # Several processes agree on where to stop: now and then, for it costs a message.
        if accelerator.num_processes == 1 or state.step % options.logging_steps == 0:
            _stop_if_asked(stop, accelerator, state, options)
        due = options.sample_steps and state.step % options.sample_steps == 0
        if preview is not None and accelerator.is_main_process and due and state.step < options.max_train_steps:
            _draw_preview(accelerator, preview, trained, output_dir, state.step)
    progress.close()

    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes autocast off the model: only now
    trained.eval()
    if finish is not None:
        finish(trained)
    if accelerator.is_main_process:
        drop_oldest(output_dir, options.checkpoints_total_limit)  # a save that was killed at its end did not
        save_model(trained, output_dir)
        if preview is not None:
            _draw_preview(accelerator, preview, trained, output_dir, state.step)
        if push is not None:
            push.finish(snapshot, f"{output_dir.name}: {options.max_train_steps} steps, the end")
    for tracker in accelerator.trackers:  # `end_training` would leave no process group for the next stage
        tracker.finish()
    accelerator.wait_for_everyone()
    return trained


def _is_scalar(value) -> bool:
    return torch.is_tensor(value) and value.ndim == 0


def _public(options: TrainingOptions) -> dict:
    """The options as they may be written down: without the token, or another secret in an address."""
    return {
        name: redacted(value, options.hub_token) if isinstance(value, str) else value
        for name, value in asdict(options).items()
        if name != "hub_token"
    }


def _postfix(stats: dict, speed: float) -> dict:
    shown = {name: f"{stats[name]:.4g}" for name in ("loss", "kl", "gamma", "active_units") if name in stats}
    return {**shown, "images/s": f"{speed:.0f}"}


# Options that may change between the parts of a run without making it another run.
_FREE_OPTIONS = frozenset(
    "output_dir cache_dir max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint"
    " strict_resume"
    " logging_steps sample_steps report_to dataloader_num_workers torch_compile push_to_hub hub_model_id"
    " hub_subfolder hub_private_repo learning_rate max_grad_norm".split()
)
# Options that name places on this machine: not to be pushed.
_LOCAL_OPTIONS = frozenset(
    "output_dir cache_dir train_data_dir train_data_files autoencoder vae resume_from_checkpoint".split()
)


def _refuse_other_options(written: Path, options: dict):
    """A run that is resumed with another seed, model or data set would be neither the old run nor the new one."""
    if not written.exists():
        return
    old, new = json.loads(written.read_text()), json.loads(json.dumps(options))
    changed = [name for name in new if name in old and old[name] != new[name] and name not in _FREE_OPTIONS]
    if changed:
        changes = ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in changed)
        raise ValueError(
            f"{written.parent} holds a run with other options ({changes}): choose another --output_dir, or the options"
            f" in {written.name}."
        )


def refuse_fp16_on_cpu(options: TrainingOptions, device: torch.device):
    """Raises ValueError for what Accelerate would silently train in float32."""
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU, and this is a CPU: use bf16, or no for float32.")


class _StopSignals:
    """While it is entered, a first SIGTERM or Ctrl-C is only noted, as `number`; a second one acts at once."""

    def __enter__(self):
        self.number, self._pid, self._before = 0, os.getpid(), {}
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._before = {each: signal.signal(each, self._note) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if os.getpid() == self._pid and not self.number:
            self.number = number
            return
        signal.signal(number, signal.SIG_DFL)  # a second one, or a worker that reads data
        os.kill(os.getpid(), number)


def _stop_if_asked(stop: _StopSignals, accelerator, state: TrainingState, options: TrainingOptions):
    number = stop.number
    if accelerator.num_processes > 1:
        number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
    if not number or state.step == options.max_train_steps:
        return
    if state.step % options.checkpointing_steps:  # else it has just been saved
        _save(accelerator, state, options)
    raise TrainingInterrupted(
        f"stopped by {signal.Signals(number).name} after step {state.step}, which is saved as checkpoint-{state.step}",
        number,
    )


def _save(accelerator, state: TrainingState, options: TrainingOptions, beside: int = 0):
    """Save a checkpoint and keep `beside` more of the others than usual; weights that are not finite stop the run."""
    spoilt = [name for name, tensor in state.model.state_dict().items() if not tensor.isfinite().all()]
    if spoilt:
        terms = ", ".join(["gamma"] * ("log_gamma" in spoilt) + [name for name in spoilt if name != "log_gamma"][:3])
        good = list_checkpoints(options.output_dir)
        raise TrainingDiverged(
            f"up to step {state.step} weights have become not finite ({terms}), and are not saved;"
            f" {f'the last good state is {good[-1].name}' if good else 'no step before was saved'}."
            f" {'Resume' if good else 'Start anew'} with a lower learning_rate."
        )
    if state.window is not None:  # one process writes, so all must hold the same sums
        state.window = accelerator.reduce(state.window, "mean")
    if accelerator.is_main_process:
        state.save(Path(options.output_dir), options.checkpoints_total_limit + beside)
    accelerator.wait_for_everyone()


_MIN_LOSS_SCALE = 1e-4  # as in fairseq: from the 65536 at the start, 30 steps that overflow in a row


def _stop_if_diverged(accelerator, state: TrainingState, before: tuple, options: TrainingOptions, scalars: list[str]):
    """Save the state before the step that went wrong, and say which term was not finite, in whichever process.

    In fp16 a gradient that is not finite, of a loss that is, only means that the scale of the loss is too large: the
    scaler skips such a step and halves the scale. It goes wrong when that does not help.
    """
    finite = accelerator.reduce(state.window).isfinite().tolist()
    names = [name for name, is_finite in zip(scalars, finite, strict=True) if not is_finite]
    advice = "Resume with a lower learning_rate or with max_grad_norm"
    if not names and accelerator.scaler is not None:
        if accelerator.scaler.get_scale() > _MIN_LOSS_SCALE:
            return
        names = ["the gradient, however small the loss is scaled"]
        advice = "The model is out of fp16's range: start anew with mixed_precision bf16"
    state.window, state.window_passes, buffers = before
    for buffer, value in zip(state.model.buffers(), buffers, strict=True):  # an analytic gamma has moved
        buffer.copy_(value)
    _save(accelerator, state, options, beside=1)
    raise TrainingDiverged(
        f"step {state.step + 1} gave values that are not finite ({', '.join(names or ['the gradient'])}); the state"
        f" before it is saved as checkpoint-{state.step}. {advice}."
    )


@torch.no_grad()
def _draw_preview(accelerator, preview, model, output_dir: Path, step: int):
    was_training = model.training
    model.eval()
    picture = preview(model)
    model.train(was_training)
    picture.save(output_dir / "samples" / f"step-{step:07d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(picture.convert("RGB"))[None]}, step=step, dataformats="NHWC")
