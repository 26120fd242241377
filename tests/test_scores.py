"""Pictures of any size as training saw them, and scores of each: against closed forms and planted cases."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_pipeline, run
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_pipeline import SIZE, generator, make_vae, probabilistic_pca  # noqa: F401
from torch.distributions import MultivariateNormal

from hf_vaeplus import (
    VAEPlusFlowMatchingConfig,
    VAEPlusFlowMatchingModel,
    VAEPlusImageProcessor,
    VAEPlusMixtureConfig,
    VAEPlusMixtureModel,
    VAEPlusPipeline,
)
from hf_vaeplus.data.rendered_faces import factors_of, render_faces
from hf_vaeplus.evaluation.scores import SCORES, auroc_by_label


@pytest.fixture
def pipe() -> VAEPlusPipeline:
    """Trained on the central 40 pixels of pictures."""
    pipe = make_pipeline()
    pipe.image_processor = VAEPlusImageProcessor(SIZE, crop=40)
    return pipe


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))


def fitted(picture: Image.Image) -> torch.Tensor:
    """The crop and the box filter, written out once more, as uint8 `(1, 3, SIZE, SIZE)`."""
    small = picture.crop((5, 10, 45, 50)).resize((SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]


def test_pictures_of_any_size_are_seen_as_in_training(pipe, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    expected = pipe.encode(fitted(picture), preprocess=False).mean
    pixels = np.array(picture)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    with_alpha = np.concatenate([pixels, np.full((60, 50, 1), 7, np.uint8)], axis=2)
    for form in (picture, tmp_path / "a.png", str(tmp_path / "a.png"), pixels, pixels / 255, with_alpha, (pixels,),
                 channels_first, channels_first.double() / 255, picture.convert("RGBA"), [picture]):  # fmt: skip
        torch.testing.assert_close(pipe.encode(form).mean, expected, rtol=1e-6, atol=1e-6)
    mixed = pipe.encode([picture, tmp_path / "a.png", fitted(picture)[0], fitted(picture)[0] / 255]).mean
    torch.testing.assert_close(mixed, expected.expand(4, -1))
    torch.testing.assert_close(pipe.encode(np.stack([pixels, pixels])).mean, expected.expand(2, -1))
    again = pipe.reconstruct(picture, "pt")
    torch.testing.assert_close(again, pipe.reconstruct(fitted(picture), "pt", preprocess=False))
    torch.testing.assert_close(pipe.interpolate(picture, pixels, 2, "pt")[0, :1], again)
    nats = pipe.log_likelihood(picture, 2, generator())
    torch.testing.assert_close(nats, pipe.log_likelihood(fitted(picture), 2, generator(), preprocess=False))


def test_exact_images_keep_every_bit(pipe):
    exact = torch.rand(2, 3, SIZE, SIZE, generator=generator())  # between the levels of 8 bits
    for form in (exact, exact.double(), exact.permute(0, 2, 3, 1).numpy()):
        assert torch.equal(pipe.encode(form).mean, pipe.encode(form, preprocess=False).mean)
    torch.testing.assert_close(pipe.encode(list(exact)).mean, pipe.encode(exact).mean, rtol=1e-6, atol=1e-6)


def test_what_the_model_draws_is_not_cropped_again(pipe, tmp_path):
    drawn = pipe(1, generator=generator()).images[0]
    drawn.save(tmp_path / "a.png")
    expected = pipe.encode(drawn, preprocess=False).mean
    torch.testing.assert_close(pipe.encode([drawn, tmp_path / "a.png"]).mean, expected.expand(2, -1))
    pipe.image_processor = VAEPlusImageProcessor(SIZE, crop=20)  # training would crop such a picture
    assert not torch.equal(pipe.encode(drawn).mean, expected)


def test_a_photograph_is_turned_as_the_camera_recorded_it(pipe, picture):
    turned = fitted(picture.transpose(Image.Transpose.ROTATE_180))
    picture.getexif()[0x0112] = 3
    torch.testing.assert_close(pipe.encode(picture).mean, pipe.encode(turned).mean, rtol=1e-6, atol=1e-6)


def test_scores_against_closed_forms(probabilistic_pca):  # noqa: F811
    pipe, density = probabilistic_pca
    x = torch.rand(5, 1, 4, 4, generator=generator(3))
    scores = pipe.score(x, 3)
    exact = density.log_prob(x.flatten(1).double())
    torch.testing.assert_close(scores.log_likelihood.double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.bits_per_dimension.double(), 8 - exact / (16 * np.log(2)), rtol=0, atol=1e-4)
    by_hand = ((x - pipe.reconstruct(x, "pt")) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(scores.squared_error, by_hand)
    dim = pipe.vae.config.latent_dim
    standard = MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    squares = 2 * (standard.log_prob(torch.zeros(dim)) - standard.log_prob(pipe.encode(x).mean))
    assert scores.latent_distance_is == "mahalanobis"
    torch.testing.assert_close(scores.latent_distance.square(), squares, rtol=1e-4, atol=1e-5)
    same = pipe.log_likelihood(x, 4, generator())
    assert torch.equal(pipe.score(x, 4, generator()).log_likelihood, same)


def test_a_second_stage_with_a_density_is_the_prior_of_scores():
    config = VAEPlusMixtureConfig(latent_dim=4, num_components=2)
    second_stage = VAEPlusMixtureModel(config)
    covariance = torch.diag(torch.tensor([0.5, 1.0, 2.0, 0.7]))
    second_stage.set_input_moments(torch.tensor([0.3, 0.0, -1.0, 0.2]), covariance)
    whole = make_pipeline()
    pipe = VAEPlusPipeline(whole.vae, whole.autoencoder, second_stage)
    images = torch.rand(3, 3, SIZE, SIZE, generator=generator())
    scores = pipe.score(images, 2, generator())
    assert (scores.latent_distance_is, scores.prior) == ("negative_log_density", "second_stage")
    density = -second_stage.log_prob(pipe.encode(images).mean)
    torch.testing.assert_close(scores.latent_distance, density.float().detach())
    assert torch.equal(scores.log_likelihood, pipe.log_likelihood(images, 2, generator(), prior="second_stage"))
    assert pipe.score(images, 2, prior="standard_normal").latent_distance_is == "mahalanobis"
    with pytest.raises(ValueError, match="needs a second stage with an exact log_prob"):
        whole.score(images, prior="second_stage")


def test_the_density_of_an_ode_is_the_prior_of_scores_if_it_is_asked_for(tmp_path, monkeypatch):
    whole = make_pipeline()
    flow = VAEPlusFlowMatchingModel(VAEPlusFlowMatchingConfig(latent_dim=4, hidden_dim=8, num_blocks=1))
    pipe = VAEPlusPipeline(whole.vae, whole.autoencoder, flow)
    images = torch.rand(3, 3, SIZE, SIZE, generator=generator())
    assert pipe.score(images, 1).latent_distance_is == "mahalanobis"
    density = -flow.log_prob(pipe.encode(images).mean)
    torch.testing.assert_close(pipe.score(images, 1, prior="second_stage").latent_distance, density.detach())
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("flow")
    Image.fromarray(render_faces(factors_of([0], 8), SIZE)[0]).save("face.png")
    words = ("score", "flow", "face.png", "--num_importance_samples", "1", "--quiet", "--overwrite", "--json")
    for flags, told in (((), "mahalanobis"), (("--prior", "second_stage"), "negative_log_density")):
        code, output, errors = run(*words, *flags)
        assert code == 0, errors
        assert json.loads(output)["latent_distance_is"] == told


def test_a_model_without_a_likelihood_has_the_other_scores():
    whole = make_pipeline()
    vae = make_vae(reconstruction_space="input")
    scores = VAEPlusPipeline(vae, whole.autoencoder).score(torch.rand(2, 3, SIZE, SIZE))
    assert scores.log_likelihood is None and scores.bits_per_dimension is None
    assert scores.squared_error.shape == scores.latent_distance.shape == (2,)


# -------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def drawings(pipe, tmp_path, monkeypatch) -> list[Path]:
    """Eight drawings in one folder, and in another one picture of noise, which no model of drawings expects."""
    monkeypatch.chdir(tmp_path)
    for folder in ("pictures/faces", "pictures/strange"):
        Path(folder).mkdir(parents=True)
    for number, face in enumerate(render_faces(factors_of(range(8), 8), 48)):
        Image.fromarray(face).save(f"pictures/faces/{number}.png")
    noise = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save("pictures/strange/noise, \u00e9.png")
    return sorted(Path("pictures").rglob("*.png"))


DRAWINGS = str(Path(__file__).parents[1] / "model_cards" / "vaeplus-drawings")


def test_the_planted_outlier_comes_first(drawings):
    words = ("score", DRAWINGS, "pictures", "--num_importance_samples", "2")
    code, output, errors = run(*words, "--top", "3", "--output", "scores.csv")
    assert code == 0, errors
    with open("scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows][0] == "pictures/strange/noise, \u00e9.png" and len(rows) == 9
    assert sorted(row["name"] for row in rows) == sorted(map(str, drawings))
    nats = [float(row["log_likelihood"]) for row in rows]
    assert nats == sorted(nats)
    assert output.count(".png") == 3 and "AUROC" in output
    pipe = VAEPlusPipeline.from_pretrained(DRAWINGS)
    noise = [generator(0) for _ in rows]
    expected = pipe.score([row["name"] for row in rows], 2, noise)
    for name in SCORES:
        found = torch.tensor([float(row[name]) for row in rows])
        torch.testing.assert_close(found, getattr(expected, name), rtol=1e-4, atol=1e-4)
    is_strange = [row["label"] == "strange" for row in rows]
    code, output, errors = run(*words, "--sort", "squared_error", "--output", "scores.json", "--json")
    told, stored = json.loads(output), json.loads(Path("scores.json").read_text())
    assert code == 0 and told["auroc"] == stored["auroc"] and len(stored["rows"]) == 9
    errors = [row["squared_error"] for row in stored["rows"]]
    assert errors == sorted(errors, reverse=True)
    auroc = roc_auc_score(is_strange, [float(row["latent_distance"]) for row in rows])
    assert stored["auroc"]["strange"]["latent_distance"] == auroc
    assert stored["auroc"]["strange"]["log_likelihood"] == roc_auc_score(is_strange, [-each for each in nats]) == 1
    assert stored["auroc"]["faces"]["log_likelihood"] == 0


def test_labels_of_a_csv_file_and_rows_of_a_data_set(drawings):
    Path("labels.csv").write_text("file_name,kind\npictures/faces/0.png,a\n1.png,b\nnobody.png,b\n", "utf-8")
    words = ("score", DRAWINGS, "--num_importance_samples", "1", "--quiet", "--overwrite", "--json")
    code, output, errors = run(*words, "pictures/faces", "--labels", "labels.csv", "--label_column", "kind")
    assert code == 0, errors
    labels = {row["name"]: row["label"] for row in json.loads(output)["rows"]}
    named = {name: label for name, label in labels.items() if label}
    assert named == {"pictures/faces/0.png": "a", "pictures/faces/1.png": "b"} and len(labels) == 8
    code, output, errors = run(*words, "--train_data_dir", "pictures", "--split", "train[2:]")
    assert code == 0, errors
    rows = json.loads(output)["rows"]
    assert (rows[0]["name"], rows[0]["label"], len(rows)) == ("strange/noise, \u00e9.png", "strange", 7)


def test_auroc_of_ties_infinities_and_missing_labels():
    rows = [{"label": label, "log_likelihood": nats, "squared_error": error} for label, nats, error in (
        (1, -2.0, 3.0), (0, -2.0, 1.0), (1, -np.inf, 3.0), (0, 5.0, 4.0), (None, 9.0, 9.0))]  # fmt: skip
    found = auroc_by_label(rows)
    assert found["1"] == {"log_likelihood": 0.875, "squared_error": 0.5}  # of 4 pairs: 3.5 and 2
    assert auroc_by_label([row for row in rows if row["label"] == 1]) == {}


@pytest.mark.parametrize(
    "words, message",
    [
        ("pictures --output scores.txt", "scores.csv or scores.json, got scores.txt"),
        ("pictures --num_importance_samples 0", "--num_importance_samples must be at least 1, got 0"),
        ("pictures --labels nowhere.csv", "--labels nowhere.csv cannot be read (No such file"),
        ("pictures --labels bad.csv", "no column 'file_name', it has ['a', 'b']"),
        ("pictures --labels other.csv", "names none of the pictures, such as pictures/"),
        ("pictures --dataset_name digits", "give pictures or --dataset_name, not both"),
        ("pictures --label_column x", "pictures have no columns"),
        ("", "exactly one of dataset_name"),
        ("nowhere.png", "nowhere.png is not a readable picture"),
    ],
)
def test_mistakes_of_the_command(drawings, words, message):
    Path("bad.csv").write_text("a,b\n1,2\n", "utf-8")
    Path("other.csv").write_text("file_name,label\nz.png,2\n", "utf-8")
    code, _, errors = run("score", DRAWINGS, *words.split(), "--quiet", "--json")
    assert code == 2 and message in errors and len(errors.splitlines()) == 1, errors
    assert not Path("scores.csv").exists()
