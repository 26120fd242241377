"""Detail beyond the mean: the score against its closed form, the pipeline, the stage and what refuses what."""

import json
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import SIZE, importing_from, make_pipeline, run
from torch.testing import assert_close
from transformers import ResNetBackbone, ResNetConfig

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusDetailConfig,
    VAEPlusDetailModel,
    VAEPlusPipeline,
)
from hf_vaeplus.modeling_detail import (
    energy_score,
    pixel_views,
    random_directions,
    random_square,
    square_of,
    square_sides,
)

REPRODUCE = Path(__file__).parents[1] / "examples" / "reproduce"
# Mean and standard deviation of four feature maps of EfficientNet-lite0.
GOLDEN = [(0.41887, 7.2409), (1.91196, 8.846), (0.18661, 8.84325), (0.27846, 8.68992)]
CONFIG = VAEPlusDetailConfig(image_size=16, patch_size=4, feature_dim=8, hidden_dim=8, num_blocks=1, noise_channels=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_score_of_one_number_is_that_of_gneiting_and_raftery():
    """CRPS(N(m, s^2), x) = s (w (2 Phi(w) - 1) + 2 phi(w) - 1 / sqrt(pi)), w = (x - m) / s (their Eq. 21, closed)."""
    m, s, x = 0.3, 0.7, torch.full((400_000, 1, 1, 1), 1.1)
    draws = tuple(m + s * torch.randn(x.shape, generator=generator(seed)) for seed in (1, 2))
    w = (1.1 - m) / s
    phi, capital = math.exp(-0.5 * w * w) / math.sqrt(2 * math.pi), 0.5 * (1 + math.erf(w / math.sqrt(2)))
    expected = s * (w * (2 * capital - 1) + 2 * phi - 1 / math.sqrt(math.pi))
    assert_close(float(energy_score(draws, x, torch.ones(1, 1, 1, 1))), expected, rtol=0.01, atol=0)


def test_the_score_is_smallest_for_the_distribution_of_the_target():
    target = torch.randn(200_000, 1, 1, 1, generator=generator(0))
    ones = torch.ones(1, 1, 1, 1)

    def score(mean, scale):
        draws = tuple(mean + scale * torch.randn(target.shape, generator=generator(seed)) for seed in (1, 2))
        return float(energy_score(draws, target, ones))

    true = score(0, 1)
    assert all(true < score(*other) for other in ((0, 0.0), (0, 0.8), (0, 1.25), (0.2, 1)))


def test_directions_are_unit_vectors_and_half_of_those_of_patches_see_no_brightness():
    patches, maps = random_directions([(3, 5), (7, 1)], 32, generator(), torch.device("cpu"))
    assert patches.shape == (32, 3, 5, 5) and maps.shape == (32, 7, 1, 1)
    for each in (patches, maps):
        assert_close(each.flatten(1).norm(dim=1), torch.ones(32))
    assert (patches[:16].sum((1, 2, 3)).abs() < 1e-5).all() and (patches[16:].sum((1, 2, 3)).abs() > 1e-5).any()


def test_views_shrink_by_means_as_far_as_a_patch_fits_in():
    images = torch.rand(2, 3, 32, 32, generator=generator())
    sizes = [view.shape[-1] for view in pixel_views(images)]
    assert sizes == [32, 16, 8]
    assert_close(pixel_views(images)[1][:, :, 0, 0], images[:, :, :2, :2].mean((2, 3)))


@pytest.mark.parametrize("size, sides", [(16, [16]), (32, [32]), (64, [64, 32]), (128, [128, 64, 32])])
def test_squares_lie_in_the_image_or_are_the_whole_image_moved(size, sides):
    assert square_sides(size) == sides
    source, seen = generator(), set()
    for _ in range(200):
        side, top, left = random_square(size, source)
        seen.add(side)
        reach = size - side if side < size else 15
        assert 0 <= top <= reach and 0 <= left <= reach
    assert seen == set(sides)


def test_a_square_is_cut_out_shrunk_or_enlarged():
    images = torch.rand(2, 3, 128, 128, generator=generator())
    assert torch.equal(square_of(images, 64, 10, 20), images[..., 10:74, 20:84])
    assert_close(square_of(images, 128, 0, 0), F.avg_pool2d(images, 2))
    enlarged = square_of(images, 32, 5, 6)
    assert_close(F.avg_pool2d(enlarged, 2)[..., 1:-1, 1:-1].mean(), images[..., 6:36, 7:37].mean(), rtol=0.02, atol=0)
    assert enlarged.shape[-1] == 64
    small = images[..., :32, :32]
    assert torch.equal(square_of(small, 32, 3, 4), small.roll((-3, -4), (2, 3)))


def test_features_of_the_decoder_come_with_its_image():
    torch.manual_seed(0)
    config = VAEPlusAutoencoderConfig(image_size=16, latent_dim=4, hidden_channels=(8, 12), num_blocks=1)
    model = VAEPlusAutoencoderModel(config).eval()
    torch.nn.init.normal_(model.decoder[-2].weight)
    code = torch.randn(3, 4)
    image, features = model.decode_with_features(code)
    assert torch.equal(image, model.decode(code)) and features.shape == (3, 8, 4, 4)
    VAEPlusDetailModel(CONFIG).sample(features, torch.zeros(3, *CONFIG.noise_shape))
    with pytest.raises(ValueError, match="code must"):
        model.decode_with_features(code[:, :3])


def test_training_finds_the_spread_around_the_mean():
    """Images that are N(mean, 0.2^2) at each pixel, whatever the features: draws must have that variance too."""
    torch.manual_seed(0)
    model = VAEPlusDetailModel(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    features, mean = torch.zeros(16, 8, 4, 4), torch.full((16, 3, 16, 16), 0.5)
    source = generator(3)
    for _ in range(200):
        output = model(
            features,
            mean,
            torch.randn(16, 2, *CONFIG.noise_shape, generator=source),
            mean + 0.2 * torch.randn(mean.shape, generator=source),
            random_directions([(3, 5), (3, 5)], 8, source, torch.device("cpu")),
            lambda images: pixel_views(images)[:2],
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    expected = 2 * 0.04 * mean[0].numel()
    assert_close(float(output.spread), expected, rtol=0.25, atol=0)
    assert_close(float(output.squared_error), expected, rtol=0.25, atol=0)


@pytest.fixture(scope="module")
def preset() -> dict:
    common = dict(dataset_name="rendered-faces", max_train_samples=64, resolution=32, train_batch_size=8)
    common |= dict(max_train_steps=4, logging_steps=2, checkpointing_steps=2)
    return {
        "common": common,
        "autoencoder": {"model": {"latent_dim": 4, "hidden_channels": [8, 12], "num_blocks": 1}},
        "vae": {"model": {"latent_dim": 4, "hidden_dim": 16, "reconstruction_space": "pullback"}},
        "second_stage": {"model": {"hidden_dim": 16}},
        "detail": {"model": {"hidden_dim": 8, "num_blocks": 1, "noise_channels": 4}, "num_directions": 8}
        | {"feature_loss": "efficientnet-lite0"},
    }


@pytest.fixture(scope="module")
def trained(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detail")
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    code, _, errors = run("train", "--config", str(folder / "preset.yaml"), "--output_dir", str(folder / "run"))
    assert code == 0, errors
    return folder / "run"


@pytest.fixture(scope="module")
def pipe(trained):

    pipe = VAEPlusPipeline.from_pretrained(trained / "pipeline")
    torch.nn.init.normal_(pipe.detail.exit.weight, std=0.1)  # so that detail is to be seen
    return pipe


def test_a_preset_with_a_section_gives_a_pipeline_with_detail(trained, pipe):
    assert type(pipe.detail) is VAEPlusDetailModel
    lines = [json.loads(line) for line in (trained / "detail" / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and {"loss", "spread", "squared_error"} <= lines[0].keys()
    record = json.loads((trained / "detail" / "training_options.json").read_text())
    assert record["made_from"].keys() == {"images", "autoencoder", "feature_loss"}


def test_the_card_tells_of_the_detail(trained, tmp_path):
    code, _, errors = run("card", str(trained), "org/faces", "--data_license", "none")
    assert code == 0, errors
    card = (trained / "pipeline" / "README.md").read_text()
    assert "energy score of features of efficientnet-lite0 |" in card and "deterministic=True" in card
    assert "\n| detail |" in card and re.search(r"^Fingerprints: .*, detail `", card, re.MULTILINE)


def test_an_evaluation_measures_with_and_without_it(trained, tmp_path):
    words = (
        "--dataset_name rendered-faces --max_images 20 --num_images 10 --features pixels:4 --sampler second_stage mean"
    )
    output = tmp_path / "evaluation.json"
    code, _, errors = run("evaluate", str(trained / "pipeline"), *words.split(), "--output", str(output))
    assert code == 0, errors
    found = json.loads(output.read_text())
    assert {"reconstruction", "detail", "second_stage", "mean"} <= found["sets"].keys()
    assert found["weights"].keys() == {"autoencoder", "vae", "second_stage", "detail"}


def test_samples_have_detail_and_a_seed_gives_the_same(pipe):
    images, again, mean, batched = (
        pipe(4, generator(), output_type="pt", **options).images
        for options in ({}, {}, {"deterministic": True}, {"decode_batch_size": 3})
    )
    assert torch.equal(images, again) and not torch.equal(images, mean)
    assert_close(images, batched, rtol=1e-5, atol=1e-5)
    assert_close(
        pipe(4, generator(), temperature=0, output_type="pt").images[0],
        pipe(1, temperature=0, output_type="pt").images[0],
    )
    calm = pipe(4, generator(), detail_temperature=0.5, output_type="pt").images
    assert not torch.equal(calm, images) and not torch.equal(calm, mean)
    with pytest.raises(ValueError, match="detail_temperature must be"):
        pipe(1, detail_temperature=-1)
    with mock.patch.object(pipe.detail.config, "temperature", 0.5):  # the default
        assert torch.equal(pipe(4, generator(), output_type="pt").images, calm)
        assert torch.equal(pipe(4, generator(), detail_temperature=1, output_type="pt").images, images)
    with pytest.raises(ValueError, match="temperature must be finite and at least 0, got -1"):
        VAEPlusDetailConfig(temperature=-1)


def test_reconstructions_are_means_unless_asked(pipe):
    latents = torch.randn(3, 4, generator=generator())
    mean = pipe.decode(latents, "pt")
    drawn = [pipe.decode(latents, "pt", deterministic=False, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], mean)
    code = pipe.vae.decode(latents)
    plain, features = pipe.autoencoder.decode_with_features(code)
    noise = torch.randn(3, *pipe.detail.config.noise_shape, generator=generator())
    assert_close(drawn[0], (plain + pipe.detail.sample(features, noise)).clamp(0, 1), rtol=0, atol=1e-6)
    again = pipe.reconstruct(mean, "pt", deterministic=False, generator=generator())
    assert not torch.equal(again, pipe.reconstruct(mean, "pt"))


def test_detail_that_is_not_there_or_of_another_autoencoder_is_refused(pipe):
    plain = type(pipe)(pipe.vae, pipe.autoencoder, pipe.second_stage)
    with pytest.raises(ValueError, match="this pipeline has none"):
        plain.decode(torch.zeros(1, 4), deterministic=False)
    with pytest.raises(ValueError, match="add deterministic=True"):
        pipe(1, sharpness=1)
    with pytest.raises(ValueError, match="made for another autoencoder"):
        type(pipe)(pipe.vae, pipe.autoencoder, pipe.second_stage, VAEPlusDetailModel(VAEPlusDetailConfig()))
    with pytest.raises(TypeError, match="detail must be a VAEPlusDetailModel"):
        type(pipe)(pipe.vae, pipe.autoencoder, pipe.second_stage, pipe.vae)
    with pytest.raises(ValueError, match="pass that autoencoder"):
        from hf_vaeplus import VAEPlusVAEConfig, VAEPlusVAEModel

        of_pixels = VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(3, 16, 16), network="conv", latent_dim=4))
        type(pipe)(of_pixels, detail=VAEPlusDetailModel(CONFIG))


def test_a_resumed_run_is_the_run_with_a_backbone_too(preset, trained, tmp_path):
    """Feature maps of a network besides pixels: a run of 4 steps, and one of 2 that goes on to 4."""
    torch.manual_seed(0)
    network = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetBackbone(network).save_pretrained(tmp_path / "backbone")
    from hf_vaeplus.training.options import stage_options
    from hf_vaeplus.training.stages import run_stage

    def fit(folder, steps):
        own = dict(autoencoder=str(trained / "autoencoder"), feature_loss=str(tmp_path / "backbone"))
        own |= dict(output_dir=str(folder), max_train_steps=steps, resume_from_checkpoint="latest")
        return run_stage(stage_options("detail", preset, lr_scheduler="constant", **own))

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "parts", 2)
    parts = fit(tmp_path / "parts", 4)
    assert whole.state_dict().keys() == parts.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    record = json.loads((tmp_path / "parts" / "training_options.json").read_text())
    assert record["made_from"]["feature_loss"]
    without = run_stage(
        stage_options("detail", preset, autoencoder=str(trained / "autoencoder"), output_dir=str(tmp_path / "without"))
    )
    assert not torch.equal(without.exit.weight, whole.exit.weight)


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(stage="detail"), "needs --autoencoder"),
        (dict(stage="vae", feature_loss="x"), "is for stage detail"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options, told):
    from hf_vaeplus.training.options import StageOptions

    with pytest.raises(ValueError, match=told):
        StageOptions(**options)


def test_the_backbone_of_the_package_gives_the_maps_of_efficientnet_lite0():
    """Means and spreads of the maps of the weights before their normalisation was folded in (TensorFlow's padding)."""
    from hf_vaeplus.training.backbones import open_backbone

    backbone = open_backbone("efficientnet-lite0", 48)
    rows = torch.linspace(0, 1, 48)
    image = torch.stack([rows[:, None] * rows, rows[:, None].expand(48, 48), 1 - rows.expand(48, 48)])[None]
    with torch.no_grad():
        maps = backbone(image)
    assert [tuple(each.shape[1:]) for each in maps] == [(16, 24, 24), (24, 12, 12), (40, 6, 6), (80, 3, 3)]
    found = [(float(each.mean()), float(each.std())) for each in maps]
    assert_close(found, GOLDEN, rtol=1e-3, atol=1e-4)


def test_half_size_gives_the_image_shrunk():
    with importing_from(REPRODUCE):
        import half_size
    whole = make_pipeline().autoencoder
    half, code = half_size.half_size(whole), torch.randn(3, 6)
    assert_close(half.decode(code), F.avg_pool2d(whole.decode(code), 2), rtol=1e-4, atol=1e-5)
    images = torch.rand(3, 3, SIZE // 2, SIZE // 2)
    assert_close(half.encode(images), whole.encode(F.interpolate(images, scale_factor=2)), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_no_backbone_is_refused(preset, trained, tmp_path):
    from hf_vaeplus.training.backbones import open_backbone

    with pytest.raises(ValueError, match="does not offer as a backbone"):
        open_backbone(str(trained / "autoencoder"), 32)
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(preset))  # before a stage is trained
    words = ["--output_dir", str(tmp_path / "run"), "--set", f"detail.feature_loss={tmp_path / 'gone'}"]
    code, _, errors = run("train", "--config", str(tmp_path / "preset.yaml"), *words)
    assert code == 2 and "names no model" in errors and not (tmp_path / "run" / "autoencoder").exists()
