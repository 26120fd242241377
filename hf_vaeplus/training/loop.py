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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from PIL import Image
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, get_scheduler

from ..data.cache import keep_batch
from ..files import sole_run, write_json
from ..hub.client import BackgroundPush
from ..progress import tqdm
from .checkpoints import TrainingState, drop_oldest, find_checkpoint, list_checkpoints, save_model
from .logs import HealthWatch, drop_lines_after, postfix
from .options import LOCAL_OPTIONS, TrainingOptions, recorded_options, refuse_fp16_on_cpu, refuse_other_options
from .randomness import BatchNoise, GlobalBatchSampler

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
    """

    model: PreTrainedModel
    dataset: Dataset
    prepare: Callable[[dict, BatchNoise, int], dict]
    preview: Callable[[PreTrainedModel], Image.Image] | None = None
    finish: Callable[[PreTrainedModel], None] | None = None


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


def _loader(dataset, options: TrainingOptions, accelerator: Accelerator, first: int, last: int) -> DataLoader:
    place = dict(rank=accelerator.process_index, world_size=accelerator.num_processes)
    loading = dict(num_workers=options.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda")
    if isinstance(dataset, IterableDataset):
        dataset.set_position(first, options.train_batch_size, **place)
        return DataLoader(dataset, batch_size=None, **loading)
    if len(dataset) == 0:
        raise ValueError("the data set is empty.")
    sampler = GlobalBatchSampler(len(dataset), options.train_batch_size, options.seed, **place, first=first, last=last)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=keep_batch, **loading)


def _update_average(average: list[torch.Tensor], parameters: list[nn.Parameter], steps: int, decay: float):
    """The moving average after `steps` + 1 steps; the first weights are forgotten fast."""
    with torch.no_grad():
        if steps == 0:
            torch._foreach_copy_(average, parameters)
        else:
            torch._foreach_lerp_(average, parameters, 1 - min(decay, (1 + steps) / (10 + steps)))


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
    with alone, _StopSignals() as signals:
        run = _Run(stage, options, accelerator)
        with run.progress:  # the bar is closed before anything is said of an error
            while run.step < options.max_train_steps:
                names, grad_norm = run.take_step()
                if run.is_due(options.logging_steps):
                    run.log(names, grad_norm)
                if run.is_due(options.checkpointing_steps):
                    run.save()
                    run.push()
                run.stop_if_asked(signals)
                due = options.sample_steps and run.step % options.sample_steps == 0
                if due and run.step < options.max_train_steps:
                    run.draw_preview()
        return run.finish()


_MIN_LOSS_SCALE = 1e-4  # as in fairseq: from the 65536 at the start, 30 steps that overflow in a row


class _Run:
    """A run of the loop: what is set up once, one step, and what is done between steps."""

    def __init__(self, stage: Stage, options: TrainingOptions, accelerator: Accelerator):
        self.stage, self.options, self.accelerator = stage, options, accelerator
        self.output_dir = Path(options.output_dir)
        # What training_options.json holds.
        self.record = {**recorded_options(options), "num_processes": accelerator.num_processes}
        checkpoint = self._take_over_folder()
        model = stage.model.to(accelerator.device, memory_format=torch.channels_last)
        optimizer = _optimizer(model, options)
        scheduler = get_scheduler(options.lr_scheduler, optimizer, options.lr_warmup_steps, options.max_train_steps)
        average = copy.deepcopy(model) if options.use_ema else None
        self.state = TrainingState(model, optimizer, scheduler, accelerator.scaler, average)
        if checkpoint is not None:
            self.state.load(checkpoint)
            logger.info("resumed %s", checkpoint)
        if options.torch_compile:
            model.compile()
        self.wrapped = accelerator.prepare(model)
        self.trained = model if average is None else average
        # Walks through the modules of a small model take as long as a tenth of its steps: once is enough.
        self.parameters, self.buffers = list(model.parameters()), list(model.buffers())
        self.averages = [] if average is None else [parameter.detach() for parameter in average.parameters()]
        self.average_buffers = [] if average is None else list(average.buffers())
        passes = options.gradient_accumulation_steps
        first, last = self.step * passes, options.max_train_steps * passes
        self.batches = iter(_loader(stage.dataset, options, accelerator, first, last))
        self._start_logs()
        self.wrapped.train()
        self.logged_at, self.logged_step = time.perf_counter(), self.step

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.state.step

    def is_due(self, every: int) -> bool:
        """Whether the step that is done is the last, or one of every so many."""
        return self.step % every == 0 or self.step == self.options.max_train_steps

    def _take_over_folder(self) -> Path | None:
        """Find the checkpoint to go on from, and write down the options in the folder of the run."""
        options = self.options
        checkpoint = find_checkpoint(self.output_dir, options.resume_from_checkpoint, options.strict_resume)
        if checkpoint is not None:
            refuse_other_options(checkpoint.parent / "training_options.json", self.record)
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            for leftover in self.output_dir.glob(".checkpoint-*.partial"):
                shutil.rmtree(leftover)
            write_json(self.output_dir / "training_options.json", self.record)
        return checkpoint

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
                options.hub_model_id, options.hub_subfolder, options.hub_private_repo, options.hub_token
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

    def take_step(self) -> tuple[list[str], torch.Tensor]:
        """One step of the optimizer.

        Returns:
            The names of the logged scalars, whose sums are in `state.window`, and the norm of the gradient.

        Raises:
            TrainingDiverged: the gradient was not finite.
        """
        state, options = self.state, self.options
        before = state.window, state.window_passes, [buffer.clone() for buffer in self.buffers]
        for number in range(options.gradient_accumulation_steps):
            names = self._accumulate_gradient(number)
        if state.scaler is not None:
            state.scaler.unscale_(state.optimizer)
        grad_norm = get_total_norm([each.grad for each in self.parameters if each.grad is not None])
        # The gradient holds every process's loss, so all processes come to the same decision.
        if not math.isfinite(grad_norm):
            self._stop_if_diverged(before, names)
        elif 0 < options.max_grad_norm < grad_norm:
            clip_grads_with_norm_(self.parameters, options.max_grad_norm, grad_norm)
        if state.scaler is None:
            state.optimizer.step()
        else:  # leaves the step out if a gradient is not finite
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.scheduler.step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            _update_average(self.averages, self.parameters, state.step, options.ema_decay)
            for average, buffer in zip(self.average_buffers, self.buffers, strict=True):
                average.copy_(buffer)
        state.step += 1
        self.progress.update()
        return names, grad_norm

    def _accumulate_gradient(self, number: int) -> list[str]:
        """Forward and backward pass `number` of a step; the names of the scalars that it adds to `state.window`."""
        state, options, accelerator = self.state, self.options, self.accelerator
        passes = options.gradient_accumulation_steps
        batch = {name: each.to(accelerator.device, non_blocking=True) for name, each in next(self.batches).items()}
        noise = BatchNoise(
            options.seed,
            state.step * passes + number,
            options.train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        with contextlib.nullcontext() if number == passes - 1 else accelerator.no_sync(self.wrapped):
            output = self.wrapped(**self.stage.prepare(batch, noise, state.step))
            one = 1 + 0 * output.loss.detach()  # NaN if the loss is not finite: then no gradient is, anywhere
            accelerator.backward(one * output.loss / passes)
        scalars = {name: value.detach() for name, value in output.items() if _is_scalar(value)}
        values = torch.stack([value.double() for value in scalars.values()])
        state.window = values if state.window is None else state.window + values
        state.window_passes += 1
        return list(scalars)

    def log(self, names: list[str], grad_norm: torch.Tensor):
        """A line of stats.jsonl, and the same for trackers and for the progress bar; advice, if there is any."""
        state, options, accelerator = self.state, self.options, self.accelerator
        means = accelerator.reduce(state.window / state.window_passes, "mean").tolist()
        state.window, state.window_passes = None, 0
        stats = {"step": state.step, **dict(zip(names, means, strict=True))}
        stats["grad_norm"] = float(grad_norm) if math.isfinite(grad_norm) else None  # a step that fp16 skipped
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
        trackers = {**stats, "grad_norm": float(grad_norm), "samples_per_second": speed}  # they know no null
        accelerator.log(trackers, step=state.step)

    def save(self, beside: int = 0):
        """Save a checkpoint and keep `beside` more of the others than usual.

        Raises:
            TrainingDiverged: weights are not finite.
        """
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
            state.window = self.accelerator.reduce(state.window, "mean")
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
        write_json(folder / "training_options.json", shared)
        shutil.copy(self.output_dir / "stats.jsonl", folder)

    def stop_if_asked(self, signals: _StopSignals):
        """After a signal, save the state and raise TrainingInterrupted.

        Several processes agree on where to stop: now and then, for it costs a message.
        """
        state, options, accelerator = self.state, self.options, self.accelerator
        number = signals.number
        if accelerator.num_processes > 1:
            if state.step % options.logging_steps:
                return
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        if not number or state.step == options.max_train_steps:
            return
        if state.step % options.checkpointing_steps:  # else it has just been saved
            self.save()
        raise TrainingInterrupted(
            f"stopped by {signal.Signals(number).name} after step {state.step}, which is saved as"
            f" checkpoint-{state.step}",
            number,
        )

    def _stop_if_diverged(self, before: tuple, names: list[str]):
        """Save the state before the step that went wrong, and say which term was not finite, in whichever process.

        In fp16 a gradient that is not finite, of a loss that is, only means that the scale of the loss is too large:
        the scaler skips such a step and halves the scale. It goes wrong when that does not help.
        """
        state = self.state
        finite = self.accelerator.reduce(state.window).isfinite().tolist()
        spoilt = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        advice = "Resume with a lower learning_rate or with max_grad_norm"
        if not spoilt and state.scaler is not None:
            if state.scaler.get_scale() > _MIN_LOSS_SCALE:
                return
            spoilt = ["the gradient, however small the loss is scaled"]
            advice = "The model is out of fp16's range: start anew with mixed_precision bf16"
        state.window, state.window_passes, buffers = before
        for buffer, value in zip(self.buffers, buffers, strict=True):  # an analytic gamma has moved
            buffer.copy_(value)
        self.save(beside=1)
        raise TrainingDiverged(
            f"step {state.step + 1} gave values that are not finite ({', '.join(spoilt or ['the gradient'])}); the"
            f" state before it is saved as checkpoint-{state.step}. {advice}."
        )

    @torch.no_grad()
    def draw_preview(self):
        """A picture of what the model does, in `samples/` and for TensorBoard."""
        if self.stage.preview is None or not self.accelerator.is_main_process:
            return
        was_training = self.trained.training
        picture = self.stage.preview(self.trained.eval())
        self.trained.train(was_training)
        picture.save(self.output_dir / "samples" / f"step-{self.step:07d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(picture.convert("RGB"))[None]
                tracker.log_images({"samples": pixels}, step=self.step, dataformats="NHWC")

    def finish(self) -> PreTrainedModel:
        """Finish, save, draw and upload the trained model."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # takes autocast off the model: only now
        self.trained.eval()
        if self.stage.finish is not None:
            self.stage.finish(self.trained)
        if self.accelerator.is_main_process:
            # A save that was killed at its end did not do this.
            drop_oldest(self.output_dir, self.options.checkpoints_total_limit)
            save_model(self.trained, self.output_dir)
        self.draw_preview()
        if self.uploads is not None:
            message = f"{self.output_dir.name}: {self.options.max_train_steps} steps, the end"
            self.uploads.finish(self._write_upload, message)
        for tracker in self.accelerator.trackers:  # `end_training` would leave no process group for the next stage
            tracker.finish()
        self.accelerator.wait_for_everyone()
        return self.trained
