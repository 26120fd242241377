"""How a device computes: TF32, cuDNN's search, kernels that give the same bits each time, and the cost of bf16."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from .checkpoints import list_checkpoints
from .launch import process_state, refuse_what_cannot_run
from .options import TrainingOptions, read_record, refuse_fp16_on_cpu

logger = logging.getLogger(__name__)

SLOW = 1.5  # times as long as in float32: this CPU only imitates bf16


@cache
def slowdown_in_bf16() -> float:
    """How much longer this CPU takes for products of matrices in bf16 than in float32; at most 1 if it knows bf16."""
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        matrix @ matrix  # the first one chooses a kernel
        rounds = []
        for _ in range(3):
            started = time.perf_counter()
            matrix @ matrix
            rounds.append(time.perf_counter() - started)
        times.append(min(rounds))
    return times[1] / times[0]


def fit_to_machine(options: TrainingOptions) -> TrainingOptions:
    """The options of a run that can take place here, with `mixed_precision` auto replaced by bf16 or no.

    A run that is there goes on in its own precision, also on another machine. A new one takes bf16 where this device
    has instructions for it. All processes take what the first one finds.

    Raises:
        ValueError: what cannot run here, see [`~hf_vaeplus.training.launch.refuse_what_cannot_run`]; or what is
            recorded of the run is damaged, or is fp16 and this is a CPU.
    """
    refuse_what_cannot_run(options)
    if options.mixed_precision != "auto":
        return options
    folder = Path(options.output_dir)
    newest = list_checkpoints(options.output_dir)[-1:]
    found = read_record(newest[0] if newest else folder).get("mixed_precision")
    device = process_state().device
    if found is None and device.type == "cuda":
        found = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    elif found is None:
        found = "bf16" if device.type == "cpu" and slowdown_in_bf16() < SLOW else "no"
    options = replace(options, mixed_precision=broadcast_object_list([found])[0])
    refuse_fp16_on_cpu(options, device)
    return options


def advise_on_precision(options: TrainingOptions, device: torch.device):
    """Say so if bf16 makes this run slower: some CPUs have no instructions for it."""
    if options.mixed_precision == "bf16" and device.type == "cpu" and (slowdown := slowdown_in_bf16()) >= SLOW:
        logger.warning(
            "this CPU takes %.1f times as long in bf16 as in float32: mixed_precision no trains a model faster here.",
            slowdown,
        )


@contextlib.contextmanager
def arithmetic_of(options: TrainingOptions) -> Iterator[None]:
    """While it is entered, PyTorch computes as `allow_tf32`, `cudnn_benchmark` and `deterministic` say.

    On a CPU the first two change nothing, and results are the same bits in every case.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    matmul.allow_tf32 = cudnn.allow_tf32 = options.allow_tf32
    cudnn.benchmark = options.cudnn_benchmark and not options.deterministic
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
        torch.use_deterministic_algorithms(was_deterministic)
