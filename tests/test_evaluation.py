"""Evaluation of whole pipelines against closed forms, by direction, and on one and two processes.

The pipeline of most tests is a probabilistic PCA of digits (Theorem 1's optimum), an affine VAE that needs no training
and of which everything is known.
"""

import copy
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import Launched, perturbed
from PIL import Image
from torch.distributions import LowRankMultivariateNormal
from torch.nn.functional import avg_pool2d

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.pixels import to_uint8
from hf_vaeplus.evaluation.evaluate import Judge, downsample, evaluate, sample_images, sample_mixture
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.evaluation.summaries import summarize
from hf_vaeplus.evaluation.tables import results_table
from hf_vaeplus.metrics.frechet import frechet_distance
from hf_vaeplus.metrics.ndb import NDB
from hf_vaeplus.metrics.running import RunningMoments

EXAMPLE = Path(__file__).parents[1] / "examples" / "evaluate.py"
SIZE, LATENT_DIM = 16, 12


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits(cache_dir):
    def load(split, resolution=SIZE):
        source = dict(num_channels=1, cache_dir=cache_dir, progress=False)
        return load_images("digits", split=split, resolution=resolution, **source)

    return load


@torch.no_grad()
def principal_components(
    pixels: torch.Tensor, second_stage=None
) -> tuple[VAEPlusPipeline, torch.distributions.Distribution]:
    """The affine VAE of maximal likelihood of `(n, 1, SIZE, SIZE)` pixels, and its p(x)."""
    rows = pixels.flatten(1).double()
    values, vectors = torch.linalg.eigh(rows.T.cov(correction=0))
    gamma = values[:-LATENT_DIM].mean()
    basis = vectors[:, -LATENT_DIM:] * (values[-LATENT_DIM:] - gamma).sqrt()
    shape = dict(input_shape=(1, SIZE, SIZE), latent_dim=LATENT_DIM)
    vae = VAEPlusVAEModel(VAEPlusVAEConfig(network="affine", gamma="learned", **shape)).eval()
    vae.decoder.weight.copy_(basis)
    vae.decoder.bias.copy_(rows.mean(0))
    vae.encoder.weight.copy_(basis.T / values[-LATENT_DIM:, None])
    vae.encoder.bias.copy_(-vae.encoder.weight @ vae.decoder.bias)
    vae.logvar.copy_((gamma / values[-LATENT_DIM:]).log())
    vae.log_gamma.copy_(gamma.log())
    density = LowRankMultivariateNormal(rows.mean(0), basis, gamma.expand(SIZE**2))
    return VAEPlusPipeline(vae, second_stage=second_stage), density


@pytest.fixture(scope="module")
def pca(digits) -> tuple[VAEPlusPipeline, torch.distributions.Distribution]:
    return principal_components(digits("train[:1000]").pixels(0, 1000))


@pytest.fixture(scope="module")
def deep() -> VAEPlusPipeline:
    """Three stages of random weights."""
    torch.manual_seed(0)
    small = dict(hidden_dim=8, num_blocks=1)
    first = dict(input_shape=(6,), latent_dim=4, reconstruction_space="image", gamma_init=0.1)
    second = dict(input_shape=(4,), latent_dim=3, gamma_init=0.05)
    image = dict(image_size=32, num_channels=1, latent_dim=6, hidden_channels=(4, 8), num_blocks=1)
    return VAEPlusPipeline(
        perturbed(VAEPlusVAEModel(VAEPlusVAEConfig(**first, **small))),
        perturbed(VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(**image))),
        perturbed(VAEPlusVAEModel(VAEPlusVAEConfig(**second, **small))),
    )


def uint8(images, count: int) -> torch.Tensor:
    return images.__getitems__(list(range(count)))["pixel_values"]


# ------------------------------------------------------------------------------------------------- known answers


def test_the_figures_of_a_pipeline_of_which_everything_is_known(pca, digits):
    pipe, density = pca
    images = digits("train[:1000]")
    options = dict(num_images=300, num_importance_samples=3, training_images=digits("train[300:1300]"), num_bins=[10])
    results = evaluate(pipe, images, [open_extractor("pixels:8")], ["prior", "gaussian"], **options)

    pixels = images.pixels(0, 300)
    exact = float(density.log_prob(pixels.flatten(1).double()).mean())
    # The posterior is exact: every importance weight is p(x) itself.
    assert results["likelihood"]["elbo"] == pytest.approx(exact, rel=1e-5)
    assert results["likelihood"]["nll"] == pytest.approx(-exact, rel=1e-5)

    summary = summarize(pipe, images, 300)
    assert {name: results[name] for name in summary if name != "vae"} == pytest.approx(
        {name: summary[name] for name in summary if name != "vae"}
    )
    mmd = results["vae"].pop("mmd")
    assert results["vae"] == summary["vae"]
    assert abs(mmd) < 0.05  # q(z) has about the mean and the variance of the prior
    mean_of_decibels = -10 * ((pipe.reconstruct(pixels, "pt") - pixels).square().mean((1, 2, 3))).log10().mean()
    assert results["psnr"] == pytest.approx(float(mean_of_decibels), rel=1e-4)
    assert "autoencoder_psnr" not in results and "second_stage" not in results

    def moments(pictures):
        found = RunningMoments(64)
        found.update(avg_pool2d(pictures.float() / 255, 2).flatten(1))
        return found

    sets = {name: each["distances"]["pixels:8"] for name, each in results["sets"].items()}
    reference = uint8(images, 300)
    for name, pictures in {
        "real": uint8(digits("train[300:600]"), 300),
        "downsample": downsample(reference),
        "reconstruction": to_uint8(pipe.reconstruct(pixels, "pt")),
        "prior": torch.cat([*sample_images(pipe, torch.arange(300).split(300))]),
    }.items():
        expected = frechet_distance(moments(reference), moments(pictures))
        assert sets[name]["frechet"] == pytest.approx(expected, rel=1e-3), name
        assert sets[name]["frechet_over_downsample"] == sets[name]["frechet"] / sets["downsample"]["frechet"]
        assert sets[name]["kernel"] is None and sets[name]["distance"] == "Frechet distance (pixels:8)"
    bins = NDB.fit(uint8(digits("train[300:1300]"), 1000), 10)
    expected = bins.compare(bins.count(to_uint8(pipe.reconstruct(pixels, "pt"))))
    assert results["sets"]["reconstruction"]["ndb"]["10"] == pytest.approx(
        {name: expected[name] for name in ("ndb_over_k", "js")}
    )
    assert list(sets) == ["real", "downsample", "reconstruction", "prior", "gaussian"]


def test_a_broken_decoder_scores_worse_everywhere(digits):
    images, training = digits("train[:600]"), digits("train[600:]")
    results = []
    for broken in (False, True):
        pipe, _ = principal_components(training.pixels(0, 1100))
        if broken:
            with torch.no_grad():
                pipe.vae.decoder.weight.copy_(pipe.vae.decoder.weight.roll(3, 0))
        options = dict(num_images=600, training_images=training, num_bins=[20], num_importance_samples=2)
        results.append(evaluate(pipe, images, [open_extractor("pixels:8")], **options))
    good, bad = results
    assert bad["squared_error"] > 1.3 * good["squared_error"] and bad["psnr"] < good["psnr"] - 1
    assert bad["likelihood"]["nll"] > good["likelihood"]["nll"] + 100
    for name in ("reconstruction", "prior"):
        a, b = good["sets"][name], bad["sets"][name]
        assert b["distances"]["pixels:8"]["frechet"] > 2 * a["distances"]["pixels:8"]["frechet"]
        assert b["ndb"]["20"]["js"] > a["ndb"]["20"]["js"]
    floor = good["sets"]["real"]["distances"]["pixels:8"]["frechet"]  # of the training images: `images` has no others
    assert good["protocol"]["real"] == "digits train[600:], 600 from image 0 on"
    assert floor < good["sets"]["reconstruction"]["distances"]["pixels:8"]["frechet"]
    assert good["sets"]["real"]["ndb"]["20"]["ndb_over_k"] <= 0.2
    assert [each["sets"]["real"] for each in results] == [good["sets"]["real"]] * 2  # no part of the pipeline


def test_downsample_is_an_average_and_a_bilinear_enlargement():
    picture = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    picture[..., :2, :2] = torch.tensor([[40, 80], [120, 160]])  # 100 on average
    weights = torch.tensor([1, 0.75, 0.25, 0])
    expected = (100 * weights[:, None] * weights).round().to(torch.uint8)
    assert torch.equal(downsample(picture)[0, 0], expected)


# ------------------------------------------------------------------------------------------------------- samples


def test_a_sample_depends_on_seed_and_number_alone(deep):
    codes = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for sample in (sample_images, lambda pipe, *rest: sample_mixture(pipe, codes, *rest[:1], 3, *rest[1:])):
        whole = torch.cat([*sample(deep, torch.arange(7).split(7), 5)])
        assert whole.shape == (7, 1, 32, 32) and whole.dtype == torch.uint8
        parts = torch.cat([*sample(deep, torch.arange(7).split(3), 5)])
        some = torch.cat([*sample(deep, [[6, 2]], 5)])
        # another batch sums in another order
        assert (parts.int() - whole).abs().max() <= 1 and (some.int() - whole[[6, 2]]).abs().max() <= 1
        other = torch.cat([*sample(deep, torch.arange(7).split(7), 6)])
        assert (other.int() - whole).abs().max() > 5


def test_a_mixture_draws_its_components_by_their_weights(pca):
    pipe, _ = pca
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(2, LATENT_DIM, generator=generator)
    which = torch.arange(200) % 4 == 0
    codes = centres[which.long()] + 1e-3 * torch.randn(200, LATENT_DIM, generator=generator)
    images = torch.cat([*sample_mixture(pipe, codes, torch.arange(400).split(100), 2)])
    distances = torch.stack(
        [(images.int() - to_uint8(pipe.decode(each[None], "pt"))).abs().amax((1, 2, 3)) for each in centres]
    )
    assert distances.amin(0).max() <= 3  # every image is one of two
    assert 60 < int(distances.argmin(0).sum()) < 140  # a quarter of 400, within five standard deviations
    with pytest.raises(ValueError, match="mixture of 10 needs as many codes, at least 2, got 9"):
        next(sample_mixture(pipe, codes[:9], [[0]]))


# ------------------------------------------------------------------------------------------------- the protocol


def test_the_result_holds_the_protocol_and_is_json(deep, digits):
    extractors = [open_extractor("pixels:8"), open_extractor("pixels:16")]
    samplers = ["second_stage", "prior", "mixture", "second_stage"]
    options = dict(num_images=30, training_images=digits("train[100:]", 32), num_training_images=50, seed=3)
    results = evaluate(deep, digits("train[:100]", 32), extractors, samplers, **options)
    assert json.loads(json.dumps(results)) == results
    protocol = results["protocol"]
    assert [protocol["images"], protocol["split"], protocol["num_images"]] == ["digits", "train[:100]", 30]
    assert [protocol["resolution"], protocol["num_channels"], protocol["crop"]] == [32, 1, None]
    assert protocol["source"] == {"digits": 1}
    assert "box" in protocol["resize"] and "8 bits" in protocol["rounding"]
    assert protocol["extractors"] == [extractor.description() for extractor in extractors]
    assert [protocol["training_split"], protocol["num_training_images"]] == ["train[100:]", 50]
    assert [protocol["samplers"], protocol["seed"]] == [["second_stage", "prior", "mixture"], 3]
    assert protocol["real"] == "digits train[:100], 30 from image 30 on"
    sets = ["real", "downsample", "autoencoder", "reconstruction", "second_stage", "prior", "mixture"]
    assert list(results["sets"]) == sets
    assert all(list(each["distances"]) == ["pixels:8", "pixels:16"] for each in results["sets"].values())
    table = results_table(results)
    assert [line.split()[0] for line in table.split("\n\n")[1].splitlines()[1:]] == sets
    for text in (
        f"{results['autoencoder_squared_error']:.2f}",
        f"PSNR {results['psnr']:.2f} dB",
        f"{results['sets']['prior']['distances']['pixels:16']['frechet_over_downsample']:.3f}",
        f"{results['second_stage']['active_units_by_variance']} of 3",
        f"{results['vae']['mmd']:.3g}",
        protocol["real"],
    ):
        assert text in table
    again = evaluate(deep, digits("train[:100]", 32), extractors, samplers, **options, batch_size=7)
    for name in sets:
        assert again["sets"][name]["distances"]["pixels:8"]["frechet"] == pytest.approx(
            results["sets"][name]["distances"]["pixels:8"]["frechet"], rel=0.01
        )
    assert again["vae"]["mmd"] == pytest.approx(results["vae"]["mmd"], rel=1e-4)


def test_the_sharpened_sampler_is_the_pipeline_at_sharpness_1(deep, digits):
    images = digits("train[:100]", 32)
    pipe = copy.deepcopy(deep)
    pipe.autoencoder.match_spectrum([images.pixels(0, 100)])
    found = evaluate(pipe, images, [open_extractor("pixels:32")], ["second_stage", "sharpened"], num_images=30)
    drawn = torch.cat([*sample_images(pipe, torch.arange(30).split(10), 0, sharpness=1.0)])
    expected = Judge(
        open_extractor("pixels:32"), [torch.as_tensor(images.__getitems__(range(30))["pixel_values"])], []
    )([drawn])
    distances = {
        name: found["sets"][name]["distances"]["pixels:32"]["frechet"] for name in ("second_stage", "sharpened")
    }
    assert distances["sharpened"] == pytest.approx(expected["frechet"], rel=1e-6)
    assert distances["sharpened"] != pytest.approx(distances["second_stage"], rel=0.01)


@pytest.mark.parametrize(
    "split, training, num_images, expected",
    [
        ("train[:40]", None, 20, "digits train[:40], 20 from image 20 on"),
        ("train[:40]", None, 21, "none"),
        ("train[:40]", "train[40:]", 40, "digits train[40:], 40 from image 0 on"),
        ("train[:40]", "train[39:]", 40, "none"),  # one image is in both
        ("train[:40]", "train[39:]", 30, "digits train[39:], 30 from image 0 on"),
        ("train[:40]", "train[40:70]", 40, "none"),
        ("train[:40]", "train[:40]", 40, "none"),
    ],
)
def test_the_floor_is_measured_on_images_that_are_not_the_reference(
    pca, digits, split, training, num_images, expected
):
    training = training and digits(training)
    extractors = [open_extractor("pixels:4")]
    results = evaluate(pca[0], digits(split), extractors, num_images=num_images, training_images=training)
    assert results["protocol"]["real"] == expected
    assert ("real" in results["sets"]) == (expected != "none")
    assert ("needs as many more" in results_table(results)) == (expected == "none")


SMOOTH = torch.linspace(0, 50, 64)[:, None].expand(64, 64)
COLOURS = torch.arange(0, 200, 5.0)[:, None, None, None]


@pytest.mark.parametrize(
    "pictures",
    [torch.zeros(40, 1, 64, 64), COLOURS.expand(40, 1, 64, 64), COLOURS + SMOOTH],
    ids=["black", "one colour each", "smooth"],
)
def test_no_ratio_is_made_of_rounding(pictures, tmp_path):
    for number, (picture,) in enumerate(pictures.to(torch.uint8)):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{number:02}.png")
    images = load_images(
        train_data_dir=tmp_path, resolution=64, num_channels=1, cache_dir=tmp_path / "cache", progress=False
    )
    pipe = VAEPlusPipeline(VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(1, 64, 64), network="conv", latent_dim=2)))
    results = evaluate(pipe, images, [open_extractor("pixels:16")], num_images=20)
    for each in results["sets"].values():
        assert each["distances"]["pixels:16"]["frechet_over_downsample"] is None
    rows = [line.split() for line in results_table(results).split("\n\n")[1].splitlines()]
    assert rows[0][3:6] == ["/", "downsample", "kernel"] and all(row[2:4] == ["-", "-"] for row in rows[1:])


def test_a_perfect_reconstruction_has_no_decibels(pca, digits, monkeypatch):
    monkeypatch.setattr("hf_vaeplus.evaluation.summaries.squared_error", lambda a, b: torch.zeros(len(a)))
    results = evaluate(pca[0], digits("train[:20]"), [open_extractor("pixels:4")], num_images=10)
    json.dumps(results, allow_nan=False)
    assert results["psnr"] is None and "no PSNR" in results_table(results)


def test_bins_are_fitted_once(pca, digits, cache_dir, monkeypatch):
    options = dict(num_images=20, training_images=digits("train[50:]"), num_training_images=90, num_bins=[3, 4])
    results = [evaluate(pca[0], digits("train[:50]"), [open_extractor("pixels:4")], **options)]
    monkeypatch.setattr(NDB, "fit", lambda *args: pytest.fail("fitted again"))
    results.append(evaluate(pca[0], digits("train[:50]"), [open_extractor("pixels:4")], **options))
    assert results[0] == results[1]
    assert list(results[0]["sets"]["prior"]["ndb"]) == ["3", "4"]
    with pytest.raises(pytest.fail.Exception, match="fitted again"):  # the bins of other images
        evaluate(pca[0], digits("train[:50]"), [open_extractor("pixels:4")], **{**options, "num_training_images": 80})
    assert not list((cache_dir / "bins").glob(".*"))


def test_a_judge_sees_a_thousand_images_with_the_kernel(digits):
    extractor = open_extractor("pixels:2")
    pictures = uint8(digits("train"), 1000)
    judge = Judge(extractor, pictures.split(300))
    result = judge(pictures.split(400))
    assert result["frechet"] == pytest.approx(0, abs=1e-9) and abs(result["kernel"][0]) < 1e-2
    assert (result["num_images"], result["num_reference"], result["ndb"]) == (1000, 1000, {})
    assert result["sliced_wasserstein"] == pytest.approx(0, abs=1e-12) and result["memorised"] is None
    assert result["prdc"] == dict(precision=1, recall=1, density=1, coverage=1)
    json.dumps(result)
    assert judge(pictures[:999].split(400))["kernel"] is None


# ----------------------------------------------------------------------------------------------- cheating samplers


@pytest.fixture(scope="module")
def drawings(cache_dir):
    """Drawings of one law, whatever the slice; digits are in the order of those who wrote them."""

    def load(split):
        source = dict(resolution=32, num_channels=1, max_samples=1_800, cache_dir=cache_dir, progress=False)
        return load_images("rendered-faces", split=split, **source)

    return load


@pytest.fixture
def cheating(deep, drawings, monkeypatch):
    """The evaluation of a pipeline that draws what it is told to."""

    def run(samples, extractors=("pixels:8",), **options):
        monkeypatch.setattr("hf_vaeplus.evaluation.evaluate.sample_images", lambda *args, **rest: [samples])
        wanted = {"num_images": 300, "training_images": drawings("train[1000:]"), **options}
        return evaluate(deep, drawings("train[:600]"), [*map(open_extractor, extractors)], **wanted)

    return run


@pytest.fixture
def noisy_copies(drawings):
    pixels = drawings("train[1000:]").pixels(0, 300)
    return to_uint8(
        (pixels + 0.01 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    )


def test_copies_win_the_distance_and_are_found_in_features_and_codes(cheating, noisy_copies):
    results = cheating(noisy_copies, ["pixels:8", "pixels:16"])
    real, samples = results["sets"]["real"], results["sets"]["second_stage"]
    for extractor in ("pixels:8", "pixels:16"):
        copied, honest = (each["distances"][extractor] for each in (samples, real))
        assert copied["frechet"] < 2 * honest["frechet"] and copied["memorised"]["share"] > 0.95
        assert honest["memorised"]["share"] < 0.12 and not honest["memorised"]["flagged"]
    assert samples["memorised_codes"]["share"] > 0.3  # the encoder is random, and the noise moves its few codes
    assert not real["memorised_codes"]["flagged"]
    told = [each for each in samples["warnings"] if "samples repeat training images: " in each]
    assert [each.partition(": ")[0] for each in told] == ["codes", "pixels:8", "pixels:16"]
    assert "warnings" not in real and results["guard"].keys() == {"codes", "pixels:8", "pixels:16"}
    table = results_table(results)
    assert "nearer to one of 800 training images (train[1000:]) than 95% of held-out images are" in table
    for warning in samples["warnings"]:
        assert f"\nwarning: second_stage, {warning}" in table
    row = next(line.split() for line in table.splitlines() if line.startswith("second_stage "))
    shares = samples["distances"]["pixels:8"]["memorised"]["share"], samples["memorised_codes"]["share"]
    assert row[-2:] == [f"{share:.1%}" for share in shares]


def test_missing_kinds_of_images_are_told_and_fresh_images_are_not(cheating, drawings):
    fresh = uint8(drawings("train[600:1000]"), 400)
    assert cheating(fresh[:300])["sets"]["second_stage"]["warnings"] == []
    darker = fresh.double().mean((1, 2, 3)).argsort()[:250]  # none of the brightest three eighths
    results = cheating(fresh[darker])
    samples, real = (results["sets"][name]["distances"]["pixels:8"] for name in ("second_stage", "real"))
    assert samples["prdc"]["precision"] > 0.9 and samples["prdc"]["coverage"] < 0.9 * real["prdc"]["coverage"]
    told = " ".join(results["sets"]["second_stage"]["warnings"])
    assert "some real images have no samples near them: coverage" in told and "repeat" not in told
    assert samples["sliced_wasserstein"] > results["sliced_limits"]["pixels:8"] > real["sliced_wasserstein"]
    assert "distributed in another way" in told


def test_without_training_images_the_table_says_that_nothing_was_guarded(pca, digits):
    results = evaluate(pca[0], digits("train[:40]"), [open_extractor("pixels:4")], num_images=20)
    assert results["guard"] is None and results["sets"]["prior"]["memorised_codes"] is None
    assert all(each["distances"]["pixels:4"]["memorised"] is None for each in results["sets"].values())
    table = results_table(results)
    assert "the guard was not run, because no training images were given" in table
    assert next(line for line in table.splitlines() if line.startswith("prior")).split()[-2:] == ["-", "-"]


def test_held_out_images_that_were_trained_on_blind_the_guard(cheating, noisy_copies, drawings):
    results = cheating(noisy_copies, training_images=drawings("train"))
    assert results["guard"]["codes"] == {"threshold": 0, "copies": 1, "reach": 0.05, "sees": False}
    assert not any("repeat" in each for each in results["sets"]["second_stage"]["warnings"])
    table = results_table(results)
    assert "codes: 100.0% of the held-out images are training images themselves" in table
    assert "pixels:8: the guard sees nothing" in table


def test_training_images_in_the_row_of_real_images_are_not_called_copies(pca, digits):
    extractors, training = [open_extractor("pixels:4")], digits("train[40:]")
    results = evaluate(pca[0], digits("train[:40]"), extractors, num_images=40, training_images=training)
    assert results["protocol"]["real"] == "digits train[40:], 40 from image 0 on"
    real = results["sets"]["real"]
    assert real["memorised_codes"] is None and real["distances"]["pixels:4"]["memorised"] is None


def test_too_few_images_for_neighbours_are_measured_all_the_same(pca, digits):
    options = dict(num_images=4, training_images=digits("train[40:]"), num_training_images=3)
    results = evaluate(pca[0], digits("train[:40]"), [open_extractor("pixels:4")], **options)
    assert f"copies of the {1_797 - 43:,} training images that were left out are not found" in results_table(results)
    prior = results["sets"]["prior"]["distances"]["pixels:4"]
    assert prior["prdc"] is None and prior["memorised"]["limit"] > 0.5
    assert prior["sliced_wasserstein"] > 0 and " - " in results_table(results)


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samplers": ["posterior"]}, "samplers must be of second_stage, mean, sharpened, prior, .*, got 'posterior'"),
        ({"samplers": ["second_stage"]}, "no second stage: sample it with prior"),
        ({"samplers": ["sharpened"]}, "its autoencoder was trained without match_spectrum"),
        ({"samplers": ["mixture"]}, "need as many training images, got 0"),
        ({"num_bins": [3]}, "need as many training images, got 0 for num_bins=\\[3\\]"),
        ({"num_images": 1}, "num_images must be at least 2 .* got 1"),
        ({"batch_size": 0}, "batch_size at least 1"),
        ({"num_importance_samples": -1}, "num_importance_samples at least 0"),
        ({"seed": -1}, "seed in"),
        ({"extractors": []}, "extractors must be one or several"),
        ({"extractors": [open_extractor("pixels"), open_extractor("pixels")]}, "different names"),
        ({"extractors": [open_extractor("pixels:17")]}, "pixels:17 averages pixels, got smaller"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(pca, digits, changes, message, capfd):
    capfd.readouterr()
    with pytest.raises(ValueError, match=message):
        evaluate(pca[0], digits("train[:50]"), **{"extractors": [open_extractor("pixels:4")], **changes})
    assert capfd.readouterr() == ("", "")  # no bar has begun


def test_images_of_another_size_and_a_gamma_of_codes_are_refused(pca, deep, digits):
    with pytest.raises(ValueError, match="1 channels of 16 x 16 like the pipeline's, got 1 of 32 x 32"):
        evaluate(pca[0], digits("train[:50]", 32), [open_extractor("pixels:4")])
    vae = VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(6,), latent_dim=4, hidden_dim=8, num_blocks=1))
    pipe = VAEPlusPipeline(vae, deep.autoencoder)
    with pytest.raises(ValueError, match="gamma was measured on codes"):
        evaluate(pipe, digits("train[:50]", 32), [open_extractor("pixels:4")], num_importance_samples=2)


# ----------------------------------------------------------------------------------------------------- processes


def run_example(folder, argv):
    os.chdir(folder)
    sys.argv = [str(EXAMPLE), "pipeline", *argv]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_two_processes_find_what_one_finds(deep, digits, cache_dir, tmp_path):
    deep.save_pretrained(tmp_path / "pipeline")
    argv = (
        "--dataset_name digits --split train[:53] --ndb_split train[53:] --ndb 3 --ndb_images 35 --features pixels:4"
        " pixels:8 --sampler second_stage mixture --num_importance_samples 2 --batch_size 8 --num_images 53 --json"
    ).split()
    log, environment = tmp_path / "log", {"VAEPLUS_CACHE": str(cache_dir)}
    assert Launched(2, log, environment, run_example, tmp_path, argv).ended_within(300)
    (printed,) = re.findall(r'\{".*\}$', log.read_text(), re.MULTILINE)  # once
    two = json.loads(printed)
    assert two == json.loads((tmp_path / "results.json").read_text())
    assert two["pipeline"] == "pipeline" and two["command"].startswith("evaluate.py pipeline")
    one = evaluate(
        deep,
        digits("train[:53]", 32),
        [open_extractor("pixels:4"), open_extractor("pixels:8")],
        ["second_stage", "mixture"],
        num_images=53,  # 3 full batches of 2 * 8 and 5 more
        training_images=digits("train[53:]", 32),
        num_training_images=35,
        num_bins=[3],
        num_importance_samples=2,
        batch_size=8,
    )
    assert (one["protocol"].pop("num_processes"), two["protocol"].pop("num_processes")) == (1, 2)
    assert one["protocol"] == two["protocol"]
    assert one["likelihood"] == pytest.approx(two["likelihood"], rel=1e-5)
    assert one["squared_error"] == pytest.approx(two["squared_error"], rel=1e-6)
    for stage in ("vae", "second_stage"):
        assert one[stage].pop("kl_per_dimension") == pytest.approx(two[stage].pop("kl_per_dimension"), rel=1e-5)
        assert one[stage] == pytest.approx(two[stage], rel=1e-5)
    for name, each in one["sets"].items():
        assert each["ndb"]["3"] == pytest.approx(two["sets"][name]["ndb"]["3"])
        for extractor, distances in each["distances"].items():
            same = two["sets"][name]["distances"][extractor]
            assert distances["frechet"] == pytest.approx(same["frechet"], rel=1e-3)  # 8 bits may round another way
            assert distances["kernel"] is same["kernel"] is None
            assert distances["sliced_wasserstein"] == pytest.approx(same["sliced_wasserstein"], rel=1e-3)
            assert distances["prdc"] == pytest.approx(same["prdc"], abs=0.1)
            assert (distances["memorised"] is None) == (name == "real")
            if name != "real":
                assert distances["memorised"] == pytest.approx(same["memorised"], abs=0.05)
