"""What a training run can be told: options, presets, and what may change when a run goes on."""

import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, get_args, get_type_hints

import yaml
from huggingface_hub.utils import validate_repo_id

from ..data.catalogue import NAMED_DATA_SETS, ON_BAD_IMAGE
from ..provenance import redacted

if TYPE_CHECKING:  # a command line is parsed without it
    import torch

# Those of `transformers.get_scheduler` that need no metric and no setting of their own.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
)  # fmt: skip
# Those of `accelerate.utils.LoggerType`, whose import takes seconds.
TRACKERS = (
    "all", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
)  # fmt: skip


def option(default, help: str, **metadata):
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainingOptions:
    """What the loop can be told. Names are those of diffusers' example scripts."""

    output_dir: str = option("runs/stage", "folder for checkpoints, logs, samples and the final model")
    seed: int = option(0, "seed of everything random")
    max_train_steps: int = option(10_000, "optimizer steps")
    train_batch_size: int = option(64, "samples per process in one forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    lr_scheduler: str = option("cosine", f"{', '.join(SCHEDULES)}: as in transformers.get_scheduler")
    lr_warmup_steps: int = option(100, "steps of linear warm-up of the learning rate")
    gamma_lr_multiplier: float = option(10.0, "learning rate of a learned log_gamma, as a multiple of learning_rate")
    adam_beta1: float = option(0.9, "AdamW's beta1")
    adam_beta2: float = option(0.99, "AdamW's beta2")
    adam_weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(0.0, "clip the gradient to this norm; 0 leaves it alone")
    mixed_precision: str = option("no", "no | bf16 | fp16", choices=("no", "bf16", "fp16"))
    use_ema: bool = option(False, "keep an exponential moving average of the weights and save that as the model")
    ema_decay: float = option(0.999, "decay of the moving average (shorter during the first steps)")
    checkpointing_steps: int = option(1_000, "save a resumable checkpoint every so many steps")
    checkpoints_total_limit: int = option(2, "how many checkpoints to keep")
    resume_from_checkpoint: str | None = option(None, "'latest', or the folder of a checkpoint")
    strict_resume: bool = option(False, "refuse a damaged newest checkpoint instead of taking the one before it")
    logging_steps: int = option(50, "steps between two lines of stats.jsonl")
    sample_steps: int = option(0, "steps between two sample grids; 0 draws one at the end only")
    report_to: str = option("none", "none | tensorboard | any other tracker of Accelerate")
    dataloader_num_workers: int = option(0, "worker processes that read data")
    torch_compile: bool = option(False, "compile the model: pays back on long runs only")
    push_to_hub: bool = option(False, "upload to the Hub at each checkpoint and at the end; a failure loses nothing")
    hub_model_id: str | None = option(None, "repository to push to, 'name' or 'organisation/name'")
    hub_subfolder: str = option("", "folder in that repository (default: its root)")
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "write token of the Hub, if not logged in"}
    )
    hub_private_repo: bool = option(False, "create the repository as a private one")

    def __post_init__(self):
        self._check_types()
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
                     "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
                     "adam_epsilon"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("lr_warmup_steps", "max_grad_norm", "sample_steps", "dataloader_num_workers", "seed",
                     "gamma_lr_multiplier", "adam_weight_decay"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{entry.name} must be a finite number, got {value}.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}.")
        known = {"lr_scheduler": SCHEDULES, "report_to": ("none", *TRACKERS)}
        for name, values in known.items():
            names = sorted(values)
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id: name the repository, such as 'your-name/vaeplus-faces'.")
        if self.hub_model_id:
            validate_repo_id(self.hub_model_id)
        place = PurePosixPath(self.hub_subfolder)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"hub_subfolder must be a folder in the repository, got {self.hub_subfolder!r}.")

    def _check_types(self):
        for name, annotation in get_type_hints(type(self)).items():
            value, wanted = getattr(self, name), get_args(annotation) or (annotation,)
            wanted += (int,) if float in wanted else ()
            if isinstance(value, bool) != (bool in wanted) or not isinstance(value, wanted):
                names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in wanted)
                hint = " (YAML needs the dot in 1.0e-3)" if float in wanted and isinstance(value, str) else ""
                got = type(value).__name__ if name == "hub_token" else repr(value)
                raise ValueError(f"{name} must be {names}, got {got}{hint}.")


def recorded_options(options: TrainingOptions) -> dict:
    """The options as they may be written down: without the token, or another secret in an address."""
    return {
        name: redacted(value, options.hub_token) if isinstance(value, str) else value
        for name, value in asdict(options).items()
        if name != "hub_token"
    }


# Options that may change between the parts of a run without making it another run.
_FREE_OPTIONS = frozenset(
    "output_dir cache_dir max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint"
    " strict_resume"
    " logging_steps sample_steps report_to dataloader_num_workers torch_compile push_to_hub hub_model_id"
    " hub_subfolder hub_private_repo learning_rate max_grad_norm".split()
)


# Options that name places on this machine: not to be pushed.
LOCAL_OPTIONS = frozenset(
    "output_dir cache_dir train_data_dir train_data_files autoencoder vae resume_from_checkpoint".split()
)


def refuse_other_options(written: Path, options: dict):
    """A run that is resumed with another seed, model or data set would be neither the old run nor the new one."""
    if not written.exists():
        return
    old, new = json.loads(written.read_text()), json.loads(json.dumps(options))
    changed = [name for name in new if name in old and old[name] != new[name] and name not in _FREE_OPTIONS]
    if changed:
        changes = ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in changed)
        raise ValueError(
            f"{written.parent} holds a run with other options ({changes}): choose another --output_dir, or the options"
            f" in {written.name}."
        )


def refuse_fp16_on_cpu(options: TrainingOptions, device: "torch.device"):
    """Raises ValueError for what Accelerate would silently train in float32."""
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU, and this is a CPU: use bf16, or no for float32.")


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


def preset_names() -> list[str]:
    """Names of the presets that the package carries."""
    carried = (resources.files("hf_vaeplus") / "presets").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in carried if entry.name.endswith(".yaml"))


def load_preset(name: str | Path) -> dict:
    """A preset by the name of one that the package carries, or by the path of a YAML file.

    Returns:
        `dict` with the options of `common` (all stages) and of each stage: `{"common": {...}, "vae": {...}, ...}`.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: not a mapping of mappings, or an unknown section or option.
    """
    carried = resources.files("hf_vaeplus") / "presets"
    names = preset_names()
    path = carried / f"{name}.yaml" if name in names else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no preset or file named {name}: the presets are {', '.join(names)}.")
    content = path.read_bytes()
    try:
        preset = yaml.safe_load(content)
    except Exception as error:  # PyYAML's constructors raise nearly anything
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    _check_size(preset, name)
    check_preset(preset, name)
    return preset


def _check_size(preset, name, limit: int = 10_000):
    """A few lines of YAML can name themselves, or a billion values: what prints them would never end."""
    waiting, count = [preset], 0
    while waiting:
        item, count = waiting.pop(), count + 1
        waiting.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        if count > limit:
            raise ValueError(f"{name} holds more than {limit:,} values, expected the options of a few stages.")


def check_preset(preset, name):
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
