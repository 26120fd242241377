"""What several test files need."""

import torch

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
