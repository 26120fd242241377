"""Bounds of log p(x) against the closed form of the affine VAE, p(x) = N(b, W W^T + gamma I)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import LowRankMultivariateNormal, Normal

from hf_vaeplus import VAEPlusPipeline, VAEPlusVAEConfig, VAEPlusVAEModel
from hf_vaeplus.metrics.likelihood import elbo, importance_weighted

SIZE, LATENT_DIM, GAMMA = 4, 3, 0.02


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def affine_pipeline(basis: torch.Tensor) -> tuple[VAEPlusPipeline, LowRankMultivariateNormal]:
    """A pixel VAE with decoder W z + b and a gamma that was learned, and its exact p(x).

    The posterior is N(M^-1 W^T (x - b), gamma M^-1) with M = W^T W + gamma I (Tipping and Bishop 1999, Eq. 7); the
    encoder is exact where the columns of W are orthogonal, elsewhere its variance is that of M's diagonal.
    """
    torch.manual_seed(0)
    shape = dict(input_shape=(1, SIZE, SIZE), latent_dim=LATENT_DIM)
    vae = VAEPlusVAEModel(VAEPlusVAEConfig(network="affine", gamma="learned", gamma_init=1.0, **shape)).eval()
    offset = torch.rand(SIZE**2, generator=source(1))
    m = basis.T @ basis + GAMMA * torch.eye(LATENT_DIM)
    vae.decoder.weight.copy_(basis)
    vae.decoder.bias.copy_(offset)
    vae.encoder.weight.copy_(torch.linalg.solve(m, basis.T))
    vae.encoder.bias.copy_(-vae.encoder.weight @ offset)
    vae.logvar.copy_((GAMMA / m.diagonal()).log())
    vae.log_gamma.fill_(math.log(GAMMA))  # as if training had moved it away from gamma_init
    density = LowRankMultivariateNormal(offset.double(), basis.double(), torch.full((SIZE**2,), GAMMA).double())
    return VAEPlusPipeline(vae), density


def orthogonal_basis() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(SIZE**2, LATENT_DIM, generator=source())).Q * torch.tensor([0.5, 0.3, 0.1])


# ---------------------------------------------------------------------------------------------------- the numbers


def test_known_weights():
    log_weights = torch.tensor([[1.0, 0.0], [3.0, 0.0]]).double().log()
    assert elbo(log_weights).tolist() == [0.5 * math.log(3), -math.inf]
    assert importance_weighted(log_weights).tolist() == pytest.approx([math.log(2), -math.inf])


@given(st.integers(1, 9), st.integers(1, 5), st.floats(0, 300), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_elbo_is_never_above_the_importance_weighted_bound(num_samples, batch, spread, seed):
    log_weights = spread * torch.randn(num_samples, batch, generator=source(seed)) - 1e4
    low, high = elbo(log_weights), importance_weighted(log_weights)
    assert low.dtype == high.dtype == torch.float64 and low.shape == high.shape == (batch,)
    assert (low <= high + 1e-9).all()
    assert (high <= log_weights.double().amax(0) + 1e-9).all()


def test_weights_beyond_the_range_of_exp():
    log_weights = torch.tensor([[-50_000.0, 90_000.0], [-50_000.0, 90_000.0]])
    assert importance_weighted(log_weights).tolist() == elbo(log_weights).tolist() == [-50_000.0, 90_000.0]


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4)])
def test_other_shapes_are_refused(shape):
    for bound in (elbo, importance_weighted):
        with pytest.raises(ValueError, match=r"\(K >= 1, batch\)"):
            bound(torch.zeros(shape))


# ------------------------------------------------------------------------------------------- against the closed form


def test_with_the_exact_posterior_every_weight_is_the_density():
    pipe, density = affine_pipeline(orthogonal_basis())
    images = torch.rand(6, 1, SIZE, SIZE, generator=source(2))
    exact = density.log_prob(images.flatten(1).double())
    log_weights = pipe.log_importance_weights(images, 5, source(3))
    torch.testing.assert_close(log_weights, exact.expand(5, 6), rtol=0, atol=1e-3)
    for bound in (elbo, importance_weighted):
        torch.testing.assert_close(bound(log_weights), exact, rtol=0, atol=1e-3)


def test_otherwise_more_samples_approach_the_density_from_below():
    pipe, density = affine_pipeline(0.2 * torch.randn(SIZE**2, LATENT_DIM, generator=source()))
    with torch.no_grad():
        pipe.vae.logvar += 0.5
    image = torch.rand(1, 1, SIZE, SIZE, generator=source(2))
    exact = density.log_prob(image.flatten(1).double()).item()
    total, repeats = 512, 200
    log_weights = pipe.log_importance_weights(
        image.expand(repeats, -1, -1, -1), total, source(3), decode_batch_size=8192
    )
    bounds = [importance_weighted(log_weights.reshape(k, -1)) for k in (1, 4, 16, 128, 512)]
    errors = [4 * bound.std() / math.sqrt(len(bound)) for bound in bounds]
    means = [bound.mean().item() for bound in bounds]
    assert means[0] < exact - 0.1  # the ELBO: there is something to approach
    assert means == sorted(means) and abs(means[-1] - exact) < 0.01
    assert all(mean < exact + error for mean, error in zip(means, errors, strict=True))
    assert elbo(log_weights).mean().item() == pytest.approx(means[0])


def test_the_elbo_is_the_one_that_training_maximises():
    pipe, _ = affine_pipeline(0.2 * torch.randn(SIZE**2, LATENT_DIM, generator=source()))
    images = torch.rand(20, 1, SIZE, SIZE, generator=source(2))
    estimates = elbo(pipe.log_importance_weights(images, 400, source(3), decode_batch_size=8192))
    with torch.no_grad():
        losses = torch.stack([pipe.vae(images).loss for _ in range(400)]).double()
    error = 4 * losses.std() / math.sqrt(len(losses)) * math.sqrt(2)
    assert abs(-losses.mean() - estimates.mean()) < error


# --------------------------------------------------------------------------------------------- the pipeline's weights


def test_weights_are_those_of_torch_distributions():
    pipe, _ = affine_pipeline(0.2 * torch.randn(SIZE**2, LATENT_DIM, generator=source()))
    images = torch.rand(3, 1, SIZE, SIZE, generator=source(2))
    noise = torch.stack([torch.randn(4, LATENT_DIM, generator=source(seed)) for seed in range(3)], dim=1)
    with torch.no_grad():
        q = pipe.vae.encode(images)
        z = q.sample(noise)
        means = pipe.vae.decode(z.flatten(0, 1)).unflatten(0, (4, 3))
        expected = Normal(means.double(), math.sqrt(GAMMA)).log_prob(images.double()).flatten(2).sum(2)
        expected += (Normal(0, 1).log_prob(z) - Normal(q.mean, (0.5 * q.logvar).exp()).log_prob(z)).sum(2)
    weights = pipe.log_importance_weights(images, 4, [source(seed) for seed in range(3)])
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_log_likelihood_is_their_importance_weighted_bound(batch_size):
    pipe, _ = affine_pipeline(0.2 * torch.randn(SIZE**2, LATENT_DIM, generator=source()))
    images = torch.rand(5, 1, SIZE, SIZE, generator=source(2))
    weights = pipe.log_importance_weights(images, 7, source(3), batch_size)
    assert weights.shape == (7, 5)
    torch.testing.assert_close(weights, pipe.log_importance_weights(images, 7, source(3)), rtol=1e-5, atol=1e-4)
    likelihood = pipe.log_likelihood(images, 7, source(3), batch_size)
    assert torch.equal(likelihood, importance_weighted(weights).float())
