"""Second stages that are conditioned on labels: what labels mean, densities, samples, training, and refusals."""

import datetime
import gzip
import json
import math
import shutil
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import (
    SMALL_PRIOR,
    Killed,
    contents,
    encoded,
    make_pipeline,
    make_prior,
    noise,
    perturbed,
    run,
)
from sklearn.datasets import load_digits
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from hf_vaeplus import (
    VAEPlusFlowMatchingConfig,
    VAEPlusMixtureConfig,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.labels import labels_of, read_labels
from hf_vaeplus.data.rendered_faces import FACTOR_NAMES, factors_of
from hf_vaeplus.hub.cards import _condition_call
from hf_vaeplus.hub.latents import encode_to_parquet
from hf_vaeplus.hub.repository import export
from hf_vaeplus.training import stages
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import StageOptions, read_record
from hf_vaeplus.training.randomness import Noise
from hf_vaeplus.training.stages import run_stage

CLASSES = {"condition": "classes", "id2label": {3: "cat", 5: "dog", 9: "emu"}}
FACTORS = {"condition": "factors", "id2label": {0: "age", 1: "light"}}
ATTRIBUTES = {"condition": "attributes", "id2label": {0: "hat", 1: "beard", 2: "glasses"}}
KINDS = ["vae", "flow_matching", "coupling_flow", "mixture"]
NAN = math.nan


def make_second_stage(kind: str, latent_dim: int = 4, **options):
    if kind != "vae":
        return make_prior(kind, latent_dim, **options)
    torch.manual_seed(0)
    config = VAEPlusVAEConfig(input_shape=(latent_dim,), latent_dim=3, hidden_dim=8, num_blocks=1, **options)
    return perturbed(VAEPlusVAEModel(config)).eval().requires_grad_(False)


def with_second_stage(kind: str, **options) -> VAEPlusPipeline:
    pipe = make_pipeline(second_stage=False)
    return VAEPlusPipeline(pipe.vae, pipe.autoencoder, make_second_stage(kind, **options))


def images_of(pipe, num_images=None, seed: int = 3, **options) -> torch.Tensor:
    return pipe(num_images, torch.Generator().manual_seed(seed), output_type="pt", **options).images


# ----------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "rows, names, kind, id2label, values",
    [
        ([7, 3, None, 7, 3, 7], None, "classes", {3: "3", 7: "7"}, [1, 0, -1, 1, 0, 1]),
        ([1, -1, -1, 1], None, "classes", {-1: "-1", 1: "1"}, [1, 0, 0, 1]),
        ([True, False, False, True], None, "classes", {0: "False", 1: "True"}, [1, 0, 0, 1]),
        ([2, 0, -1, 2, 0], ["cat", "dog", "emu"], "classes", {0: "cat", 2: "emu"}, [1, 0, -1, 1, 0]),
        (["b", "a", None, "b"], None, "classes", {0: "a", 1: "b"}, [1, 0, -1, 1]),
        ([0.5, NAN, 2, None], None, "factors", {0: "c"}, [[0.5], [NAN], [2], [NAN]]),
        ([[0, 1], [1, 1.0], None], None, "attributes", {0: "0", 1: "1"}, [[0, 1], [1, 1], [NAN, NAN]]),
        ([[True, None], [False, True]], ["hat", "tie"], "attributes", {0: "hat", 1: "tie"}, [[1, NAN], [0, 1]]),
        ([[-1, 1], [1, 1]], None, "factors", {0: "0", 1: "1"}, [[-1, 1], [1, 1]]),
    ],
)
def test_the_values_of_a_column_say_what_they_are(rows, names, kind, id2label, values):
    labels = labels_of(rows, names, "c")
    assert labels.kind == kind and labels.id2label == id2label
    expected = torch.tensor(values) if kind == "classes" else torch.tensor(values, dtype=torch.float32)
    torch.testing.assert_close(labels.values, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "rows, names, told",
    [
        ([None, NAN], None, "no value for any image, expected a label of most of them"),
        ([4, 4, 4, 4], None, "1 different labels for 4 images, expected 2 to 10,000 classes"),
        (["a", "b", "c", "d", "d"], None, "4 different labels for 5 images"),
        ([0, 1, 5, 1], ["cat", "dog"], "the class 5, expected 0 to 1, as it names 2 classes"),
        ([[1, 0], [1]], None, "lists of 1 to 2 values, expected one length"),
        ([["a"], ["b"]], None, "'a' in a list, expected finite numbers"),
        ([[math.inf], [1.0]], None, "'inf' in a list"),
        ([{"x": 1}, {"x": 2}], None, "values of the type dict, expected whole numbers"),
        ([1, "a", 1, "a"], None, "values of the type int and str"),
        ([[2, 3], [2, 3]], None, "the same values for all images"),
    ],
)
def test_columns_that_hold_no_labels(rows, names, told):
    with pytest.raises(ValueError, match="label_column='c' holds .*" + told):
        labels_of(rows, names, "c")


def test_labels_follow_their_images(tmp_path, monkeypatch):
    """Through slices, held-out images, pictures that are left out, and mirror images; whatever the source is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    wanted = {"resolution": 32, "progress": False}
    digits = load_images("digits", split="train[3:200]", holdout=60, random_flip=True, **wanted)
    for images, flips in ((digits, 2), (digits.unseen(), 1)):
        found, expected = read_labels(images, "label"), torch.from_numpy(load_digits().target[images.numbers])
        assert torch.equal(found.values, expected.repeat(flips)) and len(found.values) == len(images)
        assert found.id2label == {number: str(number) for number in range(10)}
    faces = load_images("rendered-faces", max_samples=20, split="train[5:]", num_factors=3, **wanted)
    found = read_labels(faces, "factors")
    assert found.kind == "factors" and found.id2label == dict(enumerate(FACTOR_NAMES[:3]))
    assert torch.equal(found.values, torch.from_numpy(factors_of(range(5, 20), 3)))

    for number in range(8):
        (folder := Path("pictures", "ab"[number % 2])).mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(noise(number, 32)))
    (Path("pictures") / "a" / "0.png").write_bytes(b"no picture")
    pictures = load_images(train_data_dir="pictures", on_bad_image="skip", **wanted)
    found = read_labels(pictures, "label")
    assert found.values.tolist() == [0] * 3 + [1] * 4 and found.id2label == {0: "a", 1: "b"}
    Path("pictures/b").rename("pictures/c")  # the same pixels in the same order: other labels nevertheless
    renamed = load_images(train_data_dir="pictures", on_bad_image="skip", **wanted)
    assert renamed.fingerprint == pictures.fingerprint
    assert read_labels(renamed, "label").fingerprint != found.fingerprint

    rows = {"image": [encoded(noise(number, 32)) for number in range(6)], "kind": [0, 1, 0, 1, 0, -1]}
    rows["list"] = [[0.5, number] for number in range(6)]
    kinds = datasets.Features(image=datasets.Value("binary"), kind=datasets.ClassLabel(names=["cat", "dog"]),
                              list=datasets.List(datasets.Value("float32")))  # fmt: skip
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet("rows.parquet")
    table = load_images(train_data_files="rows.parquet", **wanted)
    assert read_labels(table, "kind").id2label == {0: "cat", 1: "dog"}
    assert read_labels(table, "kind").values.tolist() == [0, 1, 0, 1, 0, -1]
    assert read_labels(table, "list").values[:, 1].tolist() == list(range(6))

    Path("mnist").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    Path("mnist/train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes())
    mnist = load_images(train_data_dir="mnist", **wanted)
    shutil.rmtree("pictures/c")
    for images, column, told in (
        (mnist, "label", "mnist has no labels"),
        (
            load_images(train_data_dir="pictures/a", on_bad_image="skip", **wanted),
            "label",
            "a has no labels: sort",
        ),
        (mnist, "digit", "mnist has no columns, got label_column='digit'; its own labels are called label"),
        (faces, "label", "its own labels are called factors"),
        (table, "label", "no column 'label' in parquet"),
    ):
        with pytest.raises(ValueError, match=told):
            read_labels(images, column)
    with gzip.open("mnist/train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2I", 0x801, 4) + bytes([7, 2, 7, 2]))
    assert read_labels(mnist, "label").id2label == {2: "2", 7: "7"}

    encode_to_parquet(make_pipeline(), faces, "faces.parquet", label_column="factors")
    kept = datasets.load_dataset("parquet", data_files="faces.parquet", split="train").with_format("torch")["label"][:]
    torch.testing.assert_close(kept.float(), read_labels(faces, "factors").values)


def test_labels_of_a_data_set_on_the_hub_are_fetched_once(tmp_path, monkeypatch):
    rows = {"image": [{"bytes": encoded(noise(number)), "path": None} for number in range(6)]}
    rows |= {"kind": [1, 0, 1, 1, 0, 2], "day": [datetime.date(2026, 1, 1)] * 6}
    picture = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    names = datasets.ClassLabel(names=["cat", "dog", "emu"])
    kinds = datasets.Features(image=picture, kind=names, day=datasets.Value("date32"))
    table, asked = datasets.Dataset.from_dict(rows, features=kinds).to_iterable_dataset(), []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *place, **o: asked.append(place) or datasets.IterableDatasetDict(train=table)
    )
    images = load_images("org/set", revision="1" * 40, resolution=32, cache_dir=tmp_path, progress=False)
    found, before = read_labels(images, "kind"), len(asked)
    assert found.id2label == {0: "cat", 1: "dog", 2: "emu"} and found.values.tolist() == rows["kind"]
    assert read_labels(images, "kind").fingerprint == found.fingerprint and len(asked) == before
    with pytest.raises(ValueError, match="label_column='day' holds something else .*date is not JSON"):
        read_labels(images, "day")
    with pytest.raises(ValueError, match="no column 'colour' in org/set"):
        read_labels(images, "colour")


# ----------------------------------------------------------------------------------------------- what people write


def flow(fields: dict) -> VAEPlusFlowMatchingConfig:
    return VAEPlusFlowMatchingConfig(latent_dim=2, **fields)


@pytest.mark.parametrize(
    "fields, labels, expected",
    [
        (CLASSES, 5, [1]),
        (CLASSES, "emu", [2]),
        (CLASSES, [3, "dog", None], [0, 1, -1]),
        (CLASSES, np.array([9, 3]), [2, 0]),
        (CLASSES, torch.tensor([5]), [1]),
        (CLASSES, [np.int64(9), torch.tensor(3)], [2, 0]),
        (FACTORS, [0.5, 1], [[0.5, 1]]),
        (FACTORS, {"light": 2}, [[NAN, 2]]),
        (FACTORS, [{"age": 1}, [None, 0.5]], [[1, NAN], [NAN, 0.5]]),
        (FACTORS, torch.tensor([[1.0, NAN]]), [[1, NAN]]),
        (FACTORS, [np.array([1, 2]), torch.ones(2)], [[1, 2], [1, 1]]),
        (ATTRIBUTES, [True, 0, None], [[1, 0, NAN]]),
    ],
)
def test_labels_are_taken_as_people_write_them(fields, labels, expected):
    config = flow(fields)
    again = VAEPlusFlowMatchingConfig.from_dict(json.loads(config.to_json_string()))
    for each in (config, again):
        found = each.to_condition(labels)
        assert found.dtype == (torch.long if fields is CLASSES else torch.float32)
        torch.testing.assert_close(found, torch.tensor(expected).to(found), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: flow(CLASSES).to_condition(4), r"no class 4: choose among 3 \(cat\), 5 \(dog\)"),
        (lambda: flow(CLASSES).to_condition(["cow"]), "there is no class 'cow'"),
        (lambda: flow(CLASSES).to_condition([3.0]), "there is no class 3.0"),
        (lambda: flow(CLASSES).to_condition([True]), "there is no class True"),
        (lambda: flow(CLASSES).to_condition([[3]]), r"there is no class \[3\]"),
        (lambda: flow(CLASSES).to_condition([torch.tensor([3, 5])]), r"there is no class tensor\(\[3, 5\]\)"),
        (lambda: flow(FACTORS).to_condition([1]), r"expected 2 factors \(age, light\) for each"),
        (lambda: flow(FACTORS).to_condition(torch.zeros(2, 3)), "expected 2 factors"),
        (lambda: flow(FACTORS).to_condition(3), "expected 2 factors"),
        (lambda: flow(FACTORS).to_condition([]), "expected 2 factors"),
        (lambda: flow(FACTORS).to_condition(["a", "b"]), "expected 2 factors"),
        (lambda: flow(FACTORS).to_condition([1, math.inf]), "must be finite or not given"),
        (lambda: flow(FACTORS).to_condition({"Age": 1}), "no 'Age' among the factors: choose"),
        (lambda: flow(ATTRIBUTES).to_condition([0, 0.5, 1]), "attributes are 0, 1 or not given"),
        (lambda: VAEPlusFlowMatchingConfig(condition="classes", id2label={0: "a"}), "must name 2 to 10,000 classes"),
        (lambda: VAEPlusFlowMatchingConfig(condition="classes", id2label={0: "a", 1: 5}), "must name 2 to 10,000"),
        (lambda: VAEPlusFlowMatchingConfig(condition="factors", id2label={1: "a"}), "factors by their places 0, 1"),
        (lambda: VAEPlusMixtureConfig(**FACTORS), "a mixture takes classes as condition, not factors"),
        (lambda: VAEPlusVAEConfig(network="affine", **CLASSES), "is for VAEs of vectors with network='mlp'"),
        (lambda: make_prior("mixture").sample(torch.zeros(1, 2), condition=torch.tensor([0])), "is unconditional"),
        (
            lambda: make_prior("mixture", **CLASSES).log_prob(torch.zeros(2, 2), condition=torch.tensor([0])),
            r"must be integers of shape \(2,\), got torch.int64 of shape \(1,\)",
        ),
        (
            lambda: make_prior("mixture", **CLASSES).log_prob(torch.zeros(1, 2), condition=torch.tensor([3])),
            "places of 3 classes are -1 to 2",
        ),
    ],
)  # fmt: skip
def test_conditions_that_make_no_sense(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# -------------------------------------------------------------------------------------------------------- densities


def test_a_mixture_of_classes_is_a_mixture_of_mixtures():
    """Of torch.distributions for each class, and of all classes by their shares for the null class."""
    model = make_prior("mixture", 3, **CLASSES).double()
    root, mean = model.input_root, model.input_mean
    components = MultivariateNormal(model.means @ root.T + mean, scale_tril=root @ model.factors)
    everything = MixtureSameFamily(Categorical(logits=model.log_weights), components)
    z = everything.sample((40,))
    torch.testing.assert_close(model.log_prob(z), everything.log_prob(z))
    torch.testing.assert_close(model.log_prob(z, condition=torch.full((40,), -1)), everything.log_prob(z))
    u, eps = torch.randn(2, 20_000, 3, dtype=torch.float64)
    for place in range(3):
        own = slice(3 * place, 3 * place + 3)
        parts = MultivariateNormal(components.loc[own], scale_tril=components.scale_tril[own])
        expected = MixtureSameFamily(Categorical(logits=model.log_weights[own]), parts)
        condition = torch.full((len(u),), place)
        torch.testing.assert_close(model.log_prob(z, condition=condition[:40]), expected.log_prob(z))
        drawn = model.sample(u, eps, condition)
        torch.testing.assert_close(drawn.mean(0), expected.mean, rtol=0, atol=0.05)
        torch.testing.assert_close(drawn.var(0), expected.variance, rtol=0.06, atol=0.02)
    mixed = torch.arange(20_000) % 4 - 1
    drawn = model.sample(u, eps, mixed)
    assert torch.equal(drawn[mixed == -1], model.sample(u, eps)[mixed == -1])
    assert torch.equal(drawn[mixed == 2], model.sample(u, eps, torch.full((len(u),), 2))[mixed == 2])


def test_a_conditional_coupling_flow_integrates_to_one_and_is_invertible():
    model = make_prior("coupling_flow", 2, **CLASSES).double()
    line = torch.linspace(-7, 7, 71, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    density = model.log_prob(grid, condition=torch.full((len(grid),), 1)).exp() * float(line[1] - line[0]) ** 2
    assert float(density.sum()) == pytest.approx(1, abs=2e-3)
    u = torch.randn(10_000, 2, dtype=torch.float64)
    means = [model.sample(u, condition=torch.full((len(u),), place)).mean(0) for place in (0, 1)]
    torch.testing.assert_close(means[1], density @ grid, rtol=0, atol=0.06)
    assert (means[1] - means[0]).abs().max() > 0.1  # the classes differ
    places = torch.arange(len(u)) % 4 - 1
    torch.testing.assert_close(model.to_noise(model.sample(u, condition=places), places), u)


def test_guidance_leads_from_the_null_class_through_the_class_and_beyond():
    model = make_prior("flow_matching", 3, **CLASSES)
    u, condition = torch.randn(5, 3), torch.tensor([0, 1, 2, -1, 0])

    def drawn(scale, **options):
        return model.sample(u, condition=condition, guidance_scale=scale, **options)

    class_, null = (model.sample(u, condition=each, num_inference_steps=16) for each in (condition, None))
    torch.testing.assert_close(drawn(1.0, num_inference_steps=16), class_)
    torch.testing.assert_close(drawn(0.0), null)
    torch.testing.assert_close(drawn(3.0)[3], null[3])  # there is nothing to be guided to
    with pytest.raises(ValueError, match="guidance_scale=2 needs a conditional model"):
        make_prior("flow_matching").sample(u[:, :2], guidance_scale=2.0)
    # For one Euler-like step the change is linear in the scale.
    time = torch.full((1, 1), 0.3)
    features = model.condition_features(condition, u)
    free, given = model.velocity(u, time, model.condition_features(None, u)), model.velocity(u, time, features)
    torch.testing.assert_close(model._guided(model.velocity, features, 2.5)(u, time), free + 2.5 * (given - free))
    # Its one pass can be distilled from the guided ODE: the loss is the distance to it.
    model.config.distillation_guidance = 3.0
    error = model.whitened(drawn(1.0)) - model.whitened(drawn(3.0, num_inference_steps=8))
    loss = model(noise=u, condition=condition).loss
    torch.testing.assert_close(loss, error.square().sum(1).mean(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="distillation_guidance must be .* 1 without a condition, got 2.0"):
        VAEPlusFlowMatchingConfig(distillation_guidance=2.0)


def test_flow_matching_finds_conditional_gaussians_given_all_some_or_no_factors():
    """z = A c + e / 2 of two independent factors, with labels withheld as in training: three closed forms."""
    model = make_prior("flow_matching", 2, distillation_steps=0, hidden_dim=32, **FACTORS).requires_grad_(True)
    matrix, rest = torch.tensor([[1.0, 0.0], [0.5, -1.0]]), 0.25 * torch.eye(2)
    model.set_input_moments(torch.zeros(2), matrix @ matrix.T + rest)
    optimizer = torch.optim.Adam(model.train().parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    options = StageOptions(stage="second_stage", vae="none", label_column="x", label_dropout=0.25)
    source = Noise(0, 256, torch.device("cpu"))
    for step in range(300):
        c = torch.randn(256, 2)
        given = stages._condition({"condition": c}, source.at(step, slice(256)), options)
        loss = model(c @ matrix.T + 0.5 * torch.randn(256, 2), noise=torch.randn(256, 2), **given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False).config.num_inference_steps = 10
    c = torch.randn(250, 2)
    z = c @ matrix.T + 0.5 * torch.randn(250, 2)
    first = c.clone()
    first[:, 1] = NAN
    second = matrix[:, 1:] @ matrix[:, 1:].T
    for condition, mean, covariance in (
        (c, c @ matrix.T, rest),
        (first, c[:, :1] * matrix[:, 0], second + rest),
        (None, torch.zeros(2), matrix @ matrix.T + rest),
    ):
        expected = MultivariateNormal(mean, covariance).log_prob(z)
        gap = (expected - model.log_prob(z, condition=condition)).mean()
        assert float(gap) == pytest.approx(0, abs=0.1)


def test_a_conditional_vae_is_a_vae_for_each_class():
    """Its weights with the condition folded into the biases are those of an unconditional one."""
    model = make_second_stage("vae", **CLASSES)
    alone = VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(4,), latent_dim=3, hidden_dim=8, num_blocks=1)).eval()
    z, eps, u = torch.randn(6, 4), torch.randn(5, 6, 3), torch.randn(6, 3)
    for place in (-1, 0, 2):
        weights = dict(model.state_dict())
        for name, dim in (("encoder", 4), ("decoder", 3)):
            weight = weights[f"{name}.0.weight"]
            weights[f"{name}.0.bias"] = weights[f"{name}.0.bias"] + weight[:, dim + place % 4]
            weights[f"{name}.0.weight"] = weight[:, :dim]
        alone.load_state_dict(weights)
        condition = torch.full((6,), place)
        torch.testing.assert_close(model.sample(u, z, condition), alone.sample(u, z))
        torch.testing.assert_close(model.log_prob_bound(z, eps, condition), alone.log_prob_bound(z, eps))
        torch.testing.assert_close(model(z, noise=u, condition=condition).loss, alone(z, noise=u).loss)
    torch.testing.assert_close(model.sample(u, z), model.sample(u, z, torch.full((6,), -1)))


def test_moments_are_matched_over_all_classes():
    model = make_second_stage("vae", **CLASSES)
    places = torch.tensor([0, 0, 0, 1, 2, 2])
    root = torch.eye(4) + 0.3 * torch.randn(4, 4)
    model.match_moments(torch.ones(4), root @ root.T, torch.Generator().manual_seed(0), conditions=places)
    u, eps = torch.randn(60_000, 3), torch.randn(60_000, 4)
    drawn = model.sample(u, eps, places[torch.arange(60_000) % 6])
    torch.testing.assert_close(drawn.mean(0), torch.ones(4), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(drawn.T), root @ root.T, rtol=0.05, atol=0.04)


def test_values_are_standardised_and_missing_ones_are_zero():
    features = make_prior("flow_matching", 2, **FACTORS).condition_features
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [NAN, 5.0]])
    features.set_statistics(values)
    expected = torch.tensor([[-1.0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1]])
    torch.testing.assert_close(features(values, values), expected)
    torch.testing.assert_close(features(None, values), torch.zeros(3, 4))


# ----------------------------------------------------------------------------------------------------- the pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_for_each_label_whatever_the_others(kind):
    pipe = with_second_stage(kind, **CLASSES)
    labels = [3, "dog", None, 9]
    images = images_of(pipe, class_labels=labels)
    assert images.shape[0] == 4
    torch.testing.assert_close(images_of(pipe, class_labels=labels, decode_batch_size=3), images)
    torch.testing.assert_close(images_of(pipe, 4)[2], images[2])  # without labels all are of the null class
    others = images_of(pipe, 4, class_labels=[5, 9])  # in turn, from the same noise
    torch.testing.assert_close(others, images_of(pipe, class_labels=[5, 9, 5, 9]))
    torch.testing.assert_close(others[3], images[3])
    assert (others[0] - images[0]).abs().max() > 1e-5


@pytest.mark.parametrize("kind", ["vae", "flow_matching"])
@pytest.mark.parametrize(
    "fields, given", [(CLASSES, {"class_labels": ["cat", 9]}), (FACTORS, {"conditions": [0.3, NAN]})]
)
def test_it_draws_the_same_saved_and_without_the_package(kind, fields, given, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = with_second_stage(kind, **fields)
    if fields is FACTORS:
        pipe.second_stage.condition_features.set_statistics(torch.rand(9, 2))
    export(pipe, tmp_path / "exported")
    expected = images_of(pipe, 2, **given)
    assert (expected - images_of(pipe, 2)).abs().max() > 1e-5
    for loader, trust in ((VAEPlusPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
        again = loader.from_pretrained(tmp_path / "exported", **trust)
        assert again.second_stage.config.id2label == fields["id2label"]
        assert torch.equal(images_of(again, 2, **given), expected)


@pytest.mark.parametrize("fields, count", [(CLASSES, 2), (FACTORS, 4), (ATTRIBUTES, 4), ({}, None)])
def test_a_card_shows_how_to_ask_for_images(fields, count):
    pipe = with_second_stage("vae", **fields)
    call = _condition_call(json.loads(pipe.second_stage.config.to_json_string(use_diff=False)))
    assert call is None if count is None else len(eval(call, {"pipe": pipe})) == count


def test_what_the_pipeline_refuses():
    classes, factors = with_second_stage("flow_matching", **CLASSES), with_second_stage("flow_matching", **FACTORS)
    for pipe, options, told in (
        (make_pipeline(), {"class_labels": 3}, "this pipeline is unconditional: leave out class_labels, or train"),
        (make_pipeline(second_stage=False), {"conditions": [1]}, "this pipeline is unconditional: leave out"),
        (classes, {"class_labels": [3, 4]}, "there is no class 4"),
        (classes, {"class_labels": []}, "class_labels is empty"),
        (classes, {"class_labels": [3, 5], "num_images": 3}, "there are 2 class_labels or conditions for 3 images"),
        (classes, {"class_labels": [3, 5], "num_images": 0}, "num_images must be an integer of at least 1"),
        (classes, {"conditions": [1, 2]}, "was trained on classes: give class_labels alone"),
        (classes, {"class_labels": 3, "conditions": [1, 2]}, "was trained on classes: give class_labels alone"),
        (factors, {"class_labels": 1}, "was trained on factors: give conditions alone"),
        (factors, {"conditions": torch.zeros(2, 3)}, "expected 2 factors"),
        (classes, {"guidance_scale": 2.0}, "guidance_scale=2 needs a second stage by flow matching and class_labels"),
        (with_second_stage("vae", **CLASSES), {"class_labels": 3, "guidance_scale": 2.0}, "needs a second stage by"),
        (classes, {"class_labels": 3, "guidance_scale": NAN}, "guidance_scale must be a finite number"),
        (classes, {"class_labels": 3, "latents": torch.zeros(2, 4), "num_images": 1}, "contradicts 2 latents"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            images_of(pipe, **options)
    assert images_of(classes, class_labels=3, guidance_scale=2.0).shape[0] == 1
    assert images_of(classes, class_labels=3, latents=torch.zeros(2, 4)).shape[0] == 2
    with pytest.raises(ValueError, match="needs prior='second_stage'"):
        classes.log_likelihood(torch.rand(1, 3, 32, 32), class_labels=3)


def test_likelihoods_given_the_class_add_up_to_that_of_the_null_class():
    """p(x) = sum over classes of their shares times p(x | class), exactly, with the same samples of z."""
    pipe = with_second_stage("mixture", **CLASSES)
    images = torch.rand(3, 3, 32, 32)

    def likelihood(**options):
        generator = torch.Generator().manual_seed(0)
        return pipe.log_likelihood(images, 6, generator, prior="second_stage", decode_batch_size=7, **options).double()

    shares = pipe.second_stage.log_weights.reshape(3, 3).logsumexp(1)
    joint = torch.stack([likelihood(class_labels=label) + shares[place] for place, label in enumerate((3, 5, 9))])
    torch.testing.assert_close(joint.logsumexp(0), likelihood(), rtol=0, atol=5e-3)
    each = likelihood(class_labels=["emu", 3, None])
    expected = torch.stack([joint[2, 0] - shares[2], joint[0, 1] - shares[0], likelihood()[2]])
    torch.testing.assert_close(each, expected, rtol=0, atol=5e-3)


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A folder with an autoencoder and a first VAE of digits."""
    earlier = tmp_path_factory.mktemp("conditional")
    pipe = make_pipeline(second_stage=False, num_channels=1)
    pipe.autoencoder.save_pretrained(earlier / "autoencoder")
    pipe.vae.save_pretrained(earlier / "vae")
    return earlier


def options_of(earlier, kind: str, output_dir, **changes) -> StageOptions:
    tiny = dict(
        dataset_name="digits", resolution=32, num_channels=1, max_train_samples=40, cache_dir=str(earlier / "cache")
    )
    tiny |= dict(max_train_steps=8, train_batch_size=6, logging_steps=1, checkpointing_steps=3, lr_warmup_steps=2)
    model = {"num_components": 1} if kind == "mixture" else SMALL_PRIOR
    places = {"autoencoder": str(earlier / "autoencoder"), "vae": str(earlier / "vae"), "output_dir": str(output_dir)}
    settings = dict(stage="second_stage", second_stage=kind, model=model, label_column="label", use_ema=True)
    return StageOptions(**tiny | places | settings | changes)


@pytest.mark.parametrize("kind, killed_at", [("vae", 4), ("flow_matching", 4), ("flow_matching", 7)])
def test_a_conditional_run_goes_on_bit_for_bit(earlier, tmp_path, kind, killed_at):
    whole = run_stage(options_of(earlier, kind, tmp_path / "whole"))
    assert whole.config.condition == "classes" and whole.config.id2label[7] == "7"
    options = options_of(earlier, kind, tmp_path / "run")
    stage = stages.build_stage(options)
    prepare, given = stage.prepare, []

    def stopped(batch, noise, step):
        if step == killed_at:
            raise Killed
        given.append(prepare(batch, noise, step))
        return given[-1]

    stage.prepare = stopped
    with pytest.raises(Killed):
        train(stage, options)
    assert all(each["condition"].shape == (6,) for each in given)
    again = run_stage(options_of(earlier, kind, tmp_path / "run", resume_from_checkpoint="latest"))
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    pipe = stages.build_pipeline(options, again)
    assert (images_of(pipe, 2, class_labels=7) - images_of(pipe, 2, class_labels=1)).abs().max() > 0


def test_a_mixture_is_fitted_to_each_class(earlier, tmp_path):
    model = run_stage(options_of(earlier, "mixture", tmp_path / "run"))
    labels = torch.from_numpy(load_digits().target[:40])
    shares = torch.bincount(labels) / 40
    torch.testing.assert_close(model.log_weights.exp(), shares)
    stage = stages.build_stage(options_of(earlier, "mixture", tmp_path / "run"))
    noise = Noise(0, 40, torch.device("cpu")).at(0, slice(40))
    y = model.whitened(stage.prepare({"posterior": stage.dataset.tensors["posterior"]}, noise, 0)["inputs"])
    means = torch.stack([y[labels == digit].mean(0) for digit in range(10)])
    torch.testing.assert_close(model.means, means, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at least twice as many images of '0', got 5: take fewer"):
        run_stage(options_of(earlier, "mixture", tmp_path / "many", model={"num_components": 3}))


def test_labels_are_withheld_by_the_randomness_of_the_run():
    options = StageOptions(stage="second_stage", vae="none", label_column="x", label_dropout=0.2)
    source = Noise(5, 40_000, torch.device("cpu"))

    def given(condition, rows=slice(40_000), step=3):
        return stages._condition({"condition": condition[rows]}, source.at(step, rows), options)["condition"]

    classes, values = torch.arange(40_000) % 7, torch.randn(40_000, 4)
    assert float((given(classes) == -1).double().mean()) == pytest.approx(0.2, abs=0.008)
    kept = given(classes) >= 0
    assert torch.equal(given(classes)[kept], classes[kept])
    lost = given(values).isnan().sum(1)
    # 0.2 lose all; 0.2 lose each value with a probability of 1/2; 0.6 lose none.
    expected = [0.6 + 0.2 / 16, 0.2 * 4 / 16, 0.2 * 6 / 16, 0.2 * 4 / 16, 0.2 + 0.2 / 16]
    torch.testing.assert_close(torch.bincount(lost) / 40_000, torch.tensor(expected), rtol=0, atol=0.008)
    part = slice(1000, 3000)  # of another process
    assert torch.equal(given(classes, part), given(classes)[part])
    torch.testing.assert_close(given(values, part), given(values)[part], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(given(classes, step=4), given(classes))
    assert stages._condition({}, source.at(0, slice(5)), options) == {}
    options.label_dropout = 0.0
    assert torch.equal(given(values), values) and torch.equal(given(classes), classes)


def test_a_run_knows_its_labels(earlier, tmp_path, monkeypatch):
    """Other names of the classes, with the same pictures, are other labels."""
    for number in range(12):
        (folder := tmp_path / "pictures" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.png").write_bytes(encoded(noise(number, 32)))
    own = dict(dataset_name=None, train_data_dir=str(tmp_path / "pictures"), max_train_samples=None)

    def again(**changes):
        options = options_of(earlier, "vae", tmp_path / "run", resume_from_checkpoint="latest", **own | changes)
        return run_stage(options)

    assert again().config.id2label == {0: "a", 1: "b"}
    assert set(read_record(tmp_path / "run")["made_from"]) == {"images", "labels", "autoencoder", "vae"}
    before = contents(tmp_path / "run")
    again()
    assert contents(tmp_path / "run") == before
    (tmp_path / "pictures" / "b").rename(tmp_path / "pictures" / "c")
    with pytest.raises(ValueError, match="was trained on other labels than what is there now: add --retrain"):
        again()
    with pytest.raises(ValueError, match="other options .label_column 'label' -> None"):
        again(label_column=None)
    assert again(retrain=True).config.id2label == {0: "a", 1: "c"}


def test_options_refuse_labels_where_they_say_nothing(earlier, tmp_path):
    for changes, told in (
        (
            dict(stage="vae", second_stage="vae", vae=None),
            "label_column='label' is for stage second_stage, not for vae",
        ),
        (dict(streaming=True), "label_column='label' needs cached images"),
        (dict(label_dropout=1.0), r"label_dropout must lie in \[0, 1\)"),
        (dict(model={"condition": "classes"}), "condition and id2label follow from --label_column"),
    ):
        with pytest.raises(ValueError, match=told):
            options_of(earlier, "flow_matching", tmp_path, **changes)


def test_the_command_trains_and_samples_classes(working_folder, monkeypatch):
    monkeypatch.setattr("hf_vaeplus.evaluation.summaries.plot_curves", lambda *all: all[1].write_bytes(b""))
    words = ("train", "--config", "home/tiny.yaml", "--second_stage", "flow_matching", "--output_dir", "run")
    code, _, errors = run(*words, "--label_column", "digit")
    assert code == 2 and "its own labels are called label" in errors and not Path("run/autoencoder").exists()
    code, _, errors = run(*words, "--label_column", "label")
    assert code == 0, errors
    assert read_record(Path("run/autoencoder"))["label_column"] is None
    before = contents(Path("run/second_stage"))
    assert run(*words, "--label_column", "label")[0] == 0 and contents(Path("run/second_stage")) == before
    sample = ("sample", "run/pipeline", "--json", "--output")
    code, output, errors = run(*sample, "a.png", "--class_labels", "3", "null", "--num_images", "4")
    assert code == 0 and json.loads(output.splitlines()[-1])["class_labels"] == ["3", "null"], errors
    code, output, _ = run(*sample, "b.png", "--class_labels", "3", "5", "7", "--guidance_scale", "2")
    assert code == 0 and json.loads(output.splitlines()[-1])["num_images"] == 3
    for place, given, told in (
        ("run/pipeline", ("--class_labels", "12"), "there is no class 12: choose among 0, 1, 2"),
        ("run/pipeline", ("--class_labels", "cat"), "there is no class 'cat'"),
        ("run/pipeline", ("--conditions", "age=1"), "was trained on classes: give class_labels alone"),
        ("home/pipeline", ("--class_labels", "3"), "this pipeline is unconditional: leave out class_labels"),
    ):
        code, _, errors = run("sample", place, "--output", "c.png", *given)
        assert code == 2 and told in errors and len(errors.splitlines()) == 1
