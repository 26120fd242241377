"""Our networks in pythae's models, trained by pythae's own trainer and sampled by pythae's own sampler.

The modules are the same objects' copies; losses, data set, loader, loop and callbacks are pythae's, with its defaults.
pythae knows mixed precision on CUDA alone (`torch.autocast("cuda")`), so on CPUs it trains in float32.
"""

import logging
from pathlib import Path

import torch
from common import Clock
from pythae.data.datasets import BaseDataset
from pythae.models import AE, VAE, AEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback

logging.disable(logging.INFO)  # what it says of every epoch


class Encoder(BaseEncoder):
    def __init__(self, network, is_vae: bool):
        super().__init__()
        self.network, self.is_vae = network, is_vae

    def forward(self, x):
        embedding = self.network(2 * x - 1 if not self.is_vae else (2 * x - 1).flatten(1))
        if not self.is_vae:
            return ModelOutput(embedding=embedding)
        mean, logvar = embedding.chunk(2, dim=1)
        return ModelOutput(embedding=mean, log_covariance=logvar)


class Decoder(BaseDecoder):
    def __init__(self, network, shape):
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, z):
        return ModelOutput(reconstruction=(0.5 * self.network(z) + 0.5).reshape(-1, *self.shape))


def wrap(encoder, decoder, shape: tuple, latent_dim: int, is_vae: bool):
    """pythae's AE or VAE around our encoder and decoder."""
    config = (VAEConfig if is_vae else AEConfig)(input_dim=shape, latent_dim=latent_dim)
    return (VAE if is_vae else AE)(config, Encoder(encoder, is_vae), Decoder(decoder, shape))


class _StepEnds(TrainingCallback):
    def __init__(self):
        self.clock = Clock()

    def on_train_step_end(self, training_config, **kwargs):
        self.clock.tick()


def train_and_time(model, images: torch.Tensor, batch_size: int, output_dir: Path, optimizer: dict) -> float:
    """Seconds per step of one epoch over `images`, float32 in memory, as pythae's users hold them.

    `optimizer`: `lr` and the other arguments of AdamW. What an epoch ends with (a copy of the model, saving) comes
    after the last step and does not count.
    """
    settings = BaseTrainerConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=batch_size,
        num_epochs=1,
        optimizer_cls="AdamW",
        optimizer_params={name: value for name, value in optimizer.items() if name != "lr"},
        learning_rate=optimizer["lr"],
        no_cuda=True,
    )
    ends = _StepEnds()
    data = BaseDataset(images, torch.ones(len(images)))
    BaseTrainer(model, data, training_config=settings, callbacks=[ends]).train()
    return ends.clock.seconds_per_step
