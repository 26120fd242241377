"""The WAE-MMD baseline and the aggregate network."""

import pytest
import torch
from helpers import perturbed

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.metrics.mmd import imq_mmd
from hf_vaeplus.modeling_baselines import WAEMMDModel
from hf_vaeplus.modeling_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)

TINY = dict(
    input_shape=(3, 32, 32), latent_dim=4, network="aggregate", code_dim=6, hidden_channels=(4, 8), hidden_dim=16
)


def images(count=8):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_aggregate_is_autoencoder_and_first_vae_in_one():
    """With the weights of the two, the joined network encodes and decodes as the pipeline of the two does."""
    autoencoder = perturbed(
        VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(image_size=32, latent_dim=6, hidden_channels=(4, 8)))
    )
    vae = perturbed(VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(6,), latent_dim=4, hidden_dim=16)))
    joined = VAEPlusVAEModel(VAEPlusVAEConfig(**TINY))
    half = torch.full((3, 1, 1), 0.5)
    joined.set_input_statistics(half, half)
    joined.encoder.load_state_dict(torch.nn.Sequential(*autoencoder.encoder, *vae.encoder).state_dict())
    joined.decoder.load_state_dict(vae.decoder.state_dict())
    joined.affine_skip.load_state_dict(vae.affine_skip.state_dict())
    joined.image_decoder.load_state_dict(autoencoder.decoder.state_dict())
    with torch.no_grad():
        posterior, expected = joined.encode(images()), vae.encode(autoencoder.encode(images()))
        torch.testing.assert_close(posterior.mean, expected.mean)
        torch.testing.assert_close(posterior.logvar, expected.logvar)
        z = torch.randn(5, 4)
        torch.testing.assert_close(joined.decode(z), autoencoder.decode(vae.decode(z)))


@pytest.mark.parametrize("network", ["conv", "aggregate"])
def test_number_of_conv_blocks(network):
    few, many = (VAEPlusVAEModel(VAEPlusVAEConfig(**{**TINY, "network": network}, num_conv_blocks=n)) for n in (1, 3))
    # encoder and decoder, 2 scales, 2 more blocks of two 3x3 convolutions each
    more = 2 * sum(2 * 2 * (9 * width * width + width) for width in (4, 8))
    assert many.num_parameters() - few.num_parameters() == more


def test_wae_loss():
    model = perturbed(WAEMMDModel(VAEPlusVAEConfig(**TINY)))
    noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    output = model(images(), noise, mmd_weight=7.0)
    codes = model.encode(images()).mean
    error = (model.decode(codes) - images()).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(output.mmd, imq_mmd(codes, noise).float())
    torch.testing.assert_close(output.loss, error + 7.0 * output.mmd)
    torch.testing.assert_close(output.to_tuple()[0], model(images(), noise, 7.0, return_dict=False)[0])


def test_the_penalty_pulls_codes_to_the_prior():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for weight in (0.0, 500.0):
        torch.manual_seed(0)
        model = WAEMMDModel(VAEPlusVAEConfig(**TINY))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        batch = torch.rand(64, 3, 32, 32, generator=generator)
        for _ in range(60):
            model(batch, torch.randn(64, 4, generator=generator), mmd_weight=weight).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found[weight] = float(imq_mmd(model.encode(batch).mean, torch.randn(64, 4, generator=generator)))
    assert found[500.0] < 0.2 * found[0.0]


def test_a_trained_wae_is_saved_as_a_vae_with_a_point_as_posterior(tmp_path):
    model = WAEMMDModel(VAEPlusVAEConfig(**TINY))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(3):
        model(images(), torch.randn(8, 4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    pipe = VAEPlusPipeline(VAEPlusVAEModel.from_pretrained(tmp_path))
    posterior = pipe.encode(images())
    assert (posterior.logvar == -30).all()
    torch.testing.assert_close(posterior.mean, model.eval().encode(images()).mean)
