"""Feature maps of a frozen vision backbone of `transformers`, which the detail stage can compare besides pixels.

EfficientNet-lite, which transformers lacks, is added to its backbones. The package carries the first stages of
efficientnet-lite0: 250,000 numbers, for runs on a CPU.
"""

from collections.abc import Callable
from importlib import resources

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BackboneOutput

NUM_DEPTHS = 5  # of the depths of a backbone, spread over it: what is shallow sees texture, what is deep sees parts
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


# Stages of EfficientNet-lite0: expansion, kernel, stride, channels, blocks (Tan and Le 2019, Table 1).
_LITE0 = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3))
_STEM = 32  # channels


@strict
class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of [`EfficientNetLiteBackbone`]: its four stages have strides 2, 4, 8 and 16."""

    model_type = "efficientnet_lite"

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = [f"stage{number}" for number in range(1, len(_LITE0) + 1)]
        chosen = {name: kwargs.pop(name, None) for name in ("out_indices", "out_features")}
        self.set_output_features_output_indices(**chosen)
        super().__post_init__(**kwargs)


class _MobileBlock(nn.Module):
    """Inverted bottleneck: 1 x 1 to more channels, one filter a channel, 1 x 1 to fewer; a skip where shapes agree."""

    def __init__(self, channels: int, expansion: int, side: int, stride: int, out_channels: int):
        super().__init__()
        width, self.stride = expansion * channels, stride
        self.expand = nn.Conv2d(channels, width, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(width, width, side, groups=width)
        self.project = nn.Conv2d(width, out_channels, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden if self.expand is None else F.relu6(self.expand(hidden))
        out = self.project(F.relu6(_same_conv(wide, self.depthwise, self.stride)))
        return hidden + out if out.shape == hidden.shape else out


def _same_conv(hidden: torch.Tensor, conv: nn.Conv2d, stride: int) -> torch.Tensor:
    """TensorFlow's padding, with which the weights were trained: the odd row and column lie below and to the right."""
    before, after = zip(*(_padding(size, conv.kernel_size[0], stride) for size in hidden.shape[-2:]), strict=True)
    padded = F.pad(hidden, (before[1], after[1], before[0], after[0]))
    return F.conv2d(padded, conv.weight, conv.bias, stride, groups=conv.groups)


def _padding(size: int, side: int, stride: int) -> tuple[int, int]:
    missing = max((-(-size // stride) - 1) * stride + side - size, 0)
    return missing // 2, missing - missing // 2


class EfficientNetLiteBackbone(BackboneMixin, PreTrainedModel):
    """The first four stages of EfficientNet-lite0, its normalisation folded into the convolutions."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = nn.Conv2d(3, _STEM, 3)
        self.stages, channels = nn.ModuleList(), _STEM
        for expansion, side, stride, out, count in _LITE0:
            blocks = [_MobileBlock(channels, expansion, side, stride, out)]
            blocks += [_MobileBlock(out, expansion, side, 1, out) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            channels = out
        self.num_features = [out for *_, out, _ in _LITE0]
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_) -> BackboneOutput:
        hidden, maps = F.relu6(_same_conv(pixel_values, self.stem, 2)), []
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            hidden = stage(hidden)
            maps += [hidden] if name in self.out_features else []
        return BackboneOutput(feature_maps=tuple(maps))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone)


class Backbone(nn.Module):
    """Images in [0, 1], grey or RGB, to feature maps at several depths: a list of `(n, channels, height, width)`.

    Args:
        network: a backbone of transformers.
        mean, std: of its input, by channel.
    """

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        rgb = images.expand(-1, 3, -1, -1)
        return list(self.network((rgb - self.mean) / self.std).feature_maps)


def open_backbone(name: str, image_size: int) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """A backbone from safetensors alone and without code of its own.

    Args:
        name: that of one that the package carries (efficientnet-lite0), a folder, or a repository of the Hub.
        image_size: of the images that it is to look at.

    Raises:
        ValueError: nothing is there, or nothing in safetensors; a model that transformers does not offer as a
            backbone, or that takes no images of this size.
    """
    carried = resources.files("hf_vaeplus") / "backbones" / name
    path = str(carried) if (carried / "config.json").is_file() else name
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--feature_loss {name} names no model ({' '.join(str(error).split())}): give efficientnet-lite0,"
            " or the folder or the Hub id of a backbone of transformers."
        ) from error
    stages = getattr(config, "stage_names", None)
    if not stages or type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise ValueError(
            f"--feature_loss {name} is a {config.model_type}, which transformers does not offer as a backbone: choose"
            " one of a kind such as resnet, convnext, swin or dinov2."
        )
    chosen = [stages[int(position)] for position in torch.linspace(0, len(stages) - 1, min(NUM_DEPTHS, len(stages)))]
    try:
        # `AutoBackbone.from_pretrained` takes a folder for the name of a repository of timm.
        model_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        network = model_class.from_pretrained(path, out_features=chosen, use_safetensors=True)
        try:
            found, _ = BaseImageProcessor.get_image_processor_dict(path)
        except (OSError, ValueError):  # none is stored
            found = {}
        told = {key: found.get(key) or usual for key, usual in _IMAGENET.items()}
        backbone = Backbone(network, told["image_mean"], told["image_std"])
        with torch.no_grad():
            backbone(torch.full((1, 3, image_size, image_size), 0.5))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"--feature_loss {name} cannot be loaded, or cannot look at images of {image_size} x {image_size} pixels"
            f" ({' '.join(str(error).split())}): choose another backbone."
        ) from error
    return backbone
