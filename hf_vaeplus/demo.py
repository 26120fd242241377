"""The demo in a browser: sample, reconstruct, interpolate, explore. Needs Gradio, the extra `[demo]`.

    build_demo(pipe)    the page, as `gr.Blocks`
    serve(demo)         serves it with its limits

Whatever a request holds is checked here and not by the page: a client can call the API without it.
"""

import asyncio
import contextlib
import functools
import html
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from .data.pixels import to_uint8, to_unit_range
from .image_processing_vaeplus import decode_image
from .metrics.latents import PosteriorStatistics
from .metrics.reconstruction import psnr, squared_error

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
RANGE = 3.0  # of a slider, in standard deviations of the prior

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
.pictures .grid-wrap {min-height: 0 !important; max-height: none !important; overflow: visible !important}
.pictures .grid-container {padding-top: 0 !important;
    grid-template-columns: repeat(auto-fill, minmax(max(92px, var(--least)), 1fr)) !important}
@media (max-width: 640px) {
    .gradio-container {overflow: clip !important}
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

    def __init__(self, pipe: "VAEPlusPipeline"):
        pipe.need_vae("posteriors to show")
        self.pipe = pipe
        self.sharpens = pipe.autoencoder is not None and pipe.autoencoder.config.matched_spectrum
        generator = torch.Generator().manual_seed(0)
        statistics = PosteriorStatistics(pipe.vae.config.latent_dim)
        for _ in range(4):  # 256 samples, encoded back: a saved pipeline holds no images and no figures of any
            posterior = pipe.encode(pipe(64, generator=generator, output_type="pt").images)
            statistics.update(posterior.mean, posterior.logvar)
        self.active = statistics.active_units_by_variance()
        self.kl = statistics.kl_per_dimension()  # nats, of each dimension of z
        self.directions = self.kl.argsort(descending=True)[:NUM_DIRECTIONS].tolist()

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

    def sample(self, seed, count, temperature, sharpness=0.0) -> list[Image.Image]:
        """The pictures that `vaeplus sample` draws with these values."""
        seed = _number("the seed", seed, 0, MAX_SEED, whole=True)
        count = _number("the number of pictures", count, 1, MAX_COUNT, whole=True)
        temperature = _number("the temperature", temperature, 0, 2)
        sharpness = _number("the sharpness", sharpness, 0, 1)
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(count, generator, temperature=temperature, sharpness=sharpness).images

    def sample_another(self, *values) -> tuple[int, list[Image.Image]]:
        """A seed, and its pictures; the first of `values`, the last seed, is not used."""
        seed = random.randint(0, MAX_SEED)
        return seed, self.sample(seed, *values[1:])

    def read(self, file) -> torch.Tensor:
        """An uploaded picture as the model sees it, read as on the command line: `(1, C, H, W)` in [0, 1]."""
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
        channels, resolution, _ = self.pipe.image_shape
        pixels = decode_image(Path(file["path"]), "this", resolution, None, channels)
        return to_unit_range(torch.from_numpy(np.stack([pixels])).permute(0, 3, 1, 2))

    def check(self, file):
        """Nothing, if `read` can read the file."""
        self.read(file)

    def reconstruct(self, file) -> tuple[Image.Image, Image.Image, Image.Image, str]:
        """The picture as the model sees it, its reconstruction, a draw from its posterior, and figures in Markdown."""
        seen = self.read(file)
        posterior = self.pipe.encode(seen)
        again = self.pipe.decode(posterior.mean, "pt")
        error = squared_error(again, seen)
        figures = (
            f"Squared error **{error.item():.4g}** (summed over {seen.numel()} values in [0, 1]; PSNR"
            f" {psnr(error, seen.numel()).item():.1f} dB), KL of the posterior from the prior"
            f" **{posterior.kl().sum():.4g} nats**."
        )
        return _picture(seen), _picture(again), self._draw(posterior), figures

    def draw(self, file) -> Image.Image:
        """Another draw from the posterior of the picture."""
        return self._draw(self.pipe.encode(self.read(file)))

    def _draw(self, posterior) -> Image.Image:
        return self.pipe.decode(posterior.sample())[0]

    def interpolate(self, first, last, steps) -> list[Image.Image]:
        """`steps` pictures from the first uploaded picture to the last."""
        steps = _number("the number of steps", steps, 2, MAX_STEPS, whole=True)
        return self.pipe.interpolate(self.read(first), self.read(last), steps)[0]

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
        return [round(min(max(z[0, j].item(), -RANGE), RANGE), 2) for j in self.directions]

    def explore(self, z, *values) -> Image.Image:
        """The picture at `z`, but for the directions whose sliders were moved."""
        if z is None:
            raise ValueError("there is no picture to start from: take a sample or upload one.")
        z = z.clone()
        for j, value, start in zip(self.directions, values, self._slider_values(z), strict=True):
            value = _number(f"the direction z{j}", value, -RANGE, RANGE)
            if value != start:  # `start` is rounded and cut to the range: what is not moved stays exact
                z[0, j] = value
        return self.pipe.decode(z)[0]

    def reset(self, z) -> tuple:
        """The picture and the sliders as they were at the start."""
        values = [0.0] * len(self.directions) if z is None else self._slider_values(z)
        return self.explore(z, *values), *values


def _number(name: str, value, low: float, high: float, whole: bool = False) -> int | float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} from {low:g} to {high:.10g}, got {str(value)[:40]!r}.")
    return int(value) if whole else float(value)


def _picture(images: torch.Tensor) -> Image.Image:
    array = to_uint8(images)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


# ---------------------------------------------------------------------------------------------------------- the page


def build_demo(pipe: "VAEPlusPipeline") -> gr.Blocks:
    """The page of a pipeline: four tabs, filled with samples of the pipeline. [`serve`] starts it.

    It takes 256 samples and their posteriors to order the latent directions by their KL.

    Args:
        pipe (`VAEPlusPipeline`): on the device where it is to run.
    """
    handlers = Handlers(pipe)
    samples = handlers.sample(0, 18, 1.0)
    _, size, _ = pipe.image_shape
    with _Page(title="VAE+", analytics_enabled=False, delete_cache=(KEEP_FILES // 4, KEEP_FILES)) as page:
        gr.Markdown(
            f"# VAE+\nPictures of {size} x {size} pixels from noise in one pass, and for every picture a posterior"
            f" over {pipe.vae.config.latent_dim} latent dimensions, of which {handlers.active} are in use."
        )
        with gr.Tab("Sample"):
            _sample_tab(handlers, samples)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(handlers, samples[0])
        with gr.Tab("Interpolate"):
            _interpolate_tab(handlers, samples[:2])
        with gr.Tab("Explore"):
            _explore_tab(handlers)
    return page.queue(max_size=MAX_WAITING, api_open=False)


def _sample_tab(handlers, samples):
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            count = gr.Slider(1, MAX_COUNT, len(samples), step=1, label="Pictures")
            seed = gr.Number(0, label="Seed", info="the same seed and number give the same pictures", precision=0)
            values = [seed, count, gr.Slider(0, 2, 1, step=0.05, label="Temperature", info="factor on all noise")]
            if handlers.sharpens:
                told = "0: mean of the decoder, 1: contrast of real images"
                values.append(gr.Slider(0, 1, 0, step=0.05, label="Sharpness", info=told))
            button = gr.Button("Sample", variant="primary")
            another = gr.Button("Sample with another seed")
        with gr.Column(scale=3, min_width=320):
            gallery = _gallery(samples, "Samples")
    for event in (button.click, seed.submit):
        _on(event, handlers.sample, values, gallery)
    _on(another.click, handlers.sample_another, values, [seed, gallery])


def _reconstruct_tab(handlers, sample):
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            picture = _upload("Upload a picture", sample)
            another = gr.Button("Another posterior draw")
        with gr.Column(scale=3, min_width=320):
            *pictures, figures = handlers.reconstruct(picture.value)
            labels = ("Model input", "Reconstruction", "Posterior draw")
            with gr.Row():
                outputs = [_output(image, label) for image, label in zip(pictures, labels, strict=True)]
            outputs.append(gr.Markdown(figures))
    _on(_checked(handlers, picture), handlers.reconstruct, picture, outputs)
    _on(another.click, handlers.draw, picture, outputs[2])


def _interpolate_tab(handlers, samples):
    with gr.Row():
        ends = [_upload(label, sample) for label, sample in zip(("From", "To"), samples, strict=True)]
    steps = gr.Slider(2, MAX_STEPS, 9, step=1, label="Steps", info="pictures on the way, the two ends included")
    button = gr.Button("Interpolate", variant="primary")
    way = _gallery(handlers.interpolate(*[end.value for end in ends], 9), "The way", "way")
    for event in (button.click, *[_checked(handlers, end) for end in ends]):
        _on(event, handlers.interpolate, [*ends, steps], way)


def _explore_tab(handlers):
    z, image, *values = handlers.start_from_sample(0)
    latents = gr.State(z)
    gr.Markdown(
        "Each slider is a latent dimension of the first VAE, in standard deviations of the prior. First come those"
        " that say most about a picture, by the mean KL of their posterior from the prior over 256 samples."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=260, elem_classes=["stays"]):
            picture = _output(image, "The picture at these latents")
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                labels = [f"z{j}: {handlers.kl[j]:.2f} nats" for j in handlers.directions]
                sliders = [_direction(label, value) for label, value in zip(labels, values, strict=True)]
            reset = gr.Button("Back to the start")
    with gr.Row():
        with gr.Column(min_width=260):
            seed = gr.Number(0, label="Start from the sample with this seed", precision=0)
            button = gr.Button("Start from this sample")
        with gr.Column(min_width=260):
            upload = _upload("Or start from a picture", None, height=200)
    start = [latents, picture, *sliders]
    for event in (button.click, seed.submit):
        _on(event, handlers.start_from_sample, seed, start)
    _on(_checked(handlers, upload), handlers.start_from_picture, upload, start)
    _on(reset.click, handlers.reset, latents, [picture, *sliders])
    for slider in sliders:
        _on(slider.input, handlers.explore, [latents, *sliders], picture, trigger_mode="always_last")


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
