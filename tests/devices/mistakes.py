"""Mistakes that are made with devices, each planted into the package for as long as it takes to find it.

A mistake is found if one of its scenarios fails. The kinds:

    place      a tensor on another device than its partner
    generator  noise from a generator of another device
    float64    on a device that has none
    wait       the host waits for the device in every step
    state      the optimizer, the average or a restored state is not that of the model on the device
    message    what goes to the other processes cannot travel, or does not arrive
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch

from hf_vaeplus import pipeline_vaeplus
from hf_vaeplus.metrics import mmd
from hf_vaeplus.modeling_vaeplus import GaussianPosterior, VAEPlusAutoencoderModel, VAEPlusVAEModel
from hf_vaeplus.training import codes, loop, randomness, shared_folder, stages


@dataclass
class Mistake:
    kind: str
    what: str
    plant: Callable  # returns a context in which the mistake is in the package
    scenarios: tuple[str, ...]


MISTAKES = {}


def mistake(kind: str, what: str, *scenarios: str):
    def add(plant):
        MISTAKES[plant.__name__] = Mistake(kind, what, plant, scenarios)
        return plant

    return add


def after(owner, name: str, change: Callable):
    """A patch: the function returns `change(what it returned, *its arguments)`."""
    original = getattr(owner, name)

    def changed(*arguments, **options):
        return change(original(*arguments, **options), *arguments)

    return mock.patch.object(owner, name, changed)


def instead(owner, name: str, replacement):
    return mock.patch.object(owner, name, replacement)


# -------------------------------------------------------------------------------------------------------------- place


@mistake("place", "the noise is left on the CPU", "second_stage")
def noise_on_cpu():
    return after(randomness.Noise, "draw", lambda noise, *_: noise.cpu())


@mistake("place", "the batch is not brought to the device", "stages")
def batch_on_cpu():
    original = stages._autoencoder_stage

    def changed(options, images):
        stage = original(options, images)
        prepare = stage.prepare
        stage.prepare = lambda batch, noise, step: {k: v.cpu() for k, v in prepare(batch, noise, step).items()}
        return stage

    return instead(stages, "_autoencoder_stage", changed)


@mistake("place", "rows of posteriors stay on the CPU", "second_stage")
def rows_on_cpu():
    return instead(codes.torch.Tensor, "__getitem__", _cpu_getitem)


_getitem = torch.Tensor.__getitem__


def _cpu_getitem(tensor, index):
    found = _getitem(tensor, index)
    return found.cpu() if torch.is_tensor(index) and index.dtype == torch.long else found


@mistake("place", "a frozen stage is loaded on the CPU", "image_error")
def frozen_stage_on_cpu():
    return after(stages, "load_frozen", lambda model, *_: model.cpu())


@mistake("place", "pictures are encoded where they were read", "stages")
def encoding_on_cpu():
    return after(codes, "to_unit_range", lambda pixels, *_: pixels.cpu())


@mistake("place", "a constant of the loss is made on the CPU", "second_stage")
def constant_on_cpu():
    def changed(posterior, *_):
        return GaussianPosterior(posterior.mean + torch.zeros(posterior.mean.shape), posterior.logvar)

    return after(VAEPlusVAEModel, "encode", changed)


@mistake("place", "a parameter is used that was copied before the move", "second_stage")
def stale_parameter():
    copies = {}

    def changed(mean, model, *_):
        weight = copies.setdefault(id(model), model.input_std.cpu())
        return mean * weight

    return after(VAEPlusVAEModel, "decode", changed)


@mistake("place", "the pipeline's latents stay where its generator is", "pipeline")
def latents_on_cpu():
    return after(pipeline_vaeplus, "randn_tensor", lambda noise, *_: noise.cpu())


@mistake("place", "the pipeline's pixels are not moved", "pipeline")
def pixels_on_cpu():
    return after(pipeline_vaeplus.VAEPlusPipeline, "_to_float", lambda pixels, *_: pixels.cpu())


@mistake("place", "the pictures of a preview are not moved", "stages")
def preview_on_cpu():
    def previewer(options, images):
        first = images.pixels(0, 4)

        def preview(model):
            model.encode(first if options.stage == "autoencoder" else torch.zeros(2, *model.config.input_shape))

        return preview

    return instead(stages, "_previewer", previewer)


@mistake("place", "posteriors are returned on the device", "encode", "evaluate", "pipeline")
def posterior_on_device():
    def changed(posterior, pipe, *_):
        device = pipe.vae.device
        return GaussianPosterior(posterior.mean.to(device), posterior.logvar.to(device))

    return after(pipeline_vaeplus.VAEPlusPipeline, "encode", changed)


# ---------------------------------------------------------------------------------------------------------- generator


@mistake("generator", "noise of training is drawn on the device by a generator of the CPU", "second_stage")
def cpu_generator():
    original = torch.Generator
    return instead(randomness.torch, "Generator", lambda device=None: original())


@mistake("generator", "samples are drawn on the device by the user's generator of the CPU", "pipeline")
def users_generator():
    def draw(shape, generator=None, device=None, dtype=None, **_):
        generator = generator[0] if isinstance(generator, list) else generator
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return instead(pipeline_vaeplus, "randn_tensor", draw)


@mistake("generator", "the noise of a step comes from the device's own generator", "resume")
def global_generator():
    return after(randomness.Noise, "draw", lambda noise, *_: torch.randn_like(noise))


# ------------------------------------------------------------------------------------------------------------ float64


@mistake("float64", "logged scalars are summed in float64 on the device", "second_stage")
def float64_scalars():
    return after(loop, "_is_scalar", lambda scalar, value: scalar and value.double() is not None)


@mistake("float64", "the pull-back metric is summed in float64 on the device", "stages")
def float64_metric():
    return after(VAEPlusAutoencoderModel, "decode", lambda images, *_: images.double().float())


@mistake("float64", "the spectrum is taken in float64 on the device", "stages")
def float64_spectrum():
    def changed(self, batches, max_gain=20.0):
        for pixels in batches:
            torch.fft.rfft2(pixels.double())

    return instead(VAEPlusAutoencoderModel, "match_spectrum", changed)


@mistake("float64", "the MMD of a WAE is computed in float64 whatever the device", "wasserstein")
def float64_mmd():
    return instead(mmd, "_widest_float", lambda device: torch.float64)


@mistake("float64", "likelihoods are summed in float64 on the device", "pipeline")
def float64_likelihood():
    return after(pipeline_vaeplus, "_log_gamma", lambda value, vae: value.double())


# --------------------------------------------------------------------------------------------------------------- wait


@mistake("wait", "the loss is read in every step", "second_stage")
def item_of_the_loss():
    return after(VAEPlusVAEModel, "forward", lambda output, *_: (output.loss.item(), output)[1])


@mistake("wait", "the norm of the gradient decides on the host whether to clip", "second_stage")
def norm_decides():
    return after(loop, "_clip_gradients", lambda norm, *_: (bool(norm > 1.0), norm)[1])


@mistake("wait", "the values of a step are copied to the host at once", "second_stage")
def values_at_once():
    return instead(loop, "_to_host", lambda values: (values.cpu(), None))


@mistake("wait", "the host looks at the step that it has just launched", "second_stage")
def looks_too_early():
    return after(loop._Run, "__init__", lambda _, run, *__: setattr(run, "looks_at_once", True))


@mistake("wait", "a batch of pictures is copied from memory that is not pinned", "stages")
def not_pinned():
    return after(loop, "_loader", lambda loader, *_: ({k: v.clone() for k, v in batch.items()} for batch in loader))


@mistake("wait", "indices of rows go to the device one batch at a time", "second_stage")
def indices_one_by_one():
    def batches(rows, indices, device):
        tensors = {name: tensor.to(device) for name, tensor in rows.tensors.items()}
        return ({name: tensor[torch.tensor(each).to(device)] for name, tensor in tensors.items()} for each in indices)

    return instead(loop, "resident_batches", batches)


@mistake("wait", "the device is synchronised in every step", "second_stage")
def synchronised():
    def synchronise(*_):
        event = torch.Event(device="simgpu")
        event.record()
        event.synchronize()

    return after(loop._Run, "_update", synchronise)


@mistake("wait", "a mask selects rows", "second_stage")
def mask():
    return after(VAEPlusVAEModel, "decode", lambda mean, *_: (mean[mean > 0], mean)[1])


@mistake("wait", "Python compares two tensors", "second_stage")
def comparison():
    return after(VAEPlusVAEModel, "decode", lambda mean, *_: (torch.equal(mean, mean + 1), mean)[1])


# -------------------------------------------------------------------------------------------------------------- state


@mistake("state", "the optimizer is made before the model moves", "stages")
def optimizer_too_early():
    original = loop._optimizer
    return instead(loop, "_optimizer", lambda model, options: original(copy.deepcopy(model), options))


@mistake("state", "a step that is not finite changes the weights", "divergence")
def update_of_nan():
    def update(run, grad_norm):
        run.state.optimizer.step()

    return instead(loop._Run, "_update", update)


@mistake("state", "buffers of the step before are not copied", "divergence")
def buffers_not_copied():
    return instead(loop._Run, "_buffers_now", lambda run: list(run.buffers))


@mistake("state", "the moving average takes up a step that nobody has looked at", "divergence")
def average_too_early():
    def changed(result, run, *_):
        loop._update_average(run.averages, run.parameters, run.step, run.options.ema_decay)

    return after(loop._Run, "_update", changed)


@mistake("state", "a checkpoint is loaded on the CPU and kept there", "resume")
def resumed_on_cpu():
    return after(loop.TrainingState, "load", lambda _, state, *__: state.model.to("cpu"))


# ------------------------------------------------------------------------------------------------------------ message

TWO = "two_processes"


@mistake("message", "scalars of the CPU are gathered", TWO)
def gathers_of_the_cpu():
    def mean(run, values):
        gathered = run.accelerator.gather(values.view(torch.int32).cpu())
        return gathered.view(torch.float64).reshape(-1, len(values)).mean(0)

    return instead(loop._Run, "_mean_over_processes", mean)


@mistake("message", "float64 is sent from a device without it", TWO)
def sends_float64():
    def mean(run, values):
        return run.accelerator.reduce(values.to(run.accelerator.device), "mean").cpu()

    return instead(loop._Run, "_mean_over_processes", mean)


@mistake("message", "the step of a checkpoint is compared on the CPU", TWO)
def compares_on_cpu():
    original = shared_folder.torch.tensor
    return instead(shared_folder.torch, "tensor", lambda data, device=None, **more: original(data, **more))


@mistake("message", "each process has an analytic gamma of its own", TWO)
def gamma_of_its_own():
    return instead(torch.distributed, "all_reduce", lambda *_, **__: None)


@mistake("message", "a learned gamma that no loss uses is waited for", TWO)
def unused_parameter():
    return after(stages, "WAEMMDModel", lambda model, *_: (model.log_gamma.requires_grad_(True), model)[1])
