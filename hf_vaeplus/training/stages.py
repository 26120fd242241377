"""The stages of VAE+: what each trains on and how its batch becomes the arguments of `forward`.

    autoencoder    x -> autoencoder                                               ||x - xhat||^2
    vae            x -> code of the autoencoder -> vae -> autoencoder (frozen)    nll of images + kl
                   or, to second order, without the decoder: code -> vae -> code  nll by the pull-back metric + kl
    second_stage   x -> posterior of the vae -> z = mu + sigma eps, fresh each step -> second VAE    nll of z + kl
                   or another model of z, or without a first VAE of the codes; a mixture is fitted without the loop
    detail         x -> code -> mean and features of the decoder (frozen) -> two draws    energy score of local views

With labels (`--label_column`) a second stage is conditional: some labels are withheld at each step, which trains its
null class. Codes and posteriors are computed once per data set and kept beside the image cache.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.utils.data import IterableDataset

from ..data.cache import open_cache
from ..data.labels import Labels, read_labels
from ..data.options import ImageOptions
from ..data.pixels import refuse_images_that_teach_nothing, to_unit_range
from ..data.sources import cache_folder
from ..data.stream import open_stream
from ..files import sole_run, sole_use, write_json
from ..hub.client import BackgroundPush
from ..image_processing_vaeplus import VAEPlusImageProcessor
from ..metrics.latents import PosteriorStatistics
from ..modeling_baselines import WAEMMDModel
from ..modeling_detail import (
    PATCH,
    SEEN,
    VAEPlusDetailConfig,
    VAEPlusDetailModel,
    pixel_views,
    random_directions,
    random_square,
    seen_side,
    square_of,
    square_sides,
)
from ..modeling_priors import (
    VAEPlusCouplingFlowModel,
    VAEPlusFlowMatchingModel,
    VAEPlusMixtureConfig,
    VAEPlusMixtureModel,
    VAEPlusPriorConfig,
)
from ..modeling_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusPreTrainedModel,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from ..pictures import image_grid
from ..progress import tqdm
from ..provenance import folder_fingerprint, weights_fingerprint
from .arithmetic import arithmetic_of, fit_to_machine
from .backbones import open_backbone
from .checkpoints import checkpoint_step, list_checkpoints, save_model
from .codes import EncodedImages, TensorRows, encode_dataset, load_frozen
from .launch import process_state
from .loop import Stage, train
from .options import RECORD, STAGES, StageOptions, check_preset, goes_on, read_record, run_record, stage_options
from .randomness import BatchNoise, Noise, derived_seed

logger = logging.getLogger(__name__)

# Second stages with a density, by the name that `--second_stage` gives them.
PRIORS = {
    "flow_matching": VAEPlusFlowMatchingModel,
    "coupling_flow": VAEPlusCouplingFlowModel,
    "mixture": VAEPlusMixtureModel,
}


def run_stage(options: StageOptions, images=None) -> VAEPlusPreTrainedModel:
    """Train one stage as [`StageOptions`] says; see [`~hf_vaeplus.training.loop.train`] for what it leaves and raises.

    Args:
        options: of the stage.
        images (*optional*): what `open_images(options)` returned, to open the source once for several stages.
    """
    options = fit_to_machine(options)  # before the data is read
    with arithmetic_of(options):  # codes and posteriors as well
        stage = build_stage(options, images)
        return fit_mixture(stage, options) if options.second_stage == "mixture" else train(stage, options)


def build_stage(options: StageOptions, images=None) -> Stage:
    """The stage that [`~hf_vaeplus.training.loop.train`] trains with the same options; arguments as of `run_stage`."""
    images = _open_to_train(options) if images is None else images
    torch.manual_seed(derived_seed(options.seed, 2))  # the initial weights
    build = {
        "autoencoder": _autoencoder_stage, "vae": _vae_stage, "second_stage": _second_stage, "detail": detail_stage
    }[options.stage]  # fmt: skip
    if options.second_stage != "vae":
        build = _prior_stage
    return build(options, images)


def _made_from(images, labels: Labels | None = None, **earlier: VAEPlusPreTrainedModel | None) -> dict[str, str]:
    """What identifies the images, labels and stages that a stage is trained on, wherever they lie."""
    stages = {stage: weights_fingerprint(model.state_dict()) for stage, model in earlier.items() if model is not None}
    return {"images": images.fingerprint, **_fingerprint_of_labels(labels), **stages}


def _fingerprint_of_labels(labels: Labels | None) -> dict[str, str]:
    return {} if labels is None else {"labels": labels.fingerprint}


def _labels(options: StageOptions, images) -> Labels | None:
    return None if options.label_column is None else read_labels(images, options.label_column)


def train_all(preset: dict, output_dir: Path, **overrides) -> tuple:
    """Train the stages one after the other and save the pipeline; `detail` where the preset has a section for it.

    Each stage has its own folder: the `output_dir` of its section of the preset, or else a folder in `output_dir`.

    Stages that are trained already are not trained again; one that was interrupted goes on. One whose images or
    earlier stages have changed since is refused, or trained anew if `retrain` is set.

    Args:
        preset: see `load_preset`.
        overrides: options for every stage.

    Returns:
        The pipeline, and the options of each stage.

    Raises:
        ValueError: unknown sections, options or model fields, checked for all stages before the first one trains.
    """
    options = all_stage_options(preset, output_dir, **overrides)
    return train_stages(options, open_stage_images(options), output_dir), options


def train_stages(options: dict[str, StageOptions], images: dict, output_dir: Path):
    """The work of `train_all`: from the options and the images of each stage to the saved pipeline, which it returns.

    Raises:
        ValueError: unknown model fields, other options than those of a stage that is there, or a stage whose images
            or earlier stages have changed or are to be trained on: checked before the first one trains.
    """
    autoencoder = _autoencoder_config(options["autoencoder"], images["autoencoder"])
    vae = _vae_config(options["vae"], autoencoder)
    labels = _labels(options["second_stage"], images["second_stage"])
    second_stage = _second_stage_config(options["second_stage"], vae, labels)
    configs = {"autoencoder": autoencoder, "vae": vae, "second_stage": second_stage}
    if "detail" in options:
        configs["detail"] = _detail_config(options["detail"], autoencoder)
        if options["detail"].feature_loss:  # refused now, not after hours
            open_backbone(options["detail"].feature_loss, seen_side(autoencoder.image_size))
    _look_ahead(options, images, configs, labels)
    output_dir.mkdir(parents=True, exist_ok=True)
    models = {stage: run_stage(options[stage], images[stage]) for stage in options}
    _check_that_stages_fit(options)
    pipe = build_pipeline(options["second_stage"], models["second_stage"], models.get("detail"))
    for model in (pipe.autoencoder, pipe.vae, pipe.second_stage, pipe.detail):
        _lay_out_as_loaded(model)
    if process_state().is_main_process:
        channels, size, _ = pipe.image_shape
        pipe.image_processor = VAEPlusImageProcessor(size, channels, options["autoencoder"].source_crop)
        pipe.save_pretrained(output_dir / "pipeline")
    return pipe


def _lay_out_as_loaded(model: torch.nn.Module | None):
    """Some processors sum in another order where the channels of a weight come last, as they do in training."""
    for parameter in model.parameters() if model is not None else ():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _before(stage: str) -> tuple[str, ...]:
    """The stages that a stage is built on."""
    return ("autoencoder",) if stage == "detail" else STAGES[: STAGES.index(stage)]


def _look_ahead(options: dict[str, StageOptions], images: dict, configs: dict, labels: Labels | None):
    """Raises ValueError now for what a later stage would be refused for after the earlier ones have trained."""
    to_come = {}  # stage -> what training will do to its weights
    for stage, each in options.items():
        folder, checkpoints = Path(each.output_dir), list_checkpoints(each.output_dir)
        if not checkpoints:
            to_come[stage] = "from its start"
            continue
        earlier = [name for name in _before(stage) if getattr(each, name)]
        if changing := [name for name in earlier if name in to_come]:
            if not each.retrain:
                raise ValueError(
                    f"{changing[0]} is to be trained {to_come[changing[0]]}, and {folder} was trained on it as it was:"
                    f" add --retrain to train {stage} anew after it, or choose another --output_dir."
                )
            to_come[stage] = "anew"
            continue
        made_from = {name: read_record(Path(getattr(each, name))).get("weights") for name in earlier}
        made_from |= _fingerprint_of_labels(labels if stage == "second_stage" else None)
        record = run_record(each, process_state().num_processes, {"images": images[stage].fingerprint, **made_from})
        passes_count = getattr(configs[stage], "gamma", None) == "analytic"
        if not goes_on(folder, read_record(checkpoints[-1]), record, each.retrain, passes_count):
            to_come[stage] = "anew"
        elif _steps_done(folder, checkpoints) < each.max_train_steps:
            to_come[stage] = f"to {each.max_train_steps:,} steps"


def _steps_done(folder: Path, checkpoints: list[Path]) -> int:
    """Steps behind the model in `folder`; 0 if there is none."""
    record = read_record(folder)
    if "weights" in record:
        return record["max_train_steps"]
    return checkpoint_step(checkpoints[-1]) if (folder / "model.safetensors").exists() else 0  # an earlier version's


def _check_that_stages_fit(options: dict[str, StageOptions]):
    """Raises ValueError unless each stage was trained on the earlier ones as they are now."""
    folders = {stage: Path(each.output_dir) for stage, each in options.items()}
    weights = {stage: folder_fingerprint(folder) for stage, folder in folders.items()}
    for stage, folder in folders.items():
        for name, known in read_record(folder)["made_from"].items():
            if name in weights and known != weights[name]:
                raise ValueError(
                    f"{folders[name]} has changed while {stage} was trained on it, so they are no pipeline: add"
                    f" --retrain to train {stage} anew."
                )


def all_stage_options(preset: dict, output_dir: Path, **overrides) -> dict[str, StageOptions]:
    """The options with which `train_all` trains each stage; arguments and errors as there."""
    check_preset(preset, "the preset")
    stages = (*STAGES, "detail") if "detail" in preset else STAGES
    folders = {stage: preset.get(stage, {}).get("output_dir", str(output_dir / stage)) for stage in stages}
    options = {}
    for stage in stages:
        earlier = {before: folders[before] for before in _before(stage)}
        fixed = {"output_dir": folders[stage], "resume_from_checkpoint": "latest", "hub_subfolder": stage}
        if stage != "second_stage":  # of a preset's `common`, or of a flag for all stages
            fixed |= {"second_stage": "vae", "label_column": None}
        options[stage] = fit_to_machine(stage_options(stage, preset, **{**overrides, **earlier, **fixed}))
    if len(set(folders.values())) < len(stages):
        raise ValueError(f"each stage needs an output_dir of its own, got {', '.join(folders.values())}.")
    return options


def open_stage_images(options: dict[str, StageOptions]) -> dict:
    """The images that each stage trains on. Stages that train on the same images share them: opened once."""
    opened, images = {}, {}
    for stage, each in options.items():
        wanted = [getattr(each, entry.name) for entry in fields(ImageOptions)]
        key = repr((wanted, each.cache_dir, each.streaming, each.seed if each.streaming else None))
        if key not in opened:
            opened[key] = _open_to_train(each)
        images[stage] = opened[key]
    return images


def _open_to_train(options: StageOptions):
    images = open_images(options)
    refuse_images_that_teach_nothing(images)
    return images


def open_images(options: StageOptions, split: str | None = None):
    """The images that `options` name, cached or streamed; of another split if given (never mirrored then)."""
    if split is not None:
        holdout = options.holdout if split.endswith("seen]") else 0
        options = replace(
            options, split=split, max_train_samples=None, random_flip=False, streaming=False, holdout=holdout
        )
    wanted = repr([getattr(options, entry.name) for entry in fields(ImageOptions)])
    # One process after the other: the first decodes, hashes and downloads. The others wait for its lock however long
    # that takes; at a barrier they could wait no longer than the process group's timeout.
    several = process_state().num_processes > 1
    with sole_use(cache_folder(options.cache_dir), wanted) if several else nullcontext():
        if options.streaming:
            return open_stream(options, options.cache_dir, options.seed)
        return open_cache(options, options.cache_dir)


def with_holdout(preset: dict, output_dir: Path, default: float | int | None = None, **overrides) -> dict:
    """The preset; for a folder or files of one's own, of which it names no share to hold out, with `default`.

    A run that is there goes on with what it held out; one of an earlier version held nothing out.
    """
    layers = [*preset.values(), overrides]
    options = all_stage_options(preset, output_dir, **overrides)
    are_own = all(
        each.dataset_name is None and (each.train_data_dir or each.train_data_files) and not each.streaming
        for each in options.values()
    )
    records = [
        read_record(folder) or (read_record(checkpoints[-1]) if (checkpoints := list_checkpoints(folder)) else {})
        for folder in (Path(each.output_dir) for each in options.values())
    ]
    if not are_own or any("holdout" in layer for layer in layers):
        return preset
    there = [record.get("holdout", 0) for record in records if record]
    return {**preset, "common": {**preset.get("common", {}), "holdout": there[0] if there else default}}


def seen_in_training(images, training_images, options: StageOptions) -> str:
    """Whether a model was trained on images: "seen", "unseen" or "partly seen".

    Images of another split count as unseen, also if the split holds copies of training images.

    Args:
        images ([`~hf_vaeplus.data.cache.ImageDataset`]): of the same source.
        training_images: cached or a stream; options: with which they were opened.
    """
    if images.split.partition("[")[0] != options.split.partition("[")[0]:
        return "unseen"
    if isinstance(training_images, IterableDataset):
        known = images.numbers < (options.max_train_samples or math.inf)
    else:
        known = np.isin(images.numbers, training_images.numbers)
    return "seen" if known.all() else "partly seen" if known.any() else "unseen"


def _autoencoder_config(options: StageOptions, images) -> VAEPlusAutoencoderConfig:
    shape = dict(image_size=images.resolution, num_channels=images.num_channels)
    return VAEPlusAutoencoderConfig(**{**shape, **options.model})


def _vae_config(options: StageOptions, autoencoder: VAEPlusAutoencoderConfig) -> VAEPlusVAEConfig:
    settings = dict(input_shape=(autoencoder.latent_dim,), reconstruction_space="image") | options.model
    if settings["reconstruction_space"] == "pullback":
        settings.setdefault("target_dim", autoencoder.num_channels * autoencoder.image_size**2)
    return VAEPlusVAEConfig(**settings)


def _second_stage_config(
    options: StageOptions, vae: VAEPlusVAEConfig, labels: Labels | None = None
) -> VAEPlusVAEConfig | VAEPlusPriorConfig:
    if options.second_stage != "vae":
        return _prior_config(options, vae.latent_dim, labels=labels)
    # q(z) has about unit variance: gamma must start well below it, or no direction survives.
    defaults = dict(input_shape=(vae.latent_dim,), latent_dim=vae.latent_dim, gamma="learned", gamma_init=0.1)
    return VAEPlusVAEConfig(**{**defaults, **_condition_of(labels), **options.model})


def _condition_of(labels: Labels | None) -> dict:
    """Fields of a second stage's config."""
    return {} if labels is None else labels.config


def _prior_config(
    options: StageOptions, latent_dim: int, active_dims: list[int] | None = None, labels: Labels | None = None
) -> VAEPlusPriorConfig:
    settings = dict(latent_dim=latent_dim, active_dims=active_dims, **_condition_of(labels)) | options.model
    if options.second_stage == "mixture":  # a preset's sizes of networks
        settings = {name: value for name, value in settings.items() if name not in ("hidden_dim", "num_blocks")}
    if options.second_stage == "flow_matching" and not options.distillation_share:
        settings["distillation_steps"] = 0
    config = PRIORS[options.second_stage].config_class(**settings)
    if options.second_stage == "mixture" and labels is not None:
        for place, each in enumerate(config.label_ids):
            _refuse_few(config, int((labels.values == place).sum()), f" of {config.id2label[each]!r}")
    return config


def _refuse_few(config: VAEPlusMixtureConfig, count: int, of_class: str = ""):
    if count < 2 * config.num_components:
        raise ValueError(
            f"a mixture of {config.num_components} Gaussians needs at least twice as many images{of_class}, got"
            f" {count}: take fewer with --model num_components=..."
        )


def _autoencoder_stage(options: StageOptions, images) -> Stage:
    model = VAEPlusAutoencoderModel(_autoencoder_config(options, images))

    def prepare(batch, noise, step):
        return {"pixel_values": to_unit_range(batch["pixel_values"])}

    def finish(trained):
        trained.match_spectrum(_some_images(images, trained.device))

    finishing = finish if options.match_spectrum else None
    return Stage(model, images, prepare, _previewer(options, images), finishing, _made_from(images))


def _vae_stage(options: StageOptions, images) -> Stage:
    if options.autoencoder is None:  # a VAE straight on pixels: the baselines, and small images
        shape = dict(input_shape=(images.num_channels, images.resolution, images.resolution), network="conv")
        model_class = WAEMMDModel if options.mmd_weight else VAEPlusVAEModel
        model = model_class(VAEPlusVAEConfig(**{**shape, **options.model}))
        half = torch.full_like(model.input_mean, 0.5)
        model.set_input_statistics(mean=half, std=half)  # the network sees [-1, 1]

        def prepare(batch, noise, step):
            inputs = {"inputs": to_unit_range(batch["pixel_values"]), "noise": noise(model.config.latent_dim)}
            if options.mmd_weight:
                return {**inputs, "mmd_weight": options.mmd_weight}
            return {**inputs, "kl_weight": _kl_weight(options, step)}

        return Stage(model, images, prepare, _previewer(options, images), made_from=_made_from(images))

    autoencoder = load_frozen(VAEPlusAutoencoderModel, options.autoencoder)
    config = _vae_config(options, autoencoder.config)
    model = VAEPlusVAEModel(config)
    through_decoder = config.reconstruction_space == "image"
    if isinstance(images, IterableDataset):
        dataset = images
        images.set_position(0, 1024)
        codes = autoencoder.encode(to_unit_range(next(iter(images))["pixel_values"]).to(autoencoder.device))
    else:
        codes = encode_dataset(images, autoencoder, autoencoder.encode)
        dataset = EncodedImages(images, {"code": codes}) if through_decoder else TensorRows({"code": codes})
    # A code that never moves has no scale of its own: it gets a thousandth of the others'.
    std = codes.std(0)
    model.set_input_statistics(codes.mean(0).cpu(), std.clamp(min=1e-3 * std.mean()).cpu())
    if config.reconstruction_space == "pullback":
        model.set_pullback_metric(*_pullback_metric(autoencoder, images, codes, options))

    def prepare(batch, noise, step):
        pixels = to_unit_range(batch["pixel_values"]) if "pixel_values" in batch else None
        inputs = {"inputs": batch["code"] if "code" in batch else autoencoder.encode(pixels)}
        if through_decoder:
            inputs.update(targets=pixels, target_decoder=autoencoder.decode)
        return {**inputs, "noise": noise(config.latent_dim), "kl_weight": _kl_weight(options, step)}

    made_from = _made_from(images, autoencoder=autoencoder)
    return Stage(model, dataset, prepare, _previewer(options, images), made_from=made_from)


@torch.no_grad()
def _pullback_metric(autoencoder, images, codes, options: StageOptions) -> tuple[torch.Tensor, float]:
    """The metric of the autoencoder's decoder, a mean over codes spread over `codes`, and its own squared error."""
    count, device = options.pullback_codes, autoencoder.device
    chosen = codes[:: max(1, len(codes) // count)][:count].to(device)
    metric, error, seen = 0.0, 0.0, 0
    with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
        for part in tqdm(chosen.split(4), desc="metric", leave=False, disable=not process_state().is_main_process):
            metric = metric + autoencoder.pullback_metric(part) * (len(part) / len(chosen))
        for pixels in _some_images(images, device, 500):
            error, seen = error + float(autoencoder(pixels).loss) * len(pixels), seen + len(pixels)
    return metric, error / seen


def _second_stage(options: StageOptions, images) -> Stage:
    vae = load_frozen(VAEPlusVAEModel, options.vae)
    autoencoder = load_frozen(VAEPlusAutoencoderModel, options.autoencoder) if options.autoencoder else None
    labels = _labels(options, images)
    made_from = _made_from(images, labels, autoencoder=autoencoder, vae=vae)
    known = read_record(Path(options.vae)).get("made_from", {}).get("autoencoder", made_from.get("autoencoder"))
    if known != made_from.get("autoencoder"):
        raise ValueError(
            f"{options.vae} was trained on another autoencoder than {options.autoencoder}: name the one that it was"
            " trained on with --autoencoder, or train the first VAE anew."
        )
    latent_dim = vae.config.latent_dim
    model = VAEPlusVAEModel(_second_stage_config(options, vae.config, labels))
    if labels is not None:
        model.condition_features.set_statistics(labels.values)

    def statistics(inputs):
        posterior = vae.encode(inputs)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def with_std(statistics):
        mean, logvar = statistics.chunk(2, dim=1)
        return torch.cat([mean, (0.5 * logvar).exp()], dim=1)

    dataset, rows = images, None
    if not isinstance(images, IterableDataset):
        if autoencoder is None:
            rows = encode_dataset(images, vae, statistics)
        else:  # from the codes that the first VAE was trained on
            codes = encode_dataset(images, autoencoder, autoencoder.encode)
            with torch.no_grad():
                rows = torch.cat([statistics(part.to(vae.device)).cpu() for part in codes.split(4096)])
        dataset = TensorRows({"posterior": with_std(rows), **_rows_of_labels(labels)})

    @torch.no_grad()
    def finish(trained):
        if rows is None:
            parts = _some_images(images, vae.device)
            posteriors = (statistics(part if autoencoder is None else autoencoder.encode(part)) for part in parts)
        else:
            posteriors = [rows]
        moments = PosteriorStatistics(latent_dim)  # of q(z)
        for each in posteriors:
            moments.update(*each.chunk(2, dim=1))
        generator = torch.Generator().manual_seed(derived_seed(options.seed, 5))
        conditions = None if labels is None else labels.values
        trained.match_moments(
            moments.aggregate_mean(), moments.aggregate_covariance(), generator, conditions=conditions
        )

    def prepare(batch, noise, step):
        if "posterior" not in batch:
            pixels = to_unit_range(batch["pixel_values"])
            batch = {"posterior": with_std(statistics(pixels if autoencoder is None else autoencoder.encode(pixels)))}
        mean, std = batch["posterior"].chunk(2, dim=1)
        z = torch.addcmul(mean, std, noise(latent_dim))
        inputs = {"inputs": z, "noise": noise(model.config.latent_dim), "kl_weight": _kl_weight(options, step)}
        return inputs | _condition(batch, noise, options)

    finishing = finish if options.match_moments else None
    return Stage(model, dataset, prepare, _previewer(options, images), finishing, made_from)


def _rows_of_labels(labels: Labels | None) -> dict[str, torch.Tensor]:
    return {} if labels is None else {"condition": labels.values}


def _condition(batch: dict, noise: BatchNoise, options: StageOptions) -> dict[str, torch.Tensor]:
    """The labels of a batch as an argument of `forward`, some of them withheld; nothing without labels.

    Of attributes and factors as many rows again lose each value with a probability of one half: the model learns what
    follows from some of them.
    """
    if "condition" not in batch:
        return {}
    condition, draw = batch["condition"], noise(1)
    # The noise is below these bounds with probabilities of `label_dropout` and twice that.
    shares = torch.tensor([1.0, 2.0], dtype=torch.float64) * options.label_dropout
    all_below, some_below = torch.special.ndtri(shares.clamp(max=1)).tolist()
    if not condition.is_floating_point():
        return {"condition": condition.masked_fill(draw[:, 0] < all_below, -1)}
    some = (noise(condition.shape[1]) < 0) & (draw < some_below)
    return {"condition": condition.masked_fill((draw < all_below) | some, math.nan)}


def _prior_stage(options: StageOptions, images) -> Stage:
    """A second stage with a density: of the latents of the first VAE or, without one, of the autoencoder's codes."""
    vae = load_frozen(VAEPlusVAEModel, options.vae) if options.vae else None
    autoencoder = load_frozen(VAEPlusAutoencoderModel, options.autoencoder) if options.autoencoder else None
    latent_dim = (autoencoder if vae is None else vae).config.latent_dim
    labels = _labels(options, images)
    _prior_config(options, latent_dim, labels=labels)  # what it refuses, it refuses before the images are encoded

    @torch.no_grad()
    def posterior(pixels=None, codes=None):
        """Mean and log-variance side by side; a code is exact: its variance is exp(-1000), which is 0."""
        if codes is None:
            codes = pixels if autoencoder is None else autoencoder.encode(pixels)
        if vae is None:
            return torch.cat([codes, torch.full_like(codes, -1000.0)], dim=1)
        found = vae.encode(codes)
        return torch.cat([found.mean, found.logvar], dim=1)

    dataset, rows = images, None
    if not isinstance(images, IterableDataset):
        if autoencoder is None:
            rows = encode_dataset(images, vae, posterior)
        else:  # from the codes that the first VAE was trained on
            codes = encode_dataset(images, autoencoder, autoencoder.encode)
            rows = torch.cat([posterior(codes=part.to(autoencoder.device)).cpu() for part in codes.split(4096)])
        dataset = TensorRows({"posterior": rows, **_rows_of_labels(labels)})

    moments = PosteriorStatistics(latent_dim)  # of q(z)
    for each in (
        [rows] if rows is not None else (posterior(part) for part in _some_images(images, process_state().device))
    ):
        moments.update(*each.chunk(2, dim=1))
    active_dims = None
    if vae is not None and options.active_threshold:
        # The sum of these KLs bounds what it costs, in nats, to take these dimensions for N(0, I) and independent.
        active_dims = (moments.kl_per_dimension() >= options.active_threshold).nonzero().flatten().tolist()
        if not active_dims:
            raise ValueError(
                f"no latent dimension of {options.vae} has a KL of {options.active_threshold} nats: this VAE has"
                " collapsed, train it anew."
            )
    made_from = _made_from(images, labels, autoencoder=autoencoder, vae=vae)
    stage = prior_stage(
        options, dataset, moments, active_dims, lambda batch: posterior(to_unit_range(batch["pixel_values"])), labels
    )
    return replace(stage, preview=_previewer(options, images), made_from=made_from)


def prior_stage(
    options: StageOptions,
    dataset,
    moments: PosteriorStatistics,
    active_dims: list[int] | None = None,
    posterior: Callable[[dict], torch.Tensor] | None = None,
    labels: Labels | None = None,
) -> Stage:
    """A second stage with a density, of latents that lie ready.

    Args:
        options: `second_stage` and what belongs to it.
        dataset: rows `posterior`: mean and log-variance of z side by side, `2 * latent_dim` numbers; with labels also
            rows `condition`, their values.
        moments: of all posteriors.
        active_dims: the dimensions that are learned; all if not given.
        posterior: makes such rows of the batches of a data set of another kind.
        labels: what the second stage is conditioned on.
    """
    latent_dim = len(moments.aggregate_mean())
    active_dims = active_dims if active_dims != list(range(latent_dim)) else None
    config = _prior_config(options, latent_dim, active_dims, labels)
    torch.manual_seed(derived_seed(options.seed, 2))  # once more: encoding has drawn numbers, or the cache spared them
    model = PRIORS[options.second_stage](config)
    model.set_input_moments(moments.aggregate_mean(), moments.aggregate_covariance())
    if labels is not None:
        model.condition_features.set_statistics(labels.values)
    turn = None
    if options.second_stage == "flow_matching" and config.distillation_steps:

        def start_distillation(model, trained):
            model.start_distillation(trained)
            trained.start_distillation(trained)

        first = round(options.max_train_steps * (1 - options.distillation_share))
        turn = min(first, options.max_train_steps - 1), start_distillation  # a run of two steps has both phases

    def finish(trained):
        generator = torch.Generator().manual_seed(derived_seed(options.seed, 5))
        trained.match_moments(generator, conditions=None if labels is None else labels.values)

    def latents(batch, noise):
        mean, logvar = (batch["posterior"] if "posterior" in batch else posterior(batch)).chunk(2, dim=1)
        return torch.addcmul(mean, (0.5 * logvar).exp(), noise(latent_dim))

    def prepare(batch, noise, step):
        if options.second_stage != "flow_matching":
            return {"inputs": latents(batch, noise), **_condition(batch, noise, options)}
        if turn is not None and step >= turn[0]:
            return {"noise": noise(latent_dim), **_condition(batch, noise, options)}
        inputs = {"inputs": latents(batch, noise), "noise": noise(latent_dim), "times": noise(1).sigmoid()}
        return inputs | _condition(batch, noise, options)

    finishing = finish if turn is not None and options.match_moments else None
    return Stage(model, dataset, prepare, finish=finishing, turn=turn)


def _detail_config(options: StageOptions, autoencoder: VAEPlusAutoencoderConfig) -> VAEPlusDetailConfig:
    shape = {name: getattr(autoencoder, name) for name in ("image_size", "num_channels", "patch_size")}
    return VAEPlusDetailConfig(**{**shape, "feature_dim": autoencoder.hidden_channels[0], **options.model})


def detail_stage(options: StageOptions, images, backbone: nn.Module | None = None) -> Stage:
    """Detail beyond the mean of a trained autoencoder's decoder, see [`VAEPlusDetailModel`].

    Args:
        options, images: as of `run_stage`.
        backbone (*optional*): images in [0, 1] -> feature maps, in place of that of `feature_loss`: any frozen module
            that gradients pass through.
    """
    autoencoder = load_frozen(VAEPlusAutoencoderModel, options.autoencoder)
    device, made_from = autoencoder.device, _made_from(images, autoencoder=autoencoder)
    if backbone is None and options.feature_loss:
        backbone = open_backbone(options.feature_loss, seen_side(autoencoder.config.image_size))
    if backbone is not None:
        backbone = backbone.to(device, memory_format=torch.channels_last)
        made_from["feature_loss"] = weights_fingerprint(backbone.state_dict())
    dataset = images
    if not isinstance(images, IterableDataset):
        dataset = EncodedImages(images, {"code": encode_dataset(images, autoencoder, autoencoder.encode)})
    torch.manual_seed(derived_seed(options.seed, 2))  # once more: encoding has drawn numbers, or the cache spared them
    model = VAEPlusDetailModel(_detail_config(options, autoencoder.config))
    shape, sides = model.config.noise_shape, square_sides(model.config.image_size)

    def raw_views(square):
        return pixel_views(square) + ([] if backbone is None else backbone(square))

    with torch.no_grad():  # every channel of every view counts alike
        some, moments = torch.cat(list(_some_images(images, device, 250))), {}
        for side in sides:
            start = (model.config.image_size - side) // 2
            moments[side] = [
                (view.mean((0, 2, 3), keepdim=True), view.std((0, 2, 3), keepdim=True).clamp(min=1e-3))
                for view in raw_views(square_of(some, side, start, start))
            ]
    num_patches = len(pixel_views(square_of(some[:1], sides[0], 0, 0)))
    shapes = [(mean.shape[1], PATCH if at < num_patches else 1) for at, (mean, _) in enumerate(moments[sides[0]])]

    def views(square, pixels):
        raw = raw_views(square_of(pixels, *square))
        return [(view - mean) / std for view, (mean, std) in zip(raw, moments[square[0]], strict=True)]

    def prepare(batch, noise, step):
        pixels = to_unit_range(batch["pixel_values"])
        mean, features = autoencoder.decode_with_features(
            batch["code"] if "code" in batch else autoencoder.encode(pixels)
        )
        generator = torch.Generator().manual_seed(derived_seed(options.seed, 9, step))  # the same in every process
        # Views see a larger image shrunk. In the first half of the steps they see it whole: large shapes come first.
        coarse = model.config.image_size > SEEN and step < options.max_train_steps / 2
        square = random_square(model.config.image_size, generator, whole=coarse)
        return {
            "features": features,
            "mean": mean,
            "noise": noise(2 * math.prod(shape)).view(-1, 2, *shape),
            "pixel_values": pixels,
            "directions": random_directions(shapes, options.num_directions, generator, device),
            "views": partial(views, square),
        }

    return Stage(model, dataset, prepare, _previewer(options, images), made_from=made_from)


def fit_mixture(stage: Stage, options: StageOptions) -> VAEPlusMixtureModel:
    """Fit the mixture of `stage` by scikit-learn, in float64, to one z per image, and save it as `train` would.

    One that is there already, made of the same with the same options, is taken as it is.

    Raises:
        FileExistsError: another process is at work there.
        ValueError: a mixture that was made with other options, or of other images or stages; fewer z than Gaussians.
    """
    state, folder, model = process_state(), Path(options.output_dir), stage.model
    record = {**run_record(options, state.num_processes, stage.made_from), "max_train_steps": 0}
    with sole_run(folder) if state.is_main_process else nullcontext():
        there = read_record(folder)
        stays = goes_on(folder, there, record, options.retrain) and "weights" in there
        if state.is_main_process and not (stays and there["weights"] == folder_fingerprint(folder)):
            _fit(model, stage, options)
            save_model(model, folder)
            write_json(folder / RECORD, {**record, "weights": weights_fingerprint(model.state_dict())})
        state.wait_for_everyone()
        model = load_frozen(VAEPlusMixtureModel, options.output_dir)
        if state.is_main_process:
            (folder / "samples").mkdir(exist_ok=True)
            if stage.preview is not None:
                stage.preview(model).save(folder / "samples" / "step-0000000.png")
            if options.push_to_hub:
                push = BackgroundPush(
                    options.hub_model_id, options.hub_subfolder, options.hub_private_repo, options.hub_token
                )
                push.finish(model.save_pretrained, f"{folder.name}: a mixture")
        state.wait_for_everyone()
    return model


def _fit(model: VAEPlusMixtureModel, stage: Stage, options: StageOptions):
    num_components, rows = model.config.num_components, stage.dataset.tensors["posterior"]
    _refuse_few(model.config, len(rows))
    noise = Noise(options.seed, len(rows), torch.device("cpu")).at(0, slice(len(rows)))
    y = model.whitened(stage.prepare({"posterior": rows}, noise, 0)["inputs"]).double()
    parts = [y]
    if model.config.condition is not None:  # rows without a label belong to no class
        places = stage.dataset.tensors["condition"]
        parts = [y[places == place] for place in range(len(model.config.label_ids))]
    fits = [_mixture(part, num_components, options.seed) for part in parts]
    count = sum(map(len, parts))
    weights = np.concatenate([fit.weights_ * (len(part) / count) for fit, part in zip(fits, parts, strict=True)])
    others = (np.concatenate([getattr(fit, name) for fit in fits]) for name in ("means_", "covariances_"))
    model.set_mixture(*map(torch.from_numpy, (weights, *others)))


def _mixture(y: torch.Tensor, num_components: int, seed: int) -> GaussianMixture:
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        mixture = GaussianMixture(num_components, max_iter=200, random_state=seed % 2**32).fit(y.numpy())
    if not mixture.converged_:
        logger.warning("the mixture has not converged after %d iterations: it is taken as it is", mixture.n_iter_)
    return mixture


def _some_images(images, device, count: int = 5_000) -> Iterator[torch.Tensor]:
    """Pixels in [0, 1] of images spread over the data set (of a stream: its first), by which statistics are taken."""
    if isinstance(images, IterableDataset):
        images.set_position(0, count)
        parts = next(iter(images))["pixel_values"].split(250)
    else:
        rows = torch.arange(0, len(images), max(1, len(images) // count)).split(250)
        parts = (images.batch(part.tolist())["pixel_values"] for part in rows)
    for part in tqdm(parts, desc="statistics", leave=False, disable=not process_state().is_main_process):
        yield to_unit_range(part.to(device))


def _kl_weight(options: StageOptions, step: int) -> float:
    return min(1.0, (step + 1) / options.kl_warmup_steps) if options.kl_warmup_steps else 1.0


def _previewer(options: StageOptions, images):
    """What a stage can do so far, as a picture: pairs of image and reconstruction, or samples."""
    if isinstance(images, IterableDataset):
        return None
    first = images.pixels(0, 32)
    pipeline_of = cache(partial(build_pipeline, options))  # the frozen stages are read once, not at every picture
    frozen_autoencoder = cache(partial(load_frozen, VAEPlusAutoencoderModel, options.autoencoder))
    seed = derived_seed(options.seed, 3)

    def preview(model) -> Image.Image:
        if options.stage == "detail":
            autoencoder, pixels = frozen_autoencoder(), first.to(model.device)
            mean, features = autoencoder.decode_with_features(autoencoder.encode(pixels))
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(len(first), *model.config.noise_shape, generator=generator)
            return image_grid(torch.stack([pixels, mean + model.sample(features, noise)], 1).flatten(0, 1), columns=8)
        if options.stage == "autoencoder":
            pixels = first.to(model.device)
            return image_grid(torch.stack([pixels, model(pixels).reconstruction], 1).flatten(0, 1), columns=8)
        pipe = pipeline_of(model)
        pipe.set_progress_bar_config(disable=True)
        return image_grid(pipe(64, torch.Generator().manual_seed(seed), output_type="pt").images)

    return preview


def build_pipeline(options: StageOptions, model: VAEPlusPreTrainedModel, detail: VAEPlusDetailModel | None = None):
    """The pipeline that ends with `model`, which is that of `options.stage`, and loads the stages before it."""
    from ..hub.pipeline import VAEPlusPipeline  # training the autoencoder does not need diffusers

    autoencoder = load_frozen(VAEPlusAutoencoderModel, options.autoencoder) if options.autoencoder else None
    if options.stage == "vae":
        return VAEPlusPipeline(model, autoencoder)
    vae = load_frozen(VAEPlusVAEModel, options.vae) if options.vae else None
    return VAEPlusPipeline(vae, autoencoder, model, detail)
