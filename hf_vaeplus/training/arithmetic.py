"""How a GPU computes: TF32, cuDNN's search for the fastest kernel, and kernels that give the same bits each time."""

import contextlib
import os
from collections.abc import Iterator

import torch

from .options import TrainingOptions


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
