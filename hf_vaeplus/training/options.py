"""What a training run can be told: options, presets, and what may change when a run goes on."""

import difflib
import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields, replace
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

logger = logging.getLogger(__name__)

# Those of `transformers.get_scheduler` that need no metric and no setting of their own.
Schedule = Literal[
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"
]  # fmt: skip
# "none", and those of `accelerate.utils.LoggerType`, whose import takes seconds.
Tracker = Literal[
    "none", "aim", "all", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # fmt: skip
Stage = Literal["autoencoder", "vae", "second_stage", "detail"]
STAGES = get_args(Stage)[:3]  # of every pipeline
SecondStage = Literal["vae", "flow_matching", "coupling_flow", "mixture"]


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
    global_batch_size: int | None = option(
        None,
        "samples per optimizer step, shared out among processes and forward passes: the run does not depend on the"
        " number of processes (in place of train_batch_size)",
        positive,
    )
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
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = option(
        "no",
        "precision of the networks' arithmetic; auto: bf16 where the device has instructions for it, otherwise no",
    )
    use_ema: bool = option(False, "keep an exponential moving average of the weights and save that as the model")
    ema_decay: float | int = option(0.999, "decay of the moving average (shorter during the first steps)", below_one)
    checkpointing_steps: int = option(
        1_000, "save a resumable checkpoint every so many steps", positive, group="checkpoints"
    )
    checkpoints_total_limit: int = option(2, "how many checkpoints to keep", positive)
    resume_from_checkpoint: str | None = option(
        None, "'latest', the name of a checkpoint in output_dir, or the folder of one", is_path=True
    )
    strict_resume: bool = option(False, "refuse a damaged newest checkpoint instead of taking the one before it")
    retrain: bool = option(
        False,
        "train a stage anew, from its start, if its images, the stages before it or the steps of its flow matching"
        " have changed since",
    )
    logging_steps: int = option(50, "steps between two lines of stats.jsonl", positive, group="logging")
    sample_steps: int = option(0, "steps between two sample grids; 0 draws one at the end only", not_negative)
    report_to: Tracker = option("none", "tracker of Accelerate that gets the numbers too")
    dataloader_num_workers: int = option(0, "worker processes that read data", not_negative, group="speed")
    torch_compile: bool = option(False, "compile the model: pays back on long runs only")
    allow_tf32: bool = option(False, "on NVIDIA GPUs, products of float32 numbers in TF32: faster, with 10 bits")
    cudnn_benchmark: bool = option(True, "on NVIDIA GPUs, try which convolution is the fastest at the start")
    deterministic: bool = option(
        False, "on GPUs, use slower kernels whose results are the same, bit for bit, in every run"
    )
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


RECORD = "training_options.json"  # beside the weights: how they were made, and from what


def run_record(options: TrainingOptions, num_processes: int, made_from: dict[str, str]) -> dict:
    """What `RECORD` says of a run: its options, and the fingerprints of its images and of the stages before it."""
    return {**recorded_options(options), "num_processes": num_processes, "made_from": made_from}


def read_record(folder: Path) -> dict:
    """What `RECORD` in `folder` says, nothing if there is none; of a checkpoint of an earlier version, its run's.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.exists() and folder.name.startswith("checkpoint-"):
        path = folder.parent / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("made_from", {}), dict):
            raise ValueError("expected a mapping of options")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or choose another --output_dir.") from error
    return record


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
    " strict_resume retrain"
    " logging_steps sample_steps report_to dataloader_num_workers torch_compile cudnn_benchmark deterministic"
    " push_to_hub hub_model_id"
    " hub_subfolder hub_private_repo learning_rate max_grad_norm".split()
)


# Options that name places on this machine: not to be pushed.
LOCAL_OPTIONS = frozenset(
    "output_dir cache_dir train_data_dir train_data_files autoencoder vae feature_loss resume_from_checkpoint".split()
)


# Options that name what `made_from` knows by its content: another spelling, or another place, is the same run.
_NAMES_OF_CONTENT = frozenset(
    "train_data_dir train_data_files dataset_revision holdout autoencoder vae feature_loss made_from".split()
)


def run_identity(record: dict) -> dict:
    """What two parts of one run have in common, wherever its folders lie."""
    return {name: value for name, value in record.items() if name not in _free_options(record) | LOCAL_OPTIONS}


def _free_options(record: dict) -> frozenset[str]:
    """Of flow matching the number of steps is fixed: its two phases are shares of it."""
    return _FREE_OPTIONS - ({"max_train_steps"} if record.get("second_stage") == "flow_matching" else set())


def goes_on(folder: Path, old: dict, new: dict, retrain: bool, passes_count: bool = False) -> bool:
    """Whether a run in `folder` goes on, or is to be trained anew because what it was made from has changed.

    Args:
        folder: of the run, for the message.
        old, new: what is recorded of it, and what would be recorded of its continuation.
        retrain: whether it may be trained anew.
        passes_count: whether every forward pass changes the model, so that their number per step must stay. Otherwise
            it does not matter, with a `global_batch_size`, who computes which part of the batch.

    Raises:
        ValueError: a run that is resumed with another seed, model or data set would be neither the old run nor the
            new one; so would flow matching with other steps.
    """
    old, new = dict(old), json.loads(json.dumps(new))
    if old and "second_stage" in new:
        old.setdefault("second_stage", "vae")  # an earlier version knew no other
    known, given = old.get("made_from"), new["made_from"]
    stale = [] if known is None else [name for name in given if known.get(name) != given[name]]
    if stale and retrain:
        return False
    free = set(_free_options(new)) | (set() if known is None else _NAMES_OF_CONTENT)
    if old and new.get("global_batch_size"):
        if not old.get("global_batch_size"):
            parts = old["num_processes"] * old["gradient_accumulation_steps"]
            old["global_batch_size"] = old["train_batch_size"] * parts
        free |= {"train_batch_size", "num_processes"} | (set() if passes_count else {"gradient_accumulation_steps"})
    changed = [name for name in new if name in old and old[name] != new[name] and name not in free]
    if changed == ["max_train_steps"]:
        if retrain:
            return False
        raise ValueError(
            f"{folder} holds a flow of {old['max_train_steps']} steps, got max_train_steps={new['max_train_steps']}."
            " Its two phases are shares of them: add --retrain to train it anew from its start, or choose another"
            " --output_dir."
        )
    if changed:
        changes = ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in changed)
        raise ValueError(
            f"{folder} holds a run with other options ({changes}): choose another --output_dir, or the options in"
            f" {RECORD}."
        )
    if stale:
        changed = (
            f" (holdout {old.get('holdout', 0)} -> {new['holdout']})"
            if old.get("holdout", 0) != new.get("holdout", 0)
            else ""
        )
        others = {
            "images": f"other images{changed}",
            "autoencoder": "another autoencoder",
            "vae": "another first VAE",
            "labels": "other labels",
            "feature_loss": "another network of --feature_loss",
        }
        raise ValueError(
            f"{folder} was trained on {' and '.join(others[name] for name in stale)} than what is there now: add"
            " --retrain to train it anew from its start, or choose another --output_dir."
        )
    if known is None and old and given:
        logger.warning(
            "%s does not say what it was made from: it is taken to be the images and stages that are there now", folder
        )
    return True


def with_own_batch(options: TrainingOptions, num_processes: int) -> TrainingOptions:
    """The options, with `train_batch_size` as the part of `global_batch_size` for one process and forward pass.

    Raises:
        ValueError: the batch cannot be split evenly, or the loss is not a mean over its rows.
    """
    whole, passes = options.global_batch_size, options.gradient_accumulation_steps
    if whole is None:
        return options
    parts = num_processes * passes
    if whole % parts:
        near = sorted({whole // parts * parts, -(-whole // parts) * parts} - {0})
        raise ValueError(
            f"global_batch_size {whole} cannot be split evenly over {parts} parts (processes: {num_processes}, forward"
            f" passes per step: {passes}): choose {' or '.join(map(str, near))}, or another number of processes."
        )
    if parts > 1 and getattr(options, "mmd_weight", 0):
        raise ValueError(
            f"mmd_weight compares all samples of a batch with each other, so a global_batch_size cannot be split for"
            f" it, and here it is split into {parts} parts: use one process without gradient accumulation, or"
            " --train_batch_size."
        )
    return replace(options, train_batch_size=whole // parts)


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
    second_stage: SecondStage = option(
        "vae", "second stage: which model of the latents, that of the paper or one that has a density"
    )
    active_threshold: float | int = option(
        0.01,
        "second stage with a density: latent dimensions with a smaller mean KL, in nats, are drawn from N(0, 1); 0"
        " models all of them",
        not_negative,
        finite,
    )
    distillation_share: float | int = option(
        0.25, "flow matching: share of the steps, the last ones, that distil the ODE into one pass", below_one
    )
    label_column: str | None = option(
        None,
        "second stage: condition it on this column of the data set; `label` for the folders of pictures, or MNIST's"
        " labels, `factors` for rendered-faces",
    )
    label_dropout: float | int = option(
        0.1, "conditional second stage: share of the samples whose labels are withheld, for the null class", below_one
    )
    feature_loss: str | None = option(
        None,
        "detail: backbone of transformers whose feature maps count besides pixels: efficientnet-lite0, a folder,"
        " or a Hub id",
        is_path=True,
    )
    num_directions: int = option(32, "detail: random directions of each view at each step", positive)
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
        if self.stage != "second_stage" and self.second_stage != "vae":
            raise ValueError(f"second_stage={self.second_stage} is for stage second_stage, not for {self.stage}.")
        if {"condition", "id2label"} & self.model.keys():
            raise ValueError("condition and id2label follow from --label_column: leave them out of model.")
        if self.label_column is not None:
            if self.stage != "second_stage":
                raise ValueError(
                    f"label_column={self.label_column!r} is for stage second_stage, not for {self.stage}."
                )
            if self.streaming:
                raise ValueError(f"label_column={self.label_column!r} needs cached images: leave out --streaming.")
        if self.second_stage == "mixture" and self.streaming:
            raise ValueError("second_stage=mixture is fitted to all latents at once: leave out --streaming.")
        if self.stage == "second_stage" and not self.vae:
            if self.second_stage == "vae":
                raise ValueError("the second stage needs --vae: the folder of the first VAE that it models.")
            if not self.autoencoder:
                raise ValueError(
                    f"second_stage={self.second_stage} needs --vae, the first VAE whose latents it models, or"
                    " --autoencoder alone, to model its codes."
                )
        if self.stage == "autoencoder" and (self.autoencoder or self.vae):
            raise ValueError("stage autoencoder trains from images alone: leave out --autoencoder and --vae.")
        if self.stage == "detail" and (self.vae or not self.autoencoder):
            raise ValueError("stage detail needs --autoencoder, whose decoder it extends, and no --vae.")
        if self.feature_loss and self.stage != "detail":
            raise ValueError(f"feature_loss={self.feature_loss} is for stage detail, not for {self.stage}.")
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
        raise ValueError(f"{name} must map common, {', '.join(get_args(Stage))} to options.")
    known = [entry.name for entry in fields(StageOptions) if entry.name != "stage"]
    for section, options in preset.items():
        if section not in ("common", *get_args(Stage)):
            raise ValueError(f"{name} has a section {section!r}: expected common, {', '.join(get_args(Stage))}.")
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f": did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"{name} sets {section}.{key}, which is no option{hint}")
        model = options.get("model", {})
        if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
            raise ValueError(f"{name} must map fields of the config to values in {section}.model, got {model!r}.")


def launcher_options() -> dict:
    """The options that `accelerate launch` or `accelerate config` give by the environment."""
    meanings = {
        "mixed_precision": ("ACCELERATE_MIXED_PRECISION", str.lower),
        "gradient_accumulation_steps": (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            lambda text: int(text) if text.isdecimal() else text,
        ),
        "torch_compile": ("ACCELERATE_DYNAMO_BACKEND", lambda text: text.lower() != "no"),
    }
    return {
        name: meaning(os.environ[variable])
        for name, (variable, meaning) in meanings.items()
        if os.environ.get(variable)
    }


def put_over(options: dict, others: dict):
    """Change `options` in place by `others`. A batch size of one kind takes the place of one of the other kind.

    Raises:
        ValueError: `others` holds both kinds.
    """
    batches = {"global_batch_size", "train_batch_size"}
    given = {name for name in batches if others.get(name) is not None}
    if given == batches:
        raise ValueError(
            f"global_batch_size {others['global_batch_size']} and train_batch_size {others['train_batch_size']} are"
            " both given: choose one of them."
        )
    if given:
        for name in batches - given:
            options.pop(name, None)
    options |= others


def stage_options(stage: str, preset: dict | None = None, **overrides) -> StageOptions:
    """The options of one stage: defaults, then what `accelerate launch` says, the preset's `common`, its section, and
    `overrides`.

    Pictures that the overrides name take the place of the preset's data set.
    """
    preset = preset or {}
    layers = [launcher_options(), preset.get("common", {}), preset.get(stage, {}), overrides]
    merged, model = {}, {}
    for layer in layers:
        put_over(merged, layer)
        model |= layer.get("model", {})
    own_pictures = overrides.get("train_data_dir") or overrides.get("train_data_files")
    if own_pictures and "dataset_name" not in overrides and merged.get("dataset_name") not in NAMED_DATA_SETS:
        merged["dataset_name"] = None
    return StageOptions(**{**merged, "stage": stage, "model": model})
