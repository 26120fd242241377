"""The demo: its handlers, its server under bad requests, and the page in a real browser at two widths."""

import base64
import io
import json
import random
import re
import runpy
import shutil
import socket
import sys
import time
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
import yaml
from helpers import SIZE, make_pipeline, with_prior
from PIL import Image

from hf_vaeplus import VAEPlusDetailConfig, VAEPlusDetailModel, VAEPlusImageProcessor, VAEPlusPipeline
from hf_vaeplus.cli.flags import read_pictures
from hf_vaeplus.cli.main import main
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.directions import save_directions

gradio = pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[demo]'")
httpx = pytest.importorskip("httpx")  # of Gradio

from hf_vaeplus.demo import MAX_BYTES, NUM_FRAMES, NUM_NEAREST, Handlers, build_demo, serve  # noqa: E402

SPACE = Path(__file__).parents[1] / "examples" / "space"


@pytest.fixture(scope="module")
def pipe() -> VAEPlusPipeline:
    return make_pipeline(latent_dim=9)


@pytest.fixture(scope="module")
def directions() -> dict[str, torch.Tensor]:
    return {"smile": torch.linspace(-1, 1, 9), "<age>": torch.ones(9)}


@pytest.fixture(scope="module")
def handlers(pipe, directions) -> Handlers:
    return Handlers(pipe, directions)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of pictures, good and bad."""
    folder = tmp_path_factory.mktemp("uploads")
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((90, 60), Image.Resampling.NEAREST)
    picture.save(folder / "a.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "b.png")
    turned = Image.Exif()
    turned[274] = 6  # "turn by 90 degrees to the right"
    picture.save(folder / "turned.jpg", exif=turned)
    content = (folder / "a.png").read_bytes()
    (folder / "notes.txt").write_text("not a picture")
    (folder / "notes.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "long.png").write_bytes(content + bytes(MAX_BYTES))
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("1", (8000, 6000)).save(folder / "huge.png")
    Image.new("I;16", (20, 20)).save(folder / "deep.png")
    picture.save(folder / "program.eps")  # Pillow reads these by starting Ghostscript
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    return folder


def upload(path: Path) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def same(images, others, levels: int = 0) -> bool:
    """Whether pixels differ by at most `levels` of 255."""
    return len(images) == len(others) and all(
        pixels(a).shape == pixels(b).shape and np.abs(pixels(a).astype(int) - pixels(b)).max() <= levels
        for a, b in zip(images, others, strict=True)
    )


# ------------------------------------------------------------------------------------------------------ handlers


def test_samples_are_those_of_the_pipeline(handlers, pipe):
    images = handlers.sample(7, 5, 0.5)
    assert same(images, pipe(5, torch.Generator().manual_seed(7), temperature=0.5).images)
    seed, others = handlers.sample_another(7, 5.0, 1)
    assert same(others, handlers.sample(seed, 5, 1.0)) and not same(images, others)


def test_sharpness_only_where_the_autoencoder_has_it(handlers, pipe):
    sharp = make_pipeline(latent_dim=9)
    sharp.autoencoder.match_spectrum([torch.rand(16, 3, SIZE, SIZE)])
    assert Handlers(sharp).sharpens and not handlers.sharpens
    assert not same(Handlers(sharp).sample(0, 2, 1.0, 1.0), Handlers(sharp).sample(0, 2, 1.0, 0.0))
    with pytest.raises(ValueError, match="match_spectrum"):
        handlers.sample(0, 2, 1.0, 0.5)
    labels = [of_kind(build_demo(each), gradio.Slider) for each in (sharp, pipe)]
    assert "Sharpness" in labels[0] and "Sharpness" not in labels[1]


def of_kind(page, kind) -> dict:
    """The inputs of a kind that a visitor sees, by their labels."""
    return {block.label: block for block in page.blocks.values() if isinstance(block, kind) and block.visible}


def test_a_model_with_detail_has_a_slider_for_it(pipe):
    torch.manual_seed(0)
    config = {name: getattr(pipe.autoencoder.config, name) for name in ("image_size", "num_channels", "patch_size")}
    detail = VAEPlusDetailModel(VAEPlusDetailConfig(**config, feature_dim=4, hidden_dim=4, temperature=0.5)).eval()
    whole = VAEPlusPipeline(pipe.vae, pipe.autoencoder, pipe.second_stage, detail)
    handlers, draw = Handlers(whole), partial(whole, 3)
    for value in (0.0, 1.0):
        expected = draw(torch.Generator().manual_seed(4), detail_temperature=value).images
        assert same(handlers.sample(4, 3, 1.0, value), expected)
    assert same(handlers.sample(4, 3, 1.0), draw(torch.Generator().manual_seed(4)).images)
    assert not same(handlers.sample(4, 3, 1.0, 0.0), handlers.sample(4, 3, 1.0, 1.0))
    sliders = of_kind(build_demo(whole), gradio.Slider)
    assert sliders["Detail"].value == 0.5 and "Sharpness" not in sliders


@pytest.mark.parametrize("kind", ["classes", "attributes"])
def test_a_conditional_model_is_asked_for_what_it_knows(kind):
    names = {0: "cat", 1: "dog"}
    whole = with_prior("flow_matching", condition=kind, id2label=names)
    handlers, page = Handlers(whole), build_demo(whole)
    one, option = ("dog", {"class_labels": "dog"}) if kind == "classes" else (["dog"], {"conditions": {"dog": 1.0}})
    draw = partial(whole, num_images=3, temperature=1.0)
    usual = handlers.sample(4, 3, 1.0, 0.0)
    assert same(usual, draw(generator=torch.Generator().manual_seed(4)).images)
    assert same(
        handlers.sample(4, 3, 1.0, 0.0, one), draw(generator=torch.Generator().manual_seed(4), **option).images
    )
    assert not same(usual, handlers.sample(4, 3, 1.0, 0.0, one))
    shown = of_kind(page, gradio.Dropdown)["Class"] if kind == "classes" else of_kind(page, gradio.CheckboxGroup)
    choices = shown.choices if kind == "classes" else next(iter(shown.values())).choices
    assert [value for _, value in choices if value] == ["cat", "dog"]
    for wrong in ("cow", ["cow"], {"cat": 1}, 3, [["cat"]]):
        with pytest.raises(ValueError, match="the model does not know .*: choose from the list"):
            handlers.sample(4, 3, 1.0, 0.0, wrong)


@pytest.mark.parametrize("name", ["a.png", "turned.jpg"])
def test_pictures_are_read_as_on_the_command_line(name, handlers, pipe, files):
    expected = read_pictures(Namespace(images=[files / name], crop=None), pipe)
    assert torch.equal(handlers.read(upload(files / name)), expected)


def test_a_picture_is_turned_as_its_camera_says(handlers, files):
    upright, turned = (handlers.read(upload(files / name)) for name in ("a.png", "turned.jpg"))
    assert (turned - upright.rot90(-1, (2, 3))).abs().mean() < 0.05 < (turned - upright).abs().mean()


def test_reconstruction_and_its_figures(handlers, pipe, files):
    picture = read_pictures(Namespace(images=[files / "a.png"], crop=None), pipe)
    seen, again, draw, figures = handlers.reconstruct(upload(files / "a.png"))
    assert same([again], pipe.reconstruct(picture))
    scores = pipe.score(picture, 16, torch.Generator().manual_seed(0))
    assert np.array_equal(pixels(seen), (255 * picture[0].permute(1, 2, 0)).round().numpy())
    error = (pipe.reconstruct(picture, "pt") - picture).square().sum().item()
    posterior = pipe.encode(picture)
    normal = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum().item()
    found = [float(number) for number in re.findall(r"\*\*(-?[\d.]*\d)", figures)]
    assert found == pytest.approx([error, kl, scores.log_likelihood.item()], rel=1e-3)
    assert not same([draw], [again]) and not same([draw], [handlers.draw(upload(files / "a.png"))])


def test_a_picture_unlike_the_training_data_gets_a_hint(handlers, pipe, files, tmp_path):
    """Such as noise, which no decoder draws. Samples of the model get none."""
    sample = handlers.sample(3, 1, 1.0)[0]
    sample.save(tmp_path / "sample.png")
    assert "unlike" not in handlers.reconstruct(upload(tmp_path / "sample.png"))[3]
    noise = np.random.default_rng(0).integers(0, 2, (SIZE, SIZE, 3), dtype=np.uint8) * 255
    Image.fromarray(noise).save(tmp_path / "noise.png")
    figures = handlers.reconstruct(upload(tmp_path / "noise.png"))[3]
    times = pipe.score(noise[None]).squared_error.item() / (0.02 * noise.size)  # gamma is 0.02
    assert f"unlike the training data</b>: its squared error is {times:.1f} times the 61.44 that" in figures


def test_pictures_are_prepared_by_the_stored_image_processor(files):
    cropped = make_pipeline(latent_dim=9)
    cropped.image_processor = VAEPlusImageProcessor(SIZE, crop=50)
    handlers = Handlers(cropped)
    whole = Image.open(files / "a.png").crop((20, 5, 70, 55)).resize((SIZE, SIZE), Image.Resampling.BOX)
    assert np.array_equal(pixels(handlers.reconstruct(upload(files / "a.png"))[0]), pixels(whole))
    whole.save(files / "exact.png")
    assert np.array_equal(pixels(handlers.reconstruct(upload(files / "exact.png"))[0]), pixels(whole))
    whole.crop((0, 0, 20, 20)).save(files / "small.png")
    with pytest.raises(ValueError, match="20 x 20 pixels, and the model looks at the central 50 x 50"):
        handlers.check(upload(files / "small.png"))


def gif_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"<img src='data:image/gif;base64,([^']+)'", text)[1])))


def test_a_way_as_a_gif_goes_there_and_back(handlers, files):
    ends = upload(files / "a.png"), upload(files / "b.png")
    gif, way = gif_of(handlers.way_as_gif(*ends, 5)), handlers.interpolate(*ends, 5)
    assert gif.n_frames == 8 and gif.info["loop"] == 0
    for number, place in enumerate((0, 1, 2, 3, 4, 3, 2, 1)):
        gif.seek(number)
        assert gif.width >= 128 and gif.width % SIZE == 0
        frame = pixels(gif.convert("RGB").resize((SIZE, SIZE), Image.Resampling.NEAREST)).astype(float)
        assert np.argmin([np.abs(frame - pixels(each)).mean() for each in way]) == place  # of 256 colours


def test_interpolation_is_the_pipelines(handlers, pipe, files):
    a, b = (read_pictures(Namespace(images=[files / name], crop=None), pipe) for name in ("a.png", "b.png"))
    way = handlers.interpolate(upload(files / "a.png"), upload(files / "b.png"), 4)
    assert same(way, pipe.interpolate(a, b, 4)[0])


def test_directions_come_in_the_order_of_their_kl(handlers, pipe):
    posterior = pipe.encode(
        pipe(2000, torch.Generator().manual_seed(1), output_type="pt", decode_batch_size=2000).images
    )
    kl = posterior.kl().mean(0)  # of other samples than the page takes
    assert handlers.kl.numpy() == pytest.approx(kl.numpy(), rel=0.2)
    assert len(set(handlers.directions)) == 8 and handlers.kl.argmin() not in handlers.directions
    assert handlers.kl[handlers.directions].diff().le(0).all() and handlers.kl.diff().gt(0).any()


def test_a_slider_sets_its_dimension_and_no_other(handlers, pipe, files):
    z, image, *values = handlers.start_from_picture(upload(files / "a.png"))
    picture = read_pictures(Namespace(images=[files / "a.png"], crop=None), pipe)
    assert torch.equal(z, pipe.encode(picture).mean) and same([image], pipe.reconstruct(picture))
    assert same([handlers.explore(z, *values)], [image])  # untouched: not even rounded
    moved = z.clone()
    moved[0, handlers.directions[2]] = -1.5
    values[4] = -1.5  # after the two named directions
    again = handlers.explore(z, *values)
    assert same([again], pipe.decode(moved, "pil")) and not same([again], [image])
    assert same([handlers.reset(z)[0]], [image]) and handlers.reset(z)[1:3] == (0, 0)


def test_a_named_slider_adds_its_direction(handlers, pipe, directions):
    z, _, *values = handlers.start_from_sample(0)
    values[:2] = -0.5, 2.0
    moved = z - 0.5 * directions["smile"] + 2 * directions["<age>"]
    assert same([handlers.explore(z, *values)], pipe.decode(moved, "pil"))
    with pytest.raises(ValueError, match="the direction smile must be a number from -3 to 3, got '4'"):
        handlers.explore(z, 4, *values[1:])


def test_what_lies_beyond_the_sliders_stays_until_it_is_moved(handlers, pipe):
    z = torch.full((1, 9), 0.123456)
    z[0, handlers.directions[:3]] = torch.tensor([5.0, -4.0, 1.0])
    values = handlers.reset(z)[1:]
    assert values == (0, 0, 3.0, -3.0, 1.0, *5 * [0.12])
    assert same([handlers.explore(z, *values)], pipe.decode(z, "pil"))


@pytest.mark.parametrize("place", [1, 4], ids=["named", "a dimension"])
def test_a_strip_shows_a_direction_from_end_to_end(place, handlers):
    z, _, *values = handlers.start_from_sample(0)
    text = handlers.strip(z, handlers.sliders[place], *values)
    assert "<age>" not in text  # a name is no HTML
    film = pixels(Image.open(io.BytesIO(base64.b64decode(re.search(r"url\(data:image/png;base64,([^)]+)", text)[1]))))
    assert film.shape == (SIZE, NUM_FRAMES * SIZE, 3)
    frames = [Image.fromarray(each) for each in film.reshape(SIZE, NUM_FRAMES, SIZE, 3).swapaxes(0, 1)]
    stops = np.linspace(-3, 3, NUM_FRAMES).tolist()
    alone = [handlers.explore(z, *values[:place], stop, *values[place + 1 :]) for stop in stops]
    assert same(frames, alone, levels=1)  # a batch is summed in another order on some processors
    assert not same(frames[:1], frames[-1:], levels=1)
    assert gif_of(handlers.walk(z, handlers.sliders[place], *values)).n_frames == 2 * NUM_FRAMES - 2
    for name in ("z99", None, 3, ["smile"], {}):
        with pytest.raises(ValueError, match="there is no direction .*: choose one of the list"):
            handlers.strip(z, name, *values)


def test_explore_shows_the_nearest_known_pictures(pipe, tmp_path):
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    known = load_images(train_data_dir=str(tmp_path), resolution=SIZE)
    handlers = Handlers(pipe, known=known)
    z, _, *values = handlers.start_from_picture({"path": str(tmp_path / "03.png")})
    found = handlers.nearest(z, *values)
    assert len(found) == NUM_NEAREST and same(found[:1], [Image.open(tmp_path / "03.png")])
    means = pipe.encode([Image.open(tmp_path / f"{number:02}.png") for number in range(12)]).mean
    order = (means - z).square().sum(1).argsort()[:NUM_NEAREST]
    assert same(found, [Image.open(tmp_path / f"{number:02}.png") for number in order])
    names = [each["api_name"] for each in build_demo(pipe, known=known).config["dependencies"]]
    assert "nearest" in names


def test_explore_starts_from_a_sample(handlers, pipe):
    (sample,) = handlers.sample(3, 1, 1.0)
    assert torch.equal(handlers.start_from_sample(3)[0], pipe.encode(sample).mean)


def test_grey_pictures(files):
    grey = Handlers(make_pipeline(latent_dim=9, num_channels=1))
    seen, again, *_ = grey.reconstruct(upload(files / "a.png"))
    assert seen.mode == again.mode == "L" and seen.size == (SIZE, SIZE)


BAD_UPLOADS = {
    "notes.txt": "not a picture: upload a JPEG",
    "notes.png": "not a picture: upload a JPEG",
    "empty.png": "not a picture: upload a JPEG",
    "program.eps": "not a picture: upload a JPEG",
    "drawing.svg": "not a picture: upload a JPEG",
    "missing.png": "not a picture: upload a JPEG",
    "": "not a picture: upload a JPEG",  # the folder
    "cut.png": "not a readable picture .*truncated",
    "long.png": "more than 10,485,760: upload a smaller one",
    "one.png": "has 1 x 1 pixels, expected at least 8 on each side",
    "huge.png": "has 8000 x 6000 pixels, expected .* 40,000,000 in all",
    "deep.png": "expected 8 bits a channel",
}


@pytest.mark.parametrize("name, message", BAD_UPLOADS.items(), ids=[name or "a folder" for name in BAD_UPLOADS])
def test_a_bad_upload_gives_one_sentence(name, message, handlers, files):
    for call in (handlers.reconstruct, handlers.draw, handlers.start_from_picture, handlers.check):
        with pytest.raises(ValueError, match=message) as caught:
            call(upload(files / name))
        assert "\n" not in str(caught.value) and str(files) not in str(caught.value)


@pytest.mark.parametrize("file", [None, "a.png", {}, {"path": None}, {"path": 3}, ["a.png"], 7])
def test_no_upload_gives_one_sentence(file, handlers):
    with pytest.raises(ValueError, match="no picture yet: upload one"):
        handlers.interpolate(file, file, 4)


BAD_NUMBERS = [None, "4", "many", True, [4], {}, float("nan"), float("inf"), 1e308, -1, 2**63, 10**400, 2.5]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda value: f"{type(value).__name__} {str(value)[:9]}")
def test_a_number_out_of_range_gives_one_sentence(value, handlers, files):
    picture = upload(files / "a.png")
    for call, name in (
        (lambda: handlers.sample(value, 4, 1.0), "seed"),
        (lambda: handlers.sample(0, value, 1.0), "number of pictures"),
        (lambda: handlers.interpolate(picture, picture, value), "number of steps"),
        (lambda: handlers.start_from_sample(value), "seed"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from .{{1,90}}$"):
            call()


@pytest.mark.parametrize("value", [None, "1", float("nan"), -4, 4, [1.0]])
def test_a_real_number_out_of_range_gives_one_sentence(value, handlers):
    z, _, *values = handlers.start_from_sample(0)
    for call, name in (
        (lambda: handlers.sample(0, 1, value), "temperature"),
        (lambda: handlers.sample(0, 1, 1.0, value), "sharpness"),
        (lambda: handlers.explore(z, *values[:2], value, *values[3:]), "direction z"),
        (lambda: handlers.explore(z, value, *values[1:]), "direction smile"),
    ):
        with pytest.raises(ValueError, match=f"{name}.* must be a number from"):
            call()


@pytest.mark.parametrize("sent", [None, {}, [3], {"index": "<b>"}, {"index": 99}, {"index": [0, 1]}])
def test_an_example_that_is_none_gives_one_sentence(sent, handlers):
    with pytest.raises(ValueError, match="the example must be a whole number from 0 to 5"):
        handlers.example(gradio.EventData(None, sent))


def test_exploring_nothing_gives_one_sentence(handlers):
    with pytest.raises(ValueError, match="take a sample or upload one"):
        handlers.reset(None)


# -------------------------------------------------------------------------------------------------------- server


@contextmanager
def served(pipe, directions):
    """The address of the demo of a pipeline."""
    demo = build_demo(pipe, directions, "faces of <b>")
    try:
        yield serve(demo, block=False, server_name="127.0.0.1").rstrip("/")
    finally:
        demo.close()


@pytest.fixture(scope="module")
def address(pipe, directions) -> str:
    with served(pipe, directions) as address:
        yield address


def ask(address: str, name: str, values) -> tuple[str, object]:
    """What a client without the page gets: `("complete", outputs)` or `("error", the sentence)`."""
    begun = httpx.post(f"{address}/gradio_api/call/{name}", json={"data": values}, timeout=60)
    if begun.status_code != 200:
        return "refused", begun.text
    events = httpx.get(f"{address}/gradio_api/call/{name}/{begun.json()['event_id']}", timeout=60).text
    kind, data = re.findall(r"^event: (complete|error)\ndata: (.*)$", events, re.MULTILINE)[-1]
    data = json.loads(data)
    return kind, data["error"] if kind == "error" and isinstance(data, dict) else data


def sent(address: str, path: Path) -> dict:
    """An upload, as the page does it."""
    with open(path, "rb") as file:
        (at,) = httpx.post(f"{address}/gradio_api/upload", files={"files": file}, timeout=60).json()
    return upload(Path(at))


def fetched(address: str, shown: dict) -> Image.Image:
    return Image.open(io.BytesIO(httpx.get(shown["url"], timeout=60).content))


def test_a_client_without_the_page_gets_the_same_pictures(address, handlers, files):
    kind, (gallery,) = ask(address, "sample", [7, 3, 1])
    assert kind == "complete"
    assert same([fetched(address, each["image"]) for each in gallery], handlers.sample(7, 3, 1.0))
    kind, outputs = ask(address, "reconstruct", [sent(address, files / "turned.jpg")])
    assert kind == "complete"
    expected = handlers.reconstruct(upload(files / "turned.jpg"))
    assert same([fetched(address, each) for each in outputs[:2]], expected[:2]) and outputs[3] == expected[3]


HOSTILE = [
    ("sample", [0, 10**6, 1]),
    ("sample", ["<script>alert(1)</script>", 1, 1]),
    ("sample", [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, 1, 1]),
    ("sample", [[[[[]]]], 1, 1]),
    ("sample", [0, 1]),
    ("sample", []),
    ("reconstruct", [7]),
    ("reconstruct", ["data:image/png;base64,AAAA"]),
    ("reconstruct", [{"url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}}]),
    ("reconstruct", [upload(Path("/etc/passwd"))]),
    ("reconstruct", [upload(Path("../../../etc/passwd"))]),
    ("reconstruct", [{"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}]),
    ("reconstruct", [{"path": "HTTPS://example.org/a.png", "meta": {"_type": "gradio.FileData"}}]),
    ("interpolate", [None, None, 9]),
    ("explore", 10 * [9]),
    ("strip", ["<b>z99</b>", *10 * [0]]),
    ("walk", [{"path": "/etc/passwd"}, *10 * [0]]),
    ("way_as_gif", [None, None, 9]),
    ("example", []),
    ("explore", 2 * [{}, None, "", -1]),
]


def test_hostile_requests_get_one_sentence_and_leave_the_demo_as_it_was(address, files, capfd, monkeypatch):
    hosts = []
    monkeypatch.setattr(gradio.processing_utils, "async_ssrf_protected_download", lambda *args, **_: hosts.append(0))
    uploads = [("reconstruct", [sent(address, files / name)]) for name in BAD_UPLOADS if (files / name).is_file()
               and name != "long.png"]  # fmt: skip
    before = ask(address, "sample", [7, 3, 1])
    capfd.readouterr()
    for name, values in HOSTILE + uploads:
        kind, answer = ask(address, name, values)
        assert kind == "error" and isinstance(answer, str), (name, values, answer)
        assert answer.endswith(".") and "\n" not in answer and "<" not in answer and len(answer) < 200, answer
        assert "Traceback" not in answer and "tmp" not in answer, answer
    assert not hosts  # nothing was fetched for them
    assert capfd.readouterr().err == ""
    assert ask(address, "sample", [7, 3, 1]) == before


def test_a_request_that_is_too_long_is_refused(address, files):
    size = httpx.post(f"{address}/gradio_api/upload", files={"files": (files / "long.png").read_bytes()}, timeout=60)
    assert size.status_code == 413
    body = httpx.post(f"{address}/gradio_api/call/sample", content=b" " * (MAX_BYTES + 2**17), timeout=60)
    assert body.status_code == 413
    assert ask(address, "sample", [7, 1, 1])[0] == "complete"


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_requests_in_a_row_leave_a_demo_that_answers(count, address, files, capfd):
    """Uploads that cannot be read, values of every wrong kind, too much at once, and answers that nobody fetches."""
    good = [7, 3, 1]
    before = ask(address, "sample", good)
    short = [name for name in BAD_UPLOADS if (files / name).is_file() and name != "long.png"]
    names = ["sample", "reconstruct", "interpolate", "start_from_sample", "start_from_picture", "explore", "reset"]
    deep = json.loads("[" * 100 + "]" * 100)
    values = [*BAD_NUMBERS[:-2], deep, "x" * 10_000, upload(Path("/etc/passwd")), {"path": "../../etc/passwd"}, []]
    source = random.Random(0)
    kinds = Counter()
    with httpx.Client(base_url=f"{address}/gradio_api", timeout=60) as client:
        for number in range(count):
            match number % 5:
                case 0:  # an upload that is no picture, and something done with it
                    name = source.choice(short)
                    kind, _ = ask(address, "reconstruct", [sent(address, files / name)])
                case 1:  # wrong values, as many as there should be or not
                    data = {"data": [source.choice(values) for _ in range(source.randrange(6))]}
                    content = json.dumps(data).encode()  # NaN and infinity are no JSON, and are sent all the same
                    begun = client.post(f"/call/{source.choice(names)}", content=content)
                    kind = str(begun.status_code)
                    if begun.status_code == 200:
                        client.get(f"/call/sample/{begun.json()['event_id']}")
                case 2:  # far too much, and nobody waits for the answer
                    kind = str(client.post("/call/sample", json={"data": [0, 10**9, 1]}).status_code)
                case 3:  # no request at all
                    content = source.randbytes(source.randrange(2_000))
                    kind = str(client.post("/call/sample", content=content).status_code)
                case 4:  # files that are none of the page's
                    path = source.choice(["/etc/passwd", "../../../etc/passwd", "https://example.org/a.png", "\0"])
                    kind = str(client.get("/file=" + quote(path)).status_code)
            kinds[number % 5, kind] += 1
    assert kinds[0, "error"] == count // 5
    assert not [kind for _, kind in kinds if kind.startswith("5")], kinds
    assert "Traceback" not in capfd.readouterr().err
    assert sum(kinds[4, str(status)] for status in (400, 403, 404)) == count // 5, kinds
    assert not kinds[3, "200"]
    assert ask(address, "sample", good) == before


def test_work_that_takes_too_long_is_ended(address, handlers, pipe, monkeypatch):
    before = ask(address, "sample", [7, 3, 1])
    monkeypatch.setattr("hf_vaeplus.demo.MAX_SECONDS", 0.5)
    slow = pipe.autoencoder.decoder[0].register_forward_pre_hook(lambda *_: time.sleep(0.6))
    answer = ask(address, "sample", [7, 3, 1])
    slow.remove()
    monkeypatch.undo()
    assert answer == ("error", "This takes longer than 0.5 seconds: ask for fewer pictures.")
    assert ask(address, "sample", [7, 3, 1]) == before
    with pytest.raises(ValueError, match="longer than 60 seconds"), handlers.time_limit():
        later = time.monotonic() + 61
        # not the clock of everybody: the server's loops would sleep until then
        monkeypatch.setattr("hf_vaeplus.demo.time", Namespace(monotonic=lambda: later))
        handlers.sample(7, 3, 1.0)


def test_a_request_that_never_ends_is_ended(address, monkeypatch):
    monkeypatch.setattr("hf_vaeplus.demo.MAX_SECONDS", 0.5)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /gradio_api/call/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    monkeypatch.undo()
    assert ask(address, "sample", [7, 1, 1])[0] == "complete"


def test_the_page_names_no_other_machine(address):
    page = httpx.get(address, timeout=60).text
    config = httpx.get(f"{address}/config", timeout=60).json()
    assert config["analytics_enabled"] is False and config["max_file_size"] == MAX_BYTES
    assert not re.findall(r"""<(?:script|link)[^>]+(?:src|href)=["'](?:https?:)?//""", page)


# ------------------------------------------------------------------------------------------- Space, command line


def test_the_space_builds_the_page_of_its_pipeline(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    monkeypatch.setenv("VAEPLUS_PIPELINE", str(tmp_path))
    page = runpy.run_path(str(SPACE / "app.py"))["demo"]
    tabs = [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]
    assert tabs == ["Sample", "Reconstruct", "Interpolate", "Explore"]
    assert page.title == f"{tmp_path.name} (VAE+)"


def test_the_directions_beside_a_pipeline_become_sliders(pipe, directions, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "faces" / "pipeline")
    place = str(tmp_path / "faces" / "pipeline")
    found = []
    monkeypatch.setattr("hf_vaeplus.demo.serve", lambda page, **_: found.append(page))
    save_directions(directions, pipe, place)
    save_directions({"frown": -directions["smile"]}, pipe, tmp_path / "frown.safetensors")
    for flags in ([], ["--directions", str(tmp_path / "frown.safetensors")]):
        assert main(["demo", place, *flags]) == 0
    labels = [{block.label for block in page.blocks.values() if isinstance(block, gradio.Slider)} for page in found]
    assert {"smile", "<age>"} <= labels[0] and "frown" in labels[1] and "smile" not in labels[1]
    assert found[0].title == "faces (VAE+)"


def test_the_spaces_header(monkeypatch):
    header = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert header["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    placeholder = re.search(r'"VAEPLUS_PIPELINE", "(.*)"', (SPACE / "app.py").read_text())[1]
    assert header["models"] == [placeholder]
    assert "hf-vaeplus" in (SPACE / "requirements.txt").read_text().splitlines()


def test_an_address_that_cannot_be_used_gives_one_sentence(pipe, address, tmp_path, capsys):
    port = address.rsplit(":", 1)[1]
    for flags in (["--port", port], ["--port", "99999"], ["--host", "nowhere.invalid"]):
        assert main(["demo", str(tmp_path), *flags]) == 2
        output, errors = capsys.readouterr()
        assert output == "" and re.fullmatch("vaeplus: error: cannot serve at .*choose another --host or .*\n", errors)


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "hf_vaeplus.demo")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "pipeline"]) == 2
    assert capsys.readouterr().err == "vaeplus: error: the demo needs Gradio: pip install 'hf-vaeplus[demo]'.\n"


# ------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[browser]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        outside = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", outside])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, address):
    """The page, just opened; in the end its console held no error, and it asked for nothing outside the machine."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)
    page = context.new_page()
    page.set_default_timeout(30_000)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert not complaints
    assert len(requests) > 10
    assert not [url for url in requests if not url.startswith((f"{address}/", "data:", f"blob:{address}/"))]


def open_tab(page, name: str):
    """The panel of a tab, once it is shown."""
    page.get_by_role("tab", name=name, exact=True).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_role("button").first.wait_for()
    return panel


def shown(images) -> list[Image.Image]:
    """The pictures that `<img>` elements show, from the browser's own copies."""
    script = """images => Promise.all(images.map(async image => {
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
    }))"""
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in images.evaluate_all(script)]


def changed(images, act) -> list[Image.Image]:
    """The pictures after `act()`, as soon as all are other ones."""
    sources = "images => images.map(image => image.src)"
    before = images.evaluate_all(sources)
    act()
    for _ in range(300):
        after = images.evaluate_all(sources)
        if after and not set(before) & set(after):
            return shown(images)
        images.page.wait_for_timeout(100)
    raise AssertionError("the pictures did not change")


def too_wide(page) -> list[str]:
    """Visible elements that leave the page to the right."""
    script = """() => [...document.querySelectorAll("main *")].filter(element => element.checkVisibility()
        && element.getBoundingClientRect().right > window.innerWidth + 1)
        .map(element => element.className).slice(0, 5)"""
    return page.evaluate(script)


def test_browser_sample(page, handlers):
    panel = open_tab(page, "Sample")
    gallery = panel.locator(".pictures img")
    panel.get_by_label("Seed", exact=True).fill("5")
    panel.get_by_label("number input for Pictures").fill("4")
    images = changed(gallery, panel.get_by_role("button", name="Sample", exact=True).click)
    assert same(images, handlers.sample(5, 4, 1.0))
    assert gallery.first.bounding_box()["width"] >= 90
    assert gallery.first.evaluate("image => image.complete && image.naturalWidth") == SIZE
    assert gallery.first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert not too_wide(page)
    changed(gallery, panel.get_by_role("button", name="Sample with another seed").click)
    assert panel.get_by_label("Seed", exact=True).input_value() != "5"


def test_browser_reconstruct(page, handlers, files):
    panel = open_tab(page, "Reconstruct")
    outputs = panel.locator(".square img")
    images = changed(outputs, lambda: panel.locator("input[type=file]").set_input_files(files / "turned.jpg"))
    seen, again, _, figures = handlers.reconstruct(upload(files / "turned.jpg"))
    assert same(images[:2], [seen, again])
    assert re.search(r"Squared error ([\d.]+)", panel.inner_text())[1] == re.search(r"\*\*([\d.]+)", figures)[1]
    changed(outputs.nth(2), panel.get_by_role("button", name="Another posterior draw").click)
    assert same(shown(outputs)[:2], [seen, again])
    assert not too_wide(page)


@pytest.mark.parametrize("name, message", [("notes.txt", "Invalid file type"), ("notes.png", "This is not a picture")])
def test_browser_shows_an_error_well(page, name, message, files):
    panel = open_tab(page, "Reconstruct")
    before = shown(panel.locator(".square img"))
    panel.locator("input[type=file]").set_input_files(files / name)
    error = page.get_by_test_id("toast-body")
    error.get_by_text(message).wait_for()
    box = error.bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= page.viewport_size["width"] and box["height"] < 200
    assert "Traceback" not in page.content() and same(shown(panel.locator(".square img")), before)
    if name == "notes.png":  # refused by the server: no broken picture is left in the box
        panel.get_by_text("Click to Upload").wait_for()
    error.get_by_test_id("toast-close").click()
    changed(panel.locator(".square img"), lambda: panel.locator("input[type=file]").set_input_files(files / "a.png"))


def test_browser_interpolate(page, handlers, files):
    panel = open_tab(page, "Interpolate")
    way = panel.locator(".pictures img")
    first = panel.locator("input[type=file]").first
    changed(way.last, lambda: panel.locator("input[type=file]").last.set_input_files(files / "b.png"))
    changed(way.first, lambda: first.set_input_files(files / "a.png"))
    panel.get_by_label("number input for Steps").fill("5")
    panel.get_by_role("button", name="Interpolate").click()
    way.nth(5).wait_for(state="detached")
    assert same(shown(way), handlers.interpolate(upload(files / "a.png"), upload(files / "b.png"), 5))
    assert not too_wide(page)


def test_browser_explore(page, handlers, files):
    panel = open_tab(page, "Explore")
    picture, slider = panel.locator(".square img"), panel.get_by_role("slider").first
    z, image, *values = handlers.start_from_picture(upload(files / "a.png"))
    images = changed(picture, lambda: panel.locator("input[type=file]").set_input_files(files / "a.png"))
    assert same(images, [image]) and float(slider.input_value()) == values[0] == 0

    def touch(element, share):
        element.scroll_into_view_if_needed()
        box = element.bounding_box()
        x, y = box["x"] + box["width"] * share, box["y"] + box["height"] / 2
        (page.touchscreen.tap if page.viewport_size["width"] < 500 else page.mouse.click)(x, y)

    images = changed(picture, lambda: touch(slider, 0.8))
    value = float(slider.input_value())
    assert value > 0.5
    assert same(images, [handlers.explore(z, value, *values[1:])])
    box = picture.bounding_box()
    assert box["width"] >= 150 and 0 <= box["y"] < page.viewport_size["height"]  # in sight while sliders are moved
    assert not too_wide(page)
    assert same(changed(picture, panel.get_by_role("button", name="Back to the start").click), [image])
    assert float(slider.input_value()) == 0

    place = panel.get_by_label("place on the strip")
    touch(place, 0.99)
    assert place.input_value() == str(NUM_FRAMES - 1)
    window = panel.locator(".strip .window")
    assert window.evaluate("window => getComputedStyle(window).backgroundPositionX") == "100%"
    panel.get_by_role("button", name="A walk as a GIF").click()
    panel.locator(".walk img").wait_for()
    assert panel.locator(".walk a").get_attribute("download") == "walk.gif"
    panel.get_by_role("button", name="Remove Image").click()
    panel.locator(".strip").wait_for(state="detached")
    assert not picture.count() and not panel.locator(".walk").count()


def test_browser_results_stand_above_on_a_phone_and_go_with_their_picture(page, handlers):
    panel = open_tab(page, "Reconstruct")
    outputs, inputs = panel.locator(".square img"), panel.locator(".upload")
    is_above = outputs.first.bounding_box()["y"] + 50 < inputs.bounding_box()["y"]
    assert is_above == (page.viewport_size["width"] < 500)
    images = changed(outputs, panel.locator(".examples button").nth(2).click)
    assert same(images[:1], [handlers.samples[2]])
    panel.get_by_role("button", name="Remove Image").click()
    outputs.first.wait_for(state="detached")
    assert not outputs.count() and "Squared error" not in panel.inner_text()
    panel.locator(".examples button").nth(1).click()
    outputs.nth(2).wait_for()
    assert page.title() == "faces of <b> (VAE+)" and page.get_by_role("heading", name="faces of <b>").is_visible()
