"""Registers the classes of this package with `transformers` and `diffusers`, and imports neither of them to do so.

`AutoModel.from_pretrained(folder)` works after a mere `import hf_vaeplus`, as it does with classes that register
themselves when they are imported. The import of these classes takes seconds, because `transformers.modeling_utils`
does, so it waits until the module that holds the registry has been imported.
"""

import functools
import sys


def _register_configs():
    from transformers import AutoConfig

    from .modeling_baselines import PenalizedAutoencoderConfig
    from .modeling_detail import VAEPlusDetailConfig
    from .modeling_priors import VAEPlusCouplingFlowConfig, VAEPlusFlowMatchingConfig, VAEPlusMixtureConfig
    from .modeling_vaeplus import VAEPlusAutoencoderConfig, VAEPlusEncoderConfig, VAEPlusVAEConfig

    priors = (VAEPlusCouplingFlowConfig, VAEPlusFlowMatchingConfig, VAEPlusMixtureConfig)
    first = (VAEPlusAutoencoderConfig, VAEPlusVAEConfig, VAEPlusEncoderConfig, PenalizedAutoencoderConfig)
    for config in (*first, *priors, VAEPlusDetailConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models():
    from transformers import AutoModel

    from .modeling_baselines import PenalizedAutoencoderModel
    from .modeling_detail import VAEPlusDetailModel
    from .modeling_priors import VAEPlusCouplingFlowModel, VAEPlusFlowMatchingModel, VAEPlusMixtureModel
    from .modeling_vaeplus import VAEPlusAutoencoderModel, VAEPlusEncoderModel, VAEPlusVAEModel

    priors = (VAEPlusCouplingFlowModel, VAEPlusFlowMatchingModel, VAEPlusMixtureModel)
    first = (VAEPlusAutoencoderModel, VAEPlusVAEModel, VAEPlusEncoderModel, PenalizedAutoencoderModel)
    for model in (*first, *priors, VAEPlusDetailModel):
        AutoModel.register(model.config_class, model, exist_ok=True)


def _register_image_processor():
    # The name at the top level of `transformers` once asked for torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .image_processing_vaeplus import VAEPlusImageProcessor
    from .modeling_vaeplus import VAEPlusEncoderConfig

    processors = {"pil": VAEPlusImageProcessor}
    AutoImageProcessor.register(VAEPlusEncoderConfig, image_processor_classes=processors, exist_ok=True)


def _register_pipeline():
    from .hub import pipeline  # noqa: F401  # registers itself


class _Registration:
    """A finder of modules that calls each of `waiting` once the module of its name has been imported.

    A call imports modules of this package, which import others. None of them may be half imported at that moment, so
    the calls wait until the outermost import of these packages has ended.
    """

    def __init__(self):
        self.waiting = {
            "transformers.models.auto.configuration_auto": _register_configs,
            "transformers.models.auto.modeling_auto": _register_models,
            "transformers.models.auto.image_processing_auto": _register_image_processor,
            "diffusers.pipelines.pipeline_utils": _register_pipeline,
        }
        self.depth = 0  # of imports within imports

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("transformers", "diffusers", "hf_vaeplus"):
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]  # those of other tools among them
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self.exec_module, spec.loader.exec_module)
        return spec

    def exec_module(self, exec_module, module):
        self.depth += 1
        try:
            exec_module(module)
        finally:
            self.depth -= 1
        self.register()

    def register(self):
        """Call what waits for a module that is there."""
        while not self.depth and (ready := [name for name in self.waiting if name in sys.modules]):
            self.waiting.pop(ready[0])()


def install():
    """Register with what is imported already at once, and with the rest when it is imported."""
    registration = _Registration()
    sys.meta_path.insert(0, registration)
    registration.register()
