"""VAE+ for the Hugging Face ecosystem: images from noise in one pass, with posteriors and without adversaries."""

from . import registration
from .version import __version__ as __version__

TYPE_CHECKING = False  # that of `typing`, whose import takes longer than this file
if TYPE_CHECKING:
    from .diagnosis.diagnose import diagnose
    from .hub.pipeline import VAEPlusPipeline
    from .image_processing_vaeplus import VAEPlusImageProcessor
    from .modeling_baselines import PenalizedAutoencoderConfig, PenalizedAutoencoderModel
    from .modeling_detail import VAEPlusDetailConfig, VAEPlusDetailModel
    from .modeling_priors import (
        VAEPlusCouplingFlowConfig,
        VAEPlusCouplingFlowModel,
        VAEPlusFlowMatchingConfig,
        VAEPlusFlowMatchingModel,
        VAEPlusMixtureConfig,
        VAEPlusMixtureModel,
    )
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

__all__ = [
    "GaussianPosterior",
    "PenalizedAutoencoderConfig",
    "PenalizedAutoencoderModel",
    "VAEPlusAutoencoderConfig",
    "VAEPlusAutoencoderModel",
    "VAEPlusCouplingFlowConfig",
    "VAEPlusCouplingFlowModel",
    "VAEPlusDetailConfig",
    "VAEPlusDetailModel",
    "VAEPlusEncoderConfig",
    "VAEPlusEncoderModel",
    "VAEPlusFlowMatchingConfig",
    "VAEPlusFlowMatchingModel",
    "VAEPlusImageProcessor",
    "VAEPlusMixtureConfig",
    "VAEPlusMixtureModel",
    "VAEPlusPipeline",
    "VAEPlusPreTrainedModel",
    "VAEPlusVAEConfig",
    "VAEPlusVAEModel",
    "diagnose",
]


def __getattr__(name: str):  # on first use: `vaeplus --help` imports no torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "diagnose":
        from .diagnosis import diagnose as home
    elif name == "VAEPlusPipeline":
        from .hub import pipeline as home
    elif name == "VAEPlusImageProcessor":
        from . import image_processing_vaeplus as home
    elif name.startswith("PenalizedAutoencoder"):
        from . import modeling_baselines as home
    elif name.startswith("VAEPlusDetail"):
        from . import modeling_detail as home
    elif name.startswith(("VAEPlusCouplingFlow", "VAEPlusFlowMatching", "VAEPlusMixture")):
        from . import modeling_priors as home
    else:
        from . import modeling_vaeplus as home
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.install()
