"""What several test files need."""

import io
import multiprocessing
import struct
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)


def perturbed(model):
    """A fresh network is affine and its images are grey: move every weight but gamma off its starting point."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name != "log_gamma":
                parameter += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


def two_stages(image_size: int = 32) -> VAEPlusPipeline:
    """A tiny pipeline of colour images without a second stage: codes of 6 numbers, 4 latents."""
    torch.manual_seed(0)
    vae = VAEPlusVAEConfig(input_shape=(6,), latent_dim=4, hidden_dim=8, num_blocks=1, reconstruction_space="image")
    autoencoder = VAEPlusAutoencoderConfig(image_size=image_size, latent_dim=6, hidden_channels=(4, 8))
    return VAEPlusPipeline(
        perturbed(VAEPlusVAEModel(vae)).eval(), perturbed(VAEPlusAutoencoderModel(autoencoder)).eval()
    )


# Files, as bytes.


def noise(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


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


def start_together(target, number: int, *arguments) -> list:
    """Processes that call `target(barrier, *arguments)`, and pass the barrier at one moment."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(number + 1)
    processes = [spawn.Process(target=target, args=(barrier, *arguments)) for _ in range(number)]
    for process in processes:
        process.start()
    barrier.wait(timeout=120)
    return processes
