"""How a device computes: TF32, cuDNN's search, kernels that give the same bits each time, and the cost of bf16."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator

import torch

from .options import TrainingOptions

logger = logging.getLogger(__name__)


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


def advise_on_precision(options: TrainingOptions, device: torch.device):
    """Say so if bf16 makes this run slower: some CPUs have no instructions for it."""
    if options.mixed_precision == "bf16" and device.type == "cpu" and (slowdown := slowdown_in_bf16()) > 1.5:
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
