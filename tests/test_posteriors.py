"""Uses of posteriors: restorations against closed forms, planted directions, and the examples with their numbers."""

import json
from pathlib import Path

import pytest
import torch
from helpers import importing_from, make_pipeline, run_script
from PIL import Image
from safetensors.torch import save_file
from test_pipeline import generator, make_vae, probabilistic_pca  # noqa: F401

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.directions import directions_beside, find_directions, load_directions, save_directions
from hf_vaeplus.modeling_priors import VAEPlusMixtureConfig, VAEPlusMixtureModel
from hf_vaeplus.pipeline_vaeplus import _alike

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "posteriors"


# ------------------------------------------------------------------------------------------------------ restorations


@pytest.mark.parametrize(("noise_std", "second_stage"), [(0.0, None), (0.2, None), (0.0, "mixture")])
def test_restored_is_the_posterior_mean_of_what_is_seen(probabilistic_pca, noise_std, second_stage):  # noqa: F811
    """Of an affine model, z* = (W_s^T W_s / variance + P)^-1 (W_s^T (x_s - b_s) / variance + P m) over what is seen.

    m and P are the mean and the inverse covariance of z, here those of one Gaussian as second stage.
    """
    vae = probabilistic_pca[0].vae
    mean, covariance = torch.zeros(3), torch.eye(3)
    if second_stage:
        second_stage = VAEPlusMixtureModel(VAEPlusMixtureConfig(latent_dim=3, num_components=1))
        mean, covariance = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([[2.0, 0.5, 0], [0.5, 1.0, 0], [0, 0, 0.1]])
        second_stage.set_mixture(torch.ones(1), mean[None], covariance[None])
    pipe = VAEPlusPipeline(vae, second_stage=second_stage)
    basis, offset = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    images = (0.4 + 0.2 * torch.rand(5, 1, 4, 4, generator=generator(3))).contiguous()
    seen = torch.rand(5, 4, 4, generator=generator(4)) < 0.5
    precision, variance, expected = torch.linalg.inv(covariance), 0.05 + noise_std**2, []
    for image, mask in zip(images.flatten(1), seen.flatten(1), strict=True):
        w, rest = basis[mask], (image - offset)[mask]
        z = torch.linalg.solve(w.T @ w / variance + precision, w.T @ rest / variance + precision @ mean)
        expected.append(basis @ z + offset)
    expected = torch.stack(expected).clamp(0, 1)
    hidden = torch.where(seen[:, None], images, 0.7)  # of no matter
    found = pipe.restore(hidden, seen, noise_std, output_type="pt")
    # The moments of the second stage are those of 4,096 draws.
    torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=1e-2 if second_stage else 2e-4)
    in_batches = pipe.restore(hidden, seen.numpy(), noise_std, output_type="pt", decode_batch_size=3)
    torch.testing.assert_close(in_batches, found, rtol=0, atol=1e-4)
    assert all(parameter.grad is None for parameter in vae.parameters())


@pytest.mark.parametrize(("sigma", "channels"), [(0.0, 3), (1.5, 1), (1.5, 3)])
def test_errors_that_are_alike_count_as_one(sigma, channels):
    """White noise is d errors. Blurred by a Gaussian it has the correlation exp(-l^2 / (4 sigma^2)) at the distance l,
    whose squares sum to 2 pi sigma^2; in three equal channels three times as many are alike."""
    size = 64
    errors = torch.randn(20, 3 if sigma == 0 else 1, size, size, generator=generator())
    if sigma:
        frequencies = torch.fft.fftfreq(size)
        gain = (-2 * (torch.pi * sigma) ** 2 * (frequencies[:, None] ** 2 + frequencies**2)).exp()
        errors = torch.fft.ifft2(torch.fft.fft2(errors) * gain).real.expand(-1, channels, -1, -1)
    expected = channels * 2 * torch.pi * sigma**2 if sigma else 1.0
    assert float(_alike(errors).mean()) == pytest.approx(expected, rel=0.15)


def test_a_restoration_of_all_that_is_seen_comes_nearer_than_the_encoder():
    pipe = make_pipeline()
    images = pipe(3, generator=generator(), output_type="pt").images
    errors = [(each - images).square().sum() for each in (pipe.restore(images, output_type="pt"),
                                                          pipe.reconstruct(images, "pt"))]  # fmt: skip
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (torch.ones(32, 32), "must be bools"),
        (torch.ones(32, 31, dtype=torch.bool), r"shape \(32, 32\) or \(2, 32, 32\)"),
        (torch.zeros(2, 32, 32, dtype=torch.bool), "nothing is seen"),
    ],
)
def test_masks_that_mean_nothing_are_refused(seen, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline().restore(torch.rand(2, 3, 32, 32), seen)


def test_a_restoration_needs_the_variance_of_images():
    with pytest.raises(ValueError, match="gamma was measured on codes"):
        make_pipeline(reconstruction_space="input").restore(torch.rand(2, 3, 32, 32))


# -------------------------------------------------------------------------------------------------------- directions


def test_planted_directions_are_found():
    """Attributes that go together are told apart; units are standard deviations."""
    a = torch.randn(400, 2, generator=generator()).double() * torch.tensor([1.0, 5.0])
    a[:, 1] += 3 * a[:, 0]
    planted = torch.randn(2, 4, generator=generator(1)).double()
    rest = torch.randn(400, 4, generator=generator(2)).double()
    rest -= torch.linalg.lstsq(centred := torch.cat([a, torch.ones(400, 1)], 1), rest).solution.T.mm(centred.T).T
    found = find_directions(7 + a @ planted + rest, {"smile": a[:, 0].tolist(), "age": a[:, 1]})
    for column, direction in enumerate(found.values()):
        expected = a[:, column].std(correction=0) * planted[column]
        torch.testing.assert_close(direction.double(), expected, rtol=1e-5, atol=1e-6)


def test_of_two_groups_the_direction_is_the_difference_of_their_means():
    z = torch.randn(50, 3, generator=generator())
    glasses = torch.arange(50) < 20
    found = find_directions(z, {"glasses": glasses})["glasses"]
    torch.testing.assert_close(found / glasses.float().std(correction=0), z[:20].mean(0) - z[20:].mean(0))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "at least one"),
        ({"a": [1.0] * 9}, "9 finite numbers|10 finite numbers"),
        ({"a": [1.0] * 10}, "the same for all"),
        ({"a": [float("nan")] + [1.0] * 9}, "finite numbers"),
        ({"a": ["yes"] * 10}, "must be numbers"),
        ({"a": range(10), "b": range(3, 23, 2)}, "one follows from the others"),
        ({str(n): range(n, n + 10) for n in range(9)}, "two images more"),
    ],
)
def test_labels_that_say_nothing_are_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        find_directions(torch.randn(10, 3), attributes)


def test_directions_are_stored_beside_a_pipeline_and_belong_to_its_weights(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    pipe = VAEPlusPipeline.from_pretrained(tmp_path)
    assert directions_beside(pipe) == {} == directions_beside(make_pipeline())
    directions = {"smile, broad": torch.tensor([0.1, 0, 0, 0]), "age": torch.tensor([0, 2.0, 0, 0])}
    path = save_directions(directions, pipe, tmp_path)
    found = directions_beside(pipe)
    assert list(found) == ["age", "smile, broad"]  # the strongest first
    assert all(torch.equal(found[name], directions[name]) for name in directions)
    other = make_pipeline()
    with torch.no_grad():
        other.vae.affine_skip.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="made for other weights"):
        load_directions(other, path)
    with pytest.raises(ValueError, match=r"'age' must be finite floats of shape \(3,\)"):
        load_directions(make_pipeline(latent_dim=3), path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="holds no directions"):
        load_directions(pipe, path)
    with pytest.raises(FileNotFoundError, match="save_directions"):
        load_directions(pipe, tmp_path / "none")
    save_file({"a": torch.zeros(4)}, path)  # of whoever
    with pytest.raises(ValueError, match="made for other weights"):
        load_directions(pipe, path)
    for bad in ({}, {"": torch.zeros(4)}, {"a\n": torch.zeros(4)}, {"a" * 41: torch.zeros(4)}):
        with pytest.raises(ValueError, match="at least one|printable"):
            save_directions(bad, pipe, tmp_path)


# ---------------------------------------------------------------------------------------------------------- examples


@pytest.fixture
def example(tmp_path):
    """Runs an example on the drawings as a program, in this process, and returns its result."""

    def run(name, *options) -> dict:
        output = tmp_path / "posteriors.json"
        code, _, errors = run_script(EXAMPLES / f"{name}.py", "drawings", "--output", output, *options)
        assert code == 0, errors[-3000:]
        found = json.loads(output.read_text())[name]["drawings"]
        assert found["command"] and found["commit"] and found["date"] and found["seed"] == 0 and found["num_images"]
        return found

    return run


def test_planted_anomalies_are_found(example):
    found = example("anomalies", "--num_images", 30, "--num_importance_samples", 1)["auroc"]
    assert found.keys() == {"patch", "scratch", "halves swapped"}
    assert all(auroc[score] >= 0.95 for auroc in found.values() for score in ("squared_error", "log_likelihood"))


# The lower half alone leaves more than one face possible.
RESTORED = ("hole, a quarter of the pixels", "75% of the pixels missing", "noise of 0.3")


def test_the_search_comes_nearer_than_the_nearest_training_image(example):
    found = example("restoration", "--num_images", 6, "--num_training", 1_000, "--num_steps", 30)["squared_error"]
    assert len(found) == 4 and all(found[damage]["better than nearest"] >= 0.2 for damage in RESTORED)


def test_an_edit_makes_the_change_of_the_factor(example, tmp_path):
    picture = tmp_path / "rows.png"
    small = ("--num_images", 30, "--num_training", 500)
    found = example("directions", *small, "--picture", picture)["directions"]
    assert {"smile", "turn", "hair colour"} < found.keys() and len(found) == 8
    assert all(change["of the change"] > 0.5 for change in found.values())
    assert Image.open(picture).size == (9 * 65, 8 * 65)


def test_neighbours_in_code_space_show_nearly_the_same_face(example):
    found = example("neighbours", "--num_images", 60, "--num_training", 1_000)
    distances = [found[space]["squared distance of factors"] for space in ("code space", "pixels")]
    assert distances[0] < distances[1] < 0.3 * found["pixels"]["of random pairs"]


def test_the_nearest_training_image_is_that_of_the_pixels_seen():
    with importing_from(EXAMPLES):
        from common import nearest_training_images

        training = torch.randint(256, (50, 1, 4, 4), generator=generator(), dtype=torch.uint8)
        queries = torch.rand(6, 1, 4, 4, generator=generator(1))
        seen = torch.rand(6, 4, 4, generator=generator(2)) < 0.6
        found = nearest_training_images(training, queries, seen)
    errors = [[(mask * (query - each / 255)).square().sum() for each in training[:, 0]]
              for query, mask in zip(queries[:, 0], seen, strict=True)]  # fmt: skip
    assert torch.equal(found, training[torch.tensor(errors).argmin(1)] / 255)


RESULTS = json.loads((ROOT / "results" / "posteriors.json").read_text())


def test_the_page_has_the_numbers_of_the_results():
    with importing_from(EXAMPLES):
        from tables import tables

        page = (ROOT / "docs" / "posteriors.md").read_text()
        assert all(f"<!-- {name} -->\n{table}\n<!-- /" in page for name, table in tables(RESULTS).items())


def test_the_goals_are_met():
    for model in ("drawings", "mnist"):
        assert all(auroc["squared_error"] >= 0.95 for auroc in RESULTS["anomalies"][model]["auroc"].values())
    for errors in (found["squared_error"] for found in RESULTS["restoration"].values()):
        assert all(errors[damage]["better than nearest"] >= 0.2 for damage in RESTORED)
