"""VAE+ for the Hugging Face ecosystem: images from noise in one pass, with posteriors and without adversaries."""

from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # its top level's once asked for torchvision

from .image_processing_vaeplus import VAEPlusImageProcessor
from .modeling_baselines import PenalizedAutoencoderConfig, PenalizedAutoencoderModel
from .modeling_vaeplus import (
    GaussianPosterior,
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusEncoderConfig,
    VAEPlusEncoderModel,
    VAEPlusPreTrainedModel,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)

for _config, _model in (
    (VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel),
    (VAEPlusVAEConfig, VAEPlusVAEModel),
    (VAEPlusEncoderConfig, VAEPlusEncoderModel),
    (PenalizedAutoencoderConfig, PenalizedAutoencoderModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
AutoImageProcessor.register(
    VAEPlusEncoderConfig, image_processor_classes={"pil": VAEPlusImageProcessor}, exist_ok=True
)

__all__ = [
    "GaussianPosterior",
    "PenalizedAutoencoderConfig",
    "PenalizedAutoencoderModel",
    "VAEPlusAutoencoderConfig",
    "VAEPlusAutoencoderModel",
    "VAEPlusEncoderConfig",
    "VAEPlusEncoderModel",
    "VAEPlusImageProcessor",
    "VAEPlusPipeline",
    "VAEPlusPreTrainedModel",
    "VAEPlusVAEConfig",
    "VAEPlusVAEModel",
]


def __getattr__(name: str):
    if name == "VAEPlusPipeline":  # on first use: importing a model alone does not import diffusers
        from .hub.pipeline import VAEPlusPipeline

        return VAEPlusPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
