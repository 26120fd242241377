"""Checkpoints: what a run goes on from, written whole, with checksums.

A checkpoint is a folder `checkpoint-<step>`; while it is written it has another name. `checksums.json` holds the
SHA-256 of each of its files.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..files import flush_to_disk, room_for, sha256, write_json
from ..modeling_vaeplus import one_form_of_weights
from .options import RECORD

logger = logging.getLogger(__name__)


CHECKSUMS = "checksums.json"


_ALWAYS = ("model.safetensors", "optimizer.safetensors", "progress.json")  # the others depend on the run


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, or is not what was written."""


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A half-written one has another name."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def find_checkpoint(output_dir: str | Path, wanted: str | None, strict: bool = False) -> Path | None:
    """The checkpoint that a run goes on from.

    Args:
        output_dir: folder of the run.
        wanted (`str`, *optional*): `"latest"`, the name of a checkpoint in `output_dir`, or the folder of one; nothing
            for a new run.
        strict (`bool`): refuse a newest checkpoint that is damaged, instead of taking the newest good one.

    Returns:
        `Path`, or `None` for a run that has none.

    Raises:
        DamagedCheckpoint: the checkpoint, or under `"latest"` each of them, is damaged.
        FileExistsError: a new run in the folder of an old one.
        FileNotFoundError: no such checkpoint.
    """
    existing = list_checkpoints(output_dir)
    if wanted is None:
        if existing:
            raise FileExistsError(
                f"{output_dir} already holds a run up to step {checkpoint_step(existing[-1])}: resume it with"
                " --resume_from_checkpoint latest, or choose another --output_dir."
            )
        return None
    if wanted != "latest":
        for path in (Path(output_dir) / wanted, Path(wanted)):
            if (path / "progress.json").is_file():
                check(path)
                return path
        names = [path.name for path in existing] or "none"
        raise FileNotFoundError(f"{wanted} is not a checkpoint of this project; {output_dir} has {names}.")
    for path in reversed(existing):
        try:
            check(path)
            return path
        except DamagedCheckpoint as error:
            if strict or path == existing[0]:
                raise
            logger.warning("%s The checkpoint before it is taken.", error)
    return None


def check(checkpoint: Path):
    """Raises DamagedCheckpoint, naming the file, unless the checkpoint is as it was written."""
    advice = "resume from another checkpoint with --resume_from_checkpoint, or start anew in another --output_dir."
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        files = {name: expected[name] for name in {*expected, *_ALWAYS}}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{checkpoint} lacks {CHECKSUMS}: {advice}") from None
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint / CHECKSUMS} is damaged: {advice}") from error
    inside = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    for name, digest in sorted(files.items()):
        if name not in inside:  # nothing else is opened, whatever the list names
            raise DamagedCheckpoint(f"{checkpoint} lacks {name}: {advice}")
        if sha256(inside[name]) != digest:
            raise DamagedCheckpoint(f"{inside[name]} is damaged, its checksum has changed: {advice}")


def save_model(model: PreTrainedModel, folder: Path):
    """`save_pretrained`, but no reader ever sees half a file."""
    partial = folder / ".model.partial"
    with room_for(folder, partial):
        model.save_pretrained(partial)
        flush_to_disk(partial)
        with one_form_of_weights(folder):
            for path in sorted(partial.iterdir()):  # the index of shards after its shards
                os.replace(path, folder / path.name)
        partial.rmdir()


def drop_run(output_dir: Path):
    """Remove checkpoints, model and samples of a run. What is killed in mid-way leaves a part of the same old run."""
    for old in list_checkpoints(output_dir):
        _drop(old)
    for path in (*output_dir.glob("model*.safetensors*"), output_dir / "config.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(output_dir / "samples", ignore_errors=True)


def drop_oldest(output_dir: Path, total_limit: int):
    """Keep so many checkpoints, the newest. What is killed in mid-way leaves a whole one, or none by that name."""
    for old in list_checkpoints(output_dir)[:-total_limit]:
        _drop(old)


def _drop(checkpoint: Path):
    going = checkpoint.with_name(f".{checkpoint.name}.partial")
    os.replace(checkpoint, going)
    shutil.rmtree(going)


@dataclass
class TrainingState:
    """All that a checkpoint holds: the run goes on from it as if it had never stopped."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    ema: PreTrainedModel | None
    window: torch.Tensor | None = None  # sums of the logged scalars since the last line of stats.jsonl
    window_steps: int = 0
    step: int = 0
    identity: dict = field(default_factory=dict)  # what a run that goes on from here must share with this one

    def _progress(self) -> dict:
        progress = {"step": self.step, "window_steps": self.window_steps, "scheduler": self.scheduler.state_dict()}
        return progress if self.scaler is None else {**progress, "scaler": self.scaler.state_dict()}

    def _read_progress(self, path: Path) -> dict:
        expected = self._progress()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            progress = {key: found[key] for key in expected}
            schedule = dict(found["scheduler"])
            progress["scheduler"] = {"last_epoch": schedule["last_epoch"], "_last_lr": schedule["_last_lr"]}
            for key, value in expected["scheduler"].items():  # other versions of PyTorch keep a little more or less
                progress["scheduler"].setdefault(key, schedule.get(key, value))
            fits = _alike(progress, expected)
        except (LookupError, RecursionError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"{path} is not the progress of such a run: resume with the options that the run was started with"
                " (training_options.json), or from another checkpoint."
            )
        return progress

    def save(self, output_dir: Path, total_limit: int):
        """Write checkpoint-<step> beside the others, rename it into place when complete, then drop the oldest."""
        final, partial = output_dir / f"checkpoint-{self.step}", output_dir / f".checkpoint-{self.step}.partial"
        with room_for(final, partial):
            self._write(partial)
            shutil.rmtree(final, ignore_errors=True)  # the same step again, after a resume from an older checkpoint
            os.replace(partial, final)
        drop_oldest(output_dir, total_limit)

    def _write(self, partial: Path):
        self.model.save_pretrained(partial)
        if self.ema is not None:
            self.ema.save_pretrained(partial / "ema")
        tensors = {
            f"{name}/{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        if self.window is not None:
            tensors["window"] = self.window
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "optimizer.safetensors")
        write_json(partial / "progress.json", self._progress())
        write_json(partial / RECORD, self.identity)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        write_json(partial / CHECKSUMS, {path.relative_to(partial).as_posix(): sha256(path) for path in files})
        flush_to_disk(partial)

    def load(self, checkpoint: Path):
        """Take over a checkpoint that `find_checkpoint` has found good.

        Raises:
            ValueError, FileNotFoundError: it is of another model, of a run without a moving average, not in
                safetensors, or its progress.json is not what `save` writes.
        """
        if self.ema is not None and not (checkpoint / "ema").is_dir():
            raise FileNotFoundError(
                f"checkpoint {checkpoint} lacks ema: resume with the options that the run was started with"
                " (training_options.json)."
            )
        progress = self._read_progress(checkpoint / "progress.json")
        _load_weights(self.model, checkpoint / "model.safetensors")
        if self.ema is not None:
            _load_weights(self.ema, checkpoint / "ema" / "model.safetensors")
        self.step, self.window_steps = progress["step"], progress["window_steps"]
        tensors = _tensors(checkpoint / "optimizer.safetensors")
        window = tensors.pop("window", None)
        self.window = None if window is None else window.to(self.model.device)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state = self.optimizer.state_dict()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            prefix = names[parameter] + "/"
            state["state"][number] = {
                key.removeprefix(prefix): _laid_out_as(parameter, value)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        self.optimizer.load_state_dict(state)
        rates = self.scheduler.base_lrs  # the run may go on with another learning rate
        self.scheduler.load_state_dict({**progress["scheduler"], "base_lrs": rates})
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        for group, rate, factor in zip(self.optimizer.param_groups, rates, factors, strict=True):
            group["lr"] = rate * factor
        if self.scaler is not None:
            self.scaler.load_state_dict(progress["scaler"])


def _laid_out_as(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    # Fused AdamW walks through memory: moments saved row by row would go to the wrong weights of a channels-last one.
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is no safetensors file ({error}): resume from another checkpoint.") from error


def _alike(found, expected) -> bool:
    """Whether a value of JSON has the keys, the lengths and the types of another, and numbers that can be."""
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_alike(found[key], value) for key, value in expected.items())
        )
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_alike, found, expected))
    if isinstance(expected, float):
        return isinstance(found, int | float) and abs(found) < 1e300
    return type(found) is type(expected) and (not isinstance(found, int) or 0 <= found < 2**63)


def _load_weights(model: nn.Module, path: Path):
    try:
        model.load_state_dict(_tensors(path), strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the model: start with the model options that the run was started with. {error}"
        ) from error
