"""What the ecosystem does with a model and its output: `Trainer`, `torch.export`, Accelerate."""

import pytest
import torch
from accelerate.utils import convert_to_fp32, find_batch_size, recursively_apply, send_to_device
from helpers import perturbed
from transformers import Trainer, TrainingArguments

from hf_vaeplus import (
    PenalizedAutoencoderConfig,
    PenalizedAutoencoderModel,
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusEncoderModel,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.modeling_baselines import WAEMMDModel

NOISE = {"noise": (4,)}  # given, the loss is a function of the batch


def vae(kind=VAEPlusVAEModel, **options):
    return kind(VAEPlusVAEConfig(**dict(input_shape=(6,), latent_dim=4, hidden_dim=8, num_blocks=1) | options))


def autoencoder():
    return VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(image_size=32, latent_dim=6, hidden_channels=(4, 8)))


def penalized():
    return PenalizedAutoencoderModel(PenalizedAutoencoderConfig(input_shape=(6,), latent_dim=4, hidden_dim=8))


MODELS = {  # and the shapes of what `forward` takes
    "autoencoder": (autoencoder, {"pixel_values": (3, 32, 32)}),
    "vae": (vae, {"inputs": (6,), **NOISE}),
    "learned gamma": (lambda: vae(gamma="learned"), {"inputs": (6,), **NOISE}),
    "wae": (lambda: vae(WAEMMDModel), {"inputs": (6,), **NOISE}),
    "penalized": (penalized, {"inputs": (6,)}),
}


@pytest.fixture(params=MODELS)
def case(request):
    """A model and what 8 samples hold, stacked."""
    torch.manual_seed(0)
    make, shapes = MODELS[request.param]
    return perturbed(make()).eval(), {name: torch.rand(8, *shape) for name, shape in shapes.items()}


def test_the_trainer_evaluates_predicts_and_trains(case, tmp_path):
    model, batch = case
    data = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    options = dict(
        per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2, report_to=[], use_cpu=True
    )
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, save_strategy="no", disable_tqdm=True, **options),
        train_dataset=data,
        eval_dataset=data,
    )
    with torch.no_grad():
        halves = [model(**{name: value[rows] for name, value in batch.items()}) for rows in (slice(4), slice(4, 8))]
    expected = torch.stack([half.loss for half in halves]).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = trainer.predict(data)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    names = [name for name in halves[0] if name != "loss"]
    for name, found in zip(names, predicted.predictions, strict=True):
        whole = torch.cat([torch.atleast_1d(half[name]) for half in halves])
        torch.testing.assert_close(torch.from_numpy(found), whole, msg=name)
    before = next(model.encoder.parameters()).clone()
    assert trainer.train().global_step == 2
    assert not torch.equal(next(model.encoder.parameters()), before)


def test_forward_can_be_exported(case):
    model, batch = case
    program = torch.export.export(model, (), batch)
    other = {name: torch.rand_like(value) for name, value in batch.items()}
    found = program.module()(**other)
    with torch.no_grad():
        expected = model(**other)
    assert type(found) is type(expected)
    torch.testing.assert_close(dict(found), dict(expected))


def test_an_encoder_can_be_exported():
    model, images = VAEPlusEncoderModel(autoencoder(), vae()).eval(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images).features, model(images).features)


def test_accelerate_reaches_every_tensor_of_an_output(case):
    model, batch = case
    output = model(**batch)
    assert find_batch_size(dict(list(output.items())[-1:])) == 8
    elsewhere = send_to_device(output, "meta")
    assert type(elsewhere) is type(output) and all(value.is_meta for value in elsewhere.values())
    halved = recursively_apply(lambda tensor: tensor.bfloat16(), output, error_on_other_type=True)
    assert all(value.dtype == torch.bfloat16 for value in halved.values())
    assert all(value.dtype == torch.float32 for value in convert_to_fp32(halved).values())
    if "posterior_mean" in output:
        assert elsewhere.posterior.mean.is_meta and elsewhere.posterior.logvar.is_meta
        assert torch.equal(output.posterior.mean, model.encode(batch["inputs"]).mean)


def test_without_a_loss_the_rest_is_the_same(case):
    model, batch = case
    output, bare = model(**batch), model(**batch, return_loss=False)
    assert "loss" not in bare and "reconstruction" in bare
    for name, value in bare.items():
        assert torch.equal(value, output[name]), name
    for one, other in zip(model(**batch, return_loss=False, return_dict=False), bare.values(), strict=True):
        assert torch.equal(one, other)
