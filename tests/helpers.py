"""What several test files need."""

import torch


def perturbed(model):
    """A fresh network is affine and its images are grey: move every weight but gamma off its starting point."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name != "log_gamma":
                parameter += 0.1 * torch.randn(parameter.shape, generator=source)
    return model
