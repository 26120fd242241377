"""`vaeplus sample`, `reconstruct` and `interpolate`."""

from pathlib import Path

from .flags import (
    add_crop,
    add_deterministic,
    add_overwrite,
    add_pipeline,
    add_sharpness,
    assignment,
    check_seed,
    load_pipeline,
    local_path,
    output_picture,
    pictures_in,
    read_pictures,
    writable,
    write_output,
    written_record,
)


def add_sample(commands):
    parser = commands.add_parser(
        "sample",
        help="draw new images",
        description="Sample images from a pipeline: a grid as one PNG, or --separate files.",
        epilog="examples:\n"
        "  vaeplus sample runs/faces/pipeline --num_images 64 --seed 1 --output samples.png\n"
        "  vaeplus sample org/vaeplus-celeba128 --num_images 1000 --separate --output samples/\n"
        "  vaeplus sample runs/digits/pipeline --class_labels 3 5 --num_images 16",
    )
    add_pipeline(parser, "samples.png, with --separate samples/")
    told = "how many (default: 64, or one for each of --class_labels)"
    parser.add_argument("--num_images", type=int, default=None, help=told)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="factor on all noise (default: 1)")
    add_sharpness(parser)
    add_deterministic(parser, default=False)
    told = "solve the ODE of a flow-matching second stage in so many steps (default: its one pass)"
    parser.add_argument("--num_inference_steps", type=int, default=None, help=told)
    told = "classes of a conditional second stage, by id or name, in turn; null for all classes"
    parser.add_argument("--class_labels", nargs="+", default=None, help=told)
    told = "attributes or factors of a conditional second stage, for all images"
    parser.add_argument("--conditions", nargs="+", type=assignment, metavar="NAME=VALUE", default=None, help=told)
    told = "above 1, more typical and less diverse images of the classes or conditions (default: 1)"
    parser.add_argument("--guidance_scale", type=float, default=1.0, help=told)
    parser.add_argument("--separate", action="store_true", help="write one file per image into the folder --output")
    add_overwrite(parser)
    parser.set_defaults(run=_sample)


def _sample(args):
    import torch

    from ..pictures import image_grid

    check_seed(args.seed)
    if args.separate:
        folder = Path(args.output or "samples")
        writable(folder, folder)
        if any(folder.iterdir()):  # old samples among the new ones would spoil whatever is measured on them
            raise FileExistsError(f"--output {folder} is not empty: name a new folder.")
    else:
        args.output = args.output or "samples.png"
        output = output_picture(args)
    pipe = load_pipeline(args)
    labels = None if args.class_labels is None else [_class_label(pipe, word) for word in args.class_labels]
    conditions = None if args.conditions is None else dict(args.conditions)
    if args.num_images is None:
        args.num_images = 64 if labels is None else len(labels)
    generator = torch.Generator().manual_seed(args.seed)  # the same noise on every device
    wanted = dict(generator=generator, temperature=args.temperature, sharpness=args.sharpness)
    wanted |= dict(deterministic=args.deterministic, detail_temperature=args.detail_temperature)
    wanted |= dict(decode_batch_size=args.batch_size, num_inference_steps=args.num_inference_steps)
    wanted |= dict(class_labels=labels, conditions=conditions, guidance_scale=args.guidance_scale)
    if args.separate:
        files = [folder / f"{number:06d}.png" for number in range(args.num_images)]
        for file, image in zip(files, pipe(args.num_images, **wanted).images, strict=True):
            write_output(file, image.save)
    else:
        files = [output]
        write_output(output, image_grid(pipe(args.num_images, output_type="pt", **wanted).images).save)
    print(f"saved {args.num_images} pictures in {folder}" if args.separate else f"saved {output}")
    named = "num_images seed temperature sharpness deterministic num_inference_steps class_labels guidance_scale"
    return written_record(args, files, *named.split(), conditions=conditions)


def _class_label(pipe, word: str) -> int | str | None:
    """A word of the command line as the pipeline takes it: a name goes before a number."""
    names = (getattr(getattr(pipe.second_stage, "config", None), "id2label", None) or {}).values()
    if word in names:
        return word
    if word == "null":
        return None
    try:
        return int(word)
    except ValueError:
        return word


def add_reconstruct(commands):
    parser = commands.add_parser(
        "reconstruct",
        help="pass pictures through the model",
        description="Encode pictures and decode them again: a PNG of pairs, the original left of its reconstruction.\n"
        "Pictures are cropped to their centre and resized to what the model was trained on.",
        epilog="examples:\n"
        "  vaeplus reconstruct runs/faces/pipeline a.png b.jpg --output reconstructions.png\n"
        "  vaeplus reconstruct runs/faces/pipeline photographs/ --on_bad_image skip --overwrite",
    )
    add_pipeline(parser, "reconstructions.png")
    add_sharpness(parser)
    add_deterministic(parser, default=True)
    parser.add_argument("--seed", type=int, default=0, help="seed of the detail's noise (default: 0)")
    parser.set_defaults(output="reconstructions.png")
    parser.add_argument("images", nargs="+", type=local_path, help="pictures, or folders of pictures")
    add_crop(parser)
    parser.add_argument(
        "--on_bad_image",
        choices=("raise", "skip"),
        default="raise",
        help="refuse a picture that cannot be used, or leave it out with a warning (default: raise)",
    )
    add_overwrite(parser)
    parser.set_defaults(run=_reconstruct)


def _reconstruct(args):
    import torch

    from ..pictures import image_grid

    check_seed(args.seed)
    output = output_picture(args)
    paths = pictures_in(args.images)
    pipe = load_pipeline(args)
    images = read_pictures(args, pipe, paths, skip=args.on_bad_image == "skip")
    generator = torch.Generator().manual_seed(args.seed)
    wanted = dict(sharpness=args.sharpness, deterministic=args.deterministic, generator=generator)
    wanted["detail_temperature"] = args.detail_temperature
    decoded = pipe.reconstruct(images, "pt", args.batch_size, **wanted)
    pairs = torch.stack([images, decoded], 1)
    write_output(output, image_grid(pairs.flatten(0, 1), columns=2 * min(4, len(images))).save)
    print(f"saved {output}")
    return written_record(args, [output], "sharpness", "deterministic", num_images=len(images))


def add_interpolate(commands):
    parser = commands.add_parser(
        "interpolate",
        help="walk between two pictures",
        description="Draw the way from one picture to another through the latent space, as one row of images.\n"
        "Pictures are cropped to their centre and resized to what the model was trained on.",
        epilog="example:\n  vaeplus interpolate runs/faces/pipeline a.png b.png --steps 9 --output interpolation.png",
    )
    add_pipeline(parser, "interpolation.png")
    parser.set_defaults(output="interpolation.png")
    parser.add_argument("images", nargs=2, type=local_path, metavar="IMAGE", help="first and last picture")
    add_crop(parser)
    parser.add_argument("--steps", type=int, default=9, help="images on the way, ends included (default: 9)")
    add_overwrite(parser)
    parser.set_defaults(run=_interpolate)


def _interpolate(args):
    from ..pictures import image_grid

    output = output_picture(args)
    pipe = load_pipeline(args)
    first, last = read_pictures(args, pipe)
    path = pipe.interpolate(first, last, args.steps, output_type="pt", decode_batch_size=args.batch_size)
    write_output(output, image_grid(path[0], columns=args.steps).save)
    print(f"saved {output}")
    return written_record(args, [output], "steps")
