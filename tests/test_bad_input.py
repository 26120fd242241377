"""A catalogue of what a user, a disk or a stranger may hand to the package, and what comes back.

Every case of `CATALOGUE` ends in exit code 2 and one sentence, with every file as it was; `PICTURES` are unusual, but
right, and give the right pixels.
"""

import gzip
import io
import json
import os
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pytest
import torch
import yaml
from helpers import SIZE, TINY, captured, encoded, full_disk, idx, noise, parquet, png_chunk, run, tree
from loopback_hub import Fault, Repository
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.cli.flags import parse_stage_options
from hf_vaeplus.cli.main import run_command
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.stream import stream_images
from hf_vaeplus.image_processing_vaeplus import decode_image
from hf_vaeplus.training.stages import run_stage

PNG = b"\x89PNG\r\n\x1a\n"


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes that say they are so many pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return PNG + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small picture with a comment that unpacks to 100 MB."""
    comment = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(100_000_000)))
    return encoded(noise(0))[:33] + comment + encoded(noise(0))[33:]


def flipped(content: bytes, at: int, count: int = 40) -> bytes:
    return content[:at] + bytes(255 - byte for byte in content[at : at + count]) + content[at + count :]


JPEG = encoded(noise(0, 64, 64), "jpeg", quality=90)
SMALL = encoded(noise(0, 40, 40))
ROWS = [{"bytes": encoded(noise(seed, 40, 40)), "path": f"{seed}.png"} for seed in range(4)]
DIGITS = np.zeros((5, 28, 28), np.uint8)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"

# What lies in the folder that every command runs in, and that none of them may change.
FILES = {
    # pictures
    "good.png": SMALL,
    "notes.txt": b"words",
    "empty.jpg": b"",
    "text.jpg": b"not a picture",
    "truncated.jpg": JPEG[:1000],
    "headless.jpg": JPEG[200:],
    "corrupt.png": flipped(encoded(noise(1, 64, 64)), 60),
    "page.jpg": b"<!DOCTYPE html><title>404</title>",
    "deep.png": encoded(np.full((40, 40), 300, np.uint16)),
    "float.tif": encoded(np.full((40, 40), 0.5, np.float32), "tiff"),
    "bomb.png": png_that_claims(30_000, 30_000),
    "comment.png": text_bomb(),
    "program.jpg": POSTSCRIPT,
    "long.png": encoded(np.zeros((1, 30_000), np.uint8)),
    # folders of pictures
    "pictures/0.png": SMALL,
    "pictures/1.png": encoded(noise(1, 40, 40)),
    "empty/notes.txt": b"no pictures here",
    "one/0.png": SMALL,
    "copies/0.png": SMALL,
    "copies/1.png": SMALL,
    "copies/2.png": SMALL,
    "black/0.png": encoded(np.zeros((40, 40, 3), np.uint8)),
    "black/1.png": encoded(np.zeros((50, 50, 3), np.uint8)),
    "colours/0.png": encoded(np.full((40, 40, 3), 10, np.uint8)),
    "colours/1.png": encoded(np.full((40, 40, 3), 200, np.uint8)),
    "saved/dataset_dict.json": b'{"splits": ["validation"]}',
    "packed/train.zip": b"PK\x05\x06" + bytes(18),
    "test/test/0.png": SMALL,
    "bad/0.png": SMALL,
    "bad/1.jpg": JPEG[:1000],
    "hopeless/0.jpg": b"",
    "hopeless/1.jpg": JPEG[:1000],
    "mixture/0.png": SMALL,
    "mixture/train.parquet": parquet(image=ROWS),
    # tables
    "tables/good.parquet": parquet(image=ROWS),
    "tables/text.parquet": b"not parquet",
    "tables/cut.parquet": parquet(image=ROWS)[:-20],
    "tables/damaged.parquet": flipped(parquet(image=ROWS), 4, 30),
    "tables/numbers.parquet": parquet(image=[1, 2]),
    "tables/lists.parquet": parquet(image=[[1, 2], [3]]),
    "tables/missing.parquet": parquet(image=[ROWS[0], None]),
    "tables/hollow.parquet": parquet(image=[{"bytes": b"", "path": None}] * 2),
    "tables/no_rows.parquet": parquet(image=pyarrow.array([], pyarrow.struct({"bytes": pyarrow.binary()}))),
    "tables/names.parquet": parquet(image=["good.png", "good.png"]),
    "tables/addresses.parquet": parquet(image=["https://127.0.0.1/a.png"] * 2),
    "tables/paths.parquet": parquet(image=[{"bytes": None, "path": "good.png"}] * 2),
    # MNIST's files
    "idx/cut/train-images-idx3-ubyte": idx(DIGITS)[:-1],
    "idx/labels/train-images-idx3-ubyte": idx(DIGITS, 0x801),
    "idx/short/train-images-idx3-ubyte": b"\0\0\x08",
    "idx/negative/train-images-idx3-ubyte": idx(DIGITS, shape=(-5, 28, -28)),
    "idx/none/train-images-idx3-ubyte": idx(DIGITS[:0]),
    "idx/gzip/train-images-idx3-ubyte.gz": gzip.compress(idx(DIGITS))[:-20],
    "idx/plain/train-images-idx3-ubyte.gz": idx(DIGITS),
    "idx/bomb/train-images-idx3-ubyte.gz": gzip.compress(idx(DIGITS, shape=(2**21, 28, 28)) + bytes(100_000_000)),
    "idx/long/train-images-idx3-ubyte.gz": gzip.compress(idx(DIGITS) + bytes(100_000_000)),
    "idx/claim/train-images-idx3-ubyte": idx(DIGITS, shape=(2**30, 2**30, 2**30)),
    # presets
    "list.yaml": b"- vae\n- second_stage\n",
    "number.yaml": b"3\n",
    "nothing.yaml": b"",
    "section.yaml": b"vae: 3\n",
    "stage.yaml": b"vea: {seed: 1}\n",
    "option.yaml": b"vae: {seeds: 1}\n",
    "model.yaml": b"vae: {model: [1]}\n",
    "field.yaml": b"vae: {model: {hiden_dim: 3}}\n",
    "numbered.yaml": b"vae: {1: 2}\n",
    "python.yaml": b"vae: !!python/object/apply:os.system ['touch pwned']\n",
    "tab.yaml": b"vae:\n\tseed: 1\n",
    "binary.yaml": SMALL,
    "recursive.yaml": b"vae: &a {model: *a}\n",
    "laughs.yaml": b"a0: &a0 [1]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)),
    "brackets.yaml": b"[" * 2_000,
    "duplicate.yaml": b"vae: {seed: 1}\nvae: {seed: 2}\n",
    "nan.yaml": b"vae: {learning_rate: .nan}\n",
    "infinite.yaml": b"vae: {learning_rate: .inf}\n",
    # results
    "list.json": b"[]",
    "object.json": b'{"protocol": {}}',
    "text.json": b"{",
    "latents.parquet": parquet(index=[1]),
    "latents/data.txt": b"",
}

TRAIN = "train --config tiny.yaml --output_dir out"
OWN = f"{TRAIN} --set common.dataset_name=null --num_channels 3"
STAGE = "train_stage --config tiny.yaml --output_dir out"
FIRST = f"{STAGE} --stage autoencoder"
EVAL = "evaluate pipeline --output out.json --num_images 2"
ENCODE = "encode pipeline --output out.parquet"
SAMPLE = "sample pipeline --output out.png"
DIGIT = "--dataset_name digits --max_images 40"
FULL = "cannot be written .*free some space"
UNREADABLE = "is not a readable picture .* remove it or replace it"

# What is done (a command line, or a call of the pipeline) -> what the sentence says.
CATALOGUE = {
    # ------------------------------------------------------------------------------------------------ the parser
    "no command": ("", "COMMAND"),
    "an unknown command": ("trian", "'trian', did you mean train.*quickstart"),
    "no preset": ("train", "--config"),
    "an unknown flag": (f"{TRAIN} --lerning_rate 0.1", "no option --lerning_rate, did you mean --learning_rate"),
    "an unknown flag with hyphens": (
        f"{TRAIN} --lerning-rate=0.1",
        "no option --lerning-rate, did you mean --learning",
    ),
    "a flag like no other": (f"{TRAIN} --zzz", r"no option --zzz \("),
    "a shortened flag": ("sample pipeline --num_image 3", "--num_image"),
    "a number that is none": (f"{TRAIN} --seed one", "--seed.*'one'"),
    "half a number": (f"{SAMPLE} --num_images 0.5", "'0.5'"),
    "a choice that is none": (f"{TRAIN} --mixed_precision fb16", "'fb16', did you mean .p16.*bf16"),
    "one picture to interpolate": ("interpolate pipeline good.png", "IMAGE"),
    "a setting without a value": (f"{TRAIN} --set vae.seed", "NAME=VALUE"),
    "a setting with broken YAML": (f"{TRAIN} --set vae.model=[1,", "readable"),
    "a shell that is none": ("completion cmd", "'cmd'.*bash"),
    # ------------------------------------------------------------------------------------------------ pictures
    "an empty file": ("reconstruct pipeline empty.jpg", f"empty.jpg {UNREADABLE}"),
    "text": ("reconstruct pipeline text.jpg", f"text.jpg {UNREADABLE}"),
    "a page in place of a picture": ("reconstruct pipeline page.jpg", f"page.jpg {UNREADABLE}"),
    "a truncated JPEG": ("reconstruct pipeline truncated.jpg", f"truncated.jpg {UNREADABLE}"),
    "a JPEG without its head": ("reconstruct pipeline headless.jpg", f"headless.jpg {UNREADABLE}"),
    "a corrupt PNG": ("reconstruct pipeline corrupt.png", f"corrupt.png {UNREADABLE}"),
    "16 bits": ("reconstruct pipeline deep.png", "pixel type I;16, expected 8 bits a channel; convert it first"),
    "floats": ("reconstruct pipeline float.tif", "pixel type F, expected 8 bits a channel; convert it first"),
    "a decompression bomb": ("reconstruct pipeline bomb.png", f"bomb.png {UNREADABLE}"),
    "a bomb in a comment": ("reconstruct pipeline comment.png", f"comment.png {UNREADABLE}"),
    "a PostScript program": ("reconstruct pipeline program.jpg", f"program.jpg {UNREADABLE}"),
    "a bomb among two": ("interpolate pipeline good.png bomb.png", f"bomb.png {UNREADABLE}"),
    "a folder": ("interpolate pipeline good.png pictures", f"pictures {UNREADABLE}"),
    "a missing picture": (
        "reconstruct pipeline good.png gone.png",
        "gone.png is not a readable picture.*No such file.* remove it or replace it",
    ),
    "a folder without pictures": ("reconstruct pipeline pipeline", "folder pipeline holds no pictures"),
    "pictures of which none is one": (
        "reconstruct pipeline notes.txt --on_bad_image skip",
        "none of the pict",
    ),
    "a device": ("reconstruct pipeline /dev/null", f"/dev/null {UNREADABLE}"),
    "a name with a zero": ("reconstruct pipeline a\0b.png", "a.b.png"),
    "a long name": (f"reconstruct pipeline {'a' * 300}.png", f"{UNREADABLE}"),
    "a crop of nothing": ("reconstruct pipeline good.png --crop 0", "--crop must be positive, got 0"),
    "a crop larger than the picture": ("reconstruct pipeline good.png --crop 41", "is 40x40, smaller than crop=41"),
    "a crop of a thin picture": ("reconstruct pipeline long.png --crop 2", "is 30000x1, smaller than crop=2"),
    # ------------------------------------------------------------------------------------------------ data sets
    "no folder": (f"{OWN} --train_data_dir gone", "'gone' is not a folder; check the path"),
    "two sources to train on": (f"{TRAIN} --train_data_dir pictures --train_data_files a.parquet", "exactly one of"),
    "no source to train on": (OWN, "exactly one of.*got none"),
    "a file as the folder": (f"{OWN} --train_data_dir good.png", "'good.png' is not a folder; check the path"),
    "an empty folder": (f"{OWN} --train_data_dir empty", "must hold pictures or parquet files, got neither"),
    "pictures and tables": (f"{OWN} --train_data_dir mixture", "pictures or parquet files, got both; name"),
    "one picture": (f"{OWN} --train_data_dir one", "one image.*at least two"),
    "a stream of one picture": (f"{OWN} --train_data_dir one --streaming", "one image.*at least two"),
    "copies of one picture": (f"{OWN} --train_data_dir copies", "the 3 images of copies are all the same, .*add im"),
    "a stage on copies": (f"{FIRST} --train_data_dir copies --streaming", "the 3 images of copies are all the same"),
    "black pictures": (f"{OWN} --train_data_dir black", "the 2 images of black are all the same"),
    "pictures of one colour each": (f"{OWN} --train_data_dir colours", "each of the 2 images .* has one colour every"),
    "a stage on colours": (f"{FIRST} --train_data_dir colours", "each of the 2 images of colours has one colour"),
    "a saved data set without training images": (f"{OWN} --train_data_dir saved", r"has \['validation'\]; choose one"),
    "a folder of an archive": (f"{OWN} --train_data_dir packed", "got the zip archive 'train.zip'; unpack it"),
    "an archive": (f"{OWN} --train_data_dir packed/train.zip", "is a zip archive, expected a folder; unpack it"),
    "an archive as a table": (f"{OWN} --train_data_files packed/train.zip", "is a zip archive.*unpack it"),
    "a table as a folder": (f"{OWN} --train_data_dir tables/good.parquet", "name it with train_data_files"),
    "a folder as a table": (f"{OWN} --train_data_files tables", "the folder 'tables'; name it with train_data_dir"),
    "test pictures to train on": (f"{OWN} --train_data_dir test", r"no split 'train' .* which has \['test'\]"),
    "a folder with a bad picture": (f"{OWN} --train_data_dir bad", f"1.jpg {UNREADABLE}"),
    "a stream with a bad picture": (f"{FIRST} --train_data_dir bad --streaming", f"1.jpg {UNREADABLE}"),
    "nothing but bad pictures": (f"{OWN} --train_data_dir hopeless --on_bad_image skip", "no picture .* all 2 were"),
    "a stream of bad pictures": (
        f"{FIRST} --train_data_dir hopeless --on_bad_image skip --streaming",
        "no picture that can be used, all 2 were left out",
    ),
    "latents of bad pictures": (
        f"{ENCODE} --train_data_dir hopeless --on_bad_image skip --streaming",
        "no picture that can be used, all 2 were left out",
    ),
    "another way with bad pictures": (f"{OWN} --train_data_dir bad --on_bad_image ignore", "'ignore'.*raise.*skip"),
    "a split of a folder": (f"{OWN} --train_data_dir pictures --split test", "no splits, got split='test'"),
    "a split of the digits": (f"{EVAL} {DIGIT} --split test", "no splits.*'test'"),
    "an evaluation split that is none": (f"{TRAIN} --evaluation_split test", "no splits.*'test'"),
    "a slice of a stream": (f"{ENCODE} {DIGIT} --split train[:5] --streaming", "a stream takes no slice"),
    "a slice of percents": (f"{ENCODE} {DIGIT} --split train[:5%]", "nor a name with a slice of whole numbers"),
    "a slice beyond the end": (
        f"{EVAL} {DIGIT} --split train[40:]",
        r"'train\[40:\]' must name some of the 40 images.*choose limits from 0 to 40",
    ),
    "a slice of missing images": (f"{EVAL} {DIGIT} --ndb_split train[:41]", "must name some of the 40 images"),
    "no such file": (f"{OWN} --train_data_files gone*.parquet", "no file matches .* check the path"),
    "text as parquet": (f"{OWN} --train_data_files tables/text.parquet", "text.parquet is no readable parquet file"),
    "a truncated parquet": (f"{OWN} --train_data_files tables/cut.parquet", "cut.parquet is no readable parquet"),
    "a damaged parquet": (f"{OWN} --train_data_files tables/damaged.parquet", "damaged.*fetch it again"),
    "a missing column": (
        f"{OWN} --train_data_files tables/good.parquet --image_column photo",
        r"no column 'photo' in parquet, which has \['image'\]; choose one",
    ),
    "a column of numbers": (f"{OWN} --train_data_files tables/numbers.parquet", "row 0 .* holds a int, expected a"),
    "a column of lists": (f"{OWN} --train_data_files tables/lists.parquet", "row 0 .* holds a list, expected a"),
    "a row without its picture": (f"{OWN} --train_data_files tables/missing.parquet", "row 1 .* has no image"),
    "rows of no bytes": (f"{OWN} --train_data_files tables/hollow.parquet", "row 0 .* has no image"),
    "a table without rows": (f"{OWN} --train_data_files tables/no_rows.parquet", "holds no images"),
    "names of local files": (
        f"{OWN} --train_data_files tables/names.parquet",
        "row 0 of parquet names 'good.png', which is not opened, expected the picture itself; store its bytes",
    ),
    "paths of local files": (f"{OWN} --train_data_files tables/paths.parquet", "names 'good.png', which is not open"),
    "addresses": (f"{OWN} --train_data_files tables/addresses.parquet", "names 'https://.*', which is not opened"),
    "a stream of paths": (
        f"{FIRST} --train_data_files tables/paths.parquet --streaming",
        "names 'good.png', which is not opened",
    ),
    "a truncated idx file": (f"{OWN} --train_data_dir idx/cut", "not a complete file of images .* download it again"),
    "an idx file of labels": (f"{OWN} --train_data_dir idx/labels", "not a complete file of images"),
    "an idx file of three bytes": (f"{OWN} --train_data_dir idx/short", "not a complete file of images"),
    "an idx file of negative sizes": (f"{OWN} --train_data_dir idx/negative", "not a complete file of images"),
    "an idx file of no images": (f"{OWN} --train_data_dir idx/none", "holds no images"),
    "a truncated gzip": (f"{OWN} --train_data_dir idx/gzip", "not a complete file of images .* download it again"),
    "a gzip that is none": (f"{OWN} --train_data_dir idx/plain", "not a complete file of images"),
    "a gzip bomb": (f"{OWN} --train_data_dir idx/bomb", "says that it unpacks to 1,644,167,168 bytes; unpack it if"),
    "a gzip with more than it says": (f"{OWN} --train_data_dir idx/long", "not a complete file of images"),
    "an idx file that says it is huge": (f"{OWN} --train_data_dir idx/claim", "not a complete file of images"),
    "a data set that the Hub lacks": (f"{OWN} --dataset_name nobody/nothing", "'nobody/nothing' .* is not on the Hub"),
    "a data set of the Hub, offline": (f"offline: {OWN} --dataset_name nobody/nothing", "offline"),
    "a revision that the Hub lacks": (
        f"{OWN} --dataset_name org/folder --dataset_revision v9",
        "at revision='v9' is not on the Hub",
    ),
    "a commit that the Hub lacks": (
        f"{OWN} --dataset_name org/folder --dataset_revision {'0' * 40}",
        "Revision '00.* doesn't",
    ),
    "a split that the Hub lacks": (f"{OWN} --dataset_name org/folder --split test", "no split 'test' in org/folder"),
    "a column that the Hub lacks": (f"{OWN} --dataset_name org/folder --image_column x", "no column 'x'"),
    "no id at all": (f"{OWN} --dataset_name a/b/c", "'a/b/c' .* is not on the Hub"),
    "a repository without data": (f"{OWN} --dataset_name org/nothing", "org/nothing cannot be read as a data set"),
    "paths in a data set of the Hub": (f"{OWN} --dataset_name org/paths", "row 0 of org/paths names '.*good.png'"),
    "files of another data set": (
        f"{OWN} --dataset_name org/thief",
        "row 0 of org/thief names 'hf://datasets/org/fol",
    ),
    "a way out of the data set": (f"{OWN} --dataset_name org/climber", "row 0 of org/climber names 'hf://"),
    "a damaged table on the Hub": (f"{OWN} --dataset_name org/broken", "org/broken cannot be read as a data set"),
    "a bad picture on the Hub": (f"{OWN} --dataset_name org/bad", "row 0 of org/bad is not a readable picture"),
    "a private picture": (f"{OWN} --dataset_name org/refused", "row 0 of org/refused .*cannot be read"),
    # ------------------------------------------------------------------------------------------------ options
    "an outage is no bad picture": (
        f"{OWN} --dataset_name org/refused --on_bad_image skip",
        "row 0 of org/refused .*cannot be read",
    ),
    "no steps": (f"{TRAIN} --max_train_steps 0", "max_train_steps must be positive, got 0"),
    "a negative number of samples": (f"{TRAIN} --max_train_samples -1", "max_train_samples must be at least 1"),
    "a seed out of range": (f"{TRAIN} --seed {2**63}", "seed must be below"),
    "a negative seed of a run": ("quickstart --seed -1 --output_dir out", "seed must not be negative"),
    "an unknown tracker": (f"{TRAIN} --report_to tensorbord", "tensorbord"),
    "too many factors": ("quickstart --num_factors 99 --output_dir out", "1 to 16 factors"),
    "no factors": ("quickstart --num_factors 0 --output_dir out", "1 to 16 factors"),
    "a negative batch": (f"{TRAIN} --train_batch_size -1", "train_batch_size must be positive, got -1"),
    "no accumulation": (f"{TRAIN} --gradient_accumulation_steps 0", "gradient_accumulation_steps must be positive"),
    "no logging": (f"{TRAIN} --logging_steps 0", "logging_steps must be positive, got 0"),
    "no checkpoints": (f"{TRAIN} --checkpoints_total_limit 0", "checkpoints_total_limit must be positive, got 0"),
    "a rate of nothing": (f"{TRAIN} --learning_rate 0", "learning_rate must be positive, got 0"),
    "a rate that is not a number": (f"{TRAIN} --learning_rate nan", "learning_rate must be positive, got nan"),
    "an infinite rate": (f"{TRAIN} --learning_rate inf", "learning_rate must be a finite number, got inf"),
    "a beta of one": (f"{TRAIN} --adam_beta2 1", r"adam_beta2 must lie in \[0, 1\), got 1.0"),
    "a negative weight decay": (f"{TRAIN} --adam_weight_decay -1", "adam_weight_decay must not be negative, got -1"),
    "an epsilon of nothing": (f"{TRAIN} --adam_epsilon 0", "adam_epsilon must be positive, got 0"),
    "fp16 on a CPU": (f"{TRAIN} --mixed_precision fp16", "fp16 needs a GPU, and this is a CPU: use bf16, or no"),
    "fp16 of a stage on a CPU": (f"{FIRST} --mixed_precision fp16", "fp16 needs a GPU, and this is a CPU"),
    "a schedule that waits for a metric": (
        f"{TRAIN} --lr_scheduler reduce_lr_on_plateau",
        r"--lr_scheduler: invalid choice: 'reduce_lr_on_plateau' \(choose from .?constant",
    ),
    "a decay beyond one": (f"{TRAIN} --ema_decay 1.5", r"ema_decay must lie in \[0, 1\), got 1.5"),
    "a norm that is not a number": (f"{TRAIN} --max_grad_norm nan", "max_grad_norm must .*got nan"),
    "negative workers": (f"{TRAIN} --dataloader_num_workers -1", "dataloader_num_workers must not be negative"),
    "a negative warm-up": (f"{TRAIN} --kl_warmup_steps -1", "kl_warmup_steps must not be negative, got -1"),
    "a negative penalty": (f"{STAGE} --stage vae --mmd_weight -1", "mmd_weight must not be negative, got -1.0"),
    "a penalty that is not a number": (
        f"{STAGE} --stage vae --mmd_weight nan",
        "mmd_weight must be a finite number, got nan",
    ),
    "a resolution of nothing": (f"{TRAIN} --resolution 0", "resolution must be at least 1, got 0"),
    "a resolution that does not divide": (
        f"{TRAIN} --resolution 37",
        r"cannot take images of resolution 37, the nearest that it can take: 32 and 40 \(.*multiple of",
    ),
    "a crop of drawings": ("evaluate pipeline --dataset_name rendered-faces --crop 9", "takes no crop"),
    "a negative crop": (f"{TRAIN} --crop -8", "crop must be at least 1, got -8"),
    "two channels": (f"{TRAIN} --num_channels 2", r"num_channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
    "a push to nowhere": (f"{TRAIN} --push_to_hub", "push_to_hub needs hub_model_id"),
    "a stage that is none": (f"{STAGE} --stage third", "third.*second_stage"),
    "a stage unnamed": (STAGE, "--stage is missing: choose autoencoder, vae or second_stage"),
    "a second stage alone": (f"{STAGE} --stage second_stage", "the second stage needs --vae"),
    "an autoencoder of an autoencoder": (f"{FIRST} --autoencoder x", "leave out --autoencoder"),
    "a missing autoencoder": (f"{STAGE} --stage vae --autoencoder runs/gone", "runs/gone"),
    "a pipeline as an autoencoder": (
        f"{STAGE} --stage vae --autoencoder pipeline",
        "pipeline/config.json: got the config of a vaeplus_encoder where that of a vaeplus_autoencoder is expected",
    ),
    "a VAE as an autoencoder": (
        f"{STAGE} --stage vae --autoencoder pipeline/vae",
        "got the config of a vaeplus_vae where that of a vaeplus_autoencoder is expected: name the folder of another",
    ),
    "no checkpoint": (f"{FIRST} --resume_from_checkpoint gone", "gone"),
    "a model field of nothing": (f"{FIRST} --model latent_dim=0", "latent_dim must be positive"),
    "a model field without a value": (f"{FIRST} --model latent_dim", "expected NAME=VALUE"),
    "an unknown model field": (f"{FIRST} --model latent=3", "has no field 'latent'"),
    "a list that should be a number": (f"{FIRST} --model latent_dim=[3]", "latent_dim"),
    "no channels": (f"{FIRST} --model hidden_channels=[]", "hidden_channels"),
    "negative channels": (f"{FIRST} --model hidden_channels=[4,-8]", "hidden_channels"),
    "a gamma that is not a number": (f"{TRAIN} --set vae.model.gamma_init=.nan", "gamma_init"),
    "an unknown gamma": (f"{TRAIN} --set vae.model.gamma=free", "gamma"),
    "a misspelt option": (f"{TRAIN} --set vae.lerning_rate=0.1", "did you mean 'learning_rate'"),
    "a setting of an unknown stage": (f"{TRAIN} --set vea.seed=1", "section 'vea'"),
    "a stage alone": (f"{TRAIN} --set vae=1", "STAGE.OPTION=VALUE"),
    "a model that is a number": (f"{TRAIN} --set vae.model=3", "vae.model, got 3"),
    "a field of the wrong type": (f"{TRAIN} --set vae.model.latent_dim=five", "latent_dim.*expected int"),
    "a number without a dot": (f"{TRAIN} --set vae.learning_rate=1e-3", "needs the dot"),
    # ------------------------------------------------------------------------------------------------ presets
    "a preset that is a list": ("train --config list.yaml", "list.yaml must map common, autoencoder, .* to options"),
    "a preset that is a number": ("train --config number.yaml", "number.yaml must map"),
    "an empty preset": ("train --config nothing.yaml", "nothing.yaml must map"),
    "a section that is a number": ("train --config section.yaml", "section.yaml must map"),
    "an unknown section": ("train --config stage.yaml", "section 'vea': expected common"),
    "an unknown option": ("train --config option.yaml", "vae.seeds, which is no option: did you mean 'seed'"),
    "a model that is a list": ("train --config model.yaml", r"vae.model, got \[1\]"),
    "an unknown field": (
        "train --config field.yaml --output_dir out --dataset_name digits",
        "'hiden_dim': did you mean 'hidden_dim'",
    ),
    "an option that is a number": ("train --config numbered.yaml", "vae.1, which is no option"),
    "code in a preset": ("train --config python.yaml", "python.yaml is not YAML.*python/object"),
    "a tab in a preset": ("train --config tab.yaml", "tab.yaml is not YAML"),
    "a picture as a preset": ("train --config binary.yaml", "binary.yaml is not YAML"),
    "a preset within itself": ("train --config recursive.yaml", "recursive.yaml holds more than 10,000 values"),
    "a billion laughs": ("train --config laughs.yaml", "laughs.yaml holds more than 10,000 values, expected the opt"),
    "brackets without end": ("train --config brackets.yaml", "brackets.yaml is not YAML"),
    "a rate of .nan": ("train --config nan.yaml --dataset_name digits --output_dir out", "learning_rate must be"),
    "a folder as a preset": ("train --config empty", "no preset or file named empty"),
    "a missing preset": (
        "train --config quickstat",
        "no preset or file named quickstat: the presets are .*quickstart",
    ),
    # ------------------------------------------------------------------------------------------------ pipelines
    "a missing pipeline": ("sample gone/", "gone/ is not a saved pipeline: expected a folder"),
    "an empty folder as a pipeline": ("sample empty", "empty is not a saved pipeline.*model_index.json"),
    "a missing pipeline above": ("sample ../pipeline", "../pipeline is not a saved pipeline"),
    "a file as a pipeline": ("sample good.png", "good.png is not a saved pipeline"),
    "a pipeline that the Hub lacks": ("sample nobody/nothing --output out.png", "there is no folder nobody/nothing"),
    "a pipeline without weights": ("sample hollow --output out.png", "hollow"),
    "a truncated pipeline": ("sample truncated --output out.png", "truncated.*damaged"),
    "a pipeline of another size": ("sample mismatched --output out.png", "mismatched"),
    "a pipeline with broken JSON": ("sample jsonless --output out.png", "jsonless"),
    "a pipeline that is a list": ("sample listed --output out.png", "listed/.* must hold the index .* got a list"),
    "a pipeline of another package": (
        "sample foreign --output out.png",
        "takes its vae from 'diffusers', so it is no",
    ),
    "a component that is missing": (
        "sample partless --output out.png",
        "partless/config.json: got the config of a vaeplus_encoder where that of a vaeplus_vae is expected",
    ),
    "a component of any module": ("sample module --output out.png", "takes its vae from 'os', so it is no pipeline"),
    "a config that names a method": (
        "sample fields --output out.png",
        "no field 'to_dict' and cannot keep it: remove it from the file",
    ),
    "weights that are not numbers": ("sample nans --output out.png", "weights of nans/vae hold NaN or infinity in"),
    "no images": (f"{SAMPLE} --num_images 0", "num_images must be an integer of at least 1, got 0"),
    "a negative number of images": (
        f"{SAMPLE} --num_images -3",
        "num_images must be an integer of at least 1, got -3",
    ),
    "an image in no batch": (f"{SAMPLE} --batch_size 0", "batch_size must be an integer of at least 1, got 0"),
    "a negative batch of pictures": ("reconstruct pipeline good.png --batch_size -1", "batch_size .*got -1"),
    "a temperature below 0": (f"{SAMPLE} --temperature -1", "temperature must be a finite number of at least 0"),
    "an infinite temperature": (f"{SAMPLE} --temperature inf", "temperature must be a finite number"),
    "a temperature that is not a number": (f"{SAMPLE} --temperature nan", "temperature must be a finite number"),
    "sharpness of a blunt model": (f"{SAMPLE} --sharpness 1", "sharp"),
    "sharpness that is not a number": (f"{SAMPLE} --sharpness nan", "sharp"),
    "a negative seed": (f"{SAMPLE} --seed -1", r"--seed must lie in \[0, 2\*\*63\), got -1"),
    "a huge seed": (f"{SAMPLE} --seed {2**63}", "--seed must lie in"),
    "one step": ("interpolate pipeline good.png good.png --steps 1", "steps must be an integer of at least 2, got 1"),
    "no device": (f"{SAMPLE} --device abacus", "--device abacus cannot be used here"),
    "a device that is not there": (f"{SAMPLE} --device cuda:99", "--device cuda:99 cannot be used here"),
    "a device that stores nothing": (f"{SAMPLE} --device meta", "--device meta cannot be used here"),
    # ------------------------------------------------------------------------------------------------ outputs
    "text as an output": ("sample pipeline --output notes.txt", "--output must name a picture such as"),
    "an output in a file": ("sample pipeline --output text.jpg/a.png", "the folder text.jpg cannot be made .* name"),
    "samples into a file": ("sample pipeline --separate --output good.png", "--output good.png cannot be written"),
    "samples among others": ("sample pipeline --separate --output pictures", "pictures is not empty: name a new"),
    "a full disk for a picture": ("full: sample pipeline --output good.png --overwrite", f"good.png {FULL}"),
    "a full disk for pictures": ("full: sample pipeline --separate --output out", f"000000.png {FULL}"),
    "a full disk for pairs": ("full: reconstruct pipeline good.png --output good.png --overwrite", f"good.png {FULL}"),
    "a full disk for a way": (
        "full: interpolate pipeline good.png good.png --output good.png --overwrite",
        f"good.png {FULL}",
    ),
    "a full disk for results": (
        f"full: evaluate pipeline {DIGIT} --num_images 4 --output list.json --overwrite",
        f"json {FULL}",
    ),
    "a full disk for latents": (f"full: {ENCODE} {DIGIT}", f"out.parquet {FULL}"),
    "a full disk for a cache": (f"full: {OWN} --train_data_dir pictures --resolution 64", f"the cache .* {FULL}"),
    "a run in a file": ("train --config tiny.yaml --output_dir good.png", "good.png cannot be written"),
    "a run below a file": (
        "train --config tiny.yaml --output_dir good.png/out",
        "the folder good.png/out cannot be m",
    ),
    "a cache in a file": (
        f"{OWN} --train_data_dir pictures --cache_dir good.png",
        "the cache good.png cannot be made",
    ),
    "latents over a file": (f"encode pipeline {DIGIT} --output latents.parquet", "latents.parquet exists: name a new"),
    "latents over a folder": (f"encode pipeline {DIGIT} --output latents", "latents exists: name a new"),
    "latents as text": (f"encode pipeline {DIGIT} --output a.csv", "latents go to a file such as .* got a.csv"),
    "latents below a file": (f"encode pipeline {DIGIT} --output good.png/a.parquet", "the folder good.png cannot be"),
    "private latents of nobody": (f"{ENCODE} {DIGIT} --private", "--private is of --push_to_hub, which is missing"),
    "latents to no name": (f"{ENCODE} {DIGIT} --push_to_hub a/b/c", "a/b/c"),
    "results in a folder": (f"evaluate pipeline {DIGIT} --output empty", "must name a file such as results.json"),
    "results below a file": (f"evaluate pipeline {DIGIT} --output notes.txt/a.json", "notes.txt"),
    # ------------------------------------------------------------------------------------------------ evaluation
    "no data": (EVAL, "exactly one of .* got none"),
    "two sources": (f"{EVAL} --dataset_name digits --train_data_dir pictures", "exactly one of"),
    "one image of each set": (f"evaluate pipeline {DIGIT} --num_images 1", "num_images must be at least 2"),
    "a negative count": (f"evaluate pipeline {DIGIT} --num_images -5", "num_images must be at least 2.*got -5"),
    "an unknown sampler": (
        f"{EVAL} {DIGIT} --sampler best",
        "samplers must be of second_stage, mean, sharpened, prior, mixture, gaussian, got 'best'",
    ),
    "an unknown extractor": (f"{EVAL} {DIGIT} --features vgg", "pixels, pixels:SIZE, fid:WEIGHTS or a file.*vgg"),
    "text as an extractor": (f"{EVAL} {DIGIT} --features text.onnx", "text.onnx"),
    "a missing extractor": (f"{EVAL} {DIGIT} --features gone.onnx", "no file 'gone.onnx'"),
    "features of larger images": (f"{EVAL} {DIGIT} --features pixels:99", "pixels:99 averages pixels, got smaller"),
    "the same features twice": (f"{EVAL} {DIGIT} --features pixels:8 pixels:8", "different names"),
    "weights that are text": (f"{EVAL} {DIGIT} --features fid:text.jpg", "text.jpg"),
    "pixels of no size": (f"{EVAL} {DIGIT} --features pixels:0", "pixels:0"),
    "pixels of any size": (f"{EVAL} {DIGIT} --features pixels:any", "pixels:any"),
    "more bins than images": (f"{EVAL} {DIGIT} --ndb 41", r"need as many training images, got 40 for num_bins=\[41\]"),
    "one bin": (f"{EVAL} {DIGIT} --ndb 1", r"bins of NDB \(at least 2\) .* num_bins=\[1\]"),
    "a number of bins that is none": (f"{EVAL} {DIGIT} --ndb many", "--ndb.*'many'"),
    "no image in a batch": (f"{EVAL} {DIGIT} --batch_size 0", "batch_size at least 1"),
    "a negative seed of an evaluation": (f"{EVAL} {DIGIT} --seed -1", r"seed in \[0, 2\*\*63\), .*and -1"),
    "negative importance": (f"{EVAL} {DIGIT} --num_importance_samples -1", "num_importance_samples at least 0"),
    # ------------------------------------------------------------------------------------------------ cards, Hub
    "a card of nothing": ("card empty me/faces", "empty lacks samples.png"),
    "a card of a missing run": ("card gone me/faces", "gone lacks samples.png"),
    "a card of no repository": ("card empty a/b/c", "a/b/c"),
    "results that are a list": ("card empty me/faces --evaluation list.json", "list.json holds no protocol: give"),
    "results of something else": ("card empty me/faces --evaluation object.json", "is not complete .* give"),
    "results that are text": ("card empty me/faces --evaluation text.json", "text.json is no JSON"),
    "results that are a picture": (
        "card empty me/faces --evaluation good.png",
        "good.png is no JSON .* give evaluate's",
    ),
    "missing results": ("card empty me/faces --evaluation gone.json", "gone.json is no JSON .* give evaluate's"),
    "a push of nothing": ("push empty me/faces", "empty is not a saved pipeline"),
    "a push to no repository": ("push pipeline a/b/c", "a/b/c"),
    "a variant that is none": ("push pipeline me/faces --variant int4", "'int4'.*bf16"),
    "a variant of nothing": ("push pipeline me/faces --variant bf16", "bf16|pipeline"),
    # ------------------------------------------------------------------------------------------------ the pipeline
    "latents of NaN": (lambda pipe: pipe(latents=torch.full((2, 3), torch.nan)), "latents must be finite, got NaN"),
    "latents of infinity": (lambda pipe: pipe.decode(torch.full((2, 4), torch.inf)), "latents must be finite"),
    "latents of whole numbers": (lambda pipe: pipe.decode(torch.zeros(2, 4, dtype=int)), "latents must be floats"),
    "latents of another width": (lambda pipe: pipe.decode(torch.zeros(2, 5)), r"shape \(n, 4\) .*\(2, 5\)"),
    "latents in one row": (lambda pipe: pipe.decode(torch.zeros(4)), r"shape \(n, 4\) .*\(4,\)"),
    "no latents": (lambda pipe: pipe.decode(torch.zeros(0, 4)), "n of at least 1"),
    "latents beyond the decoder": (
        lambda pipe: pipe.decode(torch.full((1, 4), 1e30)),
        "too far out.* NaN: use smaller",
    ),
    "a temperature beyond it": (lambda pipe: pipe(1, temperature=1e38), "too far out"),
    "latents as a list": (lambda pipe: pipe.decode([[0.0] * 4]), "latents must be a torch tensor, got list"),
    "latents and another count": (lambda pipe: pipe(3, latents=torch.zeros(2, 3)), "num_images=3 contradicts 2"),
    "a count that is a bool": (lambda pipe: pipe(True), "num_images must be an integer"),
    "a count that is text": (lambda pipe: pipe("4"), "num_images must be an integer of at least 1, got '4'"),
    "a temperature that is text": (lambda pipe: pipe(1, temperature="hot"), "temperature must be a finite number"),
    "a generator too few": (lambda pipe: pipe(2, [torch.Generator()]), "one per image, got 1 for 2"),
    "a seed as a generator": (lambda pipe: pipe(1, generator=0), "generator must be a torch.Generator"),
    "an unknown form": (lambda pipe: pipe(1, output_type="jpeg"), "output_type must be 'pil', 'np' or 'pt'"),
    "pictures of NaN": (lambda pipe: pipe.encode(torch.full((1, 3, SIZE, SIZE), torch.nan)), "without NaN"),
    "pictures beyond one": (lambda pipe: pipe.encode(torch.full((1, 3, SIZE, SIZE), 255.0)), r"lie in \[0, 1\]"),
    "pictures of another size": (
        lambda pipe: pipe.encode(torch.zeros(1, 3, SIZE, 33), preprocess=False),
        "preprocess at",
    ),
    "pictures of two channels": (lambda pipe: pipe.encode(torch.zeros(1, 2, SIZE, SIZE)), "1, 3 or 4 channels"),
    "pictures of five axes": (lambda pipe: pipe.encode(torch.zeros(1, 1, 3, SIZE, SIZE)), r"shape \(1, 1, 3, 32, 32"),
    "pictures of whole numbers": (lambda pipe: pipe.encode(torch.zeros(1, 3, SIZE, SIZE, dtype=int)), "uint8"),
    "no pictures": (lambda pipe: pipe.encode([]), "empty list"),
    "names of no pictures": (lambda pipe: pipe.encode(["text.jpg"]), "text.jpg is not a readable picture"),
    "a palette without preprocessing": (
        lambda pipe: pipe.encode(Image.new("P", (SIZE, SIZE)), preprocess=False),
        "mode 'RGB'.*got 'P'",
    ),
    "nothing": (lambda pipe: pipe.encode(None), "got NoneType"),
    "ways of other numbers": (
        lambda pipe: pipe.interpolate(torch.zeros(2, 3, SIZE, SIZE), torch.zeros(3, 3, SIZE, SIZE)),
        "interpolate needs as many images in b as in a, got 2 and 3",
    ),
    "no steps of a way": (
        lambda pipe: pipe.interpolate(*torch.zeros(2, 1, 3, SIZE, SIZE), steps=0),
        "steps must be an integer of at least 2, got 0",
    ),
    "an unknown option of loading": (lambda pipe: VAEPlusPipeline.from_pretrained("pipeline", steps=3), "'steps'"),
    "pickled weights by request": (
        lambda pipe: VAEPlusPipeline.from_pretrained("pipeline", use_safetensors=False),
        "use_safetensors=False is refused",
    ),
    "a stage in another's place": (lambda pipe: VAEPlusPipeline(pipe.autoencoder), "vae must be a VAEPlusVAEModel"),
    "a VAE without its autoencoder": (lambda pipe: VAEPlusPipeline(pipe.vae), "pass that one"),
    "a second stage of another VAE": (
        lambda pipe: VAEPlusPipeline(pipe.vae, pipe.autoencoder, pipe.vae),
        "the second_stage has input_shape",
    ),
}


def broken_pipelines(folder: Path):
    """Copies of `folder/pipeline`, each with one fault."""

    def copy(name):
        shutil.copytree(folder / "pipeline", folder / name)
        return folder / name

    def edit(path, **changes):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    (copy("hollow") / "vae/model.safetensors").unlink()
    weights = copy("truncated") / "vae/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    edit(copy("mismatched") / "vae/config.json", hidden_dim=9)
    (copy("jsonless") / "model_index.json").write_text("{")
    (copy("listed") / "model_index.json").write_text("[]")
    edit(copy("foreign") / "model_index.json", _class_name="LDMPipeline", vae=["diffusers", "AutoencoderKL"])
    shutil.rmtree(copy("partless") / "vae")
    edit(copy("module") / "model_index.json", vae=["os", "system"])
    edit(copy("fields") / "vae/config.json", to_dict=3)
    weights = copy("nans") / "vae/model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})


@pytest.fixture(scope="module")
def folder(home, tmp_path_factory):
    """Where every command of the catalogue runs."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "text.onnx").write_text("not a network")
    shutil.copytree(home / "pipeline", folder / "pipeline")
    broken_pipelines(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return VAEPlusPipeline.from_pretrained(folder / "pipeline")


@pytest.fixture
def place(folder, home, hub, tmp_path, monkeypatch):
    """Commands run in `folder`, with the cache of `home` and a Hub on loopback."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VAEPLUS_CACHE", str(home / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    yield folder
    shutil.rmtree(folder / "out", ignore_errors=True)


@pytest.fixture
def data_sets(hub):
    """What the Hub has."""
    own = "hf://datasets/org"
    files = {
        "folder": {"train/a.png": SMALL, "train/b.png": encoded(noise(1, 40, 40))},
        "nothing": {"README.md": b"# Nothing"},
        "paths": {"train.parquet": parquet(image=[{"bytes": None, "path": os.path.abspath("good.png")}] * 2)},
        "thief": {"train.parquet": parquet(image=[{"bytes": None, "path": f"{own}/folder@main/train/a.png"}] * 2)},
        "broken": {"train.parquet": FILES["tables/cut.parquet"]},
        "bad": {"train/a.png": FILES["truncated.jpg"], "train/b.png": SMALL},
        "refused": {"train/a.png": SMALL},
    }
    for name, content in files.items():
        hub.repositories["datasets", f"org/{name}"] = repository = Repository(False)
        repository.commit("main", content, "data")
    repository = hub.repositories["datasets", "org/climber"] = Repository(False)
    sha = repository.commit("main", {}, "data")
    climb = f"{own}/climber@{sha}/../../folder/resolve/main/train/a.png"
    repository.commits[sha] = {"train.parquet": parquet(image=[{"bytes": None, "path": climb}] * 2)}
    hub.faults.append(Fault("org/refused.*a.png", status=403, times=99))
    return hub


def told(what, pipe) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    if not isinstance(what, str):
        return captured(lambda: run_command(lambda: what(pipe), []))
    if what.startswith("full: "):
        with full_disk():
            return told(what.removeprefix("full: "), pipe)
    if what.startswith("offline: "):
        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            return told(what.removeprefix("offline: "), pipe)
    argv = what.split()
    if argv[:1] != ["train_stage"]:
        return run(*argv)
    return captured(lambda: run_command(lambda: run_stage(parse_stage_options("", argv[1:])), argv[1:]))


@pytest.mark.parametrize("what, message", CATALOGUE.values(), ids=CATALOGUE)
def test_one_sentence_and_nothing_touched(what, message, place, home, pipe, data_sets, capfd):
    before, cached = tree(place), set(home.iterdir())
    capfd.readouterr()
    code, output, errors = told(what, pipe)
    assert (code, output) == (2, ""), errors
    *bars, sentence = errors.splitlines()
    assert sentence.startswith("vaeplus: error: ") and re.search(message, sentence), errors
    assert not [line for line in bars if line and not re.search(r"\[\d\d:\d\d", line)], errors
    assert capfd.readouterr() == ("", "")  # nothing past Python's own streams
    after = tree(place)
    new = {name for name in after.keys() - before if after[name]}
    assert {name: after.get(name) for name in before} == before
    assert all(re.fullmatch(r"out/.*(\.lock|stats\.jsonl|training_options\.json)", name) for name in new), new
    assert set(home.iterdir()) == cached


# Unusual, but right: the bytes of a file and the pixels that come out, at the size of the picture.


def turned(pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    return encoded(pixels, exif=exif)


def transparent(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.random.default_rng(1).integers(0, 256, (*pixels.shape[:2], 1), np.uint8)], -1)


def cmyk(pixels: np.ndarray) -> Image.Image:
    """Ink is what light is not; none of it black."""
    inks = np.concatenate([255 - pixels, np.zeros_like(pixels[..., :1])], -1)
    return Image.fromarray(inks, "CMYK")


def palette(pixels: np.ndarray, **options) -> bytes:
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    picture.putpalette(pixels.tobytes())
    return encoded(picture, **options)


PIXELS = noise(5)
GREY = PIXELS[..., :1].repeat(3, -1)
BITS = np.where(GREY > 127, 255, 0).astype(np.uint8)
LINE = noise(6, 1, 30_000)
PICTURES = {
    "CMYK": (encoded(cmyk(PIXELS), "tiff"), PIXELS),
    "a palette": (palette(PIXELS), PIXELS),
    "a palette, partly transparent": (palette(PIXELS, transparency=3), PIXELS),
    "alpha": (encoded(transparent(PIXELS)), PIXELS),
    "grey with alpha": (encoded(transparent(PIXELS)[..., [0, 3]]), GREY),
    "grey": (encoded(PIXELS[..., 0]), GREY),
    "one bit": (encoded(Image.fromarray(BITS[..., 0]).convert("1")), BITS),
    "a turned camera": (turned(PIXELS), np.rot90(PIXELS, -1)),
    "an animation": (
        encoded(
            Image.fromarray(BITS),
            "gif",
            save_all=True,
            append_images=[Image.fromarray(255 - BITS)],
        ),
        BITS,
    ),
    "several pages": (
        encoded(Image.fromarray(PIXELS), "tiff", save_all=True, append_images=[Image.fromarray(GREY)]),
        PIXELS,
    ),
    "a bitmap": (encoded(PIXELS, "bmp"), PIXELS),
    "lossless WebP": (encoded(PIXELS, "webp", lossless=True), PIXELS),
    "interlaced": (encoded(PIXELS, "png", interlace=1), PIXELS),
    "trailing bytes": (encoded(PIXELS) + bytes(100), PIXELS),
    "one pixel": (encoded(PIXELS[:1, :1]), PIXELS[:1, :1]),
    "30,000 pixels wide": (encoded(LINE), LINE[:, 14_999:15_000]),
    "30,000 pixels high": (encoded(LINE.transpose(1, 0, 2)), LINE[:, 14_999:15_000]),
}


@pytest.mark.parametrize("content, pixels", PICTURES.values(), ids=PICTURES)
def test_unusual_pictures_give_the_right_pixels(content, pixels):
    assert np.array_equal(decode_image(content, "picture", len(pixels), None, 3), pixels)


def test_a_jpeg_in_cmyk_is_not_inverted():
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    content = encoded(cmyk(flat), "jpeg", quality=100, subsampling=0)
    assert np.abs(decode_image(content, "picture", 16, None, 3).astype(int) - flat).max() <= 3


def test_a_pillow_that_lacks_a_format_reads_the_others(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert np.array_equal(decode_image(encoded(PIXELS), "picture", 8, None, 3), PIXELS)


def test_a_folder_of_many_sizes_and_modes(tmp_path):
    contents = [PICTURES[name] for name in ("CMYK", "a palette", "alpha", "a turned camera", "one pixel", "grey")]
    contents.append((encoded(noise(7, 100, 90)), None))
    (tmp_path / "pictures").mkdir()
    for number, (content, _) in enumerate(contents):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(content)
    images = load_images(train_data_dir=tmp_path / "pictures", resolution=8, cache_dir=tmp_path, progress=False).images
    assert len(images) == len(contents)
    for image, (_, pixels) in zip(images, contents, strict=True):
        if pixels is not None:
            assert np.array_equal(image, np.broadcast_to(pixels, (8, 8, 3)))


# What a data set of the Hub may consist of.


def test_pictures_in_folders_and_archives_on_the_hub(hub, place, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for seed in (0, 1):
            file.writestr(f"train/{seed}.png", encoded(noise(seed)))
    contents = {
        "folder": {f"train/{seed}.png": encoded(noise(seed)) for seed in (0, 1)},
        "metadata": {
            "train/metadata.csv": b"file_name,text\n0.png,zero\n1.png,one\n",
            **{f"train/{seed}.png": encoded(noise(seed)) for seed in (0, 1)},
        },
        "archive": {"train.zip": archive.getvalue()},
        # a name that is also that of a file here
        "table": {
            "train.parquet": parquet(image=[{"bytes": encoded(noise(seed)), "path": "good.png"} for seed in (0, 1)])
        },
    }
    expected = np.stack([noise(0), noise(1)])
    for name, files in contents.items():
        hub.repositories["datasets", f"good/{name}"] = repository = Repository(False)
        repository.commit("main", files, "good data")
        cached = load_images(f"good/{name}", resolution=8, cache_dir=tmp_path, progress=False)
        assert np.array_equal(cached.images, expected), name
        (batch,) = stream_images(f"good/{name}", resolution=8).in_order(4)
        assert np.array_equal(batch["pixel_values"].permute(0, 2, 3, 1), expected), name


def test_a_parquet_file_of_ones_own_keeps_its_bytes_whatever_it_calls_them(place, tmp_path):
    rows = [encoded(noise(seed)) for seed in (0, 1)]
    for column in (rows, [{"bytes": row, "path": "good.png"} for row in rows]):
        (tmp_path / "train.parquet").write_bytes(parquet(image=column))
        images = load_images(
            train_data_dir=tmp_path, resolution=8, cache_dir=tmp_path / "cache", progress=False
        ).images
        assert np.array_equal(images, np.stack([noise(0), noise(1)]))
