"""`vaeplus diagnose`."""

import json
from pathlib import Path

from .flags import (
    add_data,
    add_json,
    add_overwrite,
    image_options_of,
    local_path,
    output_file,
    output_picture,
    usable_device,
    write_output,
)


def add_diagnose(commands):
    parser = commands.add_parser(
        "diagnose",
        help="say whether an autoencoder is over-regularised, under-regularised or balanced",
        description="Judge how an autoencoder is regularised, with reasons and with what helps: one of this package,\n"
        "or AutoencoderKL, AutoencoderTiny, AutoencoderDC or VQModel of diffusers, from a folder or the Hub.\n"
        "Prints a text, writes all figures as JSON and draws one picture beside it. Use images that the model was\n"
        "not trained on.",
        epilog="examples:\n"
        "  vaeplus diagnose vaeplus-quickstart/pipeline --dataset_name rendered-faces --max_images 22500 --split"
        " 'train[20000:]'\n"
        "  vaeplus diagnose stabilityai/sd-vae-ft-mse --train_data_dir photographs --resolution 128 --num_images 1000",
    )
    parser.add_argument(
        "source", metavar="MODEL", type=local_path, help="folder of a pipeline or an autoencoder, or an id on the Hub"
    )
    parser.add_argument(
        "--output", type=local_path, default="diagnosis.json",
        help="JSON to write; the picture has the same name with .png (default: diagnosis.json)",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    add_json(parser)
    add_data(parser, "judge on")
    parser.add_argument(
        "--num_images", type=int, default=5_000, help="at most so many, chosen at random (default: 5000)"
    )
    parser.add_argument(
        "--resolution", type=int, default=64, help="for models that take images of any size (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")
    add_overwrite(parser)
    parser.set_defaults(run=_diagnose)


def _diagnose(args):
    import argparse

    from ..diagnosis.diagnose import diagnose
    from ..diagnosis.models import load_autoencoder
    from ..provenance import provenance, redacted
    from ..training.stages import open_images

    output = Path(args.output)
    picture = output.with_suffix(".png")
    if output == picture or output.is_dir():
        raise ValueError(f"--output must name a file such as diagnosis.json, got {output}.")
    output_file(args)
    output_picture(argparse.Namespace(output=picture, overwrite=args.overwrite))
    model = load_autoencoder(args.source, usable_device(args))
    channels, size = model.num_channels, args.resolution
    if model.image_shape is not None:
        if len(model.image_shape) != 3:
            raise ValueError(
                f"{args.source} takes inputs of shape {model.image_shape} and no images: name the pipeline that it is"
                " a stage of, or pass it to hf_vaeplus.diagnose with its inputs."
            )
        channels, size = model.image_shape[:2]
    images = open_images(image_options_of(args, size, channels))
    diagnosis = diagnose(model, images, num_images=args.num_images, seed=args.seed, batch_size=args.batch_size)
    data = {"data": images.name, "split": images.split}
    found = {**provenance(), "source": args.source, **data, **diagnosis.to_dict()}
    text = redacted(json.dumps(found, indent=2)) + "\n"
    write_output(output, lambda partial: partial.write_text(text, encoding="utf-8"))
    write_output(picture, diagnosis.save_figure)
    print(f"{diagnosis}\n\nsaved in {output} and {picture}")
    return {"files": [str(output), str(picture)], **found}
