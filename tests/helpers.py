"""What several test files need."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import signal
import socket
import struct
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusCouplingFlowConfig,
    VAEPlusCouplingFlowModel,
    VAEPlusFlowMatchingConfig,
    VAEPlusFlowMatchingModel,
    VAEPlusMixtureConfig,
    VAEPlusMixtureModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.cli.main import main
from hf_vaeplus.files import sha256
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.codes import TensorRows
from hf_vaeplus.training.loop import Stage, train
from hf_vaeplus.training.options import TrainingOptions

SIZE = 32  # of the pictures of tiny pipelines


def perturbed(model):
    """A fresh network is affine and its images are grey: move every weight but gamma off its starting point."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name != "log_gamma":
                parameter += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


def make_pipeline(
    autoencoder: bool = True, second_stage: bool = True, num_channels: int = 3, latent_dim: int = 4, **options
) -> VAEPlusPipeline:
    """A tiny pipeline: codes of 6 numbers, 4 latents, and 3 of the second stage. `options` are those of its VAE."""
    torch.manual_seed(0)
    small = dict(hidden_dim=8, num_blocks=1)
    if autoencoder:
        own = dict(input_shape=(6,), reconstruction_space="image", gamma="learned", gamma_init=0.02)
        image = dict(image_size=SIZE, num_channels=num_channels, latent_dim=6, hidden_channels=(4, 8), num_blocks=1)
    else:
        own = dict(input_shape=(num_channels, SIZE, SIZE), network="conv", hidden_channels=(4, 8))
    second = dict(input_shape=(latent_dim,), latent_dim=3, gamma_init=0.1)
    return VAEPlusPipeline(
        vae=perturbed(VAEPlusVAEModel(VAEPlusVAEConfig(**small | own | {"latent_dim": latent_dim} | options))),
        autoencoder=perturbed(VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(**image))) if autoencoder else None,
        second_stage=perturbed(VAEPlusVAEModel(VAEPlusVAEConfig(**small | second))) if second_stage else None,
    )


SMALL_PRIOR = dict(hidden_dim=16, num_blocks=1)


def make_prior(kind: str, latent_dim: int = 2, **options) -> PreTrainedModel:
    """A tiny model of a bent, shifted density, with the moments of some data."""
    if kind == "coupling_flow":
        pytest.importorskip("zuko", reason="zuko is not installed: pip install 'hf-vaeplus[flows]'")
    torch.manual_seed(0)
    config_class, model_class, own = {
        "flow_matching": (VAEPlusFlowMatchingConfig, VAEPlusFlowMatchingModel, SMALL_PRIOR),
        "coupling_flow": (VAEPlusCouplingFlowConfig, VAEPlusCouplingFlowModel, {**SMALL_PRIOR, "num_couplings": 4}),
        "mixture": (VAEPlusMixtureConfig, VAEPlusMixtureModel, {"num_components": 3}),
    }[kind]
    model = model_class(config_class(latent_dim=latent_dim, **own | options))
    if kind == "mixture":
        dim, count = model.config.num_active, model.config.num_gaussians
        roots = torch.eye(dim) + 0.3 * torch.randn(count, dim, dim)
        shares = torch.arange(1.0, count // 3 + 1) / torch.arange(1.0, count // 3 + 1).sum()  # of the classes
        weights = torch.kron(shares, torch.tensor([0.5, 0.3, 0.2]))
        model.set_mixture(weights, torch.randn(count, dim), 0.3 * roots @ roots.mT)
    else:
        perturbed(model)
    if kind == "flow_matching" and model.teacher is not None:
        model.start_distillation(model)
        with torch.no_grad():  # the one pass is another map than the teacher
            model.network.exit.bias += 0.1
    root = torch.eye(latent_dim) + 0.2 * torch.randn(latent_dim, latent_dim)
    model.set_input_moments(torch.linspace(-0.5, 0.5, latent_dim), root @ root.T)
    return model.eval().requires_grad_(False)


def with_prior(kind: str, autoencoder: bool = True, vae: bool = True, **options) -> VAEPlusPipeline:
    pipe = make_pipeline(autoencoder, second_stage=False)
    prior = make_prior(kind, 4 if vae else 6, **options)
    return VAEPlusPipeline(pipe.vae if vae else None, pipe.autoencoder, prior)


# The command line.

# A preset of three stages for 40 digits: few steps of tiny networks.
TINY = {
    "common": {
        "dataset_name": "digits",
        "resolution": SIZE,
        "num_channels": 1,
        "max_train_samples": 40,
        "max_train_steps": 3,
        "train_batch_size": 8,
        "logging_steps": 1,
    },
    "autoencoder": {"model": {"latent_dim": 6, "hidden_channels": [4, 8], "num_blocks": 1}},
    "vae": {"model": {"latent_dim": 4, "hidden_dim": 8, "num_blocks": 1}},
    "second_stage": {"model": {"hidden_dim": 8, "num_blocks": 1}},
}
# Before the name of a script: two processes of it that train or measure together.
LAUNCH_TWO = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    " --dynamo_backend no --main_process_port 0"
).split()


def captured(call) -> tuple[int, str, str]:
    """`(exit code, standard output, standard error)` of `call`, which returns its exit code."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = call()
        except SystemExit as stop:  # argparse
            code = stop.code
    return code, output.getvalue(), errors.getvalue()


def run(*argv: str) -> tuple[int, str, str]:
    """`(exit code, standard output, standard error)` of `vaeplus ARGV`."""
    return captured(lambda: main(list(argv)))


@contextlib.contextmanager
def importing_from(folder: Path):
    """In it, modules of a folder of scripts are imported by their bare names, which other folders have as well."""
    names = {path.stem for path in folder.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    try:
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            yield
    finally:
        for name in names & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(others)


def run_script(script: Path, *argv) -> tuple[int, str, str]:
    """`(exit code, standard output, standard error)` of `python SCRIPT ARGV`, run in this process."""

    def call():
        runpy.run_path(str(script), run_name="__main__")
        return 0

    threads = torch.get_num_threads()
    words = [str(script), *map(str, argv)]
    with (
        importing_from(script.parent),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "excepthook", sys.excepthook),
        mock.patch.dict(os.environ),
    ):
        try:
            return captured(call)
        finally:
            torch.set_num_threads(threads)


def code_blocks(text: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_code(code: str, pipeline: Path) -> dict:
    """Execute a page's code with the pipeline that it names replaced by one on disk."""
    code, count = re.subn(r'from_pretrained\("[^"]+"', f"from_pretrained({str(pipeline)!r}", code)
    assert count == 1
    found = {}
    exec(compile(code, "page", "exec"), found)
    return found


# Training: a tiny VAE on rows of numbers.

DIM, LATENT_DIM, NUM_ROWS = 6, 4, 22
TINY_RUN = dict(
    max_train_steps=8, train_batch_size=4, lr_warmup_steps=2, logging_steps=2, checkpointing_steps=3, use_ema=True
)


def make_vae(seed: int = 0, **config) -> VAEPlusVAEModel:
    torch.manual_seed(seed)
    shape = dict(input_shape=(DIM,), latent_dim=LATENT_DIM, hidden_dim=8, num_blocks=1)
    return VAEPlusVAEModel(VAEPlusVAEConfig(**shape | config))


def make_rows() -> TensorRows:
    generator = torch.Generator().manual_seed(1)
    return TensorRows({"x": torch.randn(NUM_ROWS, DIM, generator=generator), "eps": torch.randn(NUM_ROWS, LATENT_DIM)})


def prepare_rows(batch, noise, step):
    return {"inputs": batch["x"], "noise": noise(LATENT_DIM)}


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the loop may catch it."""


def killed_at(kill_step):
    def prepare(batch, noise, step):
        if step == kill_step:
            raise Killed
        return prepare_rows(batch, noise, step)

    return prepare


def fit(output_dir, model=None, dataset=None, prepare=prepare_rows, preview=None, **options):
    """The trained model of a run of 8 steps in `output_dir`."""
    options = TrainingOptions(output_dir=str(output_dir), **TINY_RUN | options)
    model = make_vae() if model is None else model
    return train(Stage(model, make_rows() if dataset is None else dataset, prepare, preview), options)


def resume(output_dir, **changes):
    return fit(output_dir, resume_from_checkpoint="latest", **changes)


def stats_of(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "stats.jsonl").read_text().splitlines()]


# Files and folders.


def contents(folder) -> dict[str, bytes]:
    """Every file of a run or checkpoint, byte for byte, but the options, which name the folder."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "training_options.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tree(folder: Path) -> dict:
    """Everything in a folder: path -> hash of the content, `None` for a folder."""
    return {
        path.relative_to(folder).as_posix(): sha256(path) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 100 bytes: the system refuses, in whichever library the write is."""
    provenance()  # asks git, which would leave its lock behind if it were stopped here; the answer is kept
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Files, as bytes.


def noise(seed: int, height: int = 8, width: int | None = None) -> np.ndarray:
    """A picture of noise, square unless its width is given."""
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), dtype=np.uint8)


def encoded(pixels, format: str = "png", **options) -> bytes:
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def idx(images: np.ndarray, magic: int = 0x803, shape=None) -> bytes:
    return struct.pack(">4i", magic, *(shape or images.shape)) + images.tobytes()


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, compression="none")
    return file.getvalue()


def take(stream, first_batch, count, **position):
    """So many batches of a stream from one of them on."""
    stream.set_position(first_batch, **position)
    return [batch for _, batch in zip(range(count), stream, strict=False)]


# Processes.


def forkserver():
    """The context of processes that have imported everything when they start; a new Python needs seconds for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_vaeplus.training.stages", "hf_vaeplus.cli.main", "datasets", "transformers"])
    return context


def start_together(target, number: int, *arguments) -> list:
    """Processes that call `target(barrier, *arguments)`, and pass the barrier at one moment."""
    context = forkserver()
    barrier = context.Barrier(number + 1)
    processes = [context.Process(target=target, args=(barrier, *arguments)) for _ in range(number)]
    for process in processes:
        process.start()
    barrier.wait(timeout=120)
    return processes


class Launched:
    """Processes that call `target(*arguments)` with the environment of a launcher, such as `accelerate launch`.

    What they print goes to the file `log`. Each has a session of its own, to be killed with the workers it starts.
    """

    def __init__(self, num_processes: int, log: Path, environment: dict, target, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.log = log
        self.processes = []
        for rank in range(num_processes):
            variables = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", **environment}
            if num_processes > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            self.processes.append(forkserver().Process(target=_launched, args=(log, variables, target, arguments)))
        for process in self.processes:
            process.start()

    def exit_codes(self, seconds: float) -> list[int | None]:
        """Of each process, after so many seconds at most; `None` for one that still runs."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def ended_within(self, seconds: float) -> bool:
        """Whether all processes came to a good end in that time.

        Raises:
            RuntimeError: one of them failed.
        """
        codes = self.exit_codes(seconds)
        if any(code not in (None, 0) for code in codes):
            self.kill()
            raise RuntimeError(f"a process failed by itself: {self.log.read_text()[-4000:]}")
        return None not in codes

    def kill(self):
        """SIGKILL for every process and for the workers that it has started."""
        for process in self.processes:
            if process.exitcode is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    process.kill()  # it has no session of its own yet
        for process in self.processes:
            process.join()


def _launched(log, environment, target, arguments):
    os.setsid()
    os.environ |= environment
    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late for a PyTorch that is imported already
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*arguments)
