"""The three stages of VAE+: what each trains on and how its batch becomes the arguments of `forward`.

    autoencoder    x -> autoencoder                                               ||x - xhat||^2
    vae            x -> code of the autoencoder -> vae -> autoencoder (frozen)    nll of images + kl
                   or, to second order, without the decoder: code -> vae -> code  nll by the pull-back metric + kl
    second_stage   x -> posterior of the vae -> z = mu + sigma eps, fresh each step -> second VAE    nll of z + kl

Codes and posteriors are computed once per data set and kept beside the image cache.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache, partial
from importlib import resources
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from .checkpoints import build_once
from .data import ON_BAD_IMAGE, keep_batch, load_images, stream_images, to_unit_range
from .data import PRESETS as NAMED_DATA_SETS
from .hub import save_feature_extractor
from .modeling_baselines import WAEMMDModel
from .modeling_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusPreTrainedModel,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from .pictures import image_grid
from .training import TrainingOptions, derived_seed, option, refuse_fp16_on_cpu, train

STAGES = ("autoencoder", "vae", "second_stage")


@dataclass
class StageOptions(TrainingOptions):
    """Everything that a training run of one stage can be told: the data, the model, and [`TrainingOptions`]."""

    stage: str = option("autoencoder", "which stage to train", choices=STAGES)
    dataset_name: str | None = option(None, "rendered-faces | digits | celeba | mnist | a data set on the Hub")
    train_data_dir: str | None = option(None, "folder of pictures, parquet files named by split, or MNIST's files")
    train_data_files: str | None = option(None, "parquet files, as a glob pattern")
    split: str = option("train", "split to train on")
    dataset_revision: str | None = option(None, "branch, tag or commit of the data set on the Hub")
    image_column: str = option("image", "column that holds the pictures")
    resolution: int = option(64, "height and width of the training images in pixels")
    crop: int | None = option(None, "side of the centre crop in source pixels; default: the largest square")
    num_channels: int | None = option(None, "1 grey, 3 colour; default: what the data set has")
    num_factors: int = option(8, "r: factors that vary in rendered-faces")
    max_train_samples: int | None = option(None, "use only so many images")
    on_bad_image: str = option(
        "raise", "raise, or skip and log the pictures that cannot be used", choices=ON_BAD_IMAGE
    )
    random_flip: bool = option(False, "add every image's mirror image")
    streaming: bool = option(False, "train from the source without caching its decoded images")
    cache_dir: str | None = option(None, "where decoded images and codes are kept; default: $VAEPLUS_CACHE")
    autoencoder: str | None = option(None, "folder or Hub id of the trained autoencoder (later stages)")
    vae: str | None = option(None, "folder or Hub id of the trained first VAE (second stage)")
    pullback_codes: int = option(16, "first VAE, reconstruction_space pullback: codes that its metric is a mean of")
    kl_warmup_steps: int = option(0, "steps over which the weight of the KL term grows from 0 to 1")
    match_spectrum: bool = option(True, "autoencoder: measure, after training, what `sharpness` amplifies")
    match_moments: bool = option(True, "second stage: give its samples mean and covariance of q(z) after training")
    mmd_weight: float = option(0.0, "baseline: weight of the MMD penalty of a WAE in place of a VAE's KL term")
    model: dict = field(default_factory=dict, metadata={"help": "fields of the model's config"})

    def __post_init__(self):
        super().__post_init__()
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}.")
        if self.stage == "second_stage" and not self.vae:
            raise ValueError("the second stage needs --vae: the folder of the first VAE that it models.")
        if self.stage == "autoencoder" and (self.autoencoder or self.vae):
            raise ValueError("stage autoencoder trains from images alone: leave out --autoencoder and --vae.")
        if self.mmd_weight < 0 or self.mmd_weight and (self.stage != "vae" or self.autoencoder):
            raise ValueError(
                f"mmd_weight={self.mmd_weight} is of a WAE straight on pixels: it must not be negative, with stage vae"
                " and no --autoencoder."
            )
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image must be one of {', '.join(ON_BAD_IMAGE)}, got {self.on_bad_image!r}.")
        if self.pullback_codes < 1:
            raise ValueError(f"pullback_codes must be at least 1, got {self.pullback_codes}.")
        if self.kl_warmup_steps < 0:
            raise ValueError(f"kl_warmup_steps must not be negative, got {self.kl_warmup_steps}.")

    @property
    def source_crop(self) -> int | None:
        """The centre crop that is taken: the one asked for, or that of a data set with a short name."""
        return self.crop or NAMED_DATA_SETS.get(self.dataset_name, {}).get("crop")


def load_preset(name: str | Path) -> dict:
    """A preset by the name of one that the package carries, or by the path of a YAML file.

    Returns:
        `dict` with the options of `common` (all stages) and of each stage: `{"common": {...}, "vae": {...}, ...}`.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: not a mapping of mappings, or an unknown section or option.
    """
    carried = resources.files(__package__) / "presets"
    names = sorted(entry.name.removesuffix(".yaml") for entry in carried.iterdir() if entry.name.endswith(".yaml"))
    path = carried / f"{name}.yaml" if name in names else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no preset or file named {name}: the presets are {', '.join(names)}.")
    content = path.read_bytes()
    try:
        preset = yaml.safe_load(content)
    except Exception as error:  # PyYAML's constructors raise nearly anything
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    _check_size(preset, name)
    _check_preset(preset, name)
    return preset


def _check_size(preset, name, limit: int = 10_000):
    """A few lines of YAML can name themselves, or a billion values: what prints them would never end."""
    waiting, count = [preset], 0
    while waiting:
        item, count = waiting.pop(), count + 1
        waiting.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        if count > limit:
            raise ValueError(f"{name} holds more than {limit:,} values, expected the options of a few stages.")


def _check_preset(preset, name):
    if not isinstance(preset, dict) or not all(isinstance(section, dict) for section in preset.values()):
        raise ValueError(f"{name} must map common, {', '.join(STAGES)} to options.")
    known = [entry.name for entry in fields(StageOptions) if entry.name != "stage"]
    for section, options in preset.items():
        if section not in ("common", *STAGES):
            raise ValueError(f"{name} has a section {section!r}: expected common, {', '.join(STAGES)}.")
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f": did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"{name} sets {section}.{key}, which is no option{hint}")
        model = options.get("model", {})
        if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
            raise ValueError(f"{name} must map fields of the config to values in {section}.model, got {model!r}.")


def stage_options(stage: str, preset: dict | None = None, **overrides) -> StageOptions:
    """The options of one stage: defaults, then the preset's `common`, then its section, then `overrides`.

    Pictures that the overrides name take the place of the preset's data set.
    """
    preset = preset or {}
    layers = [preset.get("common", {}), preset.get(stage, {}), overrides]
    merged, model = {}, {}
    for layer in layers:
        merged |= layer
        model |= layer.get("model", {})
    own_pictures = overrides.get("train_data_dir") or overrides.get("train_data_files")
    if own_pictures and "dataset_name" not in overrides and merged.get("dataset_name") not in NAMED_DATA_SETS:
        merged["dataset_name"] = None
    return StageOptions(**{**merged, "stage": stage, "model": model})


def run_stage(options: StageOptions) -> VAEPlusPreTrainedModel:
    """Train one stage as [`StageOptions`] says; see [`~hf_vaeplus.training.train`] for what it leaves and raises."""
    refuse_fp16_on_cpu(options, process_state().device)  # before the data is read
    return train(*build_stage(options))


def build_stage(options: StageOptions) -> tuple:
    """The arguments of [`~hf_vaeplus.training.train`] for one stage, in order; the model comes first."""
    torch.manual_seed(derived_seed(options.seed, 2))  # the initial weights
    images = open_images(options)
    build = {"autoencoder": _autoencoder_stage, "vae": _vae_stage, "second_stage": _second_stage}[options.stage]
    model, dataset, prepare, *finish = build(options, images)
    return model, dataset, prepare, options, _previewer(options, images), *finish


def process_state() -> PartialState:
    """This process's rank and device. A bare `PartialState()` would overlook that CPUs alone were asked for."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def train_all(preset: dict, output_dir: Path, **overrides) -> tuple:
    """Train the three stages one after the other, each in its own folder of `output_dir`, and save the pipeline.

    Stages that are trained already are not trained again; one that was interrupted goes on.

    Args:
        preset: see `load_preset`.
        overrides: options for every stage.

    Returns:
        The pipeline, and the options of each stage.

    Raises:
        ValueError: unknown sections, options or model fields, checked for all stages before the first one trains.
    """
    options = all_stage_options(preset, output_dir, **overrides)
    output_dir.mkdir(parents=True, exist_ok=True)
    autoencoder = _autoencoder_config(options["autoencoder"], open_images(options["autoencoder"]))
    _second_stage_config(options["second_stage"], _vae_config(options["vae"], autoencoder))
    for stage in STAGES:
        model = run_stage(options[stage])
    pipe = build_pipeline(options["second_stage"], model)
    if process_state().is_main_process:
        pipe.save_pretrained(output_dir / "pipeline")
        save_feature_extractor(pipe, output_dir / "pipeline", options["autoencoder"].source_crop)
    return pipe, options


def all_stage_options(preset: dict, output_dir: Path, **overrides) -> dict[str, StageOptions]:
    """The options with which `train_all` trains each stage; arguments and errors as there."""
    _check_preset(preset, "the preset")
    folders = {stage: str(output_dir / stage) for stage in STAGES}
    options = {}
    for position, stage in enumerate(STAGES):
        earlier = {before: folders[before] for before in STAGES[:position]}
        own = {"output_dir": folders[stage], "resume_from_checkpoint": "latest", "hub_subfolder": stage}
        options[stage] = stage_options(stage, preset, **{**overrides, **earlier, **own})
        refuse_fp16_on_cpu(options[stage], process_state().device)
    return options


def open_images(options: StageOptions, split: str | None = None):
    """The images that `options` name, cached or streamed; of another split if given (never mirrored then)."""
    source = dict(
        train_data_dir=options.train_data_dir,
        train_data_files=options.train_data_files,
        split=split or options.split,
        revision=options.dataset_revision,
        image_column=options.image_column,
        resolution=options.resolution,
        crop=options.crop,
        num_channels=options.num_channels,
        num_factors=options.num_factors,
        max_samples=options.max_train_samples if split is None else None,
        on_bad_image=options.on_bad_image,
        random_flip=options.random_flip and split is None,
    )
    if options.streaming and split is None:
        return stream_images(options.dataset_name, **source, seed=options.seed)
    state = process_state()
    with state.main_process_first():
        return load_images(options.dataset_name, **source, cache_dir=options.cache_dir, progress=state.is_main_process)


# --------------------------------------------------------------------------------------------------------- stages


def _autoencoder_config(options: StageOptions, images) -> VAEPlusAutoencoderConfig:
    shape = dict(image_size=images.resolution, num_channels=images.num_channels)
    return VAEPlusAutoencoderConfig(**{**shape, **options.model})


def _vae_config(options: StageOptions, autoencoder: VAEPlusAutoencoderConfig) -> VAEPlusVAEConfig:
    settings = dict(input_shape=(autoencoder.latent_dim,), reconstruction_space="image") | options.model
    if settings["reconstruction_space"] == "pullback":
        settings.setdefault("target_dim", autoencoder.num_channels * autoencoder.image_size**2)
    return VAEPlusVAEConfig(**settings)


def _second_stage_config(options: StageOptions, vae: VAEPlusVAEConfig) -> VAEPlusVAEConfig:
    # q(z) has about unit variance: gamma must start well below it, or no direction survives.
    defaults = dict(input_shape=(vae.latent_dim,), latent_dim=vae.latent_dim, gamma="learned", gamma_init=0.1)
    return VAEPlusVAEConfig(**{**defaults, **options.model})


def _autoencoder_stage(options: StageOptions, images):
    model = VAEPlusAutoencoderModel(_autoencoder_config(options, images))

    def prepare(batch, noise, step):
        return {"pixel_values": to_unit_range(batch["pixel_values"])}

    def finish(trained):
        trained.match_spectrum(_some_images(images, trained.device))

    return model, images, prepare, finish if options.match_spectrum else None


def _vae_stage(options: StageOptions, images):
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

        return model, images, prepare

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

    return model, dataset, prepare


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


def _second_stage(options: StageOptions, images):
    vae = load_frozen(VAEPlusVAEModel, options.vae)
    autoencoder = load_frozen(VAEPlusAutoencoderModel, options.autoencoder) if options.autoencoder else None
    latent_dim = vae.config.latent_dim
    model = VAEPlusVAEModel(_second_stage_config(options, vae.config))

    def statistics(inputs):
        posterior = vae.encode(inputs)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    dataset, rows = images, None
    if not isinstance(images, IterableDataset):
        if autoencoder is None:
            rows = encode_dataset(images, vae, statistics)
        else:  # from the codes that the first VAE was trained on
            codes = encode_dataset(images, autoencoder, autoencoder.encode)
            with torch.no_grad():
                rows = torch.cat([statistics(part.to(vae.device)).cpu() for part in codes.split(4096)])
        dataset = TensorRows({"posterior": rows})

    @torch.no_grad()
    def finish(trained):
        posteriors = rows
        if rows is None:
            parts = _some_images(images, vae.device)
            posteriors = torch.cat([
                statistics(pixels if autoencoder is None else autoencoder.encode(pixels)).cpu() for pixels in parts
            ])  # fmt: skip
        means, logvars = posteriors.double().chunk(2, dim=1)
        covariance = torch.cov(means.T).reshape(latent_dim, latent_dim) + logvars.exp().mean(0).diag()
        generator = torch.Generator().manual_seed(derived_seed(options.seed, 5))
        trained.match_moments(means.mean(0), covariance, generator)

    def prepare(batch, noise, step):
        if "posterior" not in batch:
            pixels = to_unit_range(batch["pixel_values"])
            batch = {"posterior": statistics(pixels if autoencoder is None else autoencoder.encode(pixels))}
        mean, logvar = batch["posterior"].chunk(2, dim=1)
        z = mean + (0.5 * logvar).exp() * noise(latent_dim)
        return {"inputs": z, "noise": noise(model.config.latent_dim), "kl_weight": _kl_weight(options, step)}

    return model, dataset, prepare, finish if options.match_moments else None


def _some_images(images, device, count: int = 5_000) -> Iterator[torch.Tensor]:
    """Pixels in [0, 1] of images spread over the data set (of a stream: its first), by which statistics are taken."""
    if isinstance(images, IterableDataset):
        images.set_position(0, count)
        parts = next(iter(images))["pixel_values"].split(250)
    else:
        rows = torch.arange(0, len(images), max(1, len(images) // count)).split(250)
        parts = (images.__getitems__(part.tolist())["pixel_values"] for part in rows)
    for part in tqdm(parts, desc="statistics", leave=False, disable=not process_state().is_main_process):
        yield to_unit_range(part.to(device))


def _kl_weight(options: StageOptions, step: int) -> float:
    return min(1.0, (step + 1) / options.kl_warmup_steps) if options.kl_warmup_steps else 1.0


# --------------------------------------------------------------------------------------------------------- codes


def load_frozen(model_class: type, path: str) -> VAEPlusPreTrainedModel:
    """A trained stage for use by a later one: weights complete, no gradients, evaluation mode, on this device.

    Raises:
        ValueError, OSError: as [`VAEPlusPreTrainedModel.from_pretrained`].
    """
    model = model_class.from_pretrained(path).requires_grad_(False).eval()
    return model.to(process_state().device, memory_format=torch.channels_last)


@torch.no_grad()
def encode_dataset(images, model: VAEPlusPreTrainedModel, encode: Callable) -> torch.Tensor:
    """What `encode` says of every image, in the order of the data set, computed once and kept in the cache.

    Args:
        images: a map-style data set of images.
        model: the network that `encode` uses: its weights and the images name the cached file.
        encode: pixels in [0, 1] of shape `(batch, C, H, W)` -> `(batch, dim)`.

    Returns:
        float32 `torch.Tensor` of shape `(len(images), dim)` on the CPU.
    """
    state, key = process_state(), hashlib.sha256(f"{images.fingerprint} {len(images)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        key.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    path = Path(images.path).parent.parent / "encoded" / f"{key.hexdigest()[:32]}.safetensors"

    def build(path: Path):
        loader = DataLoader(images, batch_size=256, collate_fn=keep_batch)
        parts = []
        for batch in tqdm(loader, desc="encoding", disable=not state.is_main_process):
            pixels = to_unit_range(batch["pixel_values"].to(state.device))
            parts.append(encode(pixels).float().cpu())
        save_file({"rows": torch.cat(parts)}, path)

    def load(path: Path) -> torch.Tensor:
        rows = load_file(path).get("rows")
        if rows is None or rows.ndim != 2 or len(rows) != len(images):
            raise ValueError(f"expected one row for each of {len(images)} images")
        return rows

    with state.main_process_first():
        return build_once(path, build, load)


class TensorRows(Dataset):
    """Rows of equally long tensors; a list of indices gives a batch."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def __getitems__(self, indices: list[int]) -> dict:
        return self[torch.as_tensor(indices)]


class EncodedImages(Dataset):
    """Images with what was computed of them."""

    def __init__(self, images, encoded: dict[str, torch.Tensor]):
        self.images, self.rows = images, TensorRows(encoded)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {**self.images[index], **self.rows[index]}

    def __getitems__(self, indices: list[int]) -> dict:
        return {**self.images.__getitems__(indices), **self.rows.__getitems__(indices)}


def _previewer(options: StageOptions, images):
    """What a stage can do so far, as a picture: pairs of image and reconstruction, or samples."""
    if isinstance(images, IterableDataset):
        return None
    first = images.pixels(0, 32)
    pipeline_of = cache(partial(build_pipeline, options))  # the frozen stages are read once, not at every picture
    seed = derived_seed(options.seed, 3)

    def preview(model) -> Image.Image:
        if options.stage == "autoencoder":
            pixels = first.to(model.device)
            return image_grid(torch.stack([pixels, model(pixels).reconstruction], 1).flatten(0, 1), columns=8)
        pipe = pipeline_of(model)
        pipe.set_progress_bar_config(disable=True)
        return image_grid(pipe(64, torch.Generator().manual_seed(seed), output_type="pt").images)

    return preview


def build_pipeline(options: StageOptions, model: VAEPlusPreTrainedModel):
    """The pipeline that ends with `model`, the VAE of `options.stage`, and loads the stages before it."""
    from .pipeline_vaeplus import VAEPlusPipeline  # training the autoencoder does not need diffusers

    autoencoder = load_frozen(VAEPlusAutoencoderModel, options.autoencoder) if options.autoencoder else None
    if options.stage == "vae":
        return VAEPlusPipeline(model, autoencoder)
    return VAEPlusPipeline(load_frozen(VAEPlusVAEModel, options.vae), autoencoder, model)
