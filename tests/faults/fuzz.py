"""Feed mutated files to everything that reads one: configs, indexes, presets, checkpoints, pictures, tables, weights.

    python tests/faults/fuzz.py --executions 1000000 --output results/fuzz.json

Each target runs in a process of its own, where libFuzzer (through atheris) keeps the inputs that reach new code and
mutates them further. A crash is an error of a kind that the package does not document, an accepted input that breaks
what comes next, or a process that dies, hangs or takes all memory. Inputs that once crashed lie in `corpus/`, and
test_fuzz.py reads them again.
"""

import argparse
import contextlib
import gzip
import io
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from helpers import encoded, idx, make_pipeline, noise, parquet, png_chunk
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, features
from transformers import get_scheduler

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.cli.flags import parse_stage_options
from hf_vaeplus.cli.main import build_parser
from hf_vaeplus.data.options import ImageOptions
from hf_vaeplus.data.sources import open_source
from hf_vaeplus.image_processing_vaeplus import decode_image
from hf_vaeplus.modeling_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusEncoderConfig,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.checkpoints import DamagedCheckpoint, TrainingState, find_checkpoint
from hf_vaeplus.training.options import STAGES, StageOptions, load_preset
from hf_vaeplus.training.stages import all_stage_options

CORPUS = Path(__file__).with_name("corpus")
# What a child does: the package and Pillow's readers are watched, which has to begin before they are imported.
CHILD = """
import sys, atheris
sys.path.insert(0, sys.argv.pop(1))
with atheris.instrument_imports(include=["hf_vaeplus", "PIL", "faults"]):
    from faults import fuzz
fuzz.run_target(*sys.argv[1:])
"""
TRAP = "trapped"  # a module that nothing but an input names


class Crash(AssertionError):
    """An input that was accepted, but not handled as it should be."""


def refusal(kinds: tuple, call: Callable, *args, names: str = "", **options):
    """What `call` returns, or `None` where it refuses, with words, by one of the kinds of error that it documents."""
    try:
        return call(*args, **options)
    except kinds as error:
        if names not in str(error) or not str(error).strip():
            raise Crash(f"the message {str(error)!r} does not name {names!r}") from error


# ------------------------------------------------------------------------------------------------------- mutation

JUNK = [None, True, False, 0, 1, 2, 3, 4, 8, 32, -1, 2**31, 2**63, 10**400, 0.5, 1e-320, 1e308, float("nan"),
        float("inf"), "", "\0", "a" * 300, "../..", "\ud800", [], {}, [[]], TRAP]  # fmt: skip


def _junk(chance: random.Random, words: list, depth: int = 2):
    kind = chance.random()
    if depth and kind < 0.1:
        return [_junk(chance, words, depth - 1) for _ in range(chance.randint(0, 3))]
    if depth and kind < 0.2:
        return {str(chance.choice(words)): _junk(chance, words, depth - 1) for _ in range(chance.randint(0, 3))}
    return chance.choice(words if words and kind < 0.6 else JUNK)


def _changed(value, chance: random.Random, words: list):
    """`value` with one thing in it left out, added or replaced."""
    if isinstance(value, dict) and chance.random() < 0.95:
        keys = list(value)
        if keys and chance.random() < 0.5:
            key = chance.choice(keys)
            return {**value, key: _changed(value[key], chance, words)}
        if keys and chance.random() < 0.3:
            left_out = chance.choice(keys)
            return {key: item for key, item in value.items() if key != left_out}
        return {**value, str(chance.choice([*words, *keys])): _junk(chance, words)}
    if isinstance(value, list) and chance.random() < 0.9:
        place = chance.randint(0, len(value))
        if place < len(value) and chance.random() < 0.5:
            return [*value[:place], _changed(value[place], chance, words), *value[place + 1 :]]
        return [
            *value[:place],
            *([_junk(chance, words)] * chance.randint(0, 2)),
            *value[place + chance.randint(0, 1) :],
        ]
    return _junk(chance, words)


def json_mutator(words: list):
    """Mostly changes of the values, so that the input stays JSON; else any bytes."""

    def mutate(data: bytes, chance: random.Random) -> bytes | None:
        if chance.random() < 0.2:
            return None
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        for _ in range(chance.randint(1, 3)):
            value = _changed(value, chance, words)
        return json.dumps(value).encode()

    return mutate


def mutate_weights(data: bytes, chance: random.Random) -> bytes | None:
    """Changes in the JSON at the head of a safetensors file, whose length stands before it."""
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    words = ["F32", "F64", "BF16", "I64", "BOOL", "shape", "dtype", "data_offsets", "__metadata__", "log_gamma"]
    header = json_mutator(words)(data[8 : 8 + length], chance)
    return None if header is None else struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate_picture(data: bytes, chance: random.Random) -> bytes | None:
    """The chunks of a PNG, with sums that fit: a reader looks at nothing behind a wrong one."""
    if not data.startswith(b"\x89PNG") or chance.random() < 0.3:
        return None
    result, place = data[:8], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, content = data[place + 4 : place + 8], bytearray(data[place + 8 : place + 8 + length])
        if content and chance.random() < 0.3:
            content[chance.randrange(min(len(content), 40))] = chance.choice([0, 1, 2, 3, 4, 6, 8, 16, 127, 255])
        if kind != b"IDAT" or chance.random() < 0.95:
            result += png_chunk(kind, bytes(content)) * (1 + (chance.random() < 0.05))
        place += 12 + length
    return result


# -------------------------------------------------------------------------------------------------------- targets
# Each takes an empty folder and returns what one execution does with its bytes.


def config(folder: Path):
    """`config.json` of any model."""
    classes = (VAEPlusAutoencoderConfig, VAEPlusVAEConfig, VAEPlusEncoderConfig)
    kinds = (ValueError, StrictDataclassError, OSError)

    def execute(data):
        (folder / "config.json").write_bytes(data)
        for kind in classes:
            found = refusal(kinds, kind.from_pretrained, folder)
            if found is not None and kind.from_dict(found.to_dict()).to_dict() != found.to_dict():
                raise Crash(f"{found} does not survive a round trip")

    return execute


def preset(folder: Path):
    """A YAML file of options, up to the options of each stage."""
    path = folder / "preset.yaml"

    def execute(data):
        path.write_bytes(data)
        found = refusal((ValueError,), load_preset, path)
        if found is not None:
            refusal((ValueError,), all_stage_options, found, folder / "out")

    return execute


def pipeline(folder: Path):
    """`model_index.json` of a saved pipeline. No module that an index names is imported."""
    make_pipeline(second_stage=False).save_pretrained(folder)
    (folder / f"{TRAP}.py").write_text("")
    sys.path.insert(0, str(folder))
    kinds = (ValueError, TypeError, OSError)

    def execute(data):
        (folder / "model_index.json").write_bytes(data)
        refusal(kinds, VAEPlusPipeline.from_pretrained, folder)
        if TRAP in sys.modules:
            raise Crash("a module that the index names was imported")

    return execute


def _training_state() -> TrainingState:
    model = make_pipeline(second_stage=False).vae
    optimizer = torch.optim.AdamW(model.parameters())
    return TrainingState(model, optimizer, get_scheduler("cosine", optimizer, 2, 10), None, None)


def checksums(folder: Path):
    """`checksums.json` of the newest checkpoint."""
    _training_state().save(folder, 1)
    path = folder / "checkpoint-0" / "checksums.json"

    def execute(data):
        path.write_bytes(data)
        refusal((DamagedCheckpoint,), find_checkpoint, folder, "latest", names=str(path.parent))

    return execute


def progress(folder: Path):
    """`progress.json` of a checkpoint whose checksums are right. What is loaded can go on."""
    state = _training_state()
    state.save(folder, 1)
    checkpoint = folder / "checkpoint-0"

    def load():
        state.load(checkpoint)
        return state

    def execute(data):
        (checkpoint / "progress.json").write_bytes(data)
        state.scheduler = get_scheduler("cosine", state.optimizer, 2, 10)
        if refusal((ValueError,), load, names=str(checkpoint)):
            state.optimizer.step()
            state.scheduler.step()
            if not (isinstance(state.step, int) and state.step >= 0):
                raise Crash(f"{state.step!r} is no step")

    return execute


def picture(folder: Path):
    """The bytes of a picture, as a row of a data set or a file of a user holds them."""
    Image.init()
    Image.MAX_IMAGE_PIXELS = 500_000  # twice as many are an error: an execution takes milliseconds

    def execute(data):
        crop, channels = (None, 3) if len(data) % 2 else (5, 1)
        pixels = refusal((ValueError,), decode_image, data, "some.png", 8, crop, channels, names="some.png")
        if pixels is not None and (pixels.shape != (8, 8, channels) or pixels.dtype != np.uint8):
            raise Crash(f"pixels of shape {pixels.shape} and type {pixels.dtype}")

    return execute


def _read(**source):
    nowhere = Path(os.devnull)  # no hash of a file is kept
    source, _ = open_source(ImageOptions(**source, resolution=8, num_channels=3), nowhere)
    for row in source.rows():
        refusal((ValueError,), source.decode, [row], names=row[0])


def numbers(folder: Path):
    """MNIST's files, gzipped or not."""
    path = folder / "train-images-idx3-ubyte"

    def execute(data):
        path.unlink(missing_ok=True)
        path.with_suffix(".gz").unlink(missing_ok=True)
        place = path.with_suffix(".gz") if data.startswith(b"\x1f") else path
        place.write_bytes(data)
        refusal((ValueError,), _read, train_data_dir=folder, names=str(place))

    return execute


def table(folder: Path):
    """Parquet files with a column of pictures."""
    path = folder / "train.parquet"

    def execute(data):
        path.write_bytes(data)
        refusal((ValueError,), _read, train_data_files=path, names="parquet")

    return execute


def weights(folder: Path):
    """`model.safetensors` beside a config. What is loaded is finite."""
    make_pipeline(second_stage=False).vae.save_pretrained(folder)

    def execute(data):
        (folder / "model.safetensors").write_bytes(data)
        model = refusal((ValueError, OSError), VAEPlusVAEModel.from_pretrained, folder, names=str(folder))
        if model is not None and not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise Crash("weights that are not finite were loaded")

    return execute


def arguments(folder: Path):
    """Words of a command line, as a list in JSON, up to the options of a stage."""
    parser = build_parser()

    def execute(data):
        try:
            words = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return
        for parse in (parser.parse_args, lambda words: parse_stage_options("", words)):
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    refusal((ValueError, OSError), parse, words)
                except SystemExit as end:
                    if end.code:
                        raise Crash(f"ended with {end.code}") from end

    return execute


def canary(folder: Path):
    """Not of the package: a mistake that the fuzzer has to find."""

    def execute(data):
        if len(data) > 1 and data[0] == 0x7B and data[1] == 0x5D:
            raise KeyError(data)

    return execute


# ---------------------------------------------------------------------------------------------------------- seeds


def _as_json(*values) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _configs() -> list[bytes]:
    small = VAEPlusVAEConfig(input_shape=(1, 32, 32), latent_dim=2, network="conv", hidden_channels=(4, 8))
    found = [small, VAEPlusAutoencoderConfig(image_size=32), VAEPlusEncoderConfig()]
    return _as_json(*(each.to_dict() for each in found), {"latent_dim": 3}) + [b"[" * 3000]


def _presets() -> list[bytes]:
    small = {"common": {"dataset_name": "digits", "resolution": 32}, "vae": {"learning_rate": 1e-3, "use_ema": True},
             "autoencoder": {"max_train_steps": 3, "model": {"latent_dim": 6, "hidden_channels": [4, 8]}}}  # fmt: skip
    special = ["vae: {seed: !!int 1}\ncommon: &a {split: !!str x}", "vae: {<<: {seed: 1}}", "vae: {split: 2001-1-1}",
               "vae: {seed: 1:30, split: =, model: !!set {a}}", "[" * 900, "vae:\n  seed: 0x10\n"]  # fmt: skip
    return [*_as_json(small), *(text.encode() for text in special)]


def _saved(name: str) -> list[bytes]:
    """A file of a pipeline, or of a checkpoint of its VAE."""
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline(second_stage=False).save_pretrained(folder)
        _training_state().save(Path(folder), 1)
        return [(Path(folder) / name).read_bytes(), b"[" * 3000]


def _pictures() -> list[bytes]:
    rgb, grey = Image.fromarray(noise(0, 12, 10)), Image.fromarray(noise(1, 10, 12)[..., 0])
    inks, palette, clear = rgb.convert("CMYK"), rgb.quantize(16), rgb.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    found = [encoded(each, "png") for each in (rgb, grey, palette, clear, grey.convert("1"), grey.convert("LA"))]
    found += [encoded(rgb, "png", exif=exif), encoded(rgb, "png", interlace=1), encoded(rgb, "jpeg", exif=exif)]
    found += [encoded(grey, "jpeg"), encoded(inks, "jpeg"), encoded(rgb, "jpeg", progressive=True)]
    found += [encoded(rgb, "webp"), encoded(clear, "webp", lossless=True), encoded(rgb, "ppm"), encoded(grey, "ppm")]
    found += [encoded(palette, "gif", save_all=True, append_images=[palette.rotate(180)], transparency=3)]
    found += [encoded(each, "bmp") for each in (rgb, palette, grey.convert("1"), clear)]
    found += [encoded(each, "tiff") for each in (rgb, inks, palette, rgb.convert("LAB"), rgb.convert("YCbCr"))]
    found += [
        encoded(rgb, "tiff", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ]
    found += [encoded(grey.convert("I;16"), "tiff"), encoded(rgb, "jpeg2000")] if features.check("jpg_2000") else []
    return found


def _numbers() -> list[bytes]:
    whole = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    return [whole, gzip.compress(whole), idx(np.zeros((0, 3, 4), np.uint8)), gzip.compress(whole) * 2]


def _tables() -> list[bytes]:
    bits = encoded(noise(0, 8, 8))
    columns = [[{"bytes": bits, "path": "a.png"}, {"bytes": None, "path": "b.png"}], [bits, None], ["a.png", "a.png"],
               [1, 2], [[1], []], [datetime(2000, 1, 1)] * 2, [{"a": {"b": [1.5]}}] * 2, [True, False]]  # fmt: skip
    return [parquet(image=column) for column in columns] + [parquet(image=[bits] * 3, label=[1, 2, 3])]


def _lines() -> list[bytes]:
    lines = """sample pipe --num_images 2 --temperature 0.5 --separate --output out --seed 1 --json --batch_size 2
        reconstruct pipe a.png b.png --output out.png --device cpu
        interpolate pipe a.png b.png --steps 3 --crop 8
        train --config quickstart --set vae.seed=1 common.model.latent_dim=3
        --config quickstart --stage vae --model latent_dim=3 hidden_channels=[4,8] --dry_run
        --stage autoencoder --max_train_steps 3 --learning_rate 1e-3 --use_ema --no-use_ema --debug
        evaluate pipe --dataset_name digits --ndb 3 4 --features pixels:8 --sampler prior mixture
        encode pipe --train_data_dir x --streaming --push_to_hub a/b --private
        quickstart --num_factors 4
        card run a/b --data_license x
        push pipe a/b --variant bf16 --tag v1
        demo pipe --port 80
        completion bash
        --help"""
    return _as_json(*(line.split() for line in lines.splitlines()))


# --------------------------------------------------------------------------------------------------- all together


def _fields() -> list[str]:
    kinds = (VAEPlusAutoencoderConfig, VAEPlusVAEConfig, VAEPlusEncoderConfig)
    others = """conv aggregate mlp affine image learned fixed float16 load vaeplus_vae torch_dtype quantization_config
        attn_implementation model_type num_labels auto_map output_attentions"""
    return sorted({entry.name for kind in kinds for entry in fields(kind)}) + others.split()


def _flags() -> list[str]:
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    flags = {flag for each in commands.values() for action in each._actions for flag in action.option_strings}
    values = (
        "= 1e400 nan -1 quickstart @a -- - --seed=3 vae second_stage vae.model.latent_dim=[1 seed=2001-99-99".split()
    )
    return [*commands, *sorted(flags), *values, "latent_dim=!!bool x", f"latent_dim={'[' * 3000}"]


@dataclass(frozen=True)
class Target:
    """How an execution reads its bytes, what inputs there are to begin with, and how they are mutated."""

    read: Callable
    seeds: Callable
    share: int  # of 1,000 executions
    mutator: Callable | None = None  # returns what changes bytes, or returns `None` for a mutation of libFuzzer's own
    max_len: int = 4096


_OPTIONS = [*(entry.name for entry in fields(StageOptions)), "common", *STAGES, "quickstart", "digits"]
_PARTS = """autoencoder vae second_stage _class_name _diffusers_version hf_vaeplus modeling_vaeplus VAEPlusVAEModel os
    VAEPlusAutoencoderModel VAEPlusPipeline pipeline diffusers transformers VAEPlusVAEConfig AutoModel""".split()
_STATE = """model.safetensors optimizer.safetensors progress.json ../.. /dev/null step _last_lr window_steps scheduler
    scaler last_epoch lr_lambdas base_lrs _step_count""".split()
TARGETS = {
    "config": Target(config, _configs, 80, lambda: json_mutator(_fields())),
    "preset": Target(preset, _presets, 110, lambda: json_mutator(_OPTIONS), 1000),
    "pipeline": Target(pipeline, lambda: _saved("model_index.json"), 20, lambda: json_mutator(_PARTS)),
    "checksums": Target(checksums, lambda: _saved("checkpoint-0/checksums.json"), 150, lambda: json_mutator(_STATE)),
    "progress": Target(progress, lambda: _saved("checkpoint-0/progress.json"), 50, lambda: json_mutator(_STATE)),
    "picture": Target(picture, _pictures, 300, lambda: mutate_picture, 2048),
    "numbers": Target(numbers, _numbers, 120, None, 512),
    "table": Target(table, _tables, 60, None, 3072),
    "weights": Target(weights, lambda: _saved("vae/model.safetensors"), 20, lambda: mutate_weights, 8192),
    "arguments": Target(arguments, _lines, 90, lambda: json_mutator(_flags())),
    "canary": Target(canary, lambda: [b"{"], 0),
}


def run_target(name: str, executions: str, seed: str, folder: str):
    """The child: all executions of one target. Errors are kept, one of each kind and place, and do not end it."""
    import atheris

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    target, folder = TARGETS[name], Path(folder)
    for part in ("place", "seeds", "crashes"):
        (folder / part).mkdir()
    for number, content in enumerate(target.seeds()):
        (folder / "seeds" / f"{number:02}").write_bytes(content)
    execute, mutator = target.read(folder / "place"), target.mutator and target.mutator()

    def kept(data):
        try:
            execute(data)
        except Exception as error:
            trace = traceback.extract_tb(error.__traceback__)
            place = ([frame for frame in trace if "hf_vaeplus" in frame.filename] or trace)[-1]
            path = folder / "crashes" / f"{type(error).__name__}-{Path(place.filename).stem}-{place.lineno}"
            if not path.exists():
                path.write_bytes(data)
                path.with_suffix(".txt").write_text(traceback.format_exc())

    def mutate(data, max_size, seed):
        changed = mutator(data, random.Random(seed))
        return changed if changed is not None and len(changed) <= max_size else atheris.Mutate(data, max_size)

    limits = ["-timeout=60", "-report_slow_units=60", "-rss_limit_mb=4096", f"-artifact_prefix={folder}/crashes/"]
    size = [f"-runs={executions}", f"-seed={seed}", f"-max_len={target.max_len}", "-print_final_stats=1"]
    atheris.Setup(
        [name, *size, *limits, str(folder / "seeds")], kept, **({"custom_mutator": mutate} if mutator else {})
    )
    atheris.Fuzz()


def fuzz(name: str, executions: int, seed: int, folder: Path) -> dict:
    """A row of figures of one target. What crashed lies in `folder/crashes`, with its traceback."""
    folder.mkdir(parents=True)
    log, started = folder / "log", time.monotonic()
    own = [str(Path(__file__).parents[1]), name, str(executions), str(seed), str(folder)]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with open(log, "wb") as file:
        process = subprocess.run([sys.executable, "-c", CHILD, *own], stdout=file, stderr=file, env=os.environ | quiet)
    text = log.read_text(errors="replace")
    counts = re.findall(
        r"^(?:stat::number_of_executed_units: |#)(\d+)", text, re.MULTILINE
    )  # the last is the end, or near
    edges = re.findall(r"(?:INITED|DONE) +cov: (\d+)", text)
    crashes = sorted(path.name for path in folder.glob("crashes/*") if path.suffix != ".txt")
    if process.returncode:
        crashes.append(f"the process ended with {process.returncode}")
    return {
        "target": name,
        "executions": int((counts or [0])[-1]),
        "crashes": crashes,
        "edges_that_the_seeds_reach": int((edges or [0])[0]),
        "edges": int((edges or [0])[-1]),
        "seconds": round(time.monotonic() - started),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=1_000_000, help="of all targets together")
    whole = [name for name, target in TARGETS.items() if target.share]
    parser.add_argument("--targets", nargs="+", choices=whole, default=whole)
    parser.add_argument("--seed", type=int, default=1, help="of the mutations; 0 is libFuzzer's word for any")
    parser.add_argument(
        "--folder", type=Path, help="new folder where crashes and logs stay (default: they are removed)"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    total = sum(TARGETS[name].share for name in args.targets)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.targets:
            executions = math.ceil(args.executions * TARGETS[name].share / total)
            rows.append(fuzz(name, executions, args.seed, (args.folder or Path(temporary)) / name))
            print(json.dumps(rows[-1]), flush=True)
    crashes = sum(len(row["crashes"]) for row in rows)
    found = {**provenance(), "atheris": version("atheris"), "seed": args.seed, "crashes": crashes,
             "executions": sum(row["executions"] for row in rows), "targets": rows}  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
