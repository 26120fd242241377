"""The one training loop of all stages, on Accelerate: checkpoints, exact resume, averaging, logs.

Whatever differs between stages is passed in as a [`Stage`]. The loop itself knows two things about the models: a
learned gamma gets its own learning rate, and `HealthWatch` (logs.py) gives advice where the log holds a KL or a gamma.

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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, get_scheduler

from ..data.cache import keep_batch
from ..files import sole_run, write_json
from ..hub.client import BackgroundPush
from ..progress import tqdm
from ..provenance import folder_fingerprint, provenance, weights_fingerprint
from .arithmetic import advise_on_precision, arithmetic_of, fit_to_machine
from .checkpoints import (
    TrainingState,
    checkpoint_step,
    drop_oldest,
    drop_run,
    find_checkpoint,
    list_checkpoints,
    save_model,
)
from .codes import TensorRows, has_pinned_memory, resident_batches
from .launch import compile_settings
from .logs import HealthWatch, drop_lines_after, postfix
from .options import (
    LOCAL_OPTIONS,
    RECORD,
    TrainingOptions,
    goes_on,
    read_record,
    recorded_options,
    run_identity,
    run_record,
    with_own_batch,
)
from .randomness import BatchNoise, GlobalBatchSampler, Noise
from .shared_folder import refuse_other_folders

logger = logging.getLogger(__name__)


@dataclass
class Stage:
    """A stage of training as the loop sees it.

    Attributes:
        model: its `forward(**prepare(batch, noise, step))` returns a `ModelOutput` with a scalar `loss`; every other
            scalar of the output is logged. A parameter named `log_gamma` gets its own learning rate.
        dataset: a map-style data set with `__getitems__` that returns a batch (a dict of tensors), or an
            `IterableDataset` of batches with `set_position(first_batch, batch_size, rank, world_size)`.
        prepare: `(batch on the device, noise, step) -> keyword arguments of forward`.
        preview: draws a picture of what the model does, for `samples/`.
        finish: changes the trained model in place, once, before it is drawn and saved; the same in every process.
        made_from: fingerprints of what the stage is trained on: `images`, and the weights of the stages before it.
        turn: between two phases: the first step of the second one, and what changes the model and the trained one, its
            moving average if there is one, in place before that step. A run that is resumed later finds the change in
            its checkpoint.
    """

    model: PreTrainedModel
    dataset: Dataset
    prepare: Callable[[dict, BatchNoise, int], dict]
    preview: Callable[[PreTrainedModel], Image.Image] | None = None
    finish: Callable[[PreTrainedModel], None] | None = None
    made_from: dict[str, str] = field(default_factory=dict)
    turn: tuple[int, Callable[[PreTrainedModel, PreTrainedModel], None]] | None = None


class TrainingDiverged(RuntimeError):
    """A loss, gradient or weight was not finite. The last good state is the newest checkpoint."""


class TrainingInterrupted(KeyboardInterrupt):
    """SIGTERM, Ctrl-C or SIGHUP ended the run after a step. The state has been saved; `signal` is its number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def _optimizer(model: PreTrainedModel, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW, with a learning rate of its own and no weight decay for a learned gamma."""
    gamma = [parameter for name, parameter in model.named_parameters() if name == "log_gamma"]
    groups = [{"params": [parameter for name, parameter in model.named_parameters() if name != "log_gamma"]}]
    if gamma:
        rate = options.learning_rate * options.gamma_lr_multiplier
        groups.append({"params": gamma, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,
    )


def _in_step(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """The model, whose gradients are means over all processes, if there are several.

    `accelerator.prepare` would also copy every output, to make it float32; ours are float32 where it matters.
    """
    if accelerator.num_processes == 1:
        return model
    on_cpu = accelerator.device.type == "cpu"
    # All processes come to the same buffers by themselves: an analytic gamma is a mean over all of them.
    return DistributedDataParallel(model, device_ids=None if on_cpu else [accelerator.device], broadcast_buffers=False)


def _loader(dataset, options: TrainingOptions, accelerator: Accelerator, first: int, last: int) -> Iterable[dict]:
    place = dict(rank=accelerator.process_index, world_size=accelerator.num_processes)
    loading = dict(num_workers=options.dataloader_num_workers, pin_memory=has_pinned_memory(accelerator.device))
    if isinstance(dataset, IterableDataset):
        dataset.set_position(first, options.train_batch_size, **place)
        return DataLoader(dataset, batch_size=None, **loading)
    if len(dataset) == 0:
        raise ValueError("the data set is empty.")
    sampler = GlobalBatchSampler(len(dataset), options.train_batch_size, options.seed, **place, first=first, last=last)
    if isinstance(dataset, TensorRows):
        return resident_batches(dataset, sampler, accelerator.device)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=keep_batch, **loading)


def _clip_gradients(gradients: list[torch.Tensor], options: TrainingOptions) -> torch.Tensor:
    """Clip to `max_grad_norm` and return the norm before; as `torch.nn.utils.clip_grad_norm_`, for one device."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if options.max_grad_norm:
        torch._foreach_mul_(gradients, (options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _update_average(average: list[torch.Tensor], parameters: list[nn.Parameter], steps: int, decay: float):
    """The moving average after `steps` + 1 steps; the first weights are forgotten fast."""
    with torch.no_grad():
        if steps == 0:
            torch._foreach_copy_(average, parameters)
        else:
            torch._foreach_lerp_(average, parameters, 1 - min(decay, (1 + steps) / (10 + steps)))


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.Event | None]:
    """The values on the host, once the event has happened, if there is one."""
    if not has_pinned_memory(values.device):
        return values.cpu(), None
    copied, arrived = values.to("cpu", non_blocking=True), torch.Event(device=values.device.type)
    arrived.record()
    return copied, arrived


def _is_scalar(value) -> bool:
    return torch.is_tensor(value) and value.ndim == 0


_HANG_UP = getattr(signal, "SIGHUP", None)  # of a terminal that is closed; Windows has none


class _StopSignals:
    """While it is entered, a first SIGTERM, Ctrl-C or SIGHUP is only noted, as `number`; a second one acts at once.

    A second SIGHUP is no second wish: when a terminal is closed, the system and the shell both send one, and a session
    that ends sends SIGTERM and then SIGHUP. Under `nohup` SIGHUP stays ignored.
    """

    def __enter__(self):
        self.number, self._pid, self._before = 0, os.getpid(), {}
        wanted = [signal.SIGTERM, signal.SIGINT]
        if _HANG_UP is not None and signal.getsignal(_HANG_UP) is not signal.SIG_IGN:
            wanted.append(_HANG_UP)
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._before = {each: signal.signal(each, self._note) for each in wanted}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if os.getpid() == self._pid and not self.number:
            self.number = number
            return
        if number == _HANG_UP:
            return
        signal.signal(number, signal.SIG_DFL)  # a second one, or a worker that reads data
        os.kill(os.getpid(), number)


def train(stage: Stage, options: TrainingOptions) -> PreTrainedModel:
    """Train the model of `stage` and leave in `options.output_dir`: the model, checkpoints, `stats.jsonl`, `samples/`.

    Args:
        stage: see [`Stage`].
        options: see [`TrainingOptions`].

    Returns:
        The trained model, its moving average if `use_ema`, in evaluation mode.

    Raises:
        TrainingDiverged: a loss, gradient or weight was not finite; the newest checkpoint is the last good state.
        TrainingInterrupted: SIGTERM, Ctrl-C or SIGHUP; the state is the newest checkpoint.
        FileExistsError: `output_dir` holds a run already and nothing says to resume it, or another process is
            training there.
        ValueError, FileNotFoundError: what `resume_from_checkpoint` names does not exist, is damaged or does not fit,
            or its images or the stages before it have changed and `retrain` is not set.
        ValueError: what cannot run here, see [`~hf_vaeplus.training.launch.refuse_what_cannot_run`].
    """
    # A stage may differ from the one before in its precision, and a bare `PartialState()` before this (unlike
    # `Accelerator`) ignores ACCELERATE_USE_CPU: two CPU processes would each train alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    options = fit_to_machine(options)
    output_dir = Path(options.output_dir)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
        # The loop does both by itself. Without these, variables of the launcher would have them done a second time.
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    options = with_own_batch(options, accelerator.num_processes)
    if accelerator.is_main_process:
        advise_on_precision(options, accelerator.device)
    alone = sole_run(output_dir) if accelerator.is_main_process else contextlib.nullcontext()
    with alone, _StopSignals() as signals, arithmetic_of(options):
        run = _Run(stage, options, accelerator)
        with run.progress:  # the bar is closed before anything is said of an error
            while run.step < options.max_train_steps:
                run.take_step()
                if run.is_due(options.logging_steps):
                    run.log()
                if run.is_due(options.checkpointing_steps):
                    run.save()
                    run.push()
                run.stop_if_asked(signals)
                due = options.sample_steps and run.step % options.sample_steps == 0
                if due and run.step < options.max_train_steps:
                    run.draw_preview()
        return run.finish()


_MIN_LOSS_SCALE = 1e-4  # as in fairseq: from the 65536 at the start, 30 steps that overflow in a row


@dataclass
class _UnseenStep:
    """A step that is on its way through the device. If it went wrong, it has changed nothing but `buffers`.

    Attributes:
        names: of the logged scalars.
        values: those of each pass, one after the other, and the norm of the gradient; on the host after `arrived`.
        buffers: of the model before the step.
    """

    names: list[str]
    values: torch.Tensor
    arrived: torch.Event | None
    buffers: list[torch.Tensor]

    @cached_property
    def rows(self) -> torch.Tensor:
        """The scalars, float64 of shape `(passes, names)`."""
        return self.values[:-1].double().reshape(-1, len(self.names))

    @cached_property
    def grad_norm(self) -> float:
        """Of the gradient, before it was clipped."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.values[-1])


class _Run:
    """A run of the loop: what is set up once, one step, and what is done between steps.

    The host does not wait for a step: while the device works on it, the host prepares the next one, and then looks at
    the numbers of the step before. `state` is what has been looked at. A step whose gradient is not finite leaves
    weights and moments as they are, on the device itself, so nothing has to be undone when the host learns of it.
    """

    def __init__(self, stage: Stage, options: TrainingOptions, accelerator: Accelerator):
        self.stage, self.options, self.accelerator = stage, options, accelerator
        self.output_dir = Path(options.output_dir)
        self.record = run_record(options, accelerator.num_processes, stage.made_from)
        checkpoint = self._take_over_folder()
        refuse_other_folders(accelerator, self.output_dir, checkpoint_step(checkpoint) if checkpoint else 0)
        # Before the optimizer is made: on some devices this makes new parameters.
        model = stage.model.to(accelerator.device, memory_format=torch.channels_last)
        optimizer = _optimizer(model, options)
        scheduler = get_scheduler(options.lr_scheduler, optimizer, options.lr_warmup_steps, options.max_train_steps)
        average = copy.deepcopy(model) if options.use_ema else None
        self.state = TrainingState(model, optimizer, scheduler, accelerator.scaler, average)
        self.state.identity = run_identity(self.record)
        if checkpoint is not None:
            self.state.load(checkpoint)
            logger.info("resumed %s", checkpoint)
        if options.torch_compile:
            model.compile(**compile_settings())
        self.wrapped = _in_step(model, accelerator)
        self.trained = model if average is None else average
        # Walks through the modules of a small model take as long as a tenth of its steps: once is enough.
        self.parameters, self.buffers = list(model.parameters()), list(model.buffers())
        self.averages = [] if average is None else [parameter.detach() for parameter in average.parameters()]
        self.average_buffers = [] if average is None else list(average.buffers())
        self.buffers_before, self.buffer_versions = [None] * len(self.buffers), [-1] * len(self.buffers)
        passes = options.gradient_accumulation_steps
        self.unseen, self.grad_norm = None, math.nan
        # fp16 goes on with another scale after a step that was not finite, and Apple's MPS has no copies in the
        # background: there the host waits for each step.
        self.looks_at_once = accelerator.scaler is not None or accelerator.device.type == "mps"
        self.share_of_pass = torch.tensor(1 / passes, device=accelerator.device)
        self.noise = Noise(
            options.seed, options.train_batch_size * accelerator.num_processes * passes, accelerator.device
        )
        first, last = self.step * passes, options.max_train_steps * passes
        self.batches = iter(_loader(stage.dataset, options, accelerator, first, last))
        self._claim_folder(checkpoint)
        self._start_logs()
        self.wrapped.train()
        self.logged_at, self.logged_step = time.perf_counter(), self.step

    @property
    def step(self) -> int:
        """Steps that are done, seen or not."""
        return self.state.step + (self.unseen is not None)

    def is_due(self, every: int) -> bool:
        """Whether the step that is done is the last, or one of every so many."""
        return self.step % every == 0 or self.step == self.options.max_train_steps

    def _take_over_folder(self) -> Path | None:
        """Find the checkpoint to go on from; none for a run that starts, or starts anew. Nothing is written yet."""
        options = self.options
        checkpoint = find_checkpoint(self.output_dir, options.resume_from_checkpoint, options.strict_resume)
        passes_count = getattr(self.stage.model.config, "gamma", None) == "analytic"
        self.starts_anew = checkpoint is not None and not goes_on(
            checkpoint.parent, read_record(checkpoint), self.record, options.retrain, passes_count
        )
        if self.starts_anew:
            logger.warning("%s is trained anew: what it was made from has changed", self.output_dir)
        return None if self.starts_anew else checkpoint

    def _claim_folder(self, checkpoint: Path | None):
        """Now that nothing can be refused: prepare the folder, and find out whether its model is what is wanted.

        The record beside a model tells how that model was made, so a run that trains on leaves it alone until its end.
        """
        there, trains = read_record(self.output_dir), self.step < self.options.max_train_steps
        saved, held = there.get("weights"), folder_fingerprint(self.output_dir)
        self.is_finished = (
            not trains
            and checkpoint.parent.resolve() == self.output_dir.resolve()
            and saved is not None
            and saved == held
            and there["max_train_steps"] >= self.options.max_train_steps
        )
        if checkpoint is not None and saved is not None and held not in (None, saved):
            logger.warning("%s holds other weights than its run saved: the run replaces them", self.output_dir)
        if not trains:  # what is asked for now has made nothing
            last = there["max_train_steps"] if self.is_finished else self.step
            self.record = {**self.record, **there, "max_train_steps": last, "made_from": self.stage.made_from}
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.accelerator.is_main_process:
            for leftover in self.output_dir.glob(".checkpoint-*.partial"):
                shutil.rmtree(leftover)
            for leftover in self.output_dir.glob(".partial.*"):  # of `write_whole` in a run that was killed
                leftover.unlink()
            if self.starts_anew:
                drop_run(self.output_dir)
            if trains and not any(self.output_dir.glob("model*.safetensors")):
                write_json(self.output_dir / RECORD, self.record)

    def _start_logs(self):
        """Trackers, uploads, the log files, advice, and the progress bar."""
        options, accelerator = self.options, self.accelerator
        if options.report_to != "none":
            recorded = recorded_options(options).items()
            settings = {name: value if isinstance(value, int | float) else str(value) for name, value in recorded}
            accelerator.init_trackers("vaeplus", config=settings)
        self.uploads = None
        if options.push_to_hub and accelerator.is_main_process:
            self.uploads = BackgroundPush(
                options.hub_model_id,
                options.hub_subfolder,
                options.hub_private_repo,
                options.hub_token,
                is_new=not self.is_finished,
            )
        if accelerator.is_main_process:
            drop_lines_after(self.output_dir / "stats.jsonl", self.step)
            (self.output_dir / "samples").mkdir(exist_ok=True)
        config = self.state.model.config
        floor = config.min_gamma if getattr(config, "gamma", "fixed") != "fixed" else 0.0
        first_step = min(500, options.max_train_steps // 2)
        self.health = HealthWatch(getattr(config, "latent_dim", 0), first_step, floor)
        self.progress = tqdm(
            total=options.max_train_steps,
            initial=self.step,
            desc=self.output_dir.name,
            disable=not accelerator.is_main_process,
        )

    def take_step(self):
        """One step of the optimizer, and a look at the step before it.

        Raises:
            TrainingDiverged: the gradient of the step before was not finite.
        """
        state, options = self.state, self.options
        if self.stage.turn is not None and self.step == self.stage.turn[0]:
            self._settle()
            self.stage.turn[1](state.model, self.trained)
        buffers = self._buffers_now()
        passes = [self._accumulate_gradient(number) for number in range(options.gradient_accumulation_steps)]
        if state.scaler is not None:
            state.scaler.unscale_(state.optimizer)
        grad_norm = _clip_gradients([each.grad for each in self.parameters if each.grad is not None], options)
        scalars = [value for each in passes for value in each.values()]
        values, arrived = _to_host(torch.stack([*scalars, grad_norm]))
        step = _UnseenStep(list(passes[0]), values, arrived, buffers)
        if self.looks_at_once:
            self._stop_if_diverged(step)
            self._update(grad_norm)
            self._accept(step)
        else:
            self.look()  # at the step before this one
            self._update(grad_norm)
            self.unseen = step
        for parameter in self.parameters:  # as `zero_grad`, which takes ten times as long
            parameter.grad = None
        self.progress.update()

    def _accumulate_gradient(self, number: int) -> dict[str, torch.Tensor]:
        """Forward and backward pass `number` of a step; returns the scalars of the model's output."""
        state, options, accelerator = self.state, self.options, self.accelerator
        batch = {name: each.to(accelerator.device, non_blocking=True) for name, each in next(self.batches).items()}
        first = (number * accelerator.num_processes + accelerator.process_index) * options.train_batch_size
        noise = self.noise.at(self.step, slice(first, first + options.train_batch_size))
        arguments = self.stage.prepare(batch, noise, self.step)
        is_last = number == options.gradient_accumulation_steps - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(self.wrapped):
            with accelerator.autocast():
                output = self.wrapped(**arguments)
            # NaN if the loss is not finite: then no gradient is, anywhere.
            share = torch.add(self.share_of_pass, output.loss.detach(), alpha=0)
            loss = output.loss if state.scaler is None else state.scaler.scale(output.loss)
            loss.backward(share)
        return {name: value.detach() for name, value in output.items() if _is_scalar(value)}

    def _update(self, grad_norm: torch.Tensor):
        """Change the weights, unless the gradient is not finite."""
        state = self.state
        if state.scaler is not None:
            state.scaler.step(state.optimizer)
            state.scaler.update()
            return
        if not self.looks_at_once:  # the fused AdamW looks at this on the device
            state.optimizer.found_inf = (0 * grad_norm.float()).nan_to_num_(nan=1.0)
        state.optimizer.step()

    def look(self):
        """Look at the step that is on its way, if one is, and take it into `state`.

        Raises:
            TrainingDiverged: its gradient was not finite.
        """
        if self.unseen is not None:
            step, self.unseen = self.unseen, None
            self._stop_if_diverged(step)
            self._accept(step)

    def _accept(self, step: _UnseenStep):
        state = self.state
        mean = step.rows.mean(0)
        state.window = mean if state.window is None else state.window + mean
        state.window_steps += 1
        self.names, self.grad_norm = step.names, step.grad_norm
        state.scheduler.step()
        if state.ema is not None:
            # A second phase begins with weights of the first, which its average must not remember for long.
            first = self.stage.turn[0] if self.stage.turn is not None and state.step >= self.stage.turn[0] else 0
            _update_average(self.averages, self.parameters, state.step - first, self.options.ema_decay)
        state.step += 1

    def _settle(self):
        """Make `state` what it is after the last step."""
        self.look()
        for average, buffer in zip(self.average_buffers, self.buffers, strict=bool(self.average_buffers)):
            average.copy_(buffer)

    def _buffers_now(self) -> list[torch.Tensor]:
        """Copies of the model's buffers; a buffer that no step has changed is copied once."""
        for place, buffer in enumerate(self.buffers):
            if buffer._version != self.buffer_versions[place]:
                self.buffer_versions[place] = buffer._version
                self.buffers_before[place] = buffer.clone()
        return list(self.buffers_before)

    def _mean_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of float64 values on the host; they travel as integers, since some devices have no float64."""
        if self.accelerator.num_processes == 1:
            return values
        sent = values.view(torch.int32).to(self.accelerator.device)
        return self.accelerator.gather(sent).cpu().view(torch.float64).reshape(-1, len(values)).mean(0)

    def log(self):
        """A line of stats.jsonl, and the same for trackers and for the progress bar; advice, if there is any."""
        self.look()
        state, options, accelerator = self.state, self.options, self.accelerator
        means = self._mean_over_processes(state.window / state.window_steps).tolist()
        state.window, state.window_steps = None, 0
        stats = {"step": state.step, **dict(zip(self.names, means, strict=True))}
        stats["grad_norm"] = self.grad_norm if math.isfinite(self.grad_norm) else None  # a step that fp16 skipped
        stats["learning_rate"] = state.scheduler.get_last_lr()[0]
        now, per_step = time.perf_counter(), options.train_batch_size * options.gradient_accumulation_steps
        samples = (state.step - self.logged_step) * per_step * accelerator.num_processes
        speed = samples / (now - self.logged_at)
        self.logged_at, self.logged_step = now, state.step
        if accelerator.is_main_process:
            with open(self.output_dir / "stats.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(stats) + "\n")
            self.progress.set_postfix(postfix(stats, speed))
            for sentence in self.health(stats):
                self.progress.write(sentence, file=sys.stderr)
        trackers = {**stats, "grad_norm": self.grad_norm, "samples_per_second": speed}  # they know no null
        accelerator.log(trackers, step=state.step)

    def save(self, beside: int = 0):
        """Save a checkpoint and keep `beside` more of the others than usual.

        Raises:
            TrainingDiverged: weights are not finite.
        """
        self._settle()
        state, options = self.state, self.options
        spoilt = [name for name, tensor in state.model.state_dict().items() if not tensor.isfinite().all()]
        if spoilt:
            terms = ", ".join(
                ["gamma"] * ("log_gamma" in spoilt) + [name for name in spoilt if name != "log_gamma"][:3]
            )
            good = list_checkpoints(self.output_dir)
            raise TrainingDiverged(
                f"up to step {state.step} weights have become not finite ({terms}), and are not saved;"
                f" {f'the last good state is {good[-1].name}' if good else 'no step before was saved'}."
                f" {'Resume' if good else 'Start anew'} with a lower learning_rate."
            )
        if state.window is not None:  # one process writes, so all must hold the same sums
            state.window = self._mean_over_processes(state.window)
        if self.accelerator.is_main_process:
            state.save(self.output_dir, options.checkpoints_total_limit + beside)
        self.accelerator.wait_for_everyone()

    def push(self):
        """Start an upload of the model as it is now; the last one is left to `finish`."""
        if self.uploads is not None and self.step < self.options.max_train_steps:
            self.uploads(
                self._write_upload, f"{self.output_dir.name}: step {self.step} of {self.options.max_train_steps}"
            )

    def _write_upload(self, folder: Path):
        """What is pushed: the model as it would be saved now, and how it was made."""
        self.trained.save_pretrained(folder)
        shared = {name: value for name, value in self.record.items() if name not in LOCAL_OPTIONS}
        write_json(folder / RECORD, shared)
        shutil.copy(self.output_dir / "stats.jsonl", folder)

    def stop_if_asked(self, signals: _StopSignals):
        """After a signal, save the state and raise TrainingInterrupted.

        Several processes agree on where to stop: now and then, for it costs a message.
        """
        options, accelerator = self.options, self.accelerator
        number = signals.number
        if accelerator.num_processes > 1:
            if self.step % options.logging_steps:
                return
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        if not number or self.step == options.max_train_steps:
            return
        if self.step % options.checkpointing_steps:  # else it has just been saved
            self.save()
        raise TrainingInterrupted(
            f"stopped by {signal.Signals(number).name} after step {self.step}, which is saved as"
            f" checkpoint-{self.step}",
            number,
        )

    def _stop_if_diverged(self, step: _UnseenStep):
        """If a step went wrong, save the state before it and say which term was not finite, in whichever process.

        The gradient holds every process's loss, so all processes come to the same decision.

        In fp16 a gradient that is not finite, of a loss that is, only means that the scale of the loss is too large:
        the scaler skips such a step and halves the scale. It goes wrong when that does not help.
        """
        state = self.state
        if math.isfinite(step.grad_norm):
            return
        finite = self._mean_over_processes(step.rows.sum(0)).isfinite().tolist()
        spoilt = [name for name, is_finite in zip(step.names, finite, strict=True) if not is_finite]
        advice = "Resume with a lower learning_rate or with max_grad_norm"
        if not spoilt and state.scaler is not None:
            if state.scaler.get_scale() > _MIN_LOSS_SCALE:
                return
            spoilt = ["the gradient, however small the loss is scaled"]
            advice = "The model is out of fp16's range: start anew with mixed_precision bf16"
        for buffer, value in zip(self.buffers, step.buffers, strict=True):  # an analytic gamma has moved
            buffer.copy_(value)
        self.save(beside=1)
        raise TrainingDiverged(
            f"step {state.step + 1} gave values that are not finite ({', '.join(spoilt or ['the gradient'])}); the"
            f" state before it is saved as checkpoint-{state.step}. {advice}."
        )

    @torch.no_grad()
    def draw_preview(self):
        """A picture of what the model does, in `samples/` and for TensorBoard."""
        self._settle()
        if self.stage.preview is None or not self.accelerator.is_main_process:
            return
        was_training = self.trained.training
        picture = self.stage.preview(self.trained.eval())
        self.trained.train(was_training)
        step = self.record["max_train_steps"] if self.is_finished else self.step  # a longer run may have broken off
        picture.save(self.output_dir / "samples" / f"step-{step:07d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(picture.convert("RGB"))[None]
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")

    def finish(self) -> PreTrainedModel:
        """Finish, save, draw and upload the trained model; one that is finished already is only drawn and uploaded."""
        self._settle()
        if self.is_finished:  # what is measured once more may differ in its last bits, on another machine
            device = self.trained.device
            self.trained = type(self.trained).from_pretrained(self.output_dir).requires_grad_(False)
            self.trained.to(device, memory_format=torch.channels_last)
        self.trained.eval()
        if self.stage.finish is not None and not self.is_finished:
            self.stage.finish(self.trained)
        if not self.is_finished:
            self.record |= {"weights": weights_fingerprint(self.trained.state_dict()), "made_by": provenance()}
        if self.accelerator.is_main_process:
            # A save that was killed at its end did not do this.
            drop_oldest(self.output_dir, self.options.checkpoints_total_limit)
            if not self.is_finished:
                save_model(self.trained, self.output_dir)
                write_json(self.output_dir / RECORD, self.record)  # last: it says that the model is complete
        self.draw_preview()
        if self.uploads is not None:
            message = f"{self.output_dir.name}: {self.options.max_train_steps} steps, the end"
            self.uploads.finish(self._write_upload, message)
        for tracker in self.accelerator.trackers:  # `end_training` would leave no process group for the next stage
            tracker.finish()
        self.accelerator.wait_for_everyone()
        return self.trained
