"""Detail that a mean has not: a stochastic last part of the autoencoder's decoder.

A decoder trained on squared errors returns the mean of all images that share a code, and a mean is blurred. Here the
image is one draw from their distribution instead,

    x = mean(c) + T(h(c), eps),    eps ~ N(0, I)

where h are the last features of the autoencoder's decoder and mean is its image, both frozen. T is trained by the
energy score (Gneiting and Raftery 2007, Eq. 21, with beta = 1), a strictly proper scoring rule and no critic:

    E |s(x_1) - s(x)| - 1/2 E |s(x_1) - s(x_2)|,    x_1, x_2 two draws, x the image

In the many dimensions of a whole image the score sees little beyond means and variances. So s are projections, drawn
anew at each step, of *local* views: patches of pixels at several scales and, if given, the feature maps of a frozen
network. The score of one number is its continuous ranked probability score, and is smallest for the true conditional
distribution of that number given the code.

The mean of the likelihood, gamma and the pull-back metric stay those of the autoencoder, which is not changed.

An exported Hub repository carries this file beside `modeling_vaeplus.py`, the only file that it imports.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.utils import ModelOutput

from .modeling_vaeplus import (
    ResidualConvBlock,
    VAEPlusConfig,
    VAEPlusPreTrainedModel,
    _check_shape,
)

SEEN, SMALLEST = 64, 32  # pixels a side of the square that the views are made of, and of what it shows at least
PATCH, NUM_SCALES = 5, 4  # of the views of pixels: patches of 5 x 5 of the image, and of it shrunk by 2, 4 and 8


@strict
class VAEPlusDetailConfig(VAEPlusConfig):
    """Configuration of [`VAEPlusDetailModel`].

    Args:
        image_size, num_channels, patch_size (`int`): as of the autoencoder, see [`VAEPlusAutoencoderConfig`].
        feature_dim (`int`): channels of the last features of the autoencoder's decoder, its `hidden_channels[0]`.
        hidden_dim, num_blocks (`int`): channels and residual blocks of the network.
        noise_channels (`int`): numbers of noise that each block gets at each position of the grid, which has
            `image_size / patch_size` positions a side.
        temperature (`float`): factor on the noise in a pipeline whose caller names none. Below 1 draws are calmer.

    Raises:
        ValueError: an unknown field, one out of its range, or an image size that the patches do not divide.
    """

    model_type = "vaeplus_detail"

    image_size: int = 64
    num_channels: int = 3
    patch_size: int = 4
    feature_dim: int = 128
    hidden_dim: int = 32
    num_blocks: int = 2
    noise_channels: int = 12
    temperature: float | int = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_positive("patch_size", "feature_dim", "hidden_dim", "noise_channels")
        self._check_positive("num_blocks", limit=1000)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"VAEPlusDetailConfig.temperature must be finite and at least 0, got {self.temperature}.")
        if self.num_channels not in (1, 3):
            raise ValueError(f"VAEPlusDetailConfig.num_channels must be 1 or 3, got {self.num_channels}.")
        if not 8 <= self.image_size <= 256 or self.image_size % self.patch_size:
            raise ValueError(
                f"VAEPlusDetailConfig.image_size must be 8 to 256 and a multiple of patch_size={self.patch_size}, got"
                f" {self.image_size}."
            )

    @property
    def grid(self) -> int:
        """Positions a side of the grid that the network runs on."""
        return self.image_size // self.patch_size

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Shape of the noise of one image, `noise_channels` for each block."""
        return (self.num_blocks * self.noise_channels, self.grid, self.grid)


@dataclass
class VAEPlusDetailOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): energy score of the projections, a mean over views, positions and images.
    squared_error (`torch.FloatTensor` of shape `()`): of one draw, per image, summed over its values.
    spread (`torch.FloatTensor` of shape `()`): squared distance of two draws, likewise. Where the draws have the
        distribution of the images, it equals `squared_error`, and both are twice the squared error of the mean.
    reconstruction (`torch.FloatTensor` of shape `(batch, num_channels, image_size, image_size)`): one draw.
    """

    loss: torch.FloatTensor | None = None
    squared_error: torch.FloatTensor | None = None
    spread: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None


def seen_side(image_size: int) -> int:
    """Pixels a side of the squares that the views are made of."""
    return min(SEEN, image_size)


def square_sides(image_size: int) -> list[int]:
    """Sides of the squares of an image that are looked at: the whole image, half of it and so on."""
    return [image_size] + [image_size >> halvings for halvings in range(1, 8) if image_size >> halvings >= SMALLEST]


def random_square(image_size: int, generator: torch.Generator, whole: bool = False) -> tuple[int, int, int]:
    """Side, top and left of a square, see [`square_of`]. `whole` asks for one as large as the image.

    Views have strides, so what they miss lies on a lattice. The lattice must lie elsewhere at each step, or the draws
    get a pattern that nothing sees. The whole image is moved, too, by up to 15 pixels.
    """
    sides = square_sides(image_size)[: 1 if whole else None]
    side = sides[int(torch.randint(len(sides), (), generator=generator))]
    reach = image_size - side if side < image_size else min(15, image_size - 1)
    top, left = torch.randint(reach + 1, (2,), generator=generator).tolist()
    return side, top, left


def square_of(images: torch.Tensor, side: int, top: int, left: int) -> torch.Tensor:
    """A square of each image, at most `SEEN` pixels a side. What leaves a moved image on one side enters on the other.

    Squares of more pixels are shrunk, and those of fewer are enlarged if the image has more.
    """
    seen = seen_side(images.shape[-1])
    square = torch.roll(images, (-top, -left), (2, 3))[..., :side, :side]
    if side > seen:
        return F.interpolate(square, size=seen, mode="area")
    return square if side == seen else F.interpolate(square, size=seen, mode="bilinear", align_corners=False)


def pixel_views(images: torch.Tensor) -> list[torch.Tensor]:
    """Images `(n, channels, size, size)` at `NUM_SCALES` scales, as far as a patch fits in."""
    views = [images]
    while len(views) < NUM_SCALES and views[-1].shape[-1] >= 2 * PATCH:
        views.append(F.avg_pool2d(views[-1], 2))
    return views


def random_directions(
    shapes: list[tuple[int, int]], count: int, generator: torch.Generator, device: torch.device
) -> list[torch.Tensor]:
    """`count` unit vectors for each view, `(count, channels, side, side)`, of which `shapes` gives channels and side.

    Half of those of patches sum to 0 over a patch: they see edges and texture whatever the brightness.
    """
    directions = []
    for channels, side in shapes:
        drawn = torch.randn(count, channels, side, side, generator=generator)
        if side > 1:
            drawn[: count // 2] -= drawn[: count // 2].mean((1, 2, 3), keepdim=True)
        directions.append((drawn / drawn.flatten(1).norm(dim=1)[:, None, None, None]).to(device))
    return directions


def energy_score(
    draws: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor, directions: torch.Tensor
) -> torch.Tensor:
    """Continuous ranked probability score of projections: mean |s(x_1) - s(x)| - 1/2 mean |s(x_1) - s(x_2)|.

    Args:
        draws: one view of two independent draws, each of shape `(n, channels, height, width)`.
        target: the same view of the images.
        directions (`torch.Tensor` of shape `(count, channels, side, side)`).

    Returns:
        `torch.Tensor` of shape `()`, unbiased: its mean is smallest where draws and target have the same distribution.
    """
    first, second, real = (F.conv2d(view, directions).float() for view in (*draws, target))
    return 0.5 * ((first - real).abs() + (second - real).abs() - (first - second).abs()).mean()


class VAEPlusDetailModel(VAEPlusPreTrainedModel):
    """T: detail of an image, to be added to the decoder's mean, from the decoder's last features and noise.

    Noise is added before each block, so that a late one does not have to carry it through the early ones.

    Example:
        >>> mean, features = autoencoder.decode_with_features(code)
        >>> image = mean + detail.sample(features, torch.randn(len(code), *detail.config.noise_shape))
    """

    config_class = VAEPlusDetailConfig
    main_input_name = "features"

    def __init__(self, config: VAEPlusDetailConfig):
        super().__init__(config)
        width = config.hidden_dim
        self.enter = nn.Conv2d(config.feature_dim, width, 1)
        self.noise_maps = nn.ModuleList(nn.Conv2d(config.noise_channels, width, 1) for _ in range(config.num_blocks))
        self.blocks = nn.ModuleList(ResidualConvBlock(width) for _ in range(config.num_blocks))
        self.exit = nn.Conv2d(width, config.num_channels * config.patch_size**2, 3, padding=1)
        for noise_map in self.noise_maps:
            noise_map.init_scale = 0.5
        self.exit.init_scale = 0.03  # near 0, but not 0: there the score has no gradient that parts the two draws
        self.post_init()

    def sample(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Detail of shape `(batch, num_channels, image_size, image_size)`, around 0.

        Args:
            features (`torch.Tensor` of shape `(batch, feature_dim, grid, grid)`): of
                `VAEPlusAutoencoderModel.decode_with_features`.
            noise (`torch.Tensor` of shape `(batch, *config.noise_shape)`): standard normal.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        _check_shape("features", features, (self.config.feature_dim, self.config.grid, self.config.grid))
        _check_shape("noise", noise, self.config.noise_shape)
        hidden = self.enter(features.to(self.dtype))
        parts = noise.to(features.device, self.dtype).split(self.config.noise_channels, dim=1)
        for block, noise_map, part in zip(self.blocks, self.noise_maps, parts, strict=True):
            hidden = block(hidden + noise_map(part))
        return F.pixel_shuffle(self.exit(F.silu(hidden)), self.config.patch_size)

    def forward(
        self,
        features: torch.Tensor,
        mean: torch.Tensor,
        noise: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        directions: list[torch.Tensor] | None = None,
        views: Callable[[torch.Tensor], list[torch.Tensor]] = pixel_views,
        return_dict: bool = True,
    ) -> VAEPlusDetailOutput | tuple:
        """Draw twice and measure the energy score.

        Args:
            features, mean: of `decode_with_features`, of the images' codes.
            noise (`torch.Tensor` of shape `(batch, 2, *config.noise_shape)`): of the two draws.
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, image_size, image_size)`, *optional*): the
                images, in [0, 1]. Without them there is no loss.
            directions (*optional*): for each view, see [`random_directions`]; needed for a loss.
            views: images -> local views, maps of shape `(n, channels, height, width)`.

        Raises:
            ValueError: wrong shape, or images without directions.
        """
        draws = [mean + self.sample(features, each) for each in noise.unbind(1)]
        output = VAEPlusDetailOutput(reconstruction=draws[0])
        if pixel_values is not None:
            if directions is None:
                raise ValueError("a loss needs directions: draw them with random_directions.")
            with torch.no_grad():
                targets = views(pixel_values)
            # Both draws in one pass of the views.
            drawn = [view.chunk(2) for view in views(torch.cat(draws))]
            scores = [
                energy_score(pair, target, direction)
                for pair, target, direction in zip(drawn, targets, directions, strict=True)
            ]
            output.loss = torch.stack(scores).mean()
            output.squared_error = (draws[0] - pixel_values).detach().float().square().flatten(1).sum(1).mean()
            output.spread = (draws[0] - draws[1]).detach().float().square().flatten(1).sum(1).mean()
        return output if return_dict else output.to_tuple()


__all__ = ["VAEPlusDetailConfig", "VAEPlusDetailModel"]
