"""The demo in a browser: sample, reconstruct, interpolate, explore. Needs Gradio, the extra `[demo]`.

    build_demo(pipe)    the page, as `gr.Blocks`
    serve(demo)         serves it with its limits

Whatever a request holds is checked here and not by the page: a client can call the API without it.
"""

import asyncio
import base64
import contextlib
import functools
import html
import io
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from .data.pixels import to_uint8, to_unit_range
from .directions import directions_beside
from .metrics.latents import PosteriorStatistics
from .metrics.reconstruction import psnr
from .progress import tqdm

if TYPE_CHECKING:
    from .pipeline_vaeplus import VAEPlusPipeline

try:
    import gradio as gr
    from fastapi.exceptions import RequestValidationError  # of the web framework that Gradio runs on
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ImportError as error:
    raise ImportError("the demo needs Gradio: pip install 'hf-vaeplus[demo]'.") from error

MAX_COUNT = 64  # samples of one request
MAX_STEPS = 32  # pictures of one interpolation
MAX_SEED = 2**32 - 1
MAX_BYTES = 10 * 2**20  # of an uploaded file
MAX_PIXELS = 40_000_000
MIN_SIDE = 8  # pixels
MAX_SECONDS = 60  # that the networks work for one request, or that one takes to arrive
MAX_WAITING = 64  # requests in the queue; one runs at a time
MAX_SESSIONS = 256  # whose state is kept
KEEP_FILES = 3600  # seconds, of uploads and of pictures made
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what browsers show; some of Pillow's other readers start programs
NUM_DIRECTIONS = 8
RANGE = 3.0  # of a slider, in standard deviations of the prior or of a named attribute
NUM_NEAREST = 6  # known pictures beside an explored one
NUM_FRAMES = 13  # of a strip: -RANGE to RANGE
NUM_EXAMPLES = 6
GIF_SIDE = 128  # pixels, at least: pictures of 28 x 28 would be stamps
GIF_DURATION = 90  # milliseconds a frame
NUM_IMPORTANCE_SAMPLES = 16  # of a score
UNLIKE_ERROR = 4.0  # times the error that the model expects: of unseen faces and digits less than 1% have more
UNLIKE_LENGTH = 1.7  # times the usual length of a code: as rare

# Gradio shows small pictures small, smoothed and under their labels.
CSS = """
.gradio-container {width: 100% !important; max-width: 1160px !important; margin: 0 auto !important}
.crisp img {image-rendering: pixelated}
.crisp > label {position: static !important; border: none !important; background: none !important}
.crisp > label > span {display: none}
.square button, .square .image-frame {width: 100% !important; height: auto !important}
.square img {width: 100% !important; height: auto !important; aspect-ratio: 1; object-fit: contain !important}
.upload img {width: 100% !important; height: 100% !important; object-fit: contain !important}
.pictures {--least: 15%}
.way {--least: 10%}
.pictures .grid-wrap, .examples .grid-wrap {min-height: 0 !important; max-height: none !important;
    overflow: visible !important}
.examples .grid-container {padding-top: 0 !important; grid-auto-rows: auto !important;
    grid-template-rows: none !important; grid-template-columns: repeat(auto-fill, minmax(48px, 1fr)) !important}
.examples .gallery-item, .examples button {width: 100% !important; height: auto !important; aspect-ratio: 1}
.pictures .grid-container {padding-top: 0 !important;
    grid-template-columns: repeat(auto-fill, minmax(max(92px, var(--least)), 1fr)) !important}
.strip .window, .strip .film {background-image: var(--film); image-rendering: pixelated; border-radius: 4px}
.strip .window {width: min(100%, 260px); aspect-ratio: 1; margin: 0 auto 8px;
    background-size: calc(100% * var(--count)) 100%;
    background-position: calc(100% * var(--at) / (var(--count) - 1)) 0}
.strip .film {position: relative; aspect-ratio: var(--count); background-size: 100% 100%}
.strip .film::after {content: ""; position: absolute; top: 0; bottom: 0; width: calc(100% / var(--count));
    left: calc(100% * var(--at) / var(--count)); box-shadow: 0 0 0 3px var(--color-accent); border-radius: 2px}
.strip input {position: absolute; inset: -8px 0; width: 100%; margin: 0; opacity: 0; cursor: ew-resize;
    touch-action: pan-y}
.strip .film:focus-within {outline: 2px solid var(--color-accent); outline-offset: 4px}
.strip .ends {display: flex; justify-content: space-between; font-size: 13px; padding-top: 6px}
.walk img {image-rendering: pixelated; border-radius: 4px; width: min(100%, 260px); margin: 0 auto}
.walk {text-align: center}
.unlike {padding: 8px 12px; border-left: 4px solid #d97706; background: color-mix(in srgb, #d97706 12%, transparent)}
@media (max-width: 640px) {
    .gradio-container {overflow: clip !important}
    .result {order: -1}
    .gradio-container .main {padding: 16px !important}
    .tab-container button {padding: 0 8px !important; font-size: 14px !important}
    .stays {position: sticky !important; top: 0; z-index: 1000; background: var(--body-background-fill)}
    .stays .square {width: 60% !important; margin: 0 auto !important}
}
"""
# Of the visitor's machine: the page fetches none.
FONTS = ("-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")


class Handlers:
    """What the events of the page do: values as a client sent them in, pictures out.

    An uploaded file is the dict that Gradio makes of it, `{"path": ..., ...}`, or `None`.

    Raises:
        ValueError: one sentence for the visitor, from every method, about a value that cannot be used.
    """

    def __init__(self, pipe: "VAEPlusPipeline", directions: Mapping[str, torch.Tensor] | None = None, known=None):
        pipe.need_vae("posteriors to show")
        self.pipe, self.named, self.known = pipe, dict(directions or {}), known
        if known is not None:
            rows = tqdm(torch.arange(len(known)).split(64), desc="encoding")
            self.places = torch.cat([pipe.encode(self._known(part)).mean.cpu() for part in rows])
        self.sharpens = pipe.autoencoder is not None and pipe.autoencoder.config.matched_spectrum
        self.look = (
            ("sharpness", 0.0) if pipe.detail is None else ("detail_temperature", pipe.detail.config.temperature)
        )
        config = None if pipe.second_stage is None else pipe.second_stage.config
        self.condition = getattr(config, "condition", None)
        self.labels = [] if self.condition is None else [config.id2label[each] for each in config.label_ids]
        generator = torch.Generator().manual_seed(0)
        statistics = PosteriorStatistics(pipe.vae.config.latent_dim)
        lengths = []
        for _ in range(4):  # 256 samples, encoded back: a saved pipeline holds no images and no figures of any
            posterior = pipe.encode(pipe(64, generator=generator, output_type="pt").images)
            statistics.update(posterior.mean, posterior.logvar)
            lengths.append(posterior.mean.norm(dim=1))
        self.active = statistics.active_units_by_variance()
        self.kl = statistics.kl_per_dimension()  # nats, of each dimension of z
        self.directions = self.kl.argsort(descending=True)[:NUM_DIRECTIONS].tolist()
        self.usual_length = torch.cat(lengths).square().mean().sqrt().item()
        # gamma is the mean squared error of a pixel value in training, unless the config keeps it above
        num_values = math.prod(pipe.image_shape)
        self.expected_error = num_values * pipe.vae.decoder_log_variance.exp().item() if pipe.has_likelihood else None
        self.samples = self.sample(0, 18, 1.0)
        self.sliders = [*self.named, *[f"z{j}" for j in self.directions]]

    @contextlib.contextmanager
    def time_limit(self):
        """What runs in it ends with a ValueError at the first layer of a network after `MAX_SECONDS`."""
        end = time.monotonic() + MAX_SECONDS

        def check(layer, inputs):
            if time.monotonic() > end:
                raise ValueError(f"this takes longer than {MAX_SECONDS} seconds: ask for fewer pictures.")

        networks = [part for part in self.pipe.components.values() if part is not None]
        hooks = [layer.register_forward_pre_hook(check) for part in networks for layer in part.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sample(self, seed, count, temperature, *more) -> list[Image.Image]:
        """The pictures that `vaeplus sample` draws with these values.

        `more` are the value of what `self.look` names, which has a usual one, and of a conditional model what is to be
        seen: a class, a list of attributes, or nothing.
        """
        look, usual = self.look
        value, wanted = *more, *(usual, None)[len(more) :]
        seed = _number("the seed", seed, 0, MAX_SEED, whole=True)
        count = _number("the number of pictures", count, 1, MAX_COUNT, whole=True)
        temperature = _number("the temperature", temperature, 0, 2)
        value = _number("the sharpness" if look == "sharpness" else "the detail", value, 0, max(1, usual))
        generator = torch.Generator().manual_seed(seed)
        given = {look: value, **self._asked(wanted)}
        return self.pipe(num_images=count, generator=generator, temperature=temperature, **given).images

    def _asked(self, wanted) -> dict:
        """The options of a pipeline for what is to be seen."""
        if not wanted:
            return {}
        names = [wanted] if self.condition == "classes" else wanted
        if not isinstance(names, list) or not all(isinstance(name, str) and name in self.labels for name in names):
            raise ValueError(f"the model does not know {str(wanted)[:40]!r}: choose from the list.")
        if self.condition == "classes":
            return {"class_labels": wanted}
        return {"conditions": dict.fromkeys(names, 1.0)}

    def sample_another(self, *values) -> tuple[int, list[Image.Image]]:
        """A seed, and its pictures; the first of `values`, the last seed, is not used."""
        seed = random.randint(0, MAX_SEED)
        return seed, self.sample(seed, *values[1:])

    def read(self, file) -> torch.Tensor:
        """An uploaded picture as the model sees it, prepared as in training: `(1, C, H, W)` in [0, 1]."""
        if not isinstance(file, dict) or not isinstance(file.get("path"), str):
            raise ValueError("there is no picture yet: upload one.")
        try:
            size = Path(file["path"]).stat().st_size
            with Image.open(file["path"], formats=FORMATS) as image:  # reads no pixel yet
                width, height = image.size
        except Exception as error:  # damaged files make PIL raise nearly anything
            raise ValueError("this is not a picture: upload a JPEG, PNG, WebP, GIF or BMP file.") from error
        if size > MAX_BYTES:
            raise ValueError(f"this file has {size:,} bytes, more than {MAX_BYTES:,}: upload a smaller one.")
        if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
            raise ValueError(
                f"this picture has {width} x {height} pixels, expected at least {MIN_SIDE} on each side and"
                f" {MAX_PIXELS:,} in all: upload another."
            )
        processor = self.pipe.image_processor
        if (
            processor.crop is not None
            and min(width, height) < processor.crop
            and {width, height} != {processor.image_size}
        ):
            raise ValueError(
                f"this picture has {width} x {height} pixels, and the model looks at the central {processor.crop} x"
                f" {processor.crop}, as in training: upload a larger one."
            )
        with Image.open(file["path"], formats=FORMATS) as image:
            pixels = processor.pixels(image, "this")
        return to_unit_range(torch.tensor(pixels).permute(2, 0, 1)[None])

    def check(self, file):
        """Nothing, if `read` can read the file."""
        self.read(file)

    def reconstruct(self, file) -> tuple[Image.Image, Image.Image, Image.Image, str]:
        """The picture as the model sees it, its reconstruction, a draw from its posterior, and figures in Markdown."""
        seen = self.read(file)
        posterior = self.pipe.encode(seen)
        again = self.pipe.decode(posterior.mean, "pt")
        return _picture(seen), _picture(again), self._draw(posterior), self._figures(seen, posterior)

    def _figures(self, seen, posterior) -> str:
        scores = self.pipe.score(seen, NUM_IMPORTANCE_SAMPLES, torch.Generator().manual_seed(0))
        error, length = scores.squared_error.item(), posterior.mean.norm().item()
        figures = (
            f"Squared error **{error:.4g}** (summed over {seen.numel()} values in [0, 1]; PSNR"
            f" {psnr(scores.squared_error, seen.numel()).item():.1f} dB), KL of the posterior from the prior"
            f" **{posterior.kl().sum():.4g} nats**."
        )
        if scores.log_likelihood is not None:
            figures += (
                f" Score: log-likelihood **{scores.log_likelihood.item():.5g} nats**, a bound by"
                f" {NUM_IMPORTANCE_SAMPLES} samples; {scores.bits_per_dimension.item():.3g} bits per value."
            )
        reasons = []
        if self.expected_error is not None and error > UNLIKE_ERROR * self.expected_error:
            times, expected = error / self.expected_error, f"{self.expected_error:.4g}"
            reasons.append(f"its squared error is {times:.1f} times the {expected} that the model expects")
        if length > UNLIKE_LENGTH * self.usual_length:
            reasons.append(f"its code lies {length / self.usual_length:.1f} times as far out as is usual")
        if reasons:
            told = "This picture is unlike the training data"
            figures += f"\n\n<div class='unlike'><b>{told}</b>: {' and '.join(reasons)}.</div>"
        return figures

    def draw(self, file) -> Image.Image:
        """Another draw from the posterior of the picture."""
        return self._draw(self.pipe.encode(self.read(file)))

    def _draw(self, posterior) -> Image.Image:
        return self.pipe.decode(posterior.sample())[0]

    def interpolate(self, first, last, steps) -> list[Image.Image]:
        """`steps` pictures from the first uploaded picture to the last."""
        steps = _number("the number of steps", steps, 2, MAX_STEPS, whole=True)
        return self.pipe.interpolate(self.read(first), self.read(last), steps)[0]

    def way_as_gif(self, first, last, steps) -> str:
        """The pictures of [`interpolate`], there and back, as a GIF in HTML."""
        return _gif(self.interpolate(first, last, steps))

    def example(self, chosen: gr.EventData) -> Image.Image:
        """The sample that was clicked on."""
        index = chosen._data.get("index") if isinstance(chosen._data, dict) else None  # of a client, so anything
        return self.samples[_number("the example", index, 0, NUM_EXAMPLES - 1, whole=True)]

    def start_from_sample(self, seed) -> tuple:
        """As `start_from_picture`, from the picture that is drawn alone with this seed."""
        return self._start(self.sample(seed, 1, 1.0))

    def start_from_picture(self, file) -> tuple:
        """The latents `(1, latent_dim)` of a picture, its reconstruction and the value of each slider."""
        return self._start(self.read(file))

    def _start(self, images) -> tuple:
        z = self.pipe.encode(images).mean
        return z, self.pipe.decode(z)[0], *self._slider_values(z)

    def _slider_values(self, z) -> list[float]:
        """Where all sliders stand at the start: named directions at 0, dimensions where `z` lies."""
        at_z = [round(min(max(z[0, j].item(), -RANGE), RANGE), 2) for j in self.directions]
        return [0.0] * len(self.named) + at_z

    def _moved(self, z, values) -> torch.Tensor:
        """`z`, but for the directions whose sliders were moved."""
        if z is None:
            raise ValueError("there is no picture to start from: take a sample or upload one.")
        moved = z.clone()
        values = [_number(f"the direction {name}", value, -RANGE, RANGE)
                  for name, value in zip(self.sliders, values, strict=True)]  # fmt: skip
        starts, count = self._slider_values(z), len(self.named)
        for j, value, start in zip(self.directions, values[count:], starts[count:], strict=True):
            if value != start:  # `start` is rounded and cut to the range: what is not moved stays exact
                moved[0, j] = value
        for direction, value in zip(self.named.values(), values[:count], strict=True):
            moved += value * direction
        return moved

    def explore(self, z, *values) -> Image.Image:
        """The picture at `z`, but for the directions whose sliders were moved."""
        return self.pipe.decode(self._moved(z, values))[0]

    def reset(self, z) -> tuple:
        """The picture and the sliders as they were at the start."""
        values = [0.0] * len(self.sliders) if z is None else self._slider_values(z)
        return self.explore(z, *values), *values

    def strip(self, z, name, *values) -> str:
        """Pictures along one direction, from end to end of its slider, to drag through: HTML."""
        film = torch.cat(list(self._frames(z, name, values)), dim=2)
        file = io.BytesIO()
        _picture(film[None]).save(file, "PNG")
        label, middle = html.escape(name), NUM_FRAMES // 2
        return (
            f"<div class='strip' style='--count: {NUM_FRAMES}; --at: {middle}; --film: url({_data_url(file, 'png')})'>"
            f"<div class='window' role='img' aria-label='the picture on the strip'></div><div class='film'>"
            f"<input type='range' min='0' max='{NUM_FRAMES - 1}' value='{middle}' aria-label='place on the strip'"
            ' oninput=\'this.closest(".strip").style.setProperty("--at", this.value)\'></div>'
            f"<div class='ends'><span>-{RANGE:g}</span><span>{label}</span><span>+{RANGE:g}</span></div></div>"
        )

    def nearest(self, z, *values) -> list[Image.Image]:
        """The known pictures whose posterior means lie nearest to the latents of the explored picture."""
        distances = torch.cdist(self._moved(z, values).cpu(), self.places)[0]
        rows = distances.topk(min(NUM_NEAREST, len(self.places)), largest=False).indices
        return [_picture(image[None]) for image in self._known(rows)]

    def _known(self, rows: torch.Tensor) -> torch.Tensor:
        return to_unit_range(self.known.batch(rows.tolist())["pixel_values"])

    def walk(self, z, name, *values) -> str:
        """The pictures of [`strip`], there and back, as a GIF in HTML."""
        return _gif([_picture(frame[None]) for frame in self._frames(z, name, values)])

    def _frames(self, z, name, values) -> torch.Tensor:
        """`(NUM_FRAMES, C, H, W)`."""
        if name not in self.sliders:
            raise ValueError(f"there is no direction {str(name)[:40]!r}: choose one of the list.")
        place = self.sliders.index(name)
        stops = torch.linspace(-RANGE, RANGE, NUM_FRAMES).tolist()
        return self.pipe.decode(
            torch.cat([self._moved(z, [*values[:place], stop, *values[place + 1 :]]) for stop in stops]), "pt"
        )


def _number(name: str, value, low: float, high: float, whole: bool = False) -> int | float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} from {low:g} to {high:.10g}, got {str(value)[:40]!r}.")
    return int(value) if whole else float(value)


def _picture(images: torch.Tensor) -> Image.Image:
    array = to_uint8(images)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _gif(frames: list[Image.Image]) -> str:
    """An endless GIF, there and back, with a link that saves it: HTML. No file is left on the server."""
    scale = math.ceil(GIF_SIDE / frames[0].width)
    frames = [each.resize((each.width * scale, each.height * scale), Image.Resampling.NEAREST) for each in frames]
    file = io.BytesIO()
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:] + frames[-2:0:-1], duration=GIF_DURATION, loop=0
    )
    url = _data_url(file, "gif")
    return (
        f"<div class='walk'><img src='{url}' alt='a walk'><a href='{url}' download='walk.gif'>Save walk.gif</a></div>"
    )


def _data_url(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# ---------------------------------------------------------------------------------------------------------- the page


def build_demo(
    pipe: "VAEPlusPipeline",
    directions: Mapping[str, torch.Tensor] | None = None,
    name: str | None = None,
    known=None,
) -> gr.Blocks:
    """The page of a pipeline: four tabs, filled with samples of the pipeline. [`serve`] starts it.

    It takes 256 samples and their posteriors to order the latent directions by their KL.

    Args:
        pipe (`VAEPlusPipeline`): on the device where it is to run.
        directions: named directions, each with a slider (directions.py); those beside the stored pipeline by default.
        name (`str`, *optional*): of the model, the title; that of its folder or repository if not given.
        known (*optional*): images as `hf_vaeplus.data.cache.load_images` returns them, say those of the training. They
            are encoded at the start, and visitors see the nearest ones to a picture.
    """
    handlers = Handlers(pipe, directions_beside(pipe) if directions is None else directions, known)
    name = name or _name_of(pipe)
    size, latent_dim = pipe.image_shape[1], pipe.vae.config.latent_dim
    with _Page(title=f"{name} (VAE+)", analytics_enabled=False, delete_cache=(KEEP_FILES // 4, KEEP_FILES)) as page:
        gr.Markdown(
            f"# {html.escape(name)}\nVAE+: pictures of {size} x {size} pixels from noise in one pass, and for every"
            f" picture a posterior over {latent_dim} latent dimensions, of which {handlers.active} are in use."
        )
        with gr.Tab("Sample"):
            _sample_tab(handlers)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(handlers)
        with gr.Tab("Interpolate"):
            _interpolate_tab(handlers)
        with gr.Tab("Explore"):
            _explore_tab(handlers)
    return page.queue(max_size=MAX_WAITING, api_open=False)


def _name_of(pipe) -> str:
    """`faces` of `runs/faces/pipeline` and of `org/faces`."""
    folder = Path(pipe.name_or_path or "")
    parts = [part for part in (folder.resolve() if folder.is_dir() else folder).parts if part != "pipeline"]
    return parts[-1] if pipe.name_or_path and parts else "VAE+"


def _sample_tab(handlers):
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            count = gr.Slider(1, MAX_COUNT, len(handlers.samples), step=1, label="Pictures")
            seed = gr.Number(0, label="Seed", info="the same seed and number give the same pictures", precision=0)
            values = [seed, count, gr.Slider(0, 2, 1, step=0.05, label="Temperature", info="factor on all noise")]
            look, usual = handlers.look
            if look == "detail_temperature":
                told = "factor on the noise of the detail: 0 is calm, 1 is as it was learned"
                values.append(gr.Slider(0, max(1, usual), usual, step=0.05, label="Detail", info=told))
            elif handlers.sharpens or handlers.condition is not None:  # what is wanted comes after it
                told = "0: mean of the decoder, 1: contrast of real images"
                shown = handlers.sharpens
                values.append(gr.Slider(0, 1, usual, step=0.05, label="Sharpness", info=told, visible=shown))
            if handlers.condition == "classes":
                names = [("all classes", ""), *[(name, name) for name in handlers.labels]]
                values.append(gr.Dropdown(names, value="", label="Class"))
            elif handlers.condition == "attributes":
                values.append(gr.CheckboxGroup(handlers.labels, label="Attributes that every picture shows"))
            button = gr.Button("Sample", variant="primary")
            another = gr.Button("Sample with another seed")
        with gr.Column(scale=3, min_width=320, elem_classes=["result"]):
            gallery = _gallery(handlers.samples, "Samples")
    for event in (button.click, seed.submit):
        _on(event, handlers.sample, values, gallery)
    _on(another.click, handlers.sample_another, values, [seed, gallery])


def _reconstruct_tab(handlers):
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            picture = _upload("Upload a picture", handlers.samples[0])
            chosen = _examples(handlers, picture, "Or take a sample of the model")
            another = gr.Button("Another posterior draw")
            gr.Markdown(_seen_as(handlers))
        with gr.Column(scale=3, min_width=320, elem_classes=["result"]):
            *pictures, figures = handlers.reconstruct(picture.value)
            labels = ("Model input", "Reconstruction", "Posterior draw")
            with gr.Row():
                outputs = [_output(image, label) for image, label in zip(pictures, labels, strict=True)]
            outputs.append(gr.Markdown(figures))
    for event in (_checked(handlers, picture), chosen):
        _on(event, handlers.reconstruct, picture, outputs)
    _on(another.click, handlers.draw, picture, outputs[2])
    _clears(picture, outputs)


def _interpolate_tab(handlers):
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            with gr.Row():
                ends = [_upload(label, sample, height=200)
                        for label, sample in zip(("From", "To"), handlers.samples, strict=False)]  # fmt: skip
            chosen = _examples(handlers, ends[1], "To: or take a sample of the model")
            steps = gr.Slider(
                2, MAX_STEPS, 9, step=1, label="Steps", info="pictures on the way, the two ends included"
            )
            button = gr.Button("Interpolate", variant="primary")
            as_gif = gr.Button("The way as a GIF")
        with gr.Column(scale=2, min_width=320, elem_classes=["result"]):
            way = _gallery(handlers.interpolate(*[end.value for end in ends], 9), "The way", "way")
            gif = gr.HTML()
    values = [*ends, steps]
    for event in (button.click, chosen, *[_checked(handlers, end) for end in ends]):
        _on(event, handlers.interpolate, values, way)
    _on(as_gif.click, handlers.way_as_gif, values, gif)
    for end in ends:
        _clears(end, [way, gif])


def _explore_tab(handlers):
    z, image, *values = handlers.start_from_sample(0)
    latents = gr.State(z)
    count = len(handlers.named)
    with gr.Row():
        with gr.Column(scale=1, min_width=260, elem_classes=["stays"]):
            picture = _output(image, "The picture at these latents")
        with gr.Column(scale=2, min_width=320):
            sliders = []
            if handlers.named:
                with gr.Row():
                    sliders += [_direction(name, value) for name, value in zip(handlers.named, values, strict=False)]
            with gr.Accordion("Latent dimensions", open=not handlers.named):
                gr.Markdown(
                    "Each slider is a latent dimension of the first VAE, in standard deviations of the prior. First"
                    " come those that say most about a picture, by the mean KL of their posterior from the prior over"
                    " 256 samples."
                )
                with gr.Row():
                    labels = [f"z{j}: {handlers.kl[j]:.2f} nats" for j in handlers.directions]
                    sliders += [_direction(label, value) for label, value in zip(labels, values[count:], strict=True)]
            reset = gr.Button("Back to the start")
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            which = gr.Dropdown(
                handlers.sliders, value=handlers.sliders[0], label="Drag through a direction", filterable=False
            )
            as_gif = gr.Button("A walk as a GIF")
            gif = gr.HTML()
        with gr.Column(scale=2, min_width=320):
            strip = gr.HTML(handlers.strip(z, handlers.sliders[0], *values))
    with gr.Row():
        with gr.Column(min_width=260):
            seed = gr.Number(0, label="Start from the sample with this seed", precision=0)
            button = gr.Button("Start from this sample")
        with gr.Column(min_width=260):
            upload = _upload("Or start from a picture", None, height=200)
            gr.Markdown(_seen_as(handlers))
    results = [picture, strip, gif]
    if handlers.known is not None:
        ask = gr.Button("The nearest known pictures")
        nearest = _gallery(None, "Known pictures, the nearest first")
        _on(ask.click, handlers.nearest, [latents, *sliders], nearest)
        results.append(nearest)
    start, along = [latents, picture, *sliders], [latents, which, *sliders]
    started = [_on(event, handlers.start_from_sample, seed, start) for event in (button.click, seed.submit)]
    for event in started:
        event.success(lambda: None, None, upload, api_visibility="private")  # the picture is no longer its own
    started.append(_on(_checked(handlers, upload), handlers.start_from_picture, upload, start))
    started.append(_on(reset.click, handlers.reset, latents, [picture, *sliders]))
    for event in (*[each.success for each in started], which.input, *[slider.release for slider in sliders]):
        _on(event, handlers.strip, along, strip)
    for slider in sliders:
        _on(slider.input, handlers.explore, [latents, *sliders], picture, trigger_mode="always_last")
    _on(as_gif.click, handlers.walk, along, gif)
    _clears(upload, [latents, *results])


def _seen_as(handlers) -> str:
    crop = handlers.pipe.image_processor.crop
    part = "its largest centred square" if crop is None else f"its central {crop} x {crop} pixels"
    return f"A picture may have any size. The model sees {part}, as in training."


def _examples(handlers, picture, label):
    """Samples of the model below an upload; the event that one was clicked on and stands in the upload."""
    examples = gr.Gallery(
        handlers.samples[:NUM_EXAMPLES], label=label, format="png", columns=NUM_EXAMPLES,
        height="auto", allow_preview=False, interactive=False, buttons=[], elem_classes=["crisp", "examples"],
    )  # fmt: skip
    return _on(examples.select, handlers.example, None, picture, api_visibility="private").success


def _clears(picture, outputs):
    """A picture that is taken off the page takes its results with it."""
    picture.clear(lambda: [None] * len(outputs), None, outputs, queue=False, api_visibility="private")


def _gallery(images, label, *classes):
    return gr.Gallery(
        images, label=label, format="png", height="auto", object_fit="contain", interactive=False,
        buttons=["download"], elem_classes=["crisp", "pictures", *classes],
    )  # fmt: skip


def _output(image, label):
    return gr.Image(
        image, label=label, format="png", interactive=False, buttons=[], min_width=90, elem_classes=["crisp", "square"]
    )


def _direction(label, value):
    return gr.Slider(-RANGE, RANGE, value, step=0.01, label=label, min_width=280, buttons=[])


def _upload(label, image, height=260):
    return gr.Image(
        image, label=label, format="png", image_mode=None, sources=["upload", "clipboard"], height=height,
        min_width=150, buttons=[], elem_classes=["upload"],
    )  # fmt: skip


def _checked(handlers, picture):
    """The event of a picture that was uploaded and can be read; any other is taken off the page again."""
    uploaded = _on(picture.upload, handlers.check, picture, None, api_visibility="private")
    uploaded.failure(lambda: None, None, picture, api_visibility="private")
    return uploaded.success


def _on(event, handler, inputs, outputs, **options):
    """Bind an event to a handler that gets the values as they were sent, one request at a time in all."""

    @functools.wraps(handler)
    def answer(*values):
        try:
            with handler.__self__.time_limit():
                return handler(*values)
        except (ValueError, TypeError, OSError) as error:
            raise _refusal(str(error)) from error

    limits = dict(concurrency_limit=1, concurrency_id="pipeline")
    return event(answer, inputs, outputs, preprocess=False, show_progress="minimal", **limits, **options)


def _refusal(sentence: str) -> gr.Error:
    """What the visitor reads; Gradio renders it as HTML."""
    sentence = f"{sentence[:1].upper()}{sentence[1:].rstrip('.')}."
    return gr.Error(html.escape(sentence, quote=False), print_exception=False)


# ------------------------------------------------------------------------------------------------------- the server


class _Page(gr.Blocks):
    async def preprocess_data(self, block_fn, inputs, *args, **options):
        """Refuse in one sentence what is no value of this page: Gradio would fetch a file that is named by address."""
        try:
            if not all(_plain(value) for value in inputs):
                raise ValueError("neither a number nor an uploaded file")
            return await super().preprocess_data(block_fn, inputs, *args, **options)
        except Exception as error:
            raise _refusal("this request holds something else than the numbers and uploads of this page.") from error


def _plain(value) -> bool:
    if isinstance(value, dict):
        return "://" not in str(value.get("path")) and all(_plain(each) for each in value.values())
    return value is None or isinstance(value, str | int | float)


class _LimitBody:
    """ASGI middleware: no request body, an upload or not, is longer than the largest upload and what surrounds it, nor
    takes longer than `MAX_SECONDS` to arrive."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        received, is_whole, end = 0, scope["type"] != "http", time.monotonic() + MAX_SECONDS

        async def limited():
            nonlocal received, is_whole
            try:  # after the body there comes nothing until the client is gone
                message = await asyncio.wait_for(receive(), None if is_whole else max(0, end - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, f"a request must arrive within {MAX_SECONDS} seconds.") from None
            is_whole = is_whole or not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > MAX_BYTES + 2**16:
                raise HTTPException(413, f"a request may have {MAX_BYTES:,} bytes.")
            return message

        await self.app(scope, limited, send)


async def _no_request(request, error):
    """In place of the framework's answer, which quotes the request and fails where that is not text."""
    return PlainTextResponse("this is no request of this page.", 422)


def serve(demo: gr.Blocks, block: bool = True, ready: Callable[[str], object] | None = None, **options) -> str:
    """Serve a page of [`build_demo`] with its limits.

    Args:
        block (`bool`): print the address, and return only when interrupted.
        ready: called with the address once the page answers.
        options: of `gr.Blocks.launch`, such as `server_name` and `server_port`.

    Returns:
        `str`: the address.
    """
    _, address, _ = demo.launch(
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono="monospace"),
        head=f"<style>{CSS}</style>",  # not css=: Gradio changes its selectors
        max_file_size=MAX_BYTES,
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={
            "middleware": [Middleware(_LimitBody)],
            "exception_handlers": {RequestValidationError: _no_request},
        },
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        **options,
    )
    if ready is not None:
        ready(address)
    if block:
        print(f"the demo is at {address} (stop it with Ctrl+C)", flush=True)
        demo.block_thread()
    return address
