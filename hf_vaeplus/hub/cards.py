"""Model cards: filled from what a training run left in its folder, with nothing left open."""

import html
import json
import math
import re
import shutil
from importlib import resources
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..data.catalogue import CARD_FACTS
from ..evaluation.tables import results_table, second_stage_row
from ..provenance import folder_fingerprint
from ..training.options import STAGES, read_record

PICTURES = ("samples.png", "curves.png")


_METADATA = {
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["hf_vaeplus", "vae", "autoencoder", "image-generation"],
}


_TITLES = {"autoencoder": "autoencoder", "vae": "first VAE", "second_stage": "second stage", "detail": "detail"}


_TOLD = ("seed", "num_images", "images")  # of summary.json, as it is


_FINGERPRINTS = re.compile(r"^Fingerprints: .*$", re.MULTILINE)  # of a card


def write_card(
    run_dir: Path,
    model_id: str,
    output_dir: Path | None = None,
    evaluation: dict | None = None,
    data_license: str | None = None,
    license: str = "other",
) -> Path:
    """Write `README.md` and the pictures that it shows, ready for the Hub.

    Args:
        run_dir: what `vaeplus train` or `vaeplus quickstart` left: the stages' folders, `summary.json`, pictures.
        model_id (`str`): repository on the Hub, `name` or `organisation/name`.
        output_dir: where to; the run's `pipeline` folder by default, from where `vaeplus push` takes them.
        evaluation (`dict`, *optional*): what `vaeplus evaluate` wrote, of this pipeline.
        data_license (`str`, *optional*): licence of the training images; needed where it is not known.
        license (`str`): of the weights, an id of the Hub's list.

    Returns:
        Path of the `README.md`.

    Raises:
        ValueError: a model id that the Hub would refuse, images of unknown licence, files of the run that are
            damaged or of something else, or stages, pipeline, summary and evaluation that are not of the same weights.
        FileNotFoundError: a file of the run is missing.
    """
    validate_repo_id(model_id)
    run_dir, output_dir = Path(run_dir), Path(output_dir or Path(run_dir) / "pipeline")
    stages = _stages_of(run_dir)
    needed = [
        *PICTURES,
        "summary.json",
        *(f"{s}/{n}" for s in stages for n in ("config.json", "training_options.json")),
    ]
    for name in needed:
        if not (run_dir / name).is_file():
            raise FileNotFoundError(f"{run_dir} lacks {name}: give the --output_dir of a finished `vaeplus train`.")
    try:
        fields, hub_id, eval_results = _told_by(run_dir, evaluation)
    except (AttributeError, KeyError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"{run_dir} holds no run that a card can tell of ({error!r}): give the --output_dir of a finished"
            " `vaeplus train`."
        ) from error
    fields["fingerprints"] = _fingerprints(run_dir, evaluation)
    data_license = data_license or fields["data_license"]
    if not data_license:
        raise ValueError(
            f"the licence of the images in {fields['images']!r} is not known: state it with --data_license, such as"
            " 'CC BY 4.0, photographs by the author'."
        )
    fields |= dict(model_id=model_id, data_license=plain_text(data_license))
    data = ModelCardData(
        **_METADATA, license=license, datasets=hub_id, model_name=model_id.split("/")[-1], eval_results=eval_results
    )
    template = (resources.files(__package__) / "card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, **fields)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        shutil.copyfile(run_dir / name, output_dir / name)
    path = output_dir / "README.md"
    path.write_text(unicode_text(str(card)).rstrip() + "\n", encoding="utf-8")
    return path


def _told_by(run_dir: Path, evaluation: dict | None) -> tuple[dict, str | None, list[EvalResult]]:
    """Fields of the template, the data set on the Hub, and results, of a run that may be damaged or a stranger's."""

    def read(name: str) -> dict:
        return json.loads((run_dir / name).read_text(encoding="utf-8"))

    summary, stages = read("summary.json"), _stages_of(run_dir)
    options = {stage: read(f"{stage}/training_options.json") for stage in stages}
    configs = {stage: read(f"{stage}/config.json") for stage in stages}
    last, images = options["second_stage"], summary["images"]
    made_by = last.get("made_by", summary)
    told, data_license, hub_id, people = CARD_FACTS.get(last["dataset_name"], (None, None, last["dataset_name"], None))
    told = told or f"Images of the {'data set' if hub_id else 'folder'} '{images}'."
    if last["max_train_samples"]:
        told += f" The first {last['max_train_samples']:,} of them."
    told += " Some of them were held out of the training." if last.get("holdout", 0) != 0 else ""
    told += " Their mirror images as well." if last["random_flip"] else ""
    fields = dict(
        size=plain_text(configs["autoencoder"]["image_size"]),
        images=images,
        data=plain_text(told),
        data_license=data_license,
        people=people,
        stages=[_stage_row(stage, run_dir / stage, options[stage], configs[stage]) for stage in stages],
        command=code_text(made_by["command"]),
        made_by={name: plain_text(made_by[name]) for name in ("commit", "date", "machine")},
        torch=plain_text(made_by["versions"]["torch"]),
        summary={name: plain_text(summary[name]) for name in _TOLD},
        measured_on=_measured_on(summary.get("fingerprint"), last, summary),
        images_are=plain_text(summary.get("images_are") or ""),
        figures=[(name, plain_text(value)) for name, value in figures(summary)],
        sharpens=configs["autoencoder"].get("matched_spectrum", False),
        condition=_condition_call(configs["second_stage"]),
        temperature=plain_text(configs["detail"].get("temperature", 1)) if "detail" in configs else None,
    )
    if evaluation is not None:
        fields |= dict(
            evaluation=results_table(evaluation).replace("`", "'"),
            evaluation_command=code_text(evaluation["command"]),
            evaluation_commit=plain_text(evaluation["commit"]),
            evaluation_date=plain_text(evaluation["date"]),
            evaluated_on=_measured_on(evaluation["protocol"].get("fingerprint"), last, summary),
        )
    return fields, hub_id, _eval_results(summary, evaluation)


def _condition_call(config: dict) -> str | None:
    """How to ask a conditional second stage for images, in Python."""
    names = {int(place): name for place, name in (config.get("id2label") or {}).items()}
    if config.get("condition") == "classes":
        ids = sorted(names)[:2]
        return code_text(f"pipe(class_labels={ids}).images  # {' and '.join(names[each] for each in ids)}")
    if config.get("condition"):
        return code_text(f"pipe(conditions={{{names[0]!r}: 1.0}}, num_images=4).images")
    return None


def _stages_of(run_dir: Path) -> list[str]:
    """The stages of every pipeline, and the detail of one that has it."""
    return [*STAGES, *(["detail"] if (run_dir / "pipeline" / "detail").is_dir() else [])]


def _measured_on(fingerprint, record: dict, summary: dict) -> str:
    """Whether figures are of the training images, by their content."""
    trained_on = record.get("made_from", {}).get("images")
    if not fingerprint or not trained_on:
        return ""
    if fingerprint == trained_on:
        return "These are the images that the model was trained on."
    if fingerprint == summary.get("fingerprint") and summary.get("images_are") == "unseen":
        return "The model was not trained on these images."
    return "These are not the images that the model was trained on, or only a part of them."


def _fingerprints(run_dir: Path, evaluation: dict | None) -> str:
    """The line of the card that says of which images and weights it tells.

    Raises:
        ValueError: stages, pipeline, summary and evaluation are not of the same weights.
    """
    stages = _stages_of(run_dir)
    weights = {stage: folder_fingerprint(run_dir / stage) for stage in stages}
    records = {stage: read_record(run_dir / stage) for stage in stages}
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    again = "run the same `vaeplus train` again"
    for stage in stages:
        known = {name: each for name, each in records[stage].get("made_from", {}).items() if name in weights}
        if records[stage].get("weights", weights[stage]) != weights[stage]:
            raise ValueError(f"{run_dir / stage} holds other weights than its run saved: {again}.")
        if any(each != weights[name] for name, each in known.items()):
            raise ValueError(f"{run_dir / stage} was trained on other stages than those beside it: {again}.")
        packed = run_dir / "pipeline" / stage
        if packed.is_dir() and folder_fingerprint(packed) != weights[stage]:
            raise ValueError(f"{packed} holds other weights than {run_dir / stage}: {again}.")
    if summary.get("weights", weights) != weights:
        raise ValueError(f"{run_dir / 'summary.json'} was measured on other weights than those beside it: {again}.")
    if evaluation is not None and evaluation.get("weights", weights) != weights:
        raise ValueError(
            f"the evaluation was measured on other weights than those of {run_dir}: measure"
            f" {run_dir / 'pipeline'} with `vaeplus evaluate`."
        )
    made_from = [record.get("made_from", {}).get("images") for record in records.values()]
    images = {f"training images `{code_text(each)}`": None for each in made_from if each}
    return "Fingerprints: " + ", ".join([*images, *(f"{_TITLES[stage]} `{weights[stage]}`" for stage in stages)])


def check_weights_of_card(folder: Path):
    """Raises ValueError if the card in the folder of a pipeline tells of other weights."""
    told = _FINGERPRINTS.search((folder / "README.md").read_text(encoding="utf-8"))
    stages = [stage for stage in _TITLES if (folder / stage).is_dir()]
    if told and not all(str(folder_fingerprint(folder / stage)) in told[0] for stage in stages):
        raise ValueError(
            f"{folder / 'README.md'} tells of other weights than those beside it: write it again with `vaeplus card`,"
            " or remove it."
        )


def short_card(model_id: str, size: int) -> ModelCard:
    """The card of a pipeline of which nothing but the weights is known: what it is and how to use it."""
    data = ModelCardData(model_name=model_id.split("/")[-1], **_METADATA)
    template = (resources.files(__package__) / "short_card_template.md").read_text(encoding="utf-8")
    return ModelCard.from_template(data, template_str=template, model_id=model_id, size=size)


def plain_text(text: object) -> str:
    """Text from outside as text: on one line, without HTML, code, and Markdown's tables, links and pictures."""
    text = html.escape(" ".join(str(text).split()), quote=False).replace("`", "'")
    return re.sub(r"[\\|\[\]]", r"\\\g<0>", text)


def unicode_text(text: str) -> str:
    """Text with words of a command line, or names of files, that the locale could not read; escapes if not UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def code_text(text: object) -> str:
    """Text from outside between backticks."""
    return " ".join(str(text).split()).replace("`", "'")


def _stage_row(stage: str, folder: Path, options: dict, config: dict) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
    parameters = sum(math.prod(shape) for shape in shapes)
    told = ("latent_dim", "hidden_channels", "hidden_dim", "num_blocks", "gamma", "reconstruction_space")
    told += ("num_couplings", "num_components")
    model = ", ".join(f"{name} {config[name]}" for name in told if name in config)
    if config["model_type"] == "vaeplus_vae":
        model = model.replace(f"hidden_channels {config['hidden_channels']}, ", "")
    if network := options.get("feature_loss"):  # of a folder of this machine, its name alone
        is_place = Path(network).is_absolute() or Path(network).is_dir()
        model += f", energy score of features of {Path(network).name if is_place else network}"
    batch = options["train_batch_size"] * options["gradient_accumulation_steps"] * options["num_processes"]
    kind = options.get("second_stage", "vae")
    row = [
        _TITLES[stage] + f", {kind}" * (stage == "second_stage" and kind != "vae"),
        f"{parameters / 1e6:.2f} M",
        f"{options['max_train_steps']:,} x {batch}",
        f"{options['learning_rate']:g}",
        options["mixed_precision"] if options["mixed_precision"] != "no" else "float32",
        model,
    ]
    return [plain_text(cell) for cell in row]


def figures(summary: dict) -> list[tuple[str, str]]:
    vae = summary["vae"]
    return [
        ("squared error per image, autoencoder alone", f"{summary['autoencoder_squared_error']:.2f}"),
        ("squared error per image, whole model", f"{summary['squared_error']:.2f}"),
        ("first VAE: active units", f"{vae['active_units_by_variance']} of {vae['latent_dim']}"),
        ("first VAE: KL, gamma (a variance)", f"{vae['kl']:.2f} nats, {vae['gamma']:.3g}"),
        second_stage_row(summary["second_stage"]),
    ]


def _eval_results(summary: dict, evaluation: dict | None) -> list[EvalResult]:
    task = dict(task_type="unconditional-image-generation", dataset_name=summary["images"])
    task["dataset_type"] = summary["images"]
    results = [EvalResult(**task, metric_type="squared-error", metric_value=summary["squared_error"])]
    if evaluation is None:
        return results
    task["dataset_split"] = evaluation["protocol"]["split"]
    for name, found in evaluation["sets"].items():
        for extractor, each in found["distances"].items():
            if name not in ("real", "downsample", "autoencoder"):
                about = f"{name}, {evaluation['protocol']['num_images']} images"
                numbers = {"frechet": (each["distance"], each["frechet"])}
                if prdc := each.get("prdc"):
                    numbers |= {key: (f"{key}, {extractor}", prdc[key]) for key in ("precision", "recall", "coverage")}
                if copies := each.get("memorised"):
                    numbers["memorised"] = f"memorised share, {extractor}", copies["share"]
                for kind, (title, value) in numbers.items():
                    told = f"{title}, {about}"
                    results.append(EvalResult(**task, metric_type=kind, metric_name=told, metric_value=value))
    return results
