"""Which images, from where, at which size: the one record from the command line to the source."""

import os
from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from ..fields import at_least_one, finite, must, not_negative, one_sentence, option
from .catalogue import NAMED_DATA_SETS


def _is_path(value) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_list(value) -> bool:
    return isinstance(value, list | tuple)


@one_sentence
@strict
@dataclass
class ImageOptions:
    """A set of images.

    Args:
        dataset_name (`str`, *optional*): `"digits"` (1,797 real digits), `"rendered-faces"` (drawings from
            `num_factors` factors), `"celeba"`, `"mnist"`, or a Hub id. The name `"celeba"` or `"mnist"`
            beside a local source only sets the crop and the number of channels.
        train_data_dir (`str`, *optional*): folder of pictures or parquet files, searched recursively and taken in the
            order of their paths, of `Dataset.save_to_disk`, or of MNIST's idx files (`"train"`, `"test"`).
        train_data_files (`str` or list of `str`, *optional*): paths or glob patterns of parquet files. What exists is
            a path. A file counts once. Of a pattern's matches in several splits the training files are taken.
        split (`str`): split of a Hub data set, or of a folder, whose files are split by their paths as `datasets` does
            ([`~hf_vaeplus.data.folders.split_names`]). Of any source a slice can be taken, as
            in `datasets`: `"train[20000:]"`, `"train[:20000]"`, `"train[-500:]"`. All slices share one cache.
            `"train[unseen]"` are the images that `holdout` holds out, `"train[seen]"` the others.
        holdout (`float` or `int`, *optional*): images that are held out, after a slice is taken: a share below 1, or a
            number; 0 for none. `None` stands for 5%, but at least 100 and at most a fifth, and none of fewer than 50
            images. The choice has a fixed seed and depends on the number of images alone.
        dataset_revision (`str`, *optional*): branch, tag or commit of a Hub data set; with a full commit hash
            a cached set opens offline.
        image_column (`str`): column of pictures in a Hub data set or parquet files.
        resolution (`int`): height and width of the images in pixels.
        crop (`int`, *optional*): side in source pixels of a centre crop taken before resizing; by default 128 for
            CelebA, else the largest square.
        num_channels (`int`, *optional*): 1 (grey) or 3 (RGB); by default 1 for MNIST, else 3.
        num_factors (`int`): number of varying factors of `"rendered-faces"`.
        max_train_samples (`int`, *optional*): keep at most that many of the first images, before a slice is taken
            (`"rendered-faces"`: draw that many, by default 20,000).
        on_bad_image (`"raise" | "skip"`): what to do about a picture that cannot be used
            ([`~hf_vaeplus.data.sources.BadImage`]): raise, or leave it out and count and name it in a warning of the
            log. Slices are then of the images that are left.
        random_flip (`bool`): append the mirror image of every image, after a slice is taken.
    Raises:
        ValueError: for an option of another type or out of range.
    """

    dataset_name: str | None = option(
        None, "rendered-faces | digits | celeba | mnist | a data set on the Hub", group="data"
    )
    train_data_dir: str | os.PathLike | None = option(
        None, "folder of pictures or parquet files, of save_to_disk, or of MNIST's files", is_path=True
    )
    train_data_files: str | os.PathLike | list | tuple | None = option(
        None, "parquet files, as a glob pattern",
        must("be a path or a list of paths", lambda value: all(map(_is_path, value if _is_list(value) else [value]))),
        is_path=True,
    )  # fmt: skip
    split: str = option("train", "split to train on")
    dataset_revision: str | None = option(None, "branch, tag or commit of the data set on the Hub")
    image_column: str = option("image", "column that holds the pictures")
    resolution: int = option(64, "height and width of the training images in pixels", at_least_one)
    crop: int | None = option(
        None, "side of the centre crop in source pixels; default: the largest square", at_least_one
    )
    num_channels: int | None = option(
        None, "1 grey, 3 colour; default: what the data set has",
        must("be 1 (grey) or 3 (RGB)", lambda value: value in (1, 3)),
    )  # fmt: skip
    num_factors: int = option(8, "r: factors that vary in rendered-faces")
    max_train_samples: int | None = option(None, "use only so many images", at_least_one)
    holdout: float | int | None = option(
        0, "hold out a share (below 1) or a number of the pictures, to measure on; `vaeplus train` holds out 5%% of"
        " your own pictures, at least 100, if you do not say otherwise", not_negative, finite,
    )  # fmt: skip
    on_bad_image: Literal["raise", "skip"] = option("raise", "raise, or skip and log the pictures that cannot be used")
    random_flip: bool = option(False, "add every image's mirror image")

    def __post_init__(self):
        """Paths become text, as they are written down with a run."""
        if self.train_data_dir is not None:
            self.train_data_dir = os.fspath(self.train_data_dir)
        if _is_list(self.train_data_files):
            self.train_data_files = tuple(map(os.fspath, self.train_data_files))
        elif self.train_data_files is not None:
            self.train_data_files = os.fspath(self.train_data_files)

    @property
    def source_crop(self) -> int | None:
        """The centre crop that is taken: the one asked for, or that of a data set with a short name."""
        return self.crop or NAMED_DATA_SETS.get(self.dataset_name, {}).get("crop")

    @property
    def source_channels(self) -> int:
        """The number of channels: the one asked for, or that of a data set with a short name."""
        return self.num_channels or NAMED_DATA_SETS.get(self.dataset_name, {}).get("num_channels", 3)


def image_options(
    dataset_name: str | None = None, *, revision: str | None = None, max_samples: int | None = None, **options
) -> ImageOptions:
    """[`ImageOptions`] from the keyword arguments of `load_images`, of which two have shorter names than there."""
    return ImageOptions(dataset_name, dataset_revision=revision, max_train_samples=max_samples, **options)
