"""Pictures for people: which pixel of a grid belongs to which image, and curves of incomplete runs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_vaeplus.pictures import CURVES, image_grid, plot_curves


@given(
    count=st.integers(1, 11),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    columns=st.one_of(st.none(), st.integers(1, 5)),
)
@settings(max_examples=60, deadline=None)
def test_every_pixel_of_a_grid(count, channels, height, width, columns):
    images = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(count))
    picture = image_grid(images, columns)
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    assert picture.size == (columns * (width + 1), rows * (height + 1))

    expected = np.full((rows * (height + 1), columns * (width + 1), channels), 255)
    for i, image in enumerate(images):
        top, left = 1 + (i // columns) * (height + 1), 1 + (i % columns) * (width + 1)
        expected[top : top + height, left : left + width] = np.rint(255 * image.permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.asarray(picture).reshape(expected.shape), expected)


def test_a_grid_clips_and_takes_half_precision_with_gradients():
    images = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.bfloat16, requires_grad=True).reshape(3, 1, 1, 1)
    assert np.asarray(image_grid(images, columns=3))[1].tolist() == [255, 0, 255, 128, 255, 255]


def test_an_enlarged_grid_keeps_the_colours_of_flat_images():
    images = torch.tensor([0.2, 0.8]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    array = np.asarray(image_grid(images, columns=2, scale=3))
    assert array.shape == (13, 26, 3)
    assert (array[1:, 1:13] == 51).all() and (array[1:, 14:] == 204).all()


def write_stats(folder, lines):
    folder.mkdir()
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


AUTOENCODER = [{"step": step, "loss": 9.0 / step, "grad_norm": 1.0 / step} for step in (1, 2, 3)]
VAE = [
    {**line, "squared_error": 5.0, "kl": 2.0 - line["step"], "gamma": 0.1, "active_units": line["step"]}
    for line in AUTOENCODER
]


def panel_has_ink(picture, row: int, column: int) -> bool:
    """Whether something is drawn in the middle of a panel of the picture."""
    pixels = np.asarray(picture.convert("L")).astype(int)
    height, width = pixels.shape[0] // (pixels.shape[0] // 260), pixels.shape[1] // len(CURVES)
    middle = pixels[row * height + 60 : row * height + 200, column * width + 60 : column * width + 260]
    return bool((middle < 200).any())


def test_curves_leave_out_what_a_stage_does_not_log(tmp_path):
    folders = {"autoencoder": write_stats(tmp_path / "a", AUTOENCODER), "vae": write_stats(tmp_path / "v", VAE)}
    plot_curves(folders, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (320 * len(CURVES), 260 * 2))
        drawn = [[panel_has_ink(picture, row, column) for column in range(len(CURVES))] for row in (0, 1)]
    assert drawn[0] == [True, True, False, False, False, False]  # its loss as squared error, the gradient norm
    assert all(drawn[1])


def test_the_known_number_of_factors_is_drawn_for_the_first_vae_only(tmp_path):
    folder = write_stats(tmp_path / "run", VAE)
    drawn = {}
    for stage in ("vae", "second_stage"):
        for num_factors in (None, 2):
            plot_curves({stage: folder}, tmp_path / "curves.png", num_factors)
            drawn[stage, num_factors] = (tmp_path / "curves.png").read_bytes()
    assert drawn["vae", None] != drawn["vae", 2]
    assert drawn["second_stage", None] == drawn["second_stage", 2]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": math.nan, "kl": 0.0}],
        [{"step": 1, "loss": -2.0, "grad_norm": None}],  # a step that fp16 skipped
    ],
)
def test_curves_of_a_run_that_logged_nothing_or_strange_values(tmp_path, lines):
    plot_curves({"vae": write_stats(tmp_path / "run", lines)}, tmp_path / "curves.png", num_factors=4)
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert picture.size == (320 * len(CURVES), 260)


def test_a_field_that_later_lines_lack_is_drawn_where_it_is(tmp_path):
    lines = [VAE[0], AUTOENCODER[1], VAE[2]]
    plot_curves({"vae": write_stats(tmp_path / "run", lines)}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert panel_has_ink(picture, 0, list(CURVES).index("kl"))
