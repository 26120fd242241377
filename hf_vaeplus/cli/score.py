"""`vaeplus score`."""

import csv
import itertools
import json
import logging
import os
from pathlib import Path

from .flags import (
    add_data,
    add_label_column,
    add_overwrite,
    add_pipeline,
    check_seed,
    data_options,
    load_pipeline,
    local_path,
    output_file,
    pictures_in,
    usable_pictures,
    write_output,
    written_record,
)


def add_score(commands):
    parser = commands.add_parser(
        "score",
        help="score pictures one by one: likelihood, error, distance",
        description="How well the model fits each picture, and how usual it finds it: a table of likelihoods, bits\n"
        "per dimension, squared errors and latent distances, with the names of the files, the most unusual first.\n"
        "Pictures are cropped and resized as in training. With labels (of --labels, of a column of a table, or the\n"
        "folders that the pictures lie in) it also says how well each score tells a label from the others (AUROC).",
        epilog="examples:\n"
        "  vaeplus score runs/faces/pipeline photographs/ --top 10\n"
        "  vaeplus score runs/faces/pipeline photographs/ --labels labels.csv --output scores.json\n"
        "  vaeplus score runs/mnist/pipeline --train_data_dir mnist --split 'test[:1000]'",
    )
    add_pipeline(parser, "scores.csv")
    parser.set_defaults(output="scores.csv")
    parser.add_argument("images", nargs="*", type=local_path, help="pictures, or folders of pictures")
    add_data(parser, "score")
    parser.add_argument("--labels", type=local_path, default=None, help="CSV file with columns file_name and label")
    add_label_column(parser)
    parser.add_argument(
        "--num_importance_samples", type=int, default=16, help="samples of the bound, for each image (default: 16)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of their noise (default: 0)")
    parser.add_argument(
        "--prior",
        choices=("standard_normal", "second_stage"),
        default=None,
        help="p(z) of likelihood and distance (default: the second stage if its density takes one pass; that of flow"
        " matching takes an ODE)",
    )
    parser.add_argument(
        "--sort",
        choices=("log_likelihood", "squared_error", "latent_distance"),
        default=None,
        help="by which score (default: log_likelihood, or squared_error for a model without likelihoods)",
    )
    parser.add_argument("--top", type=int, default=20, help="rows to print; the file has all of them (default: 20)")
    add_overwrite(parser)
    parser.set_defaults(run=_score)


def _score(args):
    from ..evaluation.scores import auroc_by_label, most_unusual_first, score_images, scores_table
    from ..provenance import provenance, redacted

    output = Path(args.output)
    if output.suffix.lower() not in (".csv", ".json") or output.is_dir():
        raise ValueError(f"--output must name a file such as scores.csv or scores.json, got {output}.")
    for name, least in (("num_importance_samples", 1), ("top", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    check_seed(args.seed)
    output_file(args)
    labels = _read_labels(args) if args.labels else None
    paths = pictures_in(args.images)
    pipe = load_pipeline(args)
    pipe.need_vae("scores")
    sort = args.sort or ("log_likelihood" if pipe.has_likelihood else "squared_error")
    if sort == "log_likelihood" and not pipe.has_likelihood:
        raise ValueError(f"--sort {sort} is not possible: gamma of this model was measured on codes, not on images.")
    pipe.set_progress_bar_config(disable=True)
    batches = _of_pictures(args, pipe, paths, labels) if paths else _of_data(args, pipe, labels)
    rows, common = score_images(pipe, batches, args.num_importance_samples, args.seed, args.batch_size, args.prior)
    if not rows:
        raise ValueError("none of the pictures can be used, expected at least one: name others.")
    if all(row.get("label") is None for row in rows):
        if labels is not None:
            raise ValueError(f"--labels {args.labels} names none of the pictures, such as {rows[0]['name']}.")
        for row in rows:
            row.pop("label", None)
    elif missing := sum(row["label"] is None for row in rows):
        logging.warning("%s of %s images have no label: AUROCs leave them out", f"{missing:,}", f"{len(rows):,}")
    rows, auroc = most_unusual_first(rows, sort), auroc_by_label(rows)
    print(scores_table(rows, common, auroc, args.top, sort))
    about = dict(sort=sort, num_images=len(rows), **common, auroc=auroc)
    if output.suffix.lower() == ".json":
        found = {**provenance(), "pipeline": args.pipeline, "seed": args.seed, **about, "rows": rows}
        text = redacted(json.dumps(found, indent=2)) + "\n"
        write_output(output, lambda partial: partial.write_text(text, encoding="utf-8"))
    else:
        write_output(output, lambda partial: _write_csv(partial, rows))
    print(f"\nsaved {len(rows):,} rows in {output}")
    return written_record(args, [output], "seed", **about, rows=rows[: args.top])


def _write_csv(path: Path, rows: list[dict]):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _of_pictures(args, pipe, paths: list[Path], labels: dict | None):
    """Batches for [`score_images`] of the pictures that the command line names."""
    import torch

    from ..data.folders import labels_of_folders, printable
    from ..progress import tqdm

    if given := [name for name in ("dataset_name", "train_data_dir", "train_data_files") if hasattr(args, name)]:
        raise ValueError(f"give pictures or --{given[0]}, not both.")
    if args.label_column and not args.labels:
        raise ValueError("--label_column is for tables and for --labels: pictures have no columns, so leave it out.")
    of_folders = labels_of_folders(paths) if any(map(os.path.isdir, args.images)) else None
    args.crop = getattr(args, "crop", None)
    usable = usable_pictures(args, pipe, paths, skip=getattr(args, "on_bad_image", "raise") == "skip")
    with tqdm(desc="scoring", unit="image", total=len(paths)) as bar:
        for batch in iter(lambda: list(itertools.islice(usable, args.batch_size)), []):
            facts = []
            for place, _ in batch:
                label = of_folders[place] if of_folders else None
                if labels is not None:
                    label = _label_of(labels, paths[place], args.labels)
                facts.append({"name": printable(paths[place]), "label": label})
            yield facts, torch.stack([pixels for _, pixels in batch])
            bar.update(len(batch))


def _of_data(args, pipe, labels: dict | None):
    """Batches for [`score_images`] of a data set."""
    from ..progress import tqdm
    from ..training.stages import open_images

    options = data_options(args, pipe)
    images = open_images(options)
    source = images.source
    known = None if labels is not None else source.labels(args.label_column)
    names = source.file_names()
    with tqdm(desc="scoring", unit="image", total=len(images)) as bar:
        for batch in images.in_order(args.batch_size):
            facts = []
            for row in batch["index"].tolist():
                name = source.label(row) if names is None else names[row]
                label = known[row] if known is not None else None
                if labels is not None:
                    label = _label_of(labels, Path(options.train_data_dir or "", name), args.labels, name)
                facts.append({"name": name, "label": label})
            yield facts, batch["pixel_values"]
            bar.update(len(facts))


def _read_labels(args) -> dict[str, str]:
    """File name -> label, of a CSV file."""
    column, path = args.label_column or "label", Path(args.labels)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for name in ("file_name", column):
                if name not in columns:
                    raise ValueError(f"no column {name!r}, it has {columns}")
            return {row["file_name"]: row[column] or None for row in reader}
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--labels {path} cannot be read ({reason}): give a CSV file with file_name and label."
        ) from error


def _label_of(labels: dict, path: Path, csv_file: str, *names: str) -> str | None:
    """By the path as it is listed, from the folder of the CSV file, or by the name of the file alone."""
    from_csv = os.path.relpath(path, os.path.dirname(csv_file) or os.curdir)
    found = (labels[name] for name in (*names, str(path), Path(from_csv).as_posix(), path.name) if name in labels)
    return next(found, None)
