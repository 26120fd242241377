"""The pipeline: its noise, its likelihood against closed forms, its files, and what it refuses.

`pixel_pipeline` is affine and decodes z to 0.5 + 0.05 z, so an image shows its z.
"""

import inspect
import json
import math
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from helpers import make_pipeline, perturbed
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import MultivariateNormal, Normal

import hf_vaeplus
from hf_vaeplus import (
    GaussianPosterior,
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)

SIZE, CODE_DIM, Z_DIM, U_DIM = 32, 6, 4, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_autoencoder(**options) -> VAEPlusAutoencoderModel:
    options = dict(image_size=SIZE, latent_dim=CODE_DIM, hidden_channels=(4, 8), num_blocks=1) | options
    return perturbed(VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(**options)))


def make_vae(**options) -> VAEPlusVAEModel:
    options = dict(input_shape=(CODE_DIM,), latent_dim=Z_DIM, hidden_dim=8, num_blocks=1) | options
    return perturbed(VAEPlusVAEModel(VAEPlusVAEConfig(**options)))


@pytest.fixture(scope="module")
def pipeline() -> VAEPlusPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(5, 3, SIZE, SIZE, generator=generator(2))


@pytest.fixture
def pixel_pipeline() -> VAEPlusPipeline:
    """Affine VAE of 4 x 4 grey pixels with 16 latents and a second stage whose decoder is 0."""
    vae = make_vae(network="affine", input_shape=(1, 4, 4), latent_dim=16)
    second_stage = make_vae(input_shape=(16,), latent_dim=U_DIM, gamma="fixed", gamma_init=0.25)
    with torch.no_grad():
        for parameter in second_stage.parameters():
            parameter.zero_()
        vae.decoder.weight.copy_(0.05 * torch.eye(16))
        vae.decoder.bias.fill_(0.5)
    return VAEPlusPipeline(vae=vae, second_stage=second_stage)


def sampled(pipe, num_images=4, **options):
    options = dict(generator=generator(), output_type="pt") | options
    return pipe(num_images, **options).images


# ------------------------------------------------------------------------------------------------------------ sampling


def test_sampling_is_the_composition_of_the_stages(pipeline):
    source = generator()
    u, eps = torch.randn(4, U_DIM, generator=source), torch.randn(4, Z_DIM, generator=source)
    with torch.no_grad():
        z = pipeline.second_stage.decode(u) + math.sqrt(0.1) * eps
        expected = pipeline.autoencoder.decode(pipeline.vae.decode(z)).clamp(0, 1)
    torch.testing.assert_close(sampled(pipeline), expected)
    centre = pipeline.decode(pipeline.second_stage.decode(torch.zeros(1, U_DIM)).detach(), "pt")
    for seed in (0, 1):
        assert torch.equal(sampled(pipeline, 1, generator=generator(seed), temperature=0), centre)


def test_a_second_stage_of_matched_moments_samples_by_its_map(tmp_path):
    pipe, source = make_pipeline(), generator()
    pipe.second_stage.match_moments(torch.ones(Z_DIM), torch.eye(Z_DIM) + 0.5, generator(1), num_samples=100)
    u, eps = torch.randn(4, U_DIM, generator=source), torch.randn(4, Z_DIM, generator=source)
    expected = pipe.decode(pipe.second_stage.sample(u, eps).detach(), "pt")
    assert torch.equal(sampled(pipe), expected)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(sampled(VAEPlusPipeline.from_pretrained(tmp_path)), expected)


def test_sharpness_is_applied_before_the_clipping_and_zero_changes_nothing(images, tmp_path):
    pipe, plain = make_pipeline(), make_pipeline()
    pipe.autoencoder.match_spectrum([images])
    assert torch.equal(sampled(pipe), sampled(plain))
    with torch.no_grad():
        z = pipe.encode(images).mean
        decoded = pipe.autoencoder.decode(pipe.vae.decode(z))
        expected = pipe.autoencoder.sharpen(decoded, 0.5).clamp(0, 1)
    assert not torch.allclose(expected, decoded.clamp(0, 1), atol=0.01)
    torch.testing.assert_close(pipe.reconstruct(images, "pt", sharpness=0.5), expected)
    torch.testing.assert_close(pipe.decode(z, "pt", sharpness=0.5), expected)
    assert not torch.equal(sampled(pipe, sharpness=1), sampled(pipe))
    pipe.save_pretrained(tmp_path)
    loaded = VAEPlusPipeline.from_pretrained(tmp_path)
    assert torch.equal(sampled(loaded, sharpness=1.0), sampled(pipe, sharpness=1))


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1"])
def test_bad_sharpness(pipeline, images, value):
    for call in (sampled, lambda pipe, **options: pipe.reconstruct(images, **options)):
        with pytest.raises(ValueError, match="sharpness must be a finite number of at least 0, got"):
            call(pipeline, sharpness=value)
        with pytest.raises(ValueError, match="sharpness=1 needs an autoencoder whose match_spectrum was called"):
            call(pipeline, sharpness=1)


@pytest.mark.parametrize("autoencoder", [True, False])
@pytest.mark.parametrize("second_stage", [True, False])
def test_every_combination_of_components(autoencoder, second_stage, images, tmp_path):
    pipe = make_pipeline(autoencoder, second_stage)
    assert sampled(pipe).shape == (4, 3, SIZE, SIZE)
    assert pipe.reconstruct(images, "np").shape == (5, SIZE, SIZE, 3)
    assert pipe.log_likelihood(images, 2).shape == (5,)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["hf_vaeplus", "VAEPlusVAEModel"]
    assert index["autoencoder"] == (["hf_vaeplus", "VAEPlusAutoencoderModel"] if autoencoder else [None, None])
    assert index["second_stage"] == (["hf_vaeplus", "VAEPlusVAEModel"] if second_stage else [None, None])
    for loader in (VAEPlusPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is VAEPlusPipeline
        assert (loaded.autoencoder is not None, loaded.second_stage is not None) == (autoencoder, second_stage)
        assert torch.equal(sampled(loaded), sampled(pipe))


@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_a_vae_of_grey_pixels(network):
    vae = make_vae(input_shape=(1, 28, 28), network=network, hidden_channels=(4,))
    pipe = VAEPlusPipeline(vae=vae)
    grey = pipe(num_images=2).images
    assert [(image.mode, image.size) for image in grey] == [("L", (28, 28))] * 2
    assert pipe.encode(grey).mean.shape == (2, Z_DIM)
    assert pipe.log_likelihood(grey[0], num_importance_samples=2).isfinite().all()


def test_output_types_agree(pipeline):
    tensors, arrays, pictures = (sampled(pipeline, output_type=output_type) for output_type in ("pt", "np", "pil"))
    assert tensors.dtype == torch.float32 and arrays.dtype == np.float32
    assert 0 <= tensors.min() < tensors.max() <= 1
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1))
    for picture, array in zip(pictures, arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.uint8(np.round(255 * array)))
    assert torch.equal(pipeline(4, generator=generator(), output_type="pt", return_dict=False)[0], tensors)


def test_a_sample_depends_neither_on_the_batch_size_nor_on_other_samples(pipeline, monkeypatch):
    pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        sampled(pipeline, decode_batch_size=1), sampled(pipeline, decode_batch_size=3), rtol=0, atol=1e-5
    )

    decoded, decode = [], pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, *given: decoded.append(z) or decode(z))
    monkeypatch.setattr(pipeline.second_stage, "decode", lambda u, *given: torch.cat([u, u[:, :1]], dim=1))  # shows u
    together = sampled(pipeline, generator=[generator(seed) for seed in range(4)])
    for seed in range(4):
        alone = sampled(pipeline, 1, generator=[generator(seed)])
        torch.testing.assert_close(alone[0], together[seed], rtol=0, atol=1e-5)
    assert torch.equal(torch.cat(decoded[1:]), decoded[0])


def test_the_second_stage_adds_noise_of_its_variance(pixel_pipeline):
    def latents(**options):
        return (sampled(pixel_pipeline, 20_000, decode_batch_size=20_000, **options).flatten(1) - 0.5) / 0.05

    assert abs(latents().var() - 0.25) < 0.003  # five standard errors: 0.25 sqrt(2 / 320,000)
    assert abs(latents(temperature=0.5).var() - 0.0625) < 0.001
    assert abs(latents().mean()) < 0.005
    assert latents(temperature=0).abs().max() < 1e-5


def test_latents_take_the_place_of_the_first_noise(pipeline):
    u = torch.randn(4, U_DIM, generator=generator())
    assert len(pipeline(latents=u).images) == 4
    bare = VAEPlusPipeline(vae=pipeline.vae, autoencoder=pipeline.autoencoder)
    z = torch.randn(4, Z_DIM, generator=generator())
    assert torch.equal(sampled(bare, latents=z), sampled(bare))
    torch.testing.assert_close(sampled(bare, latents=z), bare.decode(z, "pt"))
    torch.testing.assert_close(sampled(bare, latents=z, temperature=0.5), bare.decode(0.5 * z, "pt"))


def test_the_progress_bar_shows_only_for_several_batches(pipeline, capfd):
    pipeline.set_progress_bar_config(disable=False)
    sampled(pipeline, 2)
    assert capfd.readouterr().err == ""
    sampled(pipeline, 2, decode_batch_size=1)
    assert "2/2" in capfd.readouterr().err
    pipeline.set_progress_bar_config(disable=True)


def test_a_batch_is_what_diffusers_means_by_it(pipeline):
    assert len(pipeline(batch_size=4).images) == len(pipeline(num_images=4, batch_size=4).images) == 4
    assert torch.equal(pipeline(batch_size=4, generator=generator(), output_type="pt").images, sampled(pipeline))


def test_numbers_of_numpy_and_tuples_are_taken(pipeline, images):
    options = dict(temperature=np.float32(0.5), sharpness=np.float64(0), decode_batch_size=np.int32(3))
    assert torch.equal(
        sampled(pipeline, np.int64(4), **options), sampled(pipeline, 4, temperature=0.5, decode_batch_size=3)
    )
    generators = [tuple(generator(seed) for seed in range(4)), [generator(seed) for seed in range(4)]]
    assert torch.equal(*(sampled(pipeline, generator=each) for each in generators))
    pictures = pipeline.reconstruct(images)
    assert torch.equal(pipeline.encode(tuple(pictures), np.int64(2)).mean, pipeline.encode(pictures, 2).mean)
    assert len(pipeline.interpolate(images, images, np.int64(3))[0]) == 3
    pairs = [tuple(generator(seed) for seed in range(5)), [generator(seed) for seed in range(5)]]
    estimates = [pipeline.log_likelihood(images, np.int64(2), each, np.int64(4)) for each in pairs]
    assert torch.equal(*estimates)


def test_every_method_gives_pictures_unless_asked_for_something_else(pipeline, images):
    z = pipeline.encode(images).mean
    for found in (pipeline(5).images, pipeline.decode(z), pipeline.reconstruct(images), pipeline.restore(images)):
        assert len(found) == 5 and all(isinstance(each, Image.Image) for each in found)
    assert isinstance(pipeline.interpolate(images, images)[0][0], Image.Image)
    signatures = [inspect.signature(each) for _, each in inspect.getmembers(VAEPlusPipeline, inspect.isfunction)]
    defaults = [each.parameters["output_type"].default for each in signatures if "output_type" in each.parameters]
    assert defaults == 5 * ["pil"]


def test_the_methods_say_what_they_return():
    for name in ("__call__", "encode", "decode", "reconstruct", "interpolate", "log_likelihood", "compile"):
        assert "return" in typing.get_type_hints(getattr(VAEPlusPipeline, name)), name
    returned = typing.get_type_hints(VAEPlusPipeline.encode)["return"]
    members = [name for name in vars(returned) if not name.startswith("_")]
    assert {"sample", "mode", "kl", "log_prob"} <= set(members)
    for name in members:
        assert inspect.signature(getattr(returned, name)) == inspect.signature(getattr(GaussianPosterior, name))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_compile_builds_graphs_of_what_the_methods_call(images, tmp_path):
    pipe, graphs = make_pipeline(), []
    expected = sampled(pipe), pipe.encode(images).mean, pipe.reconstruct(images, "pt")
    pipe.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    found = [sampled(pipe)]
    assert len(graphs) == 3  # second_stage.sample, vae.decode and autoencoder.decode
    found.append(pipe.encode(images).mean)
    assert len(graphs) == 5
    found.append(pipe.reconstruct(images, "pt"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(sampled(VAEPlusPipeline.from_pretrained(tmp_path)), expected[0])


# --------------------------------------------------------------------------------------------- encoding and decoding


def test_reconstruct_is_the_composition_of_the_stages(pipeline, images):
    with torch.no_grad():
        posterior = pipeline.vae.encode(pipeline.autoencoder.encode(images))
        expected = pipeline.autoencoder.decode(pipeline.vae.decode(posterior.mode())).clamp(0, 1)
    encoded = pipeline.encode(images, batch_size=2)
    assert isinstance(encoded, GaussianPosterior)
    torch.testing.assert_close(encoded.mean, posterior.mean)
    torch.testing.assert_close(encoded.logvar, posterior.logvar)
    torch.testing.assert_close(pipeline.reconstruct(images, "pt", decode_batch_size=2), expected)


def test_all_forms_of_an_image_are_the_same_image(pipeline, images):
    integers = (255 * images).round().to(torch.uint8)
    floats = integers / 255
    arrays = integers.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    expected = pipeline.encode(integers).mean
    for form in (floats, floats.double(), arrays, floats.permute(0, 2, 3, 1).numpy(), pictures):
        torch.testing.assert_close(pipeline.encode(form).mean, expected)
    for form in (integers[0], arrays[0], floats[0], pictures[0], arrays[0][:, ::-1][:, ::-1]):
        torch.testing.assert_close(pipeline.encode(form).mean, expected[:1])


def test_interpolation_ends_and_turns_evenly(pipeline, images):
    a, b = images[:2], images[2:4]
    way = pipeline.interpolate(a, b, steps=5, output_type="pt")
    assert way.shape == (2, 5, 3, SIZE, SIZE)
    torch.testing.assert_close(way[:, 0], pipeline.reconstruct(a, "pt"), rtol=0, atol=1e-5)
    torch.testing.assert_close(way[:, -1], pipeline.reconstruct(b, "pt"), rtol=0, atol=1e-5)
    pictures = pipeline.interpolate(a, b, steps=5)
    assert [len(row) for row in pictures] == [5, 5]
    np.testing.assert_array_equal(np.asarray(pictures[1][0]), np.asarray(pipeline.reconstruct(a)[1]))


def test_the_way_of_an_interpolation(pixel_pipeline):
    """With z = 20 (x - 0.5) both ways, the images show the way: equal angles, lengths in equal steps."""
    vae = pixel_pipeline.vae
    with torch.no_grad():
        vae.encoder.weight.copy_(20 * torch.eye(16))
        vae.encoder.bias.fill_(-10)
    z = torch.zeros(5, 16)
    z[0, 0], z[1, 1], z[2, 0], z[3, 0] = 3, 6, 8, -4  # a right angle; parallel; opposite; the origin

    def way(a, b):
        a, b = pixel_pipeline.decode(a[None], "pt"), pixel_pipeline.decode(b[None], "pt")
        return 20 * (pixel_pipeline.interpolate(a, b, steps=4, output_type="pt")[0].flatten(1) - 0.5)

    turn = torch.linspace(0, torch.pi / 2, 4)
    expected = torch.linspace(3, 6, 4)[:, None] * torch.stack([turn.cos(), turn.sin()], 1)
    torch.testing.assert_close(way(z[0], z[1])[:, :2], expected, rtol=0, atol=1e-4)
    for end in (z[2], z[3], z[4]):
        straight = torch.linspace(0, 1, 4)[:, None] * (end - z[0]) + z[0]
        torch.testing.assert_close(way(z[0], end), straight, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- log-likelihood


@pytest.fixture
def probabilistic_pca():
    """Affine pixel VAE x = W z + b + noise with orthogonal columns in W, so that the exact posterior is diagonal.

    Posterior N(M^-1 W^T (x - b), gamma M^-1) with M = W^T W + gamma I (Tipping and Bishop 1999, Eq. 7).
    """
    gamma, scales = 0.05, torch.tensor([0.5, 0.3, 0.1])
    vae = make_vae(network="affine", input_shape=(1, 4, 4), latent_dim=3, gamma="fixed", gamma_init=gamma)
    basis = torch.linalg.qr(torch.randn(16, 3, generator=generator())).Q * scales
    offset = torch.rand(16, generator=generator(1))
    m = scales.square() + gamma
    with torch.no_grad():
        vae.decoder.weight.copy_(basis)
        vae.decoder.bias.copy_(offset)
        vae.encoder.weight.copy_(basis.T / m[:, None])
        vae.encoder.bias.copy_(-(basis.T @ offset) / m)
        vae.logvar.copy_((gamma / m).log())
    covariance = basis @ basis.T + gamma * torch.eye(16)
    return VAEPlusPipeline(vae=vae), MultivariateNormal(offset.double(), covariance.double())


@pytest.mark.parametrize("num_importance_samples", [1, 7])
def test_log_likelihood_is_exact_with_the_exact_posterior(probabilistic_pca, num_importance_samples):
    pipe, density = probabilistic_pca
    x = torch.rand(9, 1, 4, 4, generator=generator(3))
    estimate = pipe.log_likelihood(x, num_importance_samples)
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate.double(), density.log_prob(x.flatten(1).double()), rtol=0, atol=1e-4)


def test_log_likelihood_approaches_from_below(probabilistic_pca):
    pipe, density = probabilistic_pca
    with torch.no_grad():
        pipe.vae.logvar += 0.7
        pipe.vae.encoder.bias += 0.3
    x = torch.rand(1, 1, 4, 4, generator=generator(3))
    exact = density.log_prob(x.flatten(1).double()).item()
    copies = x.expand(400, 1, 4, 4)
    bounds = [
        pipe.log_likelihood(copies, k, generator(k), decode_batch_size=4096).mean().item() for k in (1, 4, 32, 512)
    ]
    assert bounds == sorted(bounds)
    assert bounds[0] < exact - 0.1
    assert abs(bounds[-1] - exact) < 0.01


def test_log_likelihood_through_the_autoencoder(pipeline, images):
    k, num_dims = 3, 3 * SIZE**2
    noise = [torch.randn(k, Z_DIM, generator=generator(seed)) for seed in range(len(images))]
    with torch.no_grad():
        posterior = pipeline.vae.encode(pipeline.autoencoder.encode(images))
        log_weights = []
        for eps in torch.stack(noise, dim=1):
            z = posterior.sample(eps)
            mean = pipeline.autoencoder.decode(pipeline.vae.decode(z))
            log_p_x = Normal(mean.double(), math.sqrt(0.02)).log_prob(images.double()).flatten(1).sum(1)
            log_weights.append(log_p_x + Normal(0, 1).log_prob(z).sum(1) - posterior.log_prob(z))
    expected = torch.stack(log_weights).logsumexp(0) - math.log(k)
    generators = [generator(seed) for seed in range(len(images))]
    estimate = pipeline.log_likelihood(images, k, generators)
    torch.testing.assert_close(estimate.double(), expected, rtol=1e-6, atol=1e-3 * num_dims / 1000)
    torch.testing.assert_close(
        pipeline.log_likelihood(images, k, generator(), decode_batch_size=2),
        pipeline.log_likelihood(images, k, generator(), decode_batch_size=64),
        rtol=1e-6,
        atol=1e-3,
    )


def test_log_likelihood_needs_the_variance_of_images(images):
    pipe = make_pipeline(reconstruction_space="input")
    with pytest.raises(ValueError, match="gamma was measured on codes"):
        pipe.log_likelihood(images)


# --------------------------------------------------------------------------------------- precision and offloading


def test_bfloat16(pipeline, images, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = VAEPlusPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = VAEPlusPipeline.from_pretrained(tmp_path).to(torch.bfloat16)
    for pipe in (loaded, cast):
        assert pipe.autoencoder.dtype == pipe.vae.input_mean.dtype == torch.bfloat16
        assert pipe.vae.log_gamma.item() == pipeline.vae.log_gamma.item()
        samples = sampled(pipe)
        assert samples.dtype == torch.float32
        torch.testing.assert_close(samples, sampled(pipeline), rtol=0, atol=0.05)
        assert pipe.encode(images).mean.dtype == torch.float32
        assert pipe.log_likelihood(images, 2).dtype == torch.float32
    assert torch.equal(sampled(loaded), sampled(cast))


@pytest.mark.parametrize("matched", [False, True])
def test_a_pipeline_in_double_precision_does_all_that_one_in_single_precision_does(images, matched):
    pipe = make_pipeline()
    if matched:
        pipe.second_stage.match_moments(torch.ones(Z_DIM), torch.eye(Z_DIM) + 0.5, generator(1), num_samples=100)
        pipe.autoencoder.match_spectrum([images])

    def found():
        return [
            sampled(pipe),
            sampled(pipe, None, latents=torch.ones(2, U_DIM, dtype=torch.float64)),
            sampled(pipe, sharpness=float(matched)),
            pipe.encode(images).mean.float(),
            pipe.reconstruct(images, "pt"),
            pipe.interpolate(images[:1], images[1:2], 3, "pt"),
            pipe.log_likelihood(images, 2, generator()),
        ]

    single = found()
    pipe.to(torch.float64)
    for one, other in zip(found(), single, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_model_offload_hooks_fire(pipeline, images, monkeypatch):
    """On the CPU nothing moves, so this counts calls; that memory is freed on an accelerator is not tested."""
    expected = sampled(pipeline), pipeline.encode(images).mean
    pipe = make_pipeline()
    names = {id(component): name for name, component in pipe.components.items()}
    calls, pre_forward = [], CpuOffload.pre_forward
    monkeypatch.setattr(
        CpuOffload, "pre_forward", lambda hook, module: calls.append(names[id(module)]) or pre_forward(hook, module)
    )
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(sampled(pipe), expected[0])
    assert calls == ["second_stage", "vae", "autoencoder"]
    calls.clear()
    assert torch.equal(pipe.encode(images).mean, expected[1])
    assert calls == ["autoencoder", "vae"]
    for method in (pipe, pipe.encode, pipe.decode, pipe.log_likelihood):
        hooks = pipe._all_hooks
        method(**{pipe: {}, pipe.decode: dict(latents=torch.zeros(1, Z_DIM))}.get(method, dict(images=images)))
        assert pipe._all_hooks is not hooks  # `maybe_free_model_hooks` put the models back and hooked them anew


def test_sequential_offload(pipeline, images):
    """As `enable_sequential_cpu_offload`, which accepts no "cpu" without an index and fails with one."""
    pipe = make_pipeline()
    for component in filter(None, pipe.components.values()):
        accelerate.cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)
    assert pipe.vae.log_gamma.is_meta and pipe.vae.input_mean.is_meta
    assert torch.equal(sampled(pipe), sampled(pipeline))
    estimates = [each.log_likelihood(images, 2, generator()) for each in (pipe, pipeline)]
    assert torch.equal(*estimates)
    assert all(parameter.is_meta for parameter in pipe.vae.parameters())


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_saving_writes_safetensors_alone(saved):
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    parts = ("autoencoder", "second_stage", "vae")
    expected = {f"{part}/{name}" for part in parts for name in ("config.json", "model.safetensors")}
    assert files == expected | {"model_index.json", "config.json", "preprocessor_config.json"}


def test_an_exported_index_needs_no_trust(copy, pipeline):
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "VAEPlusPipeline"]
    for name in ("autoencoder", "vae", "second_stage"):
        index[name][0] = "modeling_vaeplus"
        (copy / name / "modeling_vaeplus.py").write_text("raise RuntimeError('code of the repository was run')")
    (copy / "pipeline.py").write_text("raise RuntimeError('code of the repository was run')")
    (copy / "model_index.json").write_text(json.dumps(index))
    assert torch.equal(sampled(VAEPlusPipeline.from_pretrained(copy)), sampled(pipeline))


def test_a_repository_is_downloaded_without_pickles(saved, pipeline, monkeypatch):
    asked = {}
    monkeypatch.setattr(VAEPlusPipeline, "download", lambda repository, **options: asked.update(options) or str(saved))
    loaded = VAEPlusPipeline.from_pretrained("somebody/faces", revision="v1")
    assert asked["use_safetensors"] is True and asked["revision"] == "v1"
    assert loaded.name_or_path == "somebody/faces"
    assert torch.equal(sampled(loaded), sampled(pipeline))


def test_components_can_be_replaced_or_dropped_on_loading(copy):
    assert VAEPlusPipeline.from_pretrained(copy, second_stage=None).second_stage is None
    vae = make_vae(reconstruction_space="image")
    assert VAEPlusPipeline.from_pretrained(copy, vae=vae).vae is vae
    with pytest.raises(TypeError, match="vae must be a VAEPlusVAEModel, got VAEPlusAutoencoderModel"):
        VAEPlusPipeline.from_pretrained(copy, vae=make_autoencoder())


def test_variants_and_shards(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "variant", variant="ema", max_shard_size="1KB")
    loaded = VAEPlusPipeline.from_pretrained(tmp_path / "variant", variant="ema")
    assert len(list((tmp_path / "variant" / "vae").glob("*.safetensors"))) > 1
    assert torch.equal(sampled(loaded), sampled(pipeline))


def change(folder, edit):
    file = folder / "vae" / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("load", [VAEPlusPipeline.from_pretrained, DiffusionPipeline.from_pretrained])
def test_incomplete_or_foreign_weights_are_refused(copy, saved, load):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            load(copy)

    change(copy, lambda weights: weights.pop("affine_skip.bias"))
    refused(r"do not belong to a VAEPlusVAEModel with its config.json: missing keys \['affine_skip.bias'\]")
    change(copy, lambda weights: weights.update({"affine_skip.bias": torch.zeros(7)}))
    refused("mismatched keys .*affine_skip.bias")
    change(copy, lambda weights: weights.update({"affine_skip.bias": torch.zeros(6), "extra": torch.zeros(2)}))
    refused(r"unexpected keys \['extra'\]")
    shutil.copy(saved / "second_stage" / "model.safetensors", copy / "vae")
    refused("belong to")
    whole = (saved / "vae" / "model.safetensors").read_bytes()
    (copy / "vae" / "model.safetensors").write_bytes(whole[:-4])
    refused("are damaged")


@pytest.mark.parametrize("load", [VAEPlusPipeline.from_pretrained, DiffusionPipeline.from_pretrained])
def test_pickled_weights_are_refused(copy, load):
    file = copy / "vae" / "model.safetensors"
    torch.save(load_file(file), copy / "vae" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load(copy)
    with pytest.raises(ValueError, match="use_safetensors=False is refused"):
        VAEPlusPipeline.from_pretrained(copy, use_safetensors=False)


def test_misspelt_options_are_refused(copy, pipeline):
    with pytest.raises(ValueError, match="unknown option 'secondstage'"):
        VAEPlusPipeline.from_pretrained(copy, secondstage=None)
    with pytest.raises(TypeError, match="num_image"):
        pipeline(num_image=3)


def test_the_files_work_without_the_package(saved, pipeline):
    """As an exported repository carries them, word for word."""
    modules = []
    for name in ("modeling_vaeplus", "pipeline_vaeplus"):
        file = Path(hf_vaeplus.__file__).with_name(f"{name}.py")
        modules.append(ModuleType(f"standalone_{name}"))
        sys.modules[modules[-1].__name__] = modules[-1]
        exec(compile(file.read_text(), name, "exec"), vars(modules[-1]))
    modeling, standalone = modules
    pipe = standalone.VAEPlusPipeline(
        vae=modeling.VAEPlusVAEModel.from_pretrained(saved / "vae"),
        autoencoder=modeling.VAEPlusAutoencoderModel.from_pretrained(saved / "autoencoder"),
        second_stage=modeling.VAEPlusVAEModel.from_pretrained(saved / "second_stage"),
    )
    assert not isinstance(pipe.vae, VAEPlusVAEModel)
    assert torch.equal(sampled(pipe), sampled(pipeline))


def test_importing_the_models_does_not_import_diffusers():
    code = "import hf_vaeplus, sys; assert 'diffusers' not in sys.modules; hf_vaeplus.VAEPlusPipeline"
    subprocess.run([sys.executable, "-c", code + "; assert 'diffusers' in sys.modules"], check=True)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_components_that_do_not_fit_are_refused():
    code_vae, autoencoder = make_vae(), make_autoencoder()
    for components, error, match in (
        (dict(vae=None), ValueError, "without a vae needs an autoencoder and a second_stage of its codes"),
        (dict(vae=autoencoder), TypeError, "vae must be a VAEPlusVAEModel, got VAEPlusAutoencoderModel"),
        (dict(vae=code_vae, autoencoder=code_vae), TypeError, "autoencoder must be a VAEPlusAutoencoderModel"),
        (dict(vae=code_vae, autoencoder=torch.nn.Linear(1, 1)), TypeError, "got Linear"),
        (dict(vae=code_vae, autoencoder=make_autoencoder(latent_dim=9)), ValueError, "codes have 9 numbers"),
        (dict(vae=code_vae), ValueError, r"must be \(channels, size, size\).*got \(6,\)"),
        (dict(vae=make_vae(input_shape=(1, 4, 5))), ValueError, r"got \(1, 4, 5\)"),
        (dict(vae=make_vae(input_shape=(2, 4, 4))), ValueError, r"got \(2, 4, 4\)"),
        (dict(vae=make_vae(reconstruction_space="image")), ValueError, "pass that one"),
        (dict(vae=code_vae, autoencoder=autoencoder, second_stage=code_vae), ValueError, "has 4 latent dimensions"),
        (
            dict(
                vae=code_vae,
                autoencoder=autoencoder,
                second_stage=make_vae(input_shape=(Z_DIM,), reconstruction_space="image"),
            ),
            ValueError,
            "must be a variance of z",
        ),
    ):
        with pytest.raises(error, match=match):
            VAEPlusPipeline(**components)


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(num_images=0), ValueError, "num_images must be an integer of at least 1, got 0"),
        (dict(num_images=2.5), ValueError, "got 2.5"),
        (dict(batch_size=0), ValueError, "batch_size must be an integer"),
        (dict(num_images=4, batch_size=3), ValueError, "num_images=4 contradicts batch_size=3: .* leave one out"),
        (dict(batch_size=2, latents=torch.zeros(3, U_DIM)), ValueError, "num_images=2 contradicts 3 latents"),
        (dict(decode_batch_size=0), ValueError, "decode_batch_size must be an integer"),
        (dict(temperature=-1), ValueError, "temperature must be a finite number"),
        (dict(temperature=math.nan), ValueError, "temperature must be a finite number"),
        (dict(output_type="pill"), ValueError, "'pil', 'np' or 'pt', got 'pill'"),
        (dict(num_images=3, generator=[generator()] * 2), ValueError, "one per image, got 2 for 3"),
        (dict(generator=[]), ValueError, "one per image, got 0 for 1"),
        (dict(generator=[None]), TypeError, "must be a torch.Generator or a list of them, got NoneType"),
        (dict(generator=3), TypeError, "got int"),
        (dict(num_images=2, latents=torch.zeros(3, U_DIM)), ValueError, "num_images=2 contradicts 3 latents"),
        (dict(latents=torch.zeros(3, U_DIM + 1)), ValueError, r"shape \(n, 3\).*got torch.float32 of shape \(3, 4\)"),
        (dict(latents=torch.zeros(U_DIM)), ValueError, r"of shape \(3,\)"),
        (dict(latents=torch.zeros(0, U_DIM)), ValueError, "n of at least 1"),
        (dict(latents=torch.zeros(2, U_DIM, dtype=torch.int64)), ValueError, "got torch.int64"),
        (dict(latents=torch.full((2, U_DIM), math.nan)), ValueError, "must be finite"),
        (dict(latents=np.zeros((2, U_DIM))), TypeError, "must be a torch tensor, got ndarray"),
    ],
)
def test_sampling_refuses(pipeline, options, error, match):
    with pytest.raises(error, match=match):
        pipeline(**options)


def grey(size=(SIZE, SIZE), mode="L"):
    return Image.new(mode, size)


@pytest.mark.parametrize(
    "wrong, error, match",
    [
        ([], ValueError, "empty list"),
        (torch.rand(0, 3, SIZE, SIZE), ValueError, "n of at least 1"),
        (torch.rand(1, SIZE, SIZE, 3), ValueError, r"torch \(C, H, W\).* 1, 3 or 4 channels, got shape \(32, 32, 3\)"),
        (np.zeros((3, SIZE, SIZE)), ValueError, r"numpy \(H, W, C\)"),
        (torch.rand(1, 3, SIZE, SIZE) + 1, ValueError, r"must lie in \[0, 1\]"),
        (torch.rand(1, 3, SIZE, SIZE) - 1, ValueError, r"must lie in \[0, 1\]"),
        (torch.rand(3, 50, 60) + 1, ValueError, r"must lie in \[0, 1\]"),
        (torch.full((1, 3, SIZE, SIZE), math.nan), ValueError, "without NaN, got nan"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.int64), ValueError, "got torch.int64"),
        (np.zeros((1, SIZE, SIZE, 3), dtype=bool), ValueError, "got torch.bool"),
        (grey(mode="I;16"), ValueError, "image 0 has pixel type I;16, expected 8 bits"),
        ([grey(), "face.png"], ValueError, "face.png is not a readable picture"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_images_refused(pipeline, wrong, error, match):
    for method in (pipeline.encode, pipeline.reconstruct, pipeline.log_likelihood, pipeline.score):
        with pytest.raises(error, match=match):
            method(wrong)
    with pytest.raises(error, match=match):
        pipeline.interpolate(torch.rand(1, 3, SIZE, SIZE), wrong)


@pytest.mark.parametrize(
    "wrong, error, match",
    [
        (torch.rand(1, 3, SIZE, SIZE + 1), ValueError, "leave preprocess at True"),
        (torch.rand(SIZE, SIZE), ValueError, r"got \(32, 32\)"),
        (grey(), ValueError, r"mode 'RGB'.*got 'L' and \(32, 32\): leave preprocess at True"),
        (grey((40, SIZE), "RGB"), ValueError, r"size \(32, 32\), got 'RGB' and \(40, 32\)"),
        ([grey(mode="RGB"), np.zeros((SIZE, SIZE, 3))], TypeError, "a list of images must hold PIL images"),
        ("face.png", TypeError, "must be PIL images, a numpy array or a torch tensor, got str"),
    ],
)
def test_without_preprocessing_only_exact_images_are_taken(pipeline, wrong, error, match):
    for method in (pipeline.encode, pipeline.reconstruct, pipeline.log_likelihood, pipeline.score):
        with pytest.raises(error, match=match):
            method(wrong, preprocess=False)
    with pytest.raises(error, match=match):
        pipeline.interpolate(torch.rand(1, 3, SIZE, SIZE), wrong, preprocess=False)


def test_other_arguments_refused(pipeline, images):
    for call, match in (
        (lambda: pipeline.interpolate(images, images[:2]), "as many images in b as in a, got 5 and 2"),
        (lambda: pipeline.interpolate(images, images, steps=1), "steps must be an integer of at least 2"),
        (lambda: pipeline.decode(torch.zeros(2, U_DIM)), r"floats of shape \(n, 4\)"),
        (lambda: pipeline.log_likelihood(images, 0), "num_importance_samples must be an integer"),
        (lambda: pipeline.log_likelihood(images, 2, [generator()]), "got 1 for 5 images"),
        (lambda: pipeline.encode(images, batch_size=True), "batch_size must be an integer"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
