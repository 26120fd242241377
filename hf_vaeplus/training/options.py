"""What a training run can be told: options, presets, and what may change when a run goes on."""

import difflib
import json
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, get_args

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.catalogue import NAMED_DATA_SETS
from ..data.options import ImageOptions
from ..fields import (
    at_least_one,
    below_one,
    finite,
    from_home,
    must,
    not_negative,
    one_sentence,
    option,
    positive,
    utf8,
)
from ..provenance import redacted

if TYPE_CHECKING:  # a command line is parsed without it
    import torch

# Those of `transformers.get_scheduler` that need no metric and no setting of their own.
Schedule = Literal[
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"
]  # fmt: skip
# "none", and those of `accelerate.utils.LoggerType`, whose import takes seconds.
Tracker = Literal[
    "none", "aim", "all", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # fmt: skip
Stage = Literal["autoencoder", "vae", "second_stage"]
STAGES = get_args(Stage)


def _is_inside(folder: str) -> bool:
    place = PurePosixPath(folder)
    return not place.is_absolute() and ".." not in place.parts


def _names_a_repository(repo_id: str) -> bool:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return True


@one_sentence
@strict
@dataclass
class TrainingOptions:
    """What the loop can be told. Names are those of diffusers' example scripts.

    Raises:
        ValueError: an option of another type, not among the choices or out of range.
    """

    output_dir: str = option(
        "runs/stage", "folder for checkpoints, logs, samples and the final model", utf8, group="run", is_path=True
    )
    seed: int = option(
        0, "seed of everything random", not_negative, must("be below 2**63", lambda value: value < 2**63)
    )
    max_train_steps: int = option(10_000, "optimizer steps", positive, group="optimisation")
    train_batch_size: int = option(64, "samples per process in one forward pass", positive)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", positive)
    learning_rate: float | int = option(1e-3, "peak learning rate of AdamW", positive, finite)
    lr_scheduler: Schedule = option("cosine", "schedule of the learning rate, as in transformers.get_scheduler")
    lr_warmup_steps: int = option(100, "steps of linear warm-up of the learning rate", not_negative)
    gamma_lr_multiplier: float | int = option(
        10.0, "learning rate of a learned log_gamma, as a multiple of learning_rate", not_negative, finite
    )
    adam_beta1: float | int = option(0.9, "AdamW's beta1", below_one)
    adam_beta2: float | int = option(0.99, "AdamW's beta2", below_one)
    adam_weight_decay: float | int = option(0.0, "AdamW's decoupled weight decay", not_negative, finite)
    adam_epsilon: float | int = option(1e-8, "AdamW's epsilon", positive, finite)
    max_grad_norm: float | int = option(0.0, "clip the gradient to this norm; 0 leaves it alone", not_negative, finite)
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "precision of the networks' arithmetic")
    use_ema: bool = option(False, "keep an exponential moving average of the weights and save that as the model")
    ema_decay: float | int = option(0.999, "decay of the moving average (shorter during the first steps)", below_one)
    checkpointing_steps: int = option(
        1_000, "save a resumable checkpoint every so many steps", positive, group="checkpoints"
    )
    checkpoints_total_limit: int = option(2, "how many checkpoints to keep", positive)
    resume_from_checkpoint: str | None = option(None, "'latest', or the folder of a checkpoint", is_path=True)
    strict_resume: bool = option(False, "refuse a damaged newest checkpoint instead of taking the one before it")
    logging_steps: int = option(50, "steps between two lines of stats.jsonl", positive, group="logging")
    sample_steps: int = option(0, "steps between two sample grids; 0 draws one at the end only", not_negative)
    report_to: Tracker = option("none", "tracker of Accelerate that gets the numbers too")
    dataloader_num_workers: int = option(0, "worker processes that read data", not_negative, group="speed")
    torch_compile: bool = option(False, "compile the model: pays back on long runs only")
    push_to_hub: bool = option(
        False, "upload to the Hub at each checkpoint and at the end; a failure loses nothing", group="Hub"
    )
    hub_model_id: str | None = option(
        None,
        "repository to push to, 'name' or 'organisation/name'",
        must("be the id of a repository, 'name' or 'organisation/name'", _names_a_repository),
    )
    hub_subfolder: str = option(
        "", "folder in that repository (default: its root)", must("be a folder in the repository", _is_inside)
    )
    hub_token: str | None = option(None, "write token of the Hub, if not logged in", repr=False)
    hub_private_repo: bool = option(False, "create the repository as a private one")

    def __post_init__(self):
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id: name the repository, such as 'your-name/vaeplus-faces'.")


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
    old, new = json.loads(written.read_text(encoding="utf-8")), json.loads(json.dumps(options))
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


@one_sentence
@strict
@dataclass
class StageOptions(ImageOptions, TrainingOptions):
    """Everything that a training run of one stage can be told: the model, [`ImageOptions`], [`TrainingOptions`]."""

    stage: Stage = option("autoencoder", "which stage to train", group="stages and models")
    streaming: bool = option(False, "train from the source without caching its decoded images", group="data")
    cache_dir: str | None = option(
        None, "where decoded images and codes are kept; default: $VAEPLUS_CACHE", utf8, is_path=True
    )
    autoencoder: str | None = option(
        None, "folder or Hub id of the trained autoencoder (later stages)", group="stages and models", is_path=True
    )
    vae: str | None = option(None, "folder or Hub id of the trained first VAE (second stage)", is_path=True)
    pullback_codes: int = option(
        16, "first VAE, reconstruction_space pullback: codes that its metric is a mean of", at_least_one
    )
    kl_warmup_steps: int = option(0, "steps over which the weight of the KL term grows from 0 to 1", not_negative)
    match_spectrum: bool = option(True, "autoencoder: measure, after training, what `sharpness` amplifies")
    match_moments: bool = option(True, "second stage: give its samples mean and covariance of q(z) after training")
    mmd_weight: float | int = option(
        0.0, "baseline: weight of the MMD penalty of a WAE in place of a VAE's KL term", finite, not_negative
    )
    model: dict = field(default_factory=dict, metadata={"help": "fields of the model's config"})

    def __post_init__(self):
        ImageOptions.__post_init__(self)
        TrainingOptions.__post_init__(self)
        if self.stage == "second_stage" and not self.vae:
            raise ValueError("the second stage needs --vae: the folder of the first VAE that it models.")
        if self.stage == "autoencoder" and (self.autoencoder or self.vae):
            raise ValueError("stage autoencoder trains from images alone: leave out --autoencoder and --vae.")
        if self.mmd_weight and (self.stage != "vae" or self.autoencoder):
            raise ValueError(
                f"mmd_weight={self.mmd_weight} makes a WAE that is trained straight on pixels: it needs stage vae and"
                " no --autoencoder."
            )


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
    path = carried / f"{name}.yaml" if name in names else Path(from_home(name))
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
