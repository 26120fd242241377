"""Posterior statistics against hand-made cases and torch.distributions, and the summary of a pipeline by hand."""

import pytest
import torch
from helpers import perturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.evaluation.summaries import summarize
from hf_vaeplus.metrics.latents import (
    PosteriorStatistics,
    active_units,
    active_units_by_variance,
    kl_per_dimension,
)

SIZES = {"num_samples": st.integers(2, 40), "latent_dim": st.integers(1, 7), "seed": st.integers(0, 2**31)}


def posteriors(num_samples: int, latent_dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    draw = [torch.randn(num_samples, latent_dim, generator=source, dtype=torch.float64) for _ in range(2)]
    return 3 * draw[0], 2 * draw[1]


# ---------------------------------------------------------------------------------------------------- the numbers


@given(**SIZES)
@settings(max_examples=40, deadline=None)
def test_kl_per_dimension_is_the_mean_of_the_closed_form(num_samples, latent_dim, seed):
    means, logvars = posteriors(num_samples, latent_dim, seed)
    expected = kl_divergence(Normal(means, (0.5 * logvars).exp()), Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(kl_per_dimension(means, logvars), expected)


def test_kl_of_known_posteriors():
    means = torch.tensor([[0.0, 2.0, 0.0], [0.0, -2.0, 0.0]])
    logvars = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 2.0]])
    expected = torch.tensor([0.0, 2.0, (2.718281828459045**2 - 3) / 2], dtype=torch.float64)
    torch.testing.assert_close(kl_per_dimension(means, logvars), expected)


def test_active_units_counts_the_variance_of_means_over_the_data():
    # Unbiased variances of two samples at distance d are d^2 / 2: 0.02, 0.005 and 0.
    means = torch.tensor([[0.0, 5.0, 7.0], [0.2, 5.1, 7.0]])
    assert active_units(means) == 1
    assert active_units(means, threshold=0.004) == 2
    assert active_units(means, threshold=0.03) == 0


def test_the_thresholds_are_strict():
    assert active_units(torch.tensor([[0.0], [2.0]]), threshold=2.0) == 0
    assert active_units_by_variance(torch.zeros(2, 1), threshold=1.0) == 0


def test_active_units_by_variance_averages_variances_and_not_their_logs():
    variances = torch.tensor([[0.1, 0.1, 1.0], [0.95, 0.85, 1.0]])  # means 0.525, 0.475 and 1; geometric 0.31, 0.29, 1
    assert active_units_by_variance(variances.log()) == 1
    assert active_units_by_variance(variances.log(), threshold=0.6) == 2


@given(**SIZES)
@settings(max_examples=40, deadline=None)
def test_counts_do_not_depend_on_the_order_of_samples_or_dimensions_nor_on_the_origin(num_samples, latent_dim, seed):
    means, logvars = posteriors(num_samples, latent_dim, seed)
    source = torch.Generator().manual_seed(seed + 1)
    rows, columns = (torch.randperm(size, generator=source) for size in (num_samples, latent_dim))
    means = means * torch.tensor([0.03, 1.0])[torch.arange(latent_dim) % 2]  # every other one near the threshold
    assert active_units(means[rows][:, columns] + 1.5) == active_units(means)
    assert active_units_by_variance(logvars[rows][:, columns]) == active_units_by_variance(logvars)


# --------------------------------------------------------------------------------------------------- the direction


def test_a_collapsed_posterior_has_no_active_unit():
    means, logvars = torch.zeros(20, 5), torch.zeros(20, 5)
    assert active_units(means) == active_units_by_variance(logvars) == 0
    assert kl_per_dimension(means, logvars).tolist() == [0.0] * 5


def test_a_posterior_that_says_everything_has_only_active_units():
    means, _ = posteriors(200, 5, 0)
    assert active_units(means) == active_units_by_variance(torch.full((200, 5), -6.0)) == 5


def test_a_mean_that_moves_under_unit_noise_is_active_by_burdas_count_alone():
    means, _ = posteriors(200, 3, 0)
    assert (active_units(0.1 * means), active_units_by_variance(torch.full((200, 3), -0.05))) == (3, 0)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (0, 4), (3, 2, 2)])
def test_other_shapes_are_refused(shape):
    for metric in (active_units, active_units_by_variance):
        with pytest.raises(ValueError, match="num_samples >= 2"):
            metric(torch.zeros(shape))
    with pytest.raises(ValueError, match="num_samples >= 2"):
        kl_per_dimension(torch.zeros(3, 4), torch.zeros(shape))


# ------------------------------------------------------------------------------------------------------- in batches


def gathered(means: torch.Tensor, logvars: torch.Tensor, sizes) -> PosteriorStatistics:
    statistics = PosteriorStatistics(means.shape[1])
    for batch in zip(means.split(sizes), logvars.split(sizes), strict=True):
        statistics.update(*batch)
    return statistics


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), SIZES["latent_dim"], SIZES["seed"])
@settings(max_examples=40, deadline=None)
def test_any_split_into_batches_gives_the_figures_of_all_rows(sizes, latent_dim, seed):
    means, logvars = posteriors(sum(sizes), latent_dim, seed)
    means = means * torch.tensor([0.03, 1.0])[torch.arange(latent_dim) % 2]  # every other one near the threshold
    statistics = gathered(means, logvars, sizes)
    assert statistics.count == len(means)
    for threshold in (0.01, 0.5):
        assert statistics.active_units(threshold) == active_units(means, threshold)
        assert statistics.active_units_by_variance(threshold) == active_units_by_variance(logvars, threshold)
    torch.testing.assert_close(statistics.kl_per_dimension(), kl_per_dimension(means, logvars))
    covariance = torch.cov(means.T).reshape(latent_dim, latent_dim) + logvars.exp().mean(0).diag()
    torch.testing.assert_close(statistics.aggregate_mean(), means.mean(0))
    torch.testing.assert_close(statistics.aggregate_covariance(), covariance)


def test_moments_of_the_aggregate_posterior_are_those_of_the_mixture():
    means, logvars = posteriors(30, 4, 0)
    mixture = MixtureSameFamily(Categorical(torch.ones(30)), Independent(Normal(means, (0.5 * logvars).exp()), 1))
    statistics = gathered(means, logvars, 8)
    torch.testing.assert_close(statistics.aggregate_mean(), mixture.mean)
    # The mixture divides the spread of its means by n, the unbiased covariance by n - 1.
    torch.testing.assert_close(statistics.aggregate_covariance().diagonal() - means.var(0) / 30, mixture.variance)


def test_moments_of_known_posteriors():
    statistics = gathered(torch.tensor([[1.0, 2.0], [1.0, -2.0]]), torch.zeros(2, 2), 1)
    assert statistics.aggregate_mean().tolist() == [1.0, 0.0]
    assert statistics.aggregate_covariance().tolist() == [[1.0, 0.0], [0.0, 9.0]]


def test_an_aggregate_that_fills_the_prior_has_its_moments_and_a_narrow_one_has_not():
    means, _ = posteriors(20_000, 3, 0)  # standard deviation 3
    for spread, expected in ((0.8, 1.0), (0.1, 0.37)):  # 0.8^2 + 0.36 = 1
        statistics = gathered(means * (spread / 3), torch.full_like(means, 0.36).log(), 5_000)
        torch.testing.assert_close(
            statistics.aggregate_covariance(), expected * torch.eye(3, dtype=torch.float64), rtol=0, atol=0.02
        )


def test_a_refused_batch_leaves_the_statistics_as_they_were():
    means, logvars = posteriors(6, 3, 0)
    statistics = gathered(means, logvars, 3)
    for bad_means, bad_logvars, match in (
        (means, logvars[:2], "one shape"),
        (means[:, :2], logvars[:, :2], r"\(num_rows >= 1, 3\)"),
        (means, logvars + torch.nan, "finite"),
        (means, logvars + 1000, "finite"),
        (means + torch.inf, logvars, "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            statistics.update(bad_means, bad_logvars)
    assert statistics.count == 6
    torch.testing.assert_close(statistics.kl_per_dimension(), kl_per_dimension(means, logvars))
    torch.testing.assert_close(statistics.aggregate_mean(), means.mean(0))
    assert statistics.active_units_by_variance() == active_units_by_variance(logvars)


def test_too_few_posteriors_are_refused():
    single = gathered(*posteriors(1, 3, 0), 1)
    for call in (single.active_units, single.aggregate_covariance, PosteriorStatistics(3).kl_per_dimension):
        with pytest.raises(ValueError, match="call update first"):
            call()


# ----------------------------------------------------------------------------------------------------- the summary


@pytest.fixture(scope="module")
def pipe() -> VAEPlusPipeline:
    torch.manual_seed(0)
    small = dict(hidden_dim=8, num_blocks=1)
    image = dict(image_size=32, num_channels=1, latent_dim=6, hidden_channels=(4, 8), num_blocks=1)
    first = dict(input_shape=(6,), latent_dim=4, reconstruction_space="image", gamma_init=0.3)
    second = dict(input_shape=(4,), latent_dim=3, gamma="learned", gamma_init=0.05)
    return VAEPlusPipeline(
        perturbed(VAEPlusVAEModel(VAEPlusVAEConfig(**first, **small))).eval(),
        perturbed(VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(**image))).eval(),
        perturbed(VAEPlusVAEModel(VAEPlusVAEConfig(**second, **small))).eval(),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("cache")
    return load_images("digits", resolution=32, num_channels=1, max_samples=30, cache_dir=cache_dir, progress=False)


@torch.no_grad()
def test_summary_equals_a_hand_computation(pipe, images):
    count, batch_size = 23, 10  # a last batch of 3, and images left over
    summary = summarize(pipe, images, max_images=count, batch_size=batch_size)

    pixels = to_unit_range(images.__getitems__(list(range(count)))["pixel_values"])
    code = pipe.autoencoder.encode(pixels)
    floor = pipe.autoencoder.decode(code).clamp(0, 1)
    posterior = pipe.vae.encode(code)
    whole = pipe.autoencoder.decode(pipe.vae.decode(posterior.mean)).clamp(0, 1)
    per_image = [float(((guess - pixels) ** 2).sum((1, 2, 3)).mean()) for guess in (floor, whole)]
    assert [summary["autoencoder_squared_error"], summary["squared_error"]] == pytest.approx(per_image, rel=1e-5)

    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([torch.randn(rows, 4, generator=generator) for rows in (10, 10, 3)])
    second = pipe.second_stage.encode(posterior.mean + (0.5 * posterior.logvar).exp() * noise)
    for stage, q, gamma in (("vae", posterior, 0.3), ("second_stage", second, 0.05)):
        kl = kl_divergence(Normal(q.mean, (0.5 * q.logvar).exp()), Normal(0.0, 1.0)).mean(0)
        assert summary[stage]["kl_per_dimension"] == pytest.approx(kl.tolist(), rel=1e-4, abs=1e-6)
        assert summary[stage]["kl"] == pytest.approx(float(kl.sum()), rel=1e-4)
        assert summary[stage]["gamma"] == pytest.approx(gamma, rel=1e-5)
        assert summary[stage]["latent_dim"] == q.mean.shape[1]
        assert summary[stage]["active_units"] == int((q.mean.var(0) > 0.01).sum())
        assert summary[stage]["active_units_by_variance"] == int((q.logvar.exp().mean(0) < 0.5).sum())
    assert summary["num_images"] == count


def test_summary_of_fewer_images_than_asked_for(pipe, images):
    assert summarize(pipe, images)["num_images"] == 30


def test_summary_does_not_depend_on_the_batch_size(pipe, images):
    one, other = summarize(pipe, images, batch_size=7), summarize(pipe, images, batch_size=30)
    assert one["squared_error"] == pytest.approx(other["squared_error"], rel=1e-5)
    assert one["vae"]["kl_per_dimension"] == pytest.approx(other["vae"]["kl_per_dimension"], rel=1e-4)


def test_summary_leaves_out_the_stages_that_a_pipeline_lacks(images):
    config = VAEPlusVAEConfig(input_shape=(1, 32, 32), network="conv", hidden_channels=(4, 8))
    summary = summarize(VAEPlusPipeline(VAEPlusVAEModel(config).eval()), images)
    assert set(summary) == {"num_images", "squared_error", "vae"}


def test_summary_names_the_gamma_of_the_likelihood_and_not_a_parameter_below_its_floor(pipe, images):
    log_gamma = pipe.second_stage.log_gamma
    before = log_gamma.detach().clone()
    try:
        log_gamma.data.fill_(-40.0)
        assert summarize(pipe, images)["second_stage"]["gamma"] == pytest.approx(pipe.second_stage.config.min_gamma)
    finally:
        log_gamma.data.copy_(before)
