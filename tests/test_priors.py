"""Second stages with a density: exactness, inverses, samples that follow the density, and the phases of one run."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL_PRIOR, Killed, contents, make_pipeline, make_prior, perturbed, run, with_prior
from scipy.stats import kstest
from sklearn.mixture import GaussianMixture
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from hf_vaeplus import (
    VAEPlusCouplingFlowConfig,
    VAEPlusCouplingFlowModel,
    VAEPlusFlowMatchingConfig,
    VAEPlusFlowMatchingModel,
    VAEPlusMixtureConfig,
    VAEPlusMixtureModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.metrics.latents import PosteriorStatistics
from hf_vaeplus.training import stages
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import StageOptions, goes_on, read_record
from hf_vaeplus.training.stages import run_stage

KINDS = ["flow_matching", "coupling_flow", "mixture"]


def ode_or_not(kind: str) -> dict:
    """Options of `sample` by which samples follow the density."""
    return {"num_inference_steps": 64} if kind == "flow_matching" else {}


# ------------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("kind", KINDS)
def test_a_density_integrates_to_one_and_is_that_of_the_samples(kind):
    """On a grid in two dimensions: the integral is 1 to 1e-3, and the moments are those of 20,000 samples."""
    model = make_prior(kind).double()
    if kind == "flow_matching":
        model.config.num_inference_steps = 24
        model.teacher.exit.weight *= 0.5
    line = torch.linspace(-7, 7, 101 if kind != "flow_matching" else 57, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    density = model.log_prob(grid).exp() * float(line[1] - line[0]) ** 2
    assert float(density.sum()) == pytest.approx(1, abs=1e-3)
    mean = density @ grid
    covariance = (grid - mean).T @ (density[:, None] * (grid - mean))
    u, noise = torch.randn(2, 20_000, 2, dtype=torch.float64)
    z = model.sample(u, noise, **ode_or_not(kind))
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cov(z.T), covariance, rtol=0.06, atol=0.06)
    # Along a slanted line as well: the distribution function of samples is that of the density.
    projected, order = (grid @ torch.tensor([0.8, -0.6], dtype=torch.float64)).sort()
    distribution = density[order].cumsum(0)
    found = torch.searchsorted(projected, z[:2000] @ torch.tensor([0.8, -0.6], dtype=torch.float64))
    assert kstest(distribution[found.clamp(max=len(grid) - 1)].numpy(), "uniform").pvalue > 1e-3


def test_a_flow_learns_tails_that_are_longer_than_those_of_noise():
    """Each z is N(0, s^2 I) in 8 dimensions, s = 0.6 or 2: the kurtosis of a coordinate is 8.4, and of noise 3."""
    torch.manual_seed(0)
    config = VAEPlusFlowMatchingConfig(latent_dim=8, hidden_dim=64, num_blocks=2, distillation_steps=0)
    model = VAEPlusFlowMatchingModel(config)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        z = torch.where(torch.rand(256, 1) < 0.8, 0.6, 2.0) * torch.randn(256, 8)
        optimizer.zero_grad()
        model(z / 1.043, noise=torch.randn(256, 8)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = model.sample(torch.randn(5000, 8), num_inference_steps=16)
    assert 7.5 < float((drawn / drawn.std(0)).pow(4).mean()) < 9


@pytest.mark.parametrize("active", [None, [0, 2, 3]])
def test_the_one_pass_gets_the_moments_of_the_data(active):
    model = make_prior("flow_matching", 5, active_dims=active)
    u = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(1))
    rows = active or list(range(5))
    before, ode = model.sample(u), model.sample(u[:50], num_inference_steps=4)
    variances = model.match_moments(torch.Generator().manual_seed(0))
    assert not torch.allclose(torch.cov(before[:, rows].T), model.input_root @ model.input_root.T, atol=0.1)
    z = model.sample(u)
    torch.testing.assert_close(z[:, rows].mean(0), model.input_mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(z[:, rows].T), model.input_root @ model.input_root.T, rtol=0, atol=0.05)
    # The smallest change: of the moments of the one pass before, in whitened space.
    y = model.whitened(before)
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(y.T).double()), variances, rtol=0.05, atol=0.02)
    assert torch.equal(model.sample(u[:50], num_inference_steps=4), ode)
    torch.testing.assert_close(model.bfloat16().sample(u[:50]), z[:50], rtol=0.05, atol=0.1)
    with pytest.raises(ValueError, match="match_moments needs a distilled model"):
        make_prior("flow_matching", 5, distillation_steps=0).match_moments(torch.Generator())


def test_a_mixture_is_that_of_torch_distributions():
    model = make_prior("mixture", 5).double()
    root, mean = model.input_root, model.input_mean
    components = MultivariateNormal(model.means @ root.T + mean, scale_tril=root @ model.factors)
    expected = MixtureSameFamily(Categorical(logits=model.log_weights), components)
    z = expected.sample((50,))
    torch.testing.assert_close(model.log_prob(z), expected.log_prob(z))
    drawn = model.sample(*torch.randn(2, 20_000, 5, dtype=torch.float64))
    torch.testing.assert_close(drawn.mean(0), expected.mean, rtol=0, atol=0.05)


def test_an_affine_velocity_gives_the_gaussian_of_its_ode():
    """v(y, t) = y a + b carries N(0, I) to N(b (e^a - 1) / a, e^2a I)."""
    model = make_prior("flow_matching", 3, distillation_steps=0).double()
    a, b = 0.7, torch.tensor([0.2, 0.0, -0.5], dtype=torch.float64)
    model.velocity = lambda y, time: a * y + b
    model.set_input_moments(torch.zeros(3), torch.eye(3))
    model.config.num_inference_steps = 200
    z = torch.randn(20, 3, dtype=torch.float64)
    expected = torch.distributions.Normal(b * math.expm1(a) / a, math.exp(a)).log_prob(z).sum(1)
    torch.testing.assert_close(model.log_prob(z), expected, rtol=0, atol=1e-4)


def test_hutchinsons_estimate_is_said_to_be_one_and_has_the_exact_mean(caplog):
    exact = make_prior("flow_matching", 6).double()
    estimate = make_prior("flow_matching", 6, max_exact_dim=5).double()
    assert exact.log_prob_is_exact and not estimate.log_prob_is_exact
    z = torch.randn(2, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = estimate.log_prob(z.repeat(1500, 1), generator).reshape(1500, 2)
    error = (found.mean(0) - exact.log_prob(z)).abs() / (found.std(0) / 1500**0.5)
    assert (error < 4).all() and (found.std(0) > 1e-3).all()


def test_the_bound_of_a_vae_is_one_and_comes_close():
    """An affine VAE of an affine Gaussian: its density is known, and its posterior is exact where it is set so."""
    torch.manual_seed(0)
    config = VAEPlusVAEConfig(input_shape=(3,), latent_dim=2, network="affine", gamma="fixed", gamma_init=0.5)
    vae = perturbed(VAEPlusVAEModel(config)).double().eval().requires_grad_(False)
    weight, bias = vae.decoder.weight, vae.decoder.bias
    precision = torch.eye(2) + weight.T @ weight / 0.5
    vae.encoder.weight.copy_(torch.linalg.solve(precision, weight.T) / 0.5)
    vae.encoder.bias.copy_(-vae.encoder.weight @ bias)
    vae.logvar.copy_(0.7 - precision.diagonal().log())  # wider than the exact posterior
    covariance = weight @ weight.T + 0.5 * torch.eye(3)
    z = torch.randn(5, 3, dtype=torch.float64)
    expected = MultivariateNormal(bias, covariance).log_prob(z)
    bounds = [vae.log_prob_bound(z, torch.randn(k, 5, 2, dtype=torch.float64)) for k in (1, 20_000)]
    torch.testing.assert_close(bounds[1], expected, rtol=0, atol=0.05)
    mean_of_bounds = vae.log_prob_bound(z.repeat(2000, 1), torch.randn(1, 10_000, 2, dtype=torch.float64)).mean()
    assert mean_of_bounds < expected.mean()
    with pytest.raises(ValueError, match=r"noise must have shape \(K, 5, 2\)"):
        vae.log_prob_bound(z, torch.randn(5, 2))


def test_a_coupling_flow_is_invertible():
    model = make_prior("coupling_flow", 9, num_couplings=12, active_dims=[0, 1, 2, 3, 5, 6, 7])
    u = torch.randn(500, 9)
    z = model.sample(u)
    assert (model.to_noise(z) - u).abs().max() < 1e-4 and (z - u).abs().max() > 0.5
    assert torch.equal(model.to_noise(z)[:, [4, 8]], u[:, [4, 8]])
    model.double()  # without the rounding of z
    assert (model.to_noise(model.sample(u.double())) - u).abs().max() < 1e-10
    noise, log_determinant = model._run(y := model.whitened(z.double()))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: model._run(y[None])[0][0]))(y[:20])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_determinant[:20])


@pytest.mark.parametrize("kind", KINDS)
def test_inactive_dimensions_are_drawn_and_scored_as_normal(kind):
    model = make_prior(kind, 6, active_dims=[1, 2, 5]).double()
    alone = make_prior(kind, 3).double()
    alone.load_state_dict(model.state_dict())
    u, noise = torch.randn(2, 30, 6, dtype=torch.float64)
    z = model.sample(u, noise)
    assert torch.equal(z[:, [0, 3, 4]], u[:, [0, 3, 4]])
    torch.testing.assert_close(z[:, [1, 2, 5]], alone.sample(u[:, [1, 2, 5]], noise[:, :3]))
    rest = torch.distributions.Normal(0, 1).log_prob(z[:, [0, 3, 4]]).sum(1)
    torch.testing.assert_close(model.log_prob(z), alone.log_prob(z[:, [1, 2, 5]]) + rest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_the_same_after_saving_and_whatever_the_batch(kind, tmp_path):
    model = make_prior(kind, 5, active_dims=[0, 1, 4])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    u, noise = torch.randn(2, 8, 5)
    assert torch.equal(loaded.sample(u, noise), model.sample(u, noise))
    torch.testing.assert_close(loaded.log_prob(u)[:3], model.log_prob(u[:3]))


def test_whitening_takes_data_to_mean_0_and_covariance_1():
    model = make_prior("mixture", 4)
    z = torch.randn(500, 4) @ torch.randn(4, 4) + 3
    z[:, 3] = 7.0  # it never moves
    model.set_input_moments(z.mean(0), torch.cov(z.T))
    y = model.whitened(z).double()
    torch.testing.assert_close(y.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-2)
    torch.testing.assert_close(torch.cov(y.T)[:3, :3], torch.eye(3).double(), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda m: VAEPlusMixtureConfig(latent_dim=3, active_dims=[2, 1]), "numbers below latent_dim=3 in rising"),
        (lambda m: VAEPlusMixtureConfig(latent_dim=3, active_dims=[3]), "numbers below latent_dim=3"),
        (lambda m: VAEPlusMixtureConfig(latent_dim=3, active_dims=[]), "numbers below latent_dim=3"),
        (lambda m: VAEPlusFlowMatchingConfig(distillation_steps=-1), "must be 0 to 1000"),
        (lambda m: m.log_prob(torch.zeros(2, 4)), r"z must be floats of shape \(batch, 3\)"),
        (lambda m: m.sample(torch.zeros(2, 3)), "needs noise of the shape of the latents"),
        (lambda m: m.set_mixture(torch.ones(3), torch.zeros(3, 3), torch.eye(3).repeat(3, 1, 1)), "with sum 1"),
        (lambda m: m.set_input_moments(torch.zeros(3), torch.zeros(3, 3)), "not all of z constant"),
        (lambda m: m.set_input_moments(torch.zeros(2), torch.eye(2)), r"must have shapes \(3,\) and \(3, 3\)"),
        (lambda m: make_prior("flow_matching", distillation_steps=0).start_distillation(m), "no room for a teacher"),
    ],
)  # fmt: skip
def test_mistakes(call, match):
    with pytest.raises(Exception, match=match):
        call(make_prior("mixture", 3))


def test_without_zuko_the_error_says_how_to_install_it(monkeypatch, earlier, tmp_path):
    monkeypatch.setitem(sys.modules, "zuko.flows.coupling", None)
    monkeypatch.setattr("hf_vaeplus.training.launch.find_spec", lambda name: None)
    message = r"needs the package zuko.*pip install 'hf-vaeplus\[flows\]'"
    with pytest.raises(ImportError, match=message):
        VAEPlusCouplingFlowModel(VAEPlusCouplingFlowConfig(latent_dim=2))
    with pytest.raises(ValueError, match=message):
        run_stage(options_of(earlier, "coupling_flow", tmp_path))


# ----------------------------------------------------------------------------------------------------- the pipeline


def images_of(pipe, **options) -> torch.Tensor:
    return pipe(3, torch.Generator().manual_seed(3), output_type="pt", **options).images


def test_num_inference_steps_chooses_the_ode():
    pipe = with_prior("flow_matching")
    drawn = [images_of(pipe, **each) for each in ({}, {"num_inference_steps": 4}, {"num_inference_steps": 64})]
    assert (drawn[0] - drawn[2]).abs().max() > 1e-4  # one pass is another map
    assert (drawn[1] - drawn[2]).abs().max() < (drawn[0] - drawn[2]).abs().max()
    u, noise = torch.randn(2, 5, 4)
    model = pipe.second_stage
    assert torch.equal(model.sample(u), u_to_z(model, u)) and not torch.equal(
        model.sample(u, noise, num_inference_steps=3), u_to_z(model, u)
    )
    for other in (make_pipeline(), with_prior("mixture")):
        with pytest.raises(ValueError, match="needs a second stage by flow matching"):
            images_of(other, num_inference_steps=4)
    with pytest.raises(ValueError, match="num_inference_steps must be an integer of at least 1"):
        images_of(pipe, num_inference_steps=0)


def u_to_z(model, u):
    y = u + model.network(u, torch.full((1, 1), 0.5))
    return y @ model.input_root.T + model.input_mean


def test_a_pipeline_of_codes_samples_and_says_what_it_lacks(tmp_path):
    pipe = with_prior("flow_matching", vae=False)
    pipe.save_pretrained(tmp_path)
    again = VAEPlusPipeline.from_pretrained(tmp_path)
    assert again.vae is None and torch.equal(images_of(again), images_of(pipe))
    codes = torch.randn(2, 6)
    torch.testing.assert_close(pipe.decode(codes, "pt"), pipe.autoencoder.decode(codes).clamp(0, 1))
    images = torch.rand(2, 3, 32, 32)
    for call in (pipe.encode, pipe.reconstruct, pipe.log_likelihood, lambda images: pipe.interpolate(images, images)):
        with pytest.raises(ValueError, match="this pipeline has no first VAE, so it has no"):
            call(images)
    with pytest.raises(ValueError, match="codes have 6 numbers: use the second stage that was trained on these codes"):
        VAEPlusPipeline(autoencoder=pipe.autoencoder, second_stage=make_prior("mixture", 4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_with_a_learned_prior_is_reweighted_by_it(kind):
    pipe = with_prior(kind)
    images = torch.rand(2, 3, 32, 32)

    def weights(prior):
        return pipe.log_importance_weights(images, 7, torch.Generator().manual_seed(0), prior=prior)

    posterior = pipe.encode(images)
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(7, 4, generator=generator) for _ in range(2)], 1)
    z = posterior.sample(noise)
    normal = torch.distributions.Normal(0, 1).log_prob(z).sum(2)
    learned = pipe.second_stage.log_prob(z.flatten(0, 1)).reshape(7, 2)
    difference = weights("second_stage") - weights("standard_normal")
    torch.testing.assert_close(difference.float(), learned - normal, rtol=1e-4, atol=2e-3)
    nats = pipe.log_likelihood(images, 7, torch.Generator().manual_seed(0), prior="second_stage")
    torch.testing.assert_close(nats, (weights("second_stage").logsumexp(0) - math.log(7)).float())
    settings = dict(num_importance_samples=7, prior="second_stage", unit="bits_per_dimension")
    bits = pipe.log_likelihood(images, generator=torch.Generator().manual_seed(0), **settings)
    torch.testing.assert_close(bits, -nats / 3072 / math.log(2) + 8)


def test_the_exact_likelihood_of_an_affine_model_is_found():
    """x = W (A u + m) + b + noise: with a mixture of one Gaussian as prior, log p(x) is a Gaussian's."""
    torch.manual_seed(0)
    vae = make_pipeline(autoencoder=False, num_channels=1, network="affine", gamma="fixed", gamma_init=0.3).vae
    prior = VAEPlusMixtureModel(VAEPlusMixtureConfig(latent_dim=4, num_components=1)).eval()
    root = torch.eye(4) + 0.3 * torch.randn(4, 4)
    prior.set_input_moments(torch.tensor([0.3, 0.0, -0.2, 0.1]), root @ root.T)
    pipe = VAEPlusPipeline(vae, None, prior)
    with torch.no_grad():  # the exact posterior under N(0, I) is near enough to propose from
        weight = vae.decoder.weight.double() * vae.input_std.flatten()[0]
        precision = torch.eye(4) + weight.T @ weight / 0.3
        vae.encoder.weight.copy_(torch.linalg.solve(precision, weight.T) / 0.3)
        vae.encoder.bias.copy_(-vae.encoder.weight @ vae.decoder.bias)
        vae.logvar.copy_(-precision.diagonal().log() + 0.7)
    x = torch.rand(3, 1, 32, 32)
    moments = prior.input_root.double() @ prior.input_root.double().T, prior.input_mean.double()
    mean = weight @ moments[1] + vae.decoder.bias.double()
    covariance = weight @ moments[0] @ weight.T + 0.3 * torch.eye(1024)
    expected = MultivariateNormal(mean, covariance).log_prob(x.flatten(1).double())
    found = pipe.log_likelihood(x, 4000, torch.Generator().manual_seed(0), prior="second_stage")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.2)


def test_priors_without_an_exact_density_are_refused():
    images = torch.rand(1, 3, 32, 32)
    for pipe, found in (
        (make_pipeline(), "a VAEPlusVAEModel"),
        (make_pipeline(second_stage=False), "no second stage"),
        (with_prior("flow_matching", max_exact_dim=3), "a VAEPlusFlowMatchingModel"),
    ):
        with pytest.raises(
            ValueError, match=f"needs a second stage with an exact log_prob, and this pipeline has {found}"
        ):
            pipe.log_likelihood(images, prior="second_stage")
    with pytest.raises(ValueError, match="prior must be 'standard_normal' or 'second_stage', got 'learned'"):
        make_pipeline().log_likelihood(images, prior="learned")
    with pytest.raises(ValueError, match="unit must be 'nats' or 'bits_per_dimension', got 'bits'"):
        make_pipeline().log_likelihood(images, unit="bits")


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A folder with an autoencoder and a first VAE of digits; two latent dimensions of the latter say nothing."""
    earlier = tmp_path_factory.mktemp("priors")
    pipe = make_pipeline(second_stage=False, num_channels=1, latent_dim=6)
    with torch.no_grad():
        for row in (1, 4):
            pipe.vae.encoder[-1].weight[[row, row + 6]] = 0
            pipe.vae.encoder[-1].bias[[row, row + 6]] = 0
    pipe.autoencoder.save_pretrained(earlier / "autoencoder")
    pipe.vae.save_pretrained(earlier / "vae")
    return earlier


def options_of(earlier, kind: str, output_dir, vae: bool = True, **changes) -> StageOptions:
    tiny = dict(
        dataset_name="digits", resolution=32, num_channels=1, max_train_samples=40, cache_dir=str(earlier / "cache")
    )
    tiny |= dict(max_train_steps=8, train_batch_size=5, logging_steps=1, checkpointing_steps=3, lr_warmup_steps=2)
    model = {"num_components": 2} if kind == "mixture" else SMALL_PRIOR
    earlier = {"autoencoder": str(earlier / "autoencoder"), "vae": str(earlier / "vae") if vae else None}
    settings = dict(stage="second_stage", second_stage=kind, output_dir=str(output_dir), model=model, use_ema=True)
    return StageOptions(**tiny | earlier | settings | changes)


def test_active_dimensions_are_those_with_a_kl(earlier, tmp_path):
    stage = stages.build_stage(options_of(earlier, "flow_matching", tmp_path))
    mean, logvar = stage.dataset.tensors["posterior"].chunk(2, dim=1)
    statistics = PosteriorStatistics(6)
    statistics.update(mean, logvar)
    assert stage.model.config.active_dims == (0, 2, 3, 5)
    assert statistics.kl_per_dimension()[[1, 4]].max() < 0.01 < statistics.kl_per_dimension()[[0, 2, 3, 5]].min()
    assert (
        stages.build_stage(options_of(earlier, "mixture", tmp_path, active_threshold=0)).model.config.num_active == 6
    )
    with pytest.raises(ValueError, match="has a KL of 1000.0 nats: this VAE has collapsed"):
        stages.build_stage(options_of(earlier, "mixture", tmp_path, active_threshold=1000.0))


@pytest.mark.parametrize("killed_at", [4, 6, 7])
def test_a_flow_matching_run_goes_on_bit_for_bit_across_its_phases(earlier, tmp_path, killed_at):
    """Steps 0 to 5 fit the velocity, 6 and 7 distil it; checkpoints at 3, 6 (before the turn) and 8."""
    whole = run_stage(options_of(earlier, "flow_matching", tmp_path / "whole"))
    assert whole.distilled
    options = options_of(earlier, "flow_matching", tmp_path / "run")
    stage, seen = stages.build_stage(options), []
    prepare = stage.prepare

    def stopped(batch, noise, step):
        if step == killed_at:
            raise Killed
        return prepare(batch, noise, step)

    stage.prepare = stopped
    with pytest.raises(Killed):
        train(stage, options)
    stage = stages.build_stage(options)
    stage.prepare = lambda batch, noise, step: seen.append(step) or prepare(batch, noise, step)
    train(stage, options_of(earlier, "flow_matching", tmp_path / "run", resume_from_checkpoint="latest"))
    assert seen == list(range(3 if killed_at == 4 else 6, 8))
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_the_teacher_is_the_average_at_the_turn_and_stays(earlier, tmp_path):
    short = run_stage(options_of(earlier, "flow_matching", tmp_path / "a", distillation_share=0.0, max_train_steps=8))
    assert short.teacher is None and not short.distilled
    assert run_stage(options_of(earlier, "flow_matching", tmp_path / "c", max_train_steps=2)).distilled
    stage = stages.build_stage(options_of(earlier, "flow_matching", tmp_path / "b"))
    first_step, turn = stage.turn
    taught = []
    stage.turn = (
        first_step,
        lambda model, trained: (
            taught.append({name: value.clone() for name, value in trained.network.state_dict().items()})
            or turn(model, trained)
        ),
    )
    model = train(stage, options_of(earlier, "flow_matching", tmp_path / "b"))
    assert first_step == 6
    for name, value in taught[0].items():
        assert torch.equal(model.teacher.state_dict()[name], value)
    assert any(not torch.equal(model.network.state_dict()[name], value) for name, value in taught[0].items())


def test_one_pass_learns_the_end_of_the_ode(earlier):
    """The loss of the distillation is the distance of one pass to the ODE; its gradient leaves the teacher alone."""
    model = make_prior("flow_matching", 4, distillation_steps=8).requires_grad_(True)
    model.teacher.requires_grad_(False)
    noise = torch.randn(64, 4)
    optimizer = torch.optim.Adam(model.network.parameters(), 1e-2)
    before = model(noise=noise).loss.item()
    for _ in range(100):
        loss = model(noise=torch.randn(64, 4)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = model.whitened(model.sample(noise)) - model.whitened(model.sample(noise, num_inference_steps=8))
    assert model(noise=noise).loss.item() == pytest.approx(float(error.square().sum(1).mean()), rel=1e-3)
    assert float(error.square().sum(1).mean()) < 0.1 * before
    assert all(each.grad is None for each in model.teacher.parameters())


def test_flow_matching_finds_a_gaussian():
    """Trained on N(m, C), whitened by other moments: moments of its samples, and the density in closed form."""
    model = make_prior("flow_matching", 2, distillation_steps=0).requires_grad_(True)
    model.set_input_moments(torch.zeros(2), torch.eye(2))
    target = MultivariateNormal(torch.tensor([1.0, -0.5]), torch.tensor([[0.5, 0.3], [0.3, 0.6]]))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        loss = model(target.sample((256,)), noise=torch.randn(256, 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        z = target.sample((1000,))
        assert float((target.log_prob(z) - model.log_prob(z)).mean()) == pytest.approx(0, abs=0.03)
        drawn = model.sample(torch.randn(20_000, 2))
    torch.testing.assert_close(drawn.mean(0), target.mean, rtol=0, atol=0.08)
    torch.testing.assert_close(torch.cov(drawn.T), target.covariance_matrix, rtol=0, atol=0.08)


def test_a_coupling_flow_is_trained_by_the_loop(earlier, tmp_path):
    pytest.importorskip("zuko", reason="zuko is not installed: pip install 'hf-vaeplus[flows]'")
    model = run_stage(options_of(earlier, "coupling_flow", tmp_path, max_train_steps=30, learning_rate=1e-2))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert type(VAEPlusCouplingFlowModel.from_pretrained(tmp_path)) is type(model)


def test_a_mixture_is_scikit_learns_and_is_fitted_once(earlier, tmp_path, monkeypatch):
    options = options_of(earlier, "mixture", tmp_path / "run")
    fits = []
    fit = stages._fit
    monkeypatch.setattr(stages, "_fit", lambda model, stage, options: fits.append(stage) or fit(model, stage, options))
    model = run_stage(options)
    before = contents(tmp_path / "run")
    assert torch.equal(run_stage(options).means, model.means) and len(fits) == 1
    assert contents(tmp_path / "run") == before
    record = json.loads((tmp_path / "run" / "training_options.json").read_text())
    assert record["max_train_steps"] == 0 and record["second_stage"] == "mixture" and "vae" in record["made_from"]
    mean, logvar = fits[0].dataset.tensors["posterior"].chunk(2, dim=1)
    torch.manual_seed(0)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape)
    y = model.whitened(z).double()
    theirs = GaussianMixture(2, covariance_type="full", means_init=model.means.double().numpy())
    theirs.weights_, theirs.means_ = model.log_weights.exp().double().numpy(), model.means.double().numpy()
    covariances = (model.factors @ model.factors.mT).double()
    theirs.precisions_cholesky_ = torch.linalg.inv(torch.linalg.cholesky(covariances)).mT.numpy()
    ours = model.log_prob(z) + model.input_root.diagonal().log().sum()
    ours = ours - torch.distributions.Normal(0, 1).log_prob(z[:, [1, 4]]).sum(1)
    torch.testing.assert_close(ours.double(), torch.from_numpy(theirs.score_samples(y.numpy())), rtol=0, atol=1e-3)
    assert (torch.linalg.eigvalsh(covariances) > 0).all()
    with pytest.raises(ValueError, match="other options .seed 0 -> 1"):
        run_stage(options_of(earlier, "mixture", tmp_path / "run", seed=1))
    with pytest.raises(ValueError, match="a mixture of 30 Gaussians needs at least twice as many images, got 40"):
        run_stage(options_of(earlier, "mixture", tmp_path / "many", model={"num_components": 30}))


@pytest.mark.parametrize("kind", ["flow_matching", "mixture"])
def test_a_second_stage_of_codes(earlier, tmp_path, kind):
    options = options_of(earlier, kind, tmp_path, vae=False)
    model = run_stage(options)
    pipe = stages.build_pipeline(options, model)
    assert pipe.vae is None and model.config.latent_dim == 6 and model.config.active_dims is None
    codes = stages.build_stage(options).dataset.tensors["posterior"][:, :6]
    y = model.whitened(codes)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(6), rtol=0, atol=0.02)
    assert (tmp_path / "samples").exists() and images_of(pipe).shape == (3, 1, 32, 32)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_gives_the_same_arguments(earlier, tmp_path, streaming):
    stage = stages.build_stage(options_of(earlier, "flow_matching", tmp_path, streaming=streaming))
    if streaming:
        stage.dataset.set_position(0, 5)
    batch = next(iter(stage.dataset)) if streaming else stage.dataset.__getitems__([0, 1, 2, 3, 4])
    noise = stages.Noise(0, 5, torch.device("cpu"))
    arguments = stage.prepare(batch, noise.at(0, slice(5)), 0)
    assert arguments.keys() == {"inputs", "noise", "times"} and arguments["inputs"].shape == (5, 6)
    assert stage.prepare(batch, noise.at(6, slice(5)), 6).keys() == {"noise"}


@pytest.mark.parametrize("kind", ["flow_matching", "mixture"])
def test_the_command_trains_evaluates_and_describes_it(kind, working_folder):
    """`vaeplus train --second_stage`: the earlier stages do not notice, and the same command again trains nothing."""
    words = ("train", "--config", "home/tiny.yaml", "--second_stage", kind, "--output_dir", "run")
    code, output, errors = run(*words, "--max_train_steps", "4")
    assert code == 0 and f"second stage: {kind}" in output, errors
    before = {path: path.read_bytes() for path in Path("run").glob("*/model.safetensors")}
    assert len(before) == 3 and run(*words, "--max_train_steps", "4")[0] == 0
    assert before == {path: path.read_bytes() for path in before}
    assert read_record(Path("run/autoencoder"))["second_stage"] == "vae"
    summary = json.loads(Path("run/summary.json").read_text())["second_stage"]
    assert summary["model"] == kind and summary["latent_dim"] == 4 >= summary["active_dims"]
    assert run("card", "run", "org/digits", "--data_license", "none")[0] == 0
    assert f"| second stage, {kind} |" in Path("run/pipeline/README.md").read_text()
    steps = ("--num_inference_steps", "3") if kind == "flow_matching" else ()
    code, _, errors = run("sample", "run/pipeline", "--num_images", "2", "--output", "a.png", *steps)
    assert code == 0, errors
    code, _, errors = run("sample", "run/pipeline", "--output", "b.png", "--num_inference_steps", "0")
    expected = "must be an integer of at least 1" if steps else "needs a second stage by flow matching"
    assert code == 2 and expected in errors and len(errors.splitlines()) == 1
    measured = ("--dataset_name", "digits", "--num_images", "10", "--output", "evaluation.json")
    code, output, errors = run("evaluate", "run/pipeline", *measured)
    assert code == 0 and f"second stage: {kind}" in output, errors


def test_commands_refuse_what_a_pipeline_of_codes_lacks(working_folder):
    with_prior("mixture", vae=False).save_pretrained("codes")
    for words in (("reconstruct", "codes", "home/0.png"), ("encode", "codes", "--dataset_name", "digits"),
                  ("evaluate", "codes", "--dataset_name", "digits", "--num_images", "4")):  # fmt: skip
        code, _, errors = run(*words)
        assert code == 2 and "this pipeline has no first VAE" in errors and len(errors.splitlines()) == 1


def test_what_options_refuse(earlier, tmp_path):
    def options(**changes):
        return options_of(earlier, "mixture", tmp_path, **changes)

    for changes, match in (
        (dict(stage="vae", vae=None), "second_stage=mixture is for stage second_stage, not for vae"),
        (
            dict(autoencoder=None, vae=None),
            "needs --vae, the first VAE whose latents it models, or --autoencoder alone",
        ),
        (dict(second_stage="vae", vae=None), "the second stage needs --vae"),
        (dict(streaming=True), "fitted to all latents at once: leave out --streaming"),
        (dict(second_stage="flow"), "second_stage must be one of|second_stage .*flow"),
        (dict(distillation_share=1.0), r"distillation_share must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=match):
            options(**changes)


def test_the_steps_of_flow_matching_are_fixed_and_old_records_are_of_vaes():
    record = {"second_stage": "flow_matching", "max_train_steps": 8, "made_from": {}}
    with pytest.raises(ValueError, match="a flow of 8 steps, got max_train_steps=9. .* add --retrain"):
        goes_on(Path("run"), record, {**record, "max_train_steps": 9}, False)
    assert not goes_on(Path("run"), record, {**record, "max_train_steps": 9}, retrain=True)
    others = {**record, "second_stage": "coupling_flow"}
    assert goes_on(Path("run"), others, {**others, "max_train_steps": 9}, False)
    with pytest.raises(ValueError, match="other options .second_stage 'vae' -> 'mixture'"):
        goes_on(Path("run"), {"seed": 0}, {"seed": 0, "second_stage": "mixture", "made_from": {}}, False)
