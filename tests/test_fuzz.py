"""Junk from Hypothesis for everything that takes input: it is used, or refused in the way that is documented.

What comes in files, byte by byte, is the part of faults/fuzz.py.
"""

import argparse
import contextlib
import dataclasses
import math
import shutil
import tempfile
import typing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import captured, make_pipeline, run, tree
from huggingface_hub.errors import StrictDataclassError
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedConfig

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusDetailConfig,
    VAEPlusDetailModel,
    VAEPlusFlowMatchingConfig,
    VAEPlusFlowMatchingModel,
    VAEPlusMixtureConfig,
    VAEPlusMixtureModel,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.cli.flags import parse_stage_options
from hf_vaeplus.cli.main import build_parser, run_command
from hf_vaeplus.modeling_baselines import PenalizedAutoencoderConfig, PenalizedAutoencoderModel
from hf_vaeplus.modeling_vaeplus import VAEPlusEncoderConfig
from hf_vaeplus.training.options import STAGES, StageOptions, load_preset
from hf_vaeplus.training.stages import all_stage_options

SCALARS = [None, True, 0, -1, 2**31, 2**63, 10**400, 1e-320, 1e308, math.nan, math.inf, -math.inf, "", "\0", "../x"]
scalars = st.sampled_from(SCALARS) | st.integers(-3, 99) | st.floats() | st.text(max_size=5)
junk = st.recursive(
    scalars,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=5), some, max_size=3),
    max_leaves=5,
)


def mostly(usual, odd):
    """One in ten is odd: where several are drawn, most of what is put together has none or one of them."""
    return st.integers(0, 9).flatmap(lambda number: odd if number == 5 else usual)


def of_fields(kind, unknown: list[str]):
    """Arguments of a dataclass: for each field what its type may hold, or junk; and names that it has not."""

    def values(field):
        annotation = field.type
        usual = [st.sampled_from([each]) for each in typing.get_args(annotation) if isinstance(each, str)]
        if annotation is bool:
            usual = [st.booleans()]
        elif annotation in (str, str | None) and field.default is not dataclasses.MISSING:
            usual = [st.just(field.default)]
        elif "float" in str(annotation):
            usual = [st.sampled_from([1e-4, 0.1, 0.5, 1.0, 2])]
        elif "list[int]" in str(annotation):
            usual = [st.lists(st.sampled_from([1, 2, 4, 32]), min_size=1, max_size=3).map(tuple), st.just((1, 32, 32))]
        elif "int" in str(annotation):
            usual = [st.sampled_from([1, 2, 4, 32])]
        return mostly(st.one_of(*usual), junk) if usual else junk

    known = {field.name: values(field) for field in dataclasses.fields(kind)}
    own = [name for name in known if name not in PreTrainedConfig.__dataclass_fields__]
    some = st.lists(mostly(st.sampled_from(own), st.sampled_from([*known, *unknown])), max_size=6, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: known.get(name, junk) for name in names}))


# ------------------------------------------------------------------------------------------------------- configs

MODELS = {
    VAEPlusAutoencoderConfig: (VAEPlusAutoencoderModel, {"image_size": 32, "hidden_channels": (4, 8)}),
    VAEPlusVAEConfig: (VAEPlusVAEModel, {"input_shape": (6,), "hidden_dim": 8, "hidden_channels": (4, 8)}),
    PenalizedAutoencoderConfig: (PenalizedAutoencoderModel, {"input_shape": (6,), "hidden_dim": 8}),
    VAEPlusEncoderConfig: (None, {}),
    VAEPlusFlowMatchingConfig: (VAEPlusFlowMatchingModel, {"latent_dim": 6, "hidden_dim": 8}),
    VAEPlusDetailConfig: (VAEPlusDetailModel, {"image_size": 8, "feature_dim": 4, "hidden_dim": 8}),
    VAEPlusMixtureConfig: (VAEPlusMixtureModel, {"latent_dim": 6}),
}
UNKNOWN = ["hiden_dim", "torch_dtype", "model_type", "num_labels", "attn_implementation", "quantization_config", "\0"]


def numbers(value) -> list[float]:
    """All numbers in a value."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_config_is_refused_or_survives_a_round_trip_and_builds_a_model(kind, data):
    model, small = MODELS[kind]
    given = {**small, **data.draw(of_fields(kind, UNKNOWN))}
    try:
        config = kind(**given)
    except (ValueError, StrictDataclassError) as error:
        assert str(error).strip()
        return
    event("accepted")
    assert kind.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        again = kind.from_pretrained(folder)
    assert {name: getattr(again, name) for name in kind._own_fields()} == {
        name: getattr(config, name) for name in kind._own_fields()
    }
    if model and max(numbers([getattr(config, name) for name in kind._own_fields()])) <= 64:
        assert all(tensor.isfinite().all() for tensor in model(config).state_dict().values())


# -------------------------------------------------------------------------------------------------- command line

COMMANDS = next(action for action in build_parser()._actions if action.dest == "command").choices
# What each command needs, with so little to do that none works for long.
STARTS = {
    "train": "--config home/tiny.yaml",
    "evaluate": "home/pipeline --dataset_name digits --max_images 9 --num_images 2 --output out.json",
    "diagnose": "home/pipeline --dataset_name digits --max_images 9 --output out.json",
    "sample": "home/pipeline --num_images 2 --output out.png",
    "reconstruct": "home/pipeline home/0.png --output out.png",
    "interpolate": "home/pipeline home/0.png home/1.png --output out.png",
    "encode": "home/pipeline --dataset_name digits --max_images 9",
    "card": "home a/b",
    "push": "home/pipeline a/b",
    "demo": "home/pipeline",
    "completion": "bash",
}
NUMBERS = "1 2 3 0 -1 1.5 nan -inf 1e400 .nan 999999999999999999999999999999".split()
WORDS = (
    "home home/pipeline gone out out.png digits quickstart celeba autoencoder vae vae.seed=3 vae.model.latent_dim=-1"
)
VALUES = [*NUMBERS, *WORDS.split(), *"latent_dim=4 = train train[:2] pixels:8 prior cpu a/b -- -x --help".split()]
VALUES += ["common.split=!!bool x", "", "\0", "\ud800"]
USUAL = {
    "output": ["out.png", "out.json", "out"],
    "images": ["home/0.png"],
    "config": ["home/tiny.yaml"],
    "device": ["cpu"],
}


@pytest.fixture(scope="module")
def place(home, tmp_path_factory):  # noqa: F811
    """An empty folder to run in, no training, uploading or serving, and few drawings of a quickstart."""

    def refuse(*args, **options):
        raise ValueError("everything was right")

    def few(name):
        preset = load_preset(name)
        if name == "quickstart":
            preset["common"]["max_train_samples"] = 64
        return preset

    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "inner").mkdir()
    (folder / "inner" / "home").symlink_to(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "inner")
        patch.setenv("VAEPLUS_CACHE", str(folder / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("hf_vaeplus.training.stages.train_stages", refuse)
        patch.setattr("hf_vaeplus.training.options.load_preset", few)
        if find_spec("gradio"):  # without it the command itself refuses
            patch.setattr("hf_vaeplus.demo.serve", refuse)
        yield folder


def lines(command):
    """Words that follow a command: mostly what it needs, then flags with what they take, and junk."""

    def words(action):
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            return st.sampled_from([[flag] for flag in action.option_strings])
        fits = action.choices or USUAL.get(action.dest, NUMBERS[:3] if action.type in (int, float) else VALUES)
        value = mostly(st.sampled_from(list(fits)), st.sampled_from(VALUES))
        return value.map(lambda value: [action.option_strings[0], value])

    left_out = ("help", "debug", "cache_dir")
    flags = [each for each in COMMANDS[command]._actions if each.option_strings and each.dest not in left_out]
    junk = st.sampled_from(VALUES).map(lambda value: [value])
    drawn = mostly(st.sampled_from(flags).flatmap(words), junk) if flags else junk
    start = mostly(st.just(STARTS.get(command, "").split()), st.just([]))
    return st.builds(lambda first, parts: sum(parts, first), start, st.lists(drawn, max_size=4))


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_command_line_ends_with_0_or_2(command, data, place, home):  # noqa: F811
    for left in place.glob("inner/*"):
        if left.name != "home":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    before, words = tree(home), data.draw(lines(command))
    code, _, errors = run(command, *words)
    event(f"exit code {code}")
    assert code in (0, 2), (words, errors)
    assert "Traceback" not in errors
    if code == 2:
        assert errors.splitlines()[-1].startswith("vaeplus: error: ")
    assert tree(home) == before
    assert {path.name for path in place.iterdir()} <= {"inner", "cache"}


@settings(max_examples=60, deadline=None)
@given(mostly(st.just(["--stage", "vae"]), st.just([])), lines("train"))
def test_the_options_of_a_stage_are_read_or_refused(place, stage, words):
    read = []

    def parse():
        with contextlib.suppress(SystemExit):  # --help
            read.append(parse_stage_options("", stage + words))

    code, _, errors = captured(lambda: run_command(parse, words))
    if code == 0:
        event("accepted")
        assert all(isinstance(options, StageOptions) for options in read)
    else:
        assert code == 2 and errors.startswith("vaeplus: error: ")


# ------------------------------------------------------------------------------------------------------- presets

TEXTS = (
    "!!int 1|!!bool x|!!float x|!!timestamp x|2001-99-99|!!binary x|!!set {a}|!!python/none x|&a [*a]|*a|<<|=|1:30|0x"
)
TEXTS = [*TEXTS.split("|"), "[" * 900, "{" * 900, "? [1]", "- 1", "|", "'", "%", "\t"]
sections = st.dictionaries(
    st.sampled_from(["common", *STAGES, "detail", "vea"]),
    of_fields(StageOptions, ["seeds", "hiden_dim"]) | junk,
    max_size=3,
)
texts = st.one_of(
    st.text(max_size=30),
    sections.map(lambda value: yaml.safe_dump(value)),
    st.builds(
        "{}: {{{}: {}}}".format,
        st.sampled_from(["vae", "common"]),
        st.sampled_from(["seed", "split", "model", "<<"]),
        st.sampled_from(TEXTS),
    ),
)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_a_preset_is_read_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "preset.yaml")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            options = all_stage_options(load_preset(path), Path(folder))
        except ValueError as error:
            assert str(error).strip()
        else:
            event("accepted")
            assert [each.stage for each in options.values()] in (list(STAGES), [*STAGES, "detail"])


# ------------------------------------------------------------------------------------------- latents and pictures

KINDS = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
]
FILL = [0, 0.5, 1, -1, 255, 1e30, 3e38, math.nan, math.inf]
counts = mostly(st.sampled_from([None, 2]), st.sampled_from([0, 1, 3, -1, 2.0, True, "2", 10**30]))
forms = mostly(st.sampled_from(["pt", "np", "pil"]), st.sampled_from(["jpeg", None, []]))


def arrays(shapes, as_numpy):
    """Tensors of these shapes, or of others, or something else."""

    def build(shape, kind, fill, as_numpy):
        if not kind.is_floating_point:
            fill = int(fill) % 200 if math.isfinite(fill) else 1
        tensor = torch.full(shape, fill, dtype=torch.float64).to(kind)
        return tensor.numpy() if as_numpy and kind != torch.bfloat16 else tensor

    return mostly(
        st.builds(
            build,
            mostly(st.sampled_from(shapes), st.lists(st.integers(0, 3), max_size=4)),
            mostly(st.just(torch.float32), st.sampled_from(KINDS)),
            mostly(st.just(0.5), st.sampled_from(FILL)),
            as_numpy,
        ),
        st.sampled_from([None, 3, "text", [], [None], np.array("x"), np.array([None])]),
    )


latents = arrays([(1, 4), (2, 4)], mostly(st.just(False), st.just(True)))
drawn = st.builds(
    Image.new,
    mostly(st.just("RGB"), st.sampled_from(["L", "P", "F"])),
    mostly(st.just((32, 32)), st.sampled_from([(32, 31), (0, 0)])),
)
pictures = st.one_of(
    arrays([(1, 3, 32, 32), (2, 3, 32, 32), (3, 32, 32)], st.just(False)),
    arrays([(1, 32, 32, 3), (2, 32, 32, 3), (32, 32, 3)], st.just(True)),
    st.lists(drawn, min_size=1, max_size=2),
    drawn,
)


@pytest.fixture(scope="module")
def pipe():
    pipe = make_pipeline(second_stage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def checked(call, count, shape=(3, 32, 32)):
    """What a method returns: refused, or finite images in the form that was asked for."""
    try:
        images = call()
    except (ValueError, TypeError) as error:
        assert str(error).strip()
        return
    event("accepted")
    if isinstance(images, list):
        images = np.stack([np.asarray(image) for image in images])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).movedim(-1, 1)
    assert images.shape[1:] == shape and len(images) == count(), images.shape
    assert images.double().isfinite().all()


@settings(max_examples=100, deadline=None)
@given(latents, counts, counts, forms, mostly(st.just(1.0), st.sampled_from([0, -1, math.nan, 1e38, "1", None])))
def test_latents_give_finite_images_or_are_refused(pipe, latents, num_images, batch_size, form, factor):
    checked(lambda: pipe.decode(latents, form, batch_size or 2), lambda: len(latents))
    checked(lambda: pipe(num_images, None, latents, factor, 0.0, batch_size or 2, form).images,
            lambda: num_images or (1 if latents is None else len(latents)))  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(pictures, pictures, counts, forms)
def test_pictures_give_finite_images_or_are_refused(pipe, a, b, batch_size, form):
    def single(some):
        return 1 if isinstance(some, Image.Image) or getattr(some, "ndim", 4) == 3 else len(some)

    checked(lambda: pipe.reconstruct(a, form, batch_size or 2), lambda: single(a))
    checked(lambda: pipe.encode(a, batch_size or 2).mean, lambda: single(a), (4,))
    checked(lambda: pipe.log_likelihood(a, 2, None, batch_size or 2), lambda: single(a), ())
    checked(lambda: pipe.interpolate(a, b, batch_size or 2, "pt").flatten(0, 1), lambda: single(a) * (batch_size or 2))
