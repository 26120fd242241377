"""Feature maps of a frozen vision backbone of `transformers`, which the detail stage can compare besides pixels."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig
from transformers.image_processing_utils import BaseImageProcessor

NUM_DEPTHS = 5  # of the depths of a backbone, spread over it: what is shallow sees texture, what is deep sees parts
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


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
    """The backbone in a folder or a repository of the Hub, from safetensors alone and without code of its own.

    Raises:
        ValueError: nothing is there, or nothing in safetensors; a model that transformers does not offer as a
            backbone, or that takes no images of this size.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--feature_loss {name} names no model ({' '.join(str(error).split())}): give the folder or the Hub id of"
            " a backbone of transformers."
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
        network = model_class.from_pretrained(name, out_features=chosen, use_safetensors=True)
        try:
            found, _ = BaseImageProcessor.get_image_processor_dict(name)
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
