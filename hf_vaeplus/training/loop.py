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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from PIL import Image
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, get_scheduler

from ..files import sole_run, write_json
from ..hub.client import BackgroundPush
from ..progress import tqdm
from .checkpoints import TrainingState, drop_oldest, find_checkpoint, list_checkpoints, save_model
from .logs import HealthWatch, drop_lines_after, postfix
from .options import LOCAL_OPTIONS, TrainingOptions, recorded_options, refuse_fp16_on_cpu, refuse_other_options
from .randomness import BatchNoise, GlobalBatchSampler

logger = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """A loss, gradient or weight was not finite. The last good state is the newest checkpoint."""


class TrainingInterrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended the run after a step. The state has been saved; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


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
    written = {**recorded_options(options), "num_processes": accelerator.num_processes}
    if checkpoint is not None:
        refuse_other_options(checkpoint.parent / "training_options.json", written)
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
        recorded = recorded_options(options).items()
        settings = {name: value if isinstance(value, int | float) else str(value) for name, value in recorded}
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
        write_json(folder / "training_options.json", {n: v for n, v in written.items() if n not in LOCAL_OPTIONS})
        shutil.copy(output_dir / "stats.jsonl", folder)

    if accelerator.is_main_process:
        drop_lines_after(output_dir / "stats.jsonl", state.step)
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
                progress.set_postfix(postfix(stats, speed))
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
