"""The h-penalised autoencoder: Eq. (6) read once more, the constraint Theta, the gradients of Theorem 3."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel

from hf_vaeplus import PenalizedAutoencoderConfig, PenalizedAutoencoderModel
from hf_vaeplus.modeling_baselines import ConstrainedLinear, penalty_function

TINY = dict(input_shape=(2, 3), latent_dim=4, hidden_dim=8)
NETWORKS = [
    dict(network="mlp"),
    dict(network="affine"),
    dict(network="affine", latent_dim=9),  # kappa > d
    dict(network="affine", constraint="unit_columns"),
    dict(network="affine", constraint="unit_columns", latent_dim=9),
]
PENALTIES = {
    "identity": lambda u: u,
    "sqrt": np.sqrt,
    "log": lambda u: np.log(u + 0.01),
    "power": lambda u: u**0.3,
}


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def make(**overrides) -> PenalizedAutoencoderModel:
    return PenalizedAutoencoderModel(PenalizedAutoencoderConfig(**TINY | overrides))


def layers(model):
    return [module for module in model.decoder.modules() if isinstance(module, ConstrainedLinear)]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_loss_is_equation_6(network, penalty):
    model = make(penalty=penalty, penalty_eps=0.01, penalty_power=0.3, **network).double()
    inputs = torch.randn(7, 2, 3, dtype=torch.double)
    output = model(inputs)
    d, n, h = 6, 7, PENALTIES[penalty]
    latents = model.encode(inputs)
    assert latents.shape == (n, model.config.latent_dim)
    reconstructions = model.decode(latents).detach().numpy()
    errors = [np.sum((x - f) ** 2) for x, f in zip(inputs.numpy(), reconstructions, strict=True)]
    rows = [h(np.sum(row**2) / n) for row in latents.detach().numpy().T]
    np.testing.assert_allclose(output.reconstruction_term.item(), h(sum(errors) / (d * n)), rtol=1e-12)
    np.testing.assert_allclose(output.penalty.item(), sum(rows) / d, rtol=1e-12)
    np.testing.assert_allclose(output.loss.item(), h(sum(errors) / (d * n)) + sum(rows) / d, rtol=1e-12)
    np.testing.assert_allclose(output.squared_error.item(), np.mean(errors), rtol=1e-12)
    assert torch.equal(output.loss, model(inputs, return_dict=False)[0])


@pytest.mark.parametrize("penalty", ["sqrt", "power"])
def test_gradient_is_unbounded_around_zero_and_never_nan(penalty):
    u = torch.tensor([1e-2, 1e-6, 1e-12], dtype=torch.double, requires_grad=True)
    penalty_function(u, penalty).sum().backward()
    power = 0.5 if penalty == "sqrt" else 0.25
    torch.testing.assert_close(u.grad, power * u.detach() ** (power - 1))
    zero = torch.zeros(3, requires_grad=True)  # a row of Z that is exactly zero
    value = penalty_function(zero.square().mean(), penalty)
    value.backward()
    assert value == 0 and torch.equal(zero.grad, torch.zeros(3))


@pytest.mark.parametrize(("penalty", "bound"), [("identity", 1), ("log", 1 / 1e-3)])
def test_gradient_is_bounded_around_zero(penalty, bound):
    u = torch.tensor([1e-2, 1e-6, 0.0], dtype=torch.double, requires_grad=True)
    penalty_function(u, penalty, eps=1e-3).sum().backward()
    assert (u.grad <= bound * (1 + 1e-12)).all() and u.grad[-1] == pytest.approx(bound)


def test_powers_and_logs_tend_to_the_indicator():
    u = torch.tensor([0.0, 1e-3, 1.0], dtype=torch.double)
    torch.testing.assert_close(penalty_function(u, "power", power=1e-6), (u > 0).double(), rtol=0, atol=1e-5)
    scaled_log = 1 - penalty_function(u, "log", eps=1e-300) / np.log(1e-300)
    torch.testing.assert_close(scaled_log, (u > 0).double(), rtol=0, atol=1.1e-2)


@pytest.mark.parametrize("network", NETWORKS)
def test_training_cannot_leave_the_constraint(network):
    model = make(penalty="identity", **network)
    inputs = torch.randn(64, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        loss = model(inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    for layer in layers(model):
        weight = layer.constrained_weight
        if layer.constraint == "unit_columns":
            torch.testing.assert_close(weight.norm(dim=0), torch.ones(weight.shape[1]))
        else:
            singular_values = torch.linalg.svdvals(weight)
            torch.testing.assert_close(singular_values, torch.ones_like(singular_values))


@pytest.mark.parametrize("network", NETWORKS)
def test_no_scale_of_the_parameters_makes_up_for_shrunken_latents(network):
    model = make(**network).double()
    first, second = torch.randn(2, 50, model.config.latent_dim, dtype=torch.double)
    # Unit columns: |W z| <= sum |z_k| <= sqrt(kappa) |z|; orthonormal layers: |f(z) - f(z')| <= |z - z'|.
    bound = model.config.latent_dim**0.5 if network.get("constraint") else 1.0
    with torch.no_grad():
        for scale in (1, 1e6):
            for layer in layers(model):
                layer.weight *= scale
                layer.bias.normal_(std=scale)
            moved = (model.decode(first) - model.decode(second)).flatten(1).norm(dim=1)
            assert (moved <= bound * (first - second).norm(dim=1) * (1 + 1e-6)).all()


def test_perfect_reconstruction_from_the_principal_components():
    # An affine model with the eigenvectors as weights: no error, and r rows that hold the eigenvalues.
    model = make(network="affine", latent_dim=5, penalty="sqrt").double()
    directions = torch.linalg.qr(torch.randn(6, 2, dtype=torch.double)).Q
    inputs = torch.randn(40, 2, dtype=torch.double) * torch.tensor([2.0, 0.5]) @ directions.T
    variances, vectors = torch.linalg.eigh(inputs.T @ inputs / 40)
    with torch.no_grad():
        model.decoder.weight.copy_(vectors.flip(1)[:, :5])
        model.encoder.weight.copy_(model.decoder.constrained_weight.T)
        model.encoder.bias.zero_(), model.decoder.bias.zero_()
        output = model(inputs.reshape(40, 2, 3))
    assert output.squared_error < 1e-20 and output.active_units == 2
    assert output.loss.item() == pytest.approx(variances.clamp(min=0).sqrt().sum().item() / 6, abs=1e-6)


def test_smoothing_replaces_the_argument_of_h():
    model, inputs = make(penalty="sqrt").double(), torch.randn(9, 2, 3, dtype=torch.double)
    plain, smooth = model(inputs), model(inputs, smoothing=0.5)
    assert smooth.reconstruction_term.item() == pytest.approx((plain.reconstruction_term.item() ** 2 + 0.5) ** 0.5)
    assert model(inputs, smoothing=0.0).loss == plain.loss


@pytest.mark.parametrize("network", NETWORKS)
def test_a_saved_model_comes_back_equal(network, tmp_path):
    model, inputs = make(penalty="log", penalty_eps=0.02, **network), torch.randn(5, 2, 3)
    model.save_pretrained(tmp_path)
    for loaded in (PenalizedAutoencoderModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is PenalizedAutoencoderModel and loaded.config.penalty_eps == 0.02
        assert torch.equal(loaded(inputs).loss, model(inputs).loss)


def test_half_precision_weights_run():
    output = make().to(torch.bfloat16)(torch.randn(5, 2, 3))
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(penalty_power=1.5), "penalty_power must be at most 1, got 1.5"),
        (dict(penalty_eps=0), "penalty_eps must be positive, got 0"),
        (dict(penalty_power=-0.5), "penalty_power must be positive, got -0.5"),
        (dict(constraint="unit_columns"), "network='mlp' needs constraint='orthonormal'"),
        (dict(penalty="l1"), "penalty"),
        (dict(penalty_epsilon=1.0), "did you mean 'penalty_eps'"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        PenalizedAutoencoderConfig(**fields)


def test_wrong_inputs_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"inputs must be floats of shape \(batch, 2, 3\), got torch.float32"):
        model(torch.randn(5, 6))
    with pytest.raises(ValueError, match="got torch.int64"):
        model(torch.ones(5, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"latents must be floats of shape \(batch, 4\)"):
        model.decode(torch.randn(5, 3))
