"""What each stage trains on, what it keeps of it, and the three stages in a row."""

import dataclasses
import json
from functools import partial
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, encoded, noise, parquet, perturbed, tree
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import kstest

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.evaluation.summaries import summarize
from hf_vaeplus.modeling_detail import seen_side
from hf_vaeplus.training import stages
from hf_vaeplus.training.backbones import open_backbone
from hf_vaeplus.training.codes import encode_dataset, load_frozen
from hf_vaeplus.training.options import STAGES, StageOptions, load_preset, stage_options
from hf_vaeplus.training.randomness import BatchNoise, Noise
from hf_vaeplus.training.stages import open_images, open_stage_images, run_stage, train_all

CODE_DIM, Z_DIM, BATCH = 6, 4, 5
AUTOENCODER = {"latent_dim": CODE_DIM, "hidden_channels": [4, 8], "num_blocks": 1}
MLP = {"hidden_dim": 8, "num_blocks": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with an autoencoder and a first VAE, as earlier stages leave them, and the cache."""
    home = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    config = VAEPlusAutoencoderConfig(image_size=32, num_channels=1, **AUTOENCODER)
    perturbed(VAEPlusAutoencoderModel(config)).save_pretrained(home / "autoencoder")
    config = VAEPlusVAEConfig(input_shape=(CODE_DIM,), latent_dim=Z_DIM, reconstruction_space="image", **MLP)
    perturbed(VAEPlusVAEModel(config)).save_pretrained(home / "vae")
    return home


@pytest.fixture(scope="module")
def options(home):
    """Options of a stage on 40 digits; later stages start from the models in `home`."""

    def make(stage: str, **changes) -> StageOptions:
        earlier = {name: str(home / name) for name in STAGES[: STAGES.index(stage)]}
        model = {"autoencoder": AUTOENCODER, "vae": {**MLP, "latent_dim": Z_DIM}, "second_stage": MLP}[stage]
        tiny = dict(dataset_name="digits", resolution=32, num_channels=1, max_train_samples=40, max_train_steps=3)
        tiny |= dict(train_batch_size=BATCH, logging_steps=1, cache_dir=str(home / "cache"), model=model)
        return StageOptions(stage=stage, **{**tiny, **earlier, **changes})

    return make


def build(options: StageOptions):
    """`(model, data set, prepare)` of a stage."""
    stage = stages.build_stage(options)
    return stage.model, stage.dataset, stage.prepare


def noise_of(step: int, seed: int = 0) -> BatchNoise:
    return Noise(seed, BATCH, torch.device("cpu")).at(step, slice(BATCH))


INDICES = [3, 0, 5, 39, 1]


# ------------------------------------------------------------------------------------------- what a stage trains on


def test_the_autoencoder_trains_on_pixels(options):
    _, dataset, prepare = build(options("autoencoder"))
    batch = dataset.__getitems__(INDICES)
    arguments = prepare(batch, noise_of(0), 0)
    assert arguments.keys() == {"pixel_values"}
    torch.testing.assert_close(arguments["pixel_values"], batch["pixel_values"] / 255)


def test_the_vae_maps_cached_codes_to_images_through_the_frozen_decoder(options, home):
    model, dataset, prepare = build(options("vae"))
    autoencoder = VAEPlusAutoencoderModel.from_pretrained(home / "autoencoder").eval()
    arguments = prepare(dataset.__getitems__(INDICES), noise_of(7), 7)
    pixels = to_unit_range(open_images(options("vae")).__getitems__(INDICES)["pixel_values"])

    assert model.config.reconstruction_space == "image"
    torch.testing.assert_close(arguments["targets"], pixels, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(arguments["inputs"], autoencoder.encode(pixels), rtol=1e-4, atol=1e-5)
        code = torch.randn(2, CODE_DIM, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(arguments["target_decoder"](code), autoencoder.decode(code))
    assert torch.equal(arguments["noise"], noise_of(7)(Z_DIM))
    assert arguments["kl_weight"] == 1.0


def test_a_vae_that_measures_its_error_on_codes_gets_no_decoder(options):
    settings = options("vae", model={**MLP, "latent_dim": Z_DIM, "reconstruction_space": "input"})
    _, dataset, prepare = build(settings)
    assert prepare(dataset.__getitems__(INDICES), noise_of(0), 0).keys() == {"inputs", "noise", "kl_weight"}


def test_a_pullback_vae_sees_codes_alone_and_measures_them_as_its_autoencoder_shows_them(options, home):
    settings = options("vae", model={**MLP, "latent_dim": Z_DIM, "reconstruction_space": "pullback"}, pullback_codes=7)
    model, dataset, prepare = build(settings)
    autoencoder = VAEPlusAutoencoderModel.from_pretrained(home / "autoencoder").eval()
    assert prepare(dataset.__getitems__(INDICES), noise_of(0), 0).keys() == {"inputs", "noise", "kl_weight"}
    assert model.config.target_dim == 32 * 32
    with torch.no_grad():
        images = open_images(settings).pixels(0, 40)
        torch.testing.assert_close(model.error_floor, autoencoder(images).loss)
        metric = autoencoder.pullback_metric(autoencoder.encode(images)[0:35:5])
    root = model.metric_root
    torch.testing.assert_close(root @ root.T, metric.float(), rtol=1e-3, atol=1e-4 * float(metric.max()))


def test_a_streamed_pullback_vae_gets_the_same_arguments(options):
    pullback = {**MLP, "latent_dim": Z_DIM, "reconstruction_space": "pullback"}
    _, dataset, prepare = build(options("vae", model=pullback, streaming=True))
    dataset.set_position(0, BATCH)
    arguments = prepare(next(iter(dataset)), noise_of(0), 0)
    assert arguments.keys() == {"inputs", "noise", "kl_weight"} and arguments["inputs"].shape == (BATCH, CODE_DIM)


def test_a_vae_without_an_autoencoder_trains_on_pixels(options):
    small = {"latent_dim": Z_DIM, "hidden_channels": [4, 8], "num_blocks": 1}
    model, dataset, prepare = build(options("vae", autoencoder=None, model=small))
    batch = dataset.__getitems__(INDICES)
    arguments = prepare(batch, noise_of(0), 0)
    assert (model.config.network, model.config.input_shape) == ("conv", (1, 32, 32))
    assert arguments.keys() == {"inputs", "noise", "kl_weight"}
    torch.testing.assert_close(arguments["inputs"], batch["pixel_values"] / 255)


def test_the_second_stage_draws_z_afresh_at_each_step_and_only_from_seed_and_step(options):
    _, dataset, prepare = build(options("second_stage"))
    batch = dataset.__getitems__(INDICES)
    arguments = prepare(batch, noise_of(2), 2)
    eps, own = (draw := noise_of(2))(Z_DIM), draw(Z_DIM)
    mean, std = batch["posterior"].chunk(2, dim=1)
    torch.testing.assert_close(arguments["inputs"], mean + std * eps)
    assert torch.equal(arguments["noise"], own)  # the second VAE's own noise is not that of z
    assert torch.equal(prepare(batch, noise_of(2), 2)["inputs"], arguments["inputs"])
    assert not torch.isclose(prepare(batch, noise_of(3), 3)["inputs"], arguments["inputs"]).any()
    assert not torch.isclose(prepare(batch, noise_of(2, seed=1), 2)["inputs"], arguments["inputs"]).any()


def test_the_second_stages_z_follow_the_posterior(options, home):
    _, dataset, prepare = build(options("second_stage"))
    batch = dataset.__getitems__(INDICES)
    with torch.no_grad():
        autoencoder = VAEPlusAutoencoderModel.from_pretrained(home / "autoencoder").eval()
        pixels = to_unit_range(open_images(options("vae")).__getitems__(INDICES)["pixel_values"])
        q = VAEPlusVAEModel.from_pretrained(home / "vae").eval().encode(autoencoder.encode(pixels))
    std = (0.5 * q.logvar).exp()
    torch.testing.assert_close(batch["posterior"], torch.cat([q.mean, std], 1), rtol=1e-4, atol=1e-5)
    z = torch.stack([prepare(batch, noise_of(step), step)["inputs"] for step in range(200)])
    assert kstest(((z - q.mean) / std).flatten().numpy(), "norm").pvalue > 0.01


def test_the_second_stage_starts_below_the_variance_of_what_it_models(options):
    model, *_ = build(options("second_stage"))
    assert (model.config.input_shape, model.config.latent_dim) == ((Z_DIM,), Z_DIM)
    assert model.decoder_log_variance.exp().item() == pytest.approx(0.1)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_samples_of_a_trained_second_stage_have_the_moments_of_q(options, tmp_path, streaming):
    settings = options("second_stage", output_dir=str(tmp_path), streaming=streaming, max_train_samples=400)
    model = run_stage(settings)
    vae, autoencoder = (load_frozen(kind, getattr(settings, name)) for name, kind in
                        (("vae", VAEPlusVAEModel), ("autoencoder", VAEPlusAutoencoderModel)))  # fmt: skip
    images = open_images(options("autoencoder", max_train_samples=400))
    with torch.no_grad():
        q = vae.encode(autoencoder.encode(images.pixels(0, 400)))
        z = torch.cat([q.sample() for _ in range(200)])
        x = model.sample(torch.randn(100_000, Z_DIM), torch.randn(100_000, Z_DIM))
    torch.testing.assert_close(x.mean(0), z.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(x.T), torch.cov(z.T), rtol=0.05, atol=0.05)
    assert VAEPlusVAEModel.from_pretrained(tmp_path).config.matched_moments
    other = run_stage(options("second_stage", output_dir=str(tmp_path / "other"), match_moments=False))
    assert not other.config.matched_moments


@pytest.mark.parametrize("streaming", [False, True])
def test_a_trained_autoencoder_has_the_gains_of_its_images(options, tmp_path, streaming):
    model = run_stage(options("autoencoder", output_dir=str(tmp_path), streaming=streaming))
    images = open_images(options("autoencoder")).pixels(0, 40)
    with torch.no_grad():
        power = [torch.fft.rfft2(x.double()).abs().square().mean(0) for x in (images, model(images).reconstruction)]
    gain = VAEPlusAutoencoderModel.from_pretrained(tmp_path).spectrum_gain
    expected = (power[0] / power[1]).sqrt().clamp(max=20)
    torch.testing.assert_close(gain, expected.float(), rtol=0.01, atol=0.01)
    assert (gain < 20).any()
    other = run_stage(options("autoencoder", output_dir=str(tmp_path / "other"), match_spectrum=False))
    assert not other.config.matched_spectrum


@pytest.mark.parametrize("stage", ["vae", "second_stage"])
def test_kl_warmup(options, stage):
    _, dataset, prepare = build(options(stage, kl_warmup_steps=4))
    batch = dataset.__getitems__(INDICES)
    weights = [prepare(batch, noise_of(step), step)["kl_weight"] for step in range(6)]
    assert weights == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_frozen_stages_get_no_gradient_and_pass_it_on(options, home):
    assert all(not each.requires_grad for each in load_frozen(VAEPlusVAEModel, str(home / "vae")).parameters())
    frozen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "load_frozen", lambda *args: frozen.append(load_frozen(*args)) or frozen[-1])
        model, dataset, prepare = build(options("vae"))
    perturbed(model).train()(**prepare(dataset.__getitems__(INDICES), noise_of(0), 0)).loss.backward()
    (autoencoder,) = frozen
    assert not autoencoder.training
    assert all(each.grad is None and not each.requires_grad for each in autoencoder.parameters())
    assert all(each.grad is not None and each.grad.norm() > 0 for each in model.parameters())


def test_previews_read_the_frozen_stages_once_and_follow_the_model(options, monkeypatch):
    settings, reads = options("second_stage"), []
    model = perturbed(build(settings)[0]).eval()
    monkeypatch.setattr(stages, "load_frozen", lambda *args: reads.append(args[1]) or load_frozen(*args))
    preview = stages._previewer(settings, open_images(settings))
    first, again = preview(model), preview(model)
    assert sorted(reads) == sorted([settings.autoencoder, settings.vae])
    assert first.tobytes() == again.tobytes()
    perturbed(model)
    assert preview(model).tobytes() != first.tobytes()


# -------------------------------------------------------------------------------------------------- codes, once


@pytest.fixture
def encoding(options, tmp_path):
    """`(encode once more, calls so far)`: codes of digits, in a cache of its own."""
    calls = []

    def run(autoencoder, **changes):
        settings = options("autoencoder", cache_dir=str(tmp_path), **changes)

        def encode(pixels):
            calls.append(len(pixels))
            return autoencoder.encode(pixels)

        return encode_dataset(open_images(settings), autoencoder, encode)

    return run, calls


def test_codes_are_reused_until_weights_or_data_change(encoding, home):
    run, calls = encoding
    autoencoder = load_frozen(VAEPlusAutoencoderModel, str(home / "autoencoder"))
    first = run(autoencoder)
    assert torch.equal(run(autoencoder), first) and calls == [40]
    autoencoder.encoder[-1].bias.data[0] += 1
    torch.testing.assert_close((run(autoencoder) - first)[:, 0], torch.ones(40))
    assert calls == [40, 40]
    run(autoencoder, max_train_samples=39)
    assert len(run(autoencoder, random_flip=True)) == 80
    run(autoencoder, random_flip=True)
    assert calls == [40, 40, 39, 80]
    autoencoder.encoder[-1].bias.data[0] -= 1
    torch.testing.assert_close(run(autoencoder), first)


def test_codes_follow_the_pictures_in_a_folder(encoding, home, tmp_path):
    run, calls = encoding
    autoencoder = load_frozen(VAEPlusAutoencoderModel, str(home / "autoencoder"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, grey in enumerate((0, 200, 100)):
        Image.new("L", (32, 32), grey).save(folder / f"{number}.png")
    run_folder = partial(run, autoencoder, dataset_name=None, train_data_dir=str(folder))
    before = run_folder()
    Image.new("L", (32, 32), 250).save(folder / "1.png")  # the same name
    changed = (run_folder() - before).abs().amax(1) > 1e-4
    assert changed.tolist() == [False, True, False] and calls == [3, 3]


def test_cached_codes_equal_the_autoencoders(encoding, home):
    run, _ = encoding
    autoencoder = VAEPlusAutoencoderModel.from_pretrained(home / "autoencoder").eval()
    images = load_images("digits", resolution=32, num_channels=1, cache_dir=home / "cache", progress=False)
    codes = run(autoencoder, max_train_samples=None)  # 1,797 images: several batches, the last one smaller
    with torch.no_grad():
        for i in (0, 255, 256, 1796):
            code = autoencoder.encode(to_unit_range(images[i]["pixel_values"][None]))
            torch.testing.assert_close(codes[i : i + 1], code, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_input_statistics_are_those_of_the_codes(options, streaming):
    settings = options(
        "vae", streaming=streaming, max_train_samples=128
    )  # 8 passes make the 1,024 that a stream reads
    model, _, _ = build(settings)
    _, dataset, prepare = build(dataclasses.replace(settings, streaming=False))
    codes = dataset.rows.tensors["code"]
    torch.testing.assert_close(model.input_mean, codes.mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.input_std, codes.std(0), rtol=1e-2, atol=1e-4)


def test_a_code_that_never_moves_gets_a_thousandth_of_the_others_scale(options, home, tmp_path):
    autoencoder = VAEPlusAutoencoderModel.from_pretrained(home / "autoencoder")
    autoencoder.encoder[-1].weight.data[2] = 0
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    model, dataset, _ = build(options("vae", autoencoder=str(tmp_path / "autoencoder")))
    std = dataset.rows.tensors["code"].std(0)
    assert std[2] < 1e-6 < std.mean()
    torch.testing.assert_close(model.input_std[2], 1e-3 * std.mean())
    assert torch.equal(model.input_std[[0, 1, 3, 4, 5]], std[[0, 1, 3, 4, 5]])


# ------------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("stage", STAGES)
def test_a_stream_gives_the_same_kind_of_batch(options, stage):
    _, cached, prepare = build(options(stage))
    expected = prepare(cached.__getitems__(INDICES), noise_of(0), 0)
    _, stream, prepare = build(options(stage, streaming=True))
    stream.set_position(0, BATCH)
    streamed = prepare(next(iter(stream)), noise_of(0), 0)
    assert streamed.keys() == expected.keys()
    for name, value in expected.items():
        if torch.is_tensor(value):
            assert (streamed[name].shape, streamed[name].dtype) == (value.shape, value.dtype), name
    if "pixel_values" in streamed:
        assert 0 <= streamed["pixel_values"].min() < streamed["pixel_values"].max() <= 1


@pytest.mark.parametrize("source", ["digits", "folder"])
@pytest.mark.parametrize("stage", ["autoencoder", "vae"])
def test_training_from_a_stream(options, home, tmp_path, stage, source):
    data = {}
    if source == "folder":
        (tmp_path / "pictures").mkdir()
        for i in range(7):
            Image.effect_noise((40, 36), 10 * i).save(tmp_path / "pictures" / f"{i}.png")
        data = dict(dataset_name=None, train_data_dir=str(tmp_path / "pictures"))
    out = tmp_path / "out"
    settings = options(
        stage, streaming=True, output_dir=str(out), cache_dir=str(tmp_path / "cache"), max_train_steps=2, **data
    )
    model = run_stage(settings)
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(torch.isfinite(each).all() for each in model.parameters())
    cached = (tmp_path / "cache").glob("*")
    assert {path.name for path in cached} <= {"file_hashes"}  # no pixels


# -------------------------------------------------------------------------------------------- options and presets

PRESETS = sorted(
    entry.name.removesuffix(".yaml")
    for entry in (resources.files("hf_vaeplus") / "presets").iterdir()
    if entry.name.endswith(".yaml")
)


@pytest.mark.parametrize("name", PRESETS)
def test_carried_presets_build_every_stage(name):
    preset = load_preset(name)
    assert preset.keys() <= {"common", *STAGES, "detail"}
    earlier, configs = {}, []
    for stage in STAGES:
        settings = stage_options(stage, preset, **earlier)
        for option, value in {**preset.get("common", {}), **preset.get(stage, {})}.items():
            assert getattr(settings, option) == value, option
        earlier[stage] = stage
        shape = SimpleNamespace(resolution=settings.resolution, num_channels=settings.num_channels or 3)
        builder = (stages._autoencoder_config, stages._vae_config, stages._second_stage_config)[len(configs)]
        configs.append(builder(settings, configs[-1] if configs else shape))
    if "detail" in preset:
        settings = stage_options("detail", preset, autoencoder="autoencoder")
        detail = stages._detail_config(settings, configs[0])
        assert (detail.image_size, detail.feature_dim) == (configs[0].image_size, configs[0].hidden_channels[0])
        open_backbone(settings.feature_loss, seen_side(detail.image_size))
    assert configs[1].input_shape == (configs[0].latent_dim,)
    assert configs[2].input_shape == (configs[1].latent_dim,)


def test_layers_of_options():
    preset = {
        "common": {"seed": 1, "learning_rate": 0.1, "model": {"num_blocks": 1, "hidden_dim": 8}},
        "vae": {"learning_rate": 0.2, "max_train_steps": 5, "model": {"hidden_dim": 16, "latent_dim": 2}},
        "second_stage": {"seed": 9},
    }
    options = stage_options("vae", preset, max_train_steps=6, model={"latent_dim": 3})
    assert (options.stage, options.seed, options.learning_rate, options.max_train_steps) == ("vae", 1, 0.2, 6)
    assert options.model == {"num_blocks": 1, "hidden_dim": 16, "latent_dim": 3}
    assert preset["vae"]["model"] == {"hidden_dim": 16, "latent_dim": 2}


def test_own_pictures_take_the_place_of_the_presets_data_set():
    def data(preset_name, **given):
        options = stage_options("autoencoder", {"common": {"dataset_name": preset_name}}, **given)
        return options.dataset_name, options.train_data_dir, options.train_data_files

    for name in ("rendered-faces", "somebody/pictures", None):
        assert data(name, train_data_dir="folder") == (None, "folder", None)
        assert data(name, train_data_files="*.parquet") == (None, None, "*.parquet")
    assert data("celeba", train_data_dir="folder") == ("celeba", "folder", None)  # there the name says how to crop
    assert data("digits", dataset_name="mnist", train_data_dir="folder") == ("mnist", "folder", None)
    assert data("digits") == ("digits", None, None)


BAD_PRESETS = {
    "not YAML": ("vae: [1,", "is not YAML"),
    "empty": ("", "must map"),
    "a list": ("- vae", "must map"),
    "a section without options": ("vae:", "must map"),
    "an unknown section": ("vea: {seed: 1}", "section 'vea'.*autoencoder, vae, second_stage"),
    "an unknown option": ("vae: {lerning_rate: 0.1}", "vae.lerning_rate.*did you mean 'learning_rate'"),
    "an option without a near name": ("vae: {zzz: 0.1}", "vae.zzz, which is no option.$"),
    "an option that is a number": ("vae: {3: 0.1}", "vae.3, which is no option"),
    "the stage twice": ("vae: {stage: autoencoder}", "vae.stage, which is no option"),
    "a model that is no mapping": ("vae: {model: 3}", "vae.model, got 3"),
    "a model field that is a number": ("common: {model: {3: 3}}", "common.model"),
}


@pytest.mark.parametrize("text, message", BAD_PRESETS.values(), ids=BAD_PRESETS)
def test_bad_presets(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_preset(path)
    assert str(path) in str(error.value)


def test_a_preset_that_does_not_exist_names_those_that_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="quickstart"):
        load_preset("quickstat")
    with pytest.raises(FileNotFoundError, match="quickstart"):
        load_preset(tmp_path)


BAD_OPTIONS = {
    "stage": ({"stage": "vea"}, "one of autoencoder, vae, second_stage"),
    "no vae": ({"stage": "second_stage"}, "needs --vae"),
    "autoencoder given": ({"stage": "autoencoder", "autoencoder": "x"}, "leave out --autoencoder"),
    "warmup": ({"kl_warmup_steps": -1}, "kl_warmup_steps must not be negative, got -1"),
    "model": ({"model": 3}, "model must be dict"),
    "number as text": ({"learning_rate": "1e-3"}, "needs the dot in 1.0e-3"),
    "text as number": ({"split": 3}, "split must be str, got 3"),
    "bool as number": ({"resolution": True}, "resolution must be int"),
    "seed too small": ({"seed": -1}, "seed must not be negative"),
    "seed too large": ({"seed": 2**63}, "seed must be below"),
}


@pytest.mark.parametrize("changes, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        StageOptions(**changes)


def test_an_assigned_option_is_checked_like_a_given_one():
    options = StageOptions(train_data_dir=Path("pictures"), train_data_files=("a", Path("b")))
    assert (options.train_data_dir, options.train_data_files) == ("pictures", ("a", "b"))  # as they are written down
    with pytest.raises(ValueError, match="max_train_steps must be positive, got 0"):
        options.max_train_steps = 0
    with pytest.raises(ValueError, match="on_bad_image must be one of raise, skip, got 'ignore'"):
        options.on_bad_image = "ignore"
    with pytest.raises(ValueError, match="hub_token must be str or nothing, got list$"):
        options.hub_token = ["a secret"]


def test_misspelt_model_fields_are_refused_with_a_hint(options):
    with pytest.raises(ValueError, match="'hiden_dim': did you mean 'hidden_dim'"):
        build(options("vae", model={"hiden_dim": 3}))
    with pytest.raises(StrictDataclassError, match="latent_dim.*expected int, got str"):
        build(options("autoencoder", model={"latent_dim": "five"}))


# ---------------------------------------------------------------------------------------------- all three stages


@pytest.fixture(scope="module")
def trained(home):
    """`(pipeline, options, folder)` of three tiny stages."""
    folder = home / "all"
    return *train_all(TINY, folder, cache_dir=str(home / "cache")), folder


def test_train_all_leaves_a_pipeline_that_samples(trained):
    pipe, options, folder = trained
    loaded = VAEPlusPipeline.from_pretrained(folder / "pipeline")
    draw = [each(3, torch.Generator().manual_seed(0), output_type="pt").images for each in (pipe, loaded)]
    assert draw[0].shape == (3, 1, 32, 32) and torch.equal(*draw)
    for stage in STAGES:
        assert (folder / stage / "model.safetensors").read_bytes() == (
            folder / "pipeline" / stage / "model.safetensors"
        ).read_bytes()
        assert [path.name for path in (folder / stage / "samples").iterdir()] == ["step-0000003.png"]
        assert options[stage].output_dir == str(folder / stage)


def test_stages_trained_by_train_all_build_on_each_other(trained):
    pipe, _, folder = trained
    code = load_file(folder / "vae" / "model.safetensors")["input_mean"]
    images = open_images(trained[1]["vae"]).__getitems__(list(range(40)))["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(pipe.autoencoder.encode(to_unit_range(images)).mean(0), code, rtol=1e-3, atol=1e-4)


def test_stages_share_images_from_a_list_of_files(options, tmp_path):
    for name in "ab":
        rows = [encoded(noise(seed, 32, 32)) for seed in range(2)]
        (tmp_path / f"{name}.parquet").write_bytes(parquet(image=rows))
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    shared = open_stage_images({
        stage: options(stage, dataset_name=None, train_data_files=files) for stage in ("autoencoder", "vae")
    })  # fmt: skip
    assert shared["autoencoder"] is shared["vae"] and len(shared["vae"]) == 4


def test_stages_share_the_images_that_they_have_in_common(options):
    shared = open_stage_images({
        "autoencoder": options("autoencoder"),
        "vae": options("vae", seed=1, train_batch_size=3),
        "second_stage": options("second_stage", max_train_samples=20),
    })  # fmt: skip
    assert shared["autoencoder"] is shared["vae"]
    assert (len(shared["vae"]), len(shared["second_stage"])) == (40, 20)
    streams = open_stage_images({
        "autoencoder": options("autoencoder", streaming=True),
        "vae": options("vae", streaming=True, seed=1),
        "second_stage": options("second_stage", streaming=True),
    })  # fmt: skip
    assert streams["autoencoder"] is streams["second_stage"]
    assert [streams[stage].seed for stage in STAGES] == [0, 1, 0]  # a stream is shuffled by its seed


def test_a_second_call_does_not_train_again(trained, home):
    _, _, folder = trained
    before = tree(folder)
    assert sum(name.endswith("stats.jsonl") for name in before) == 3
    train_all(TINY, folder, cache_dir=str(home / "cache"))
    assert tree(folder) == before


def test_a_call_with_another_seed_is_refused_and_changes_nothing(trained, home):
    _, _, folder = trained
    before = tree(folder)
    with pytest.raises(ValueError, match="seed 0 -> 1.*output_dir"):
        train_all(TINY, folder, cache_dir=str(home / "cache"), seed=1)
    assert tree(folder) == before


def test_the_seed_decides_the_whole_run(trained, home, tmp_path):
    _, _, folder = trained
    for seed, same in ((0, True), (1, False)):
        train_all(TINY, tmp_path / str(seed), cache_dir=str(home / "cache"), seed=seed)
        for stage in STAGES:
            weights = [(root / stage / "model.safetensors").read_bytes() for root in (folder, tmp_path / str(seed))]
            assert (weights[0] == weights[1]) is same


@pytest.mark.parametrize(
    "section, option, value, message",
    [
        ("second_stage", "lerning_rate", 0.1, "did you mean 'learning_rate'"),
        ("second_stage", "learning_rate", -1.0, "learning_rate must be positive"),
        ("second_stage", "model", {"hiden_dim": 8}, "did you mean 'hidden_dim'"),
        ("second_stage", "model", {"hidden_dim": 0}, "hidden_dim must be positive"),
        ("vae", "model", {"network": "conv"}, "network='conv' needs"),
        ("common", "resolution", 36, "multiple of"),
        ("third_stage", "seed", 3, "section 'third_stage'"),
    ],
)
def test_everything_is_checked_before_the_first_stage_trains(home, tmp_path, section, option, value, message):
    preset = {**TINY, section: {**TINY.get(section, {}), option: value}}
    with pytest.raises(ValueError, match=message):
        train_all(preset, tmp_path / "out", cache_dir=str(home / "cache"))
    assert not (tmp_path / "out" / "autoencoder").exists()


@pytest.mark.slow
def test_the_first_vae_finds_the_number_of_factors(tmp_path):
    """The quickstart with r = 4: as many latent dimensions stay active as the drawings have factors (Theorem 2)."""
    preset = load_preset("quickstart")
    pipe, options = train_all(preset, tmp_path / "out", num_factors=4, cache_dir=str(tmp_path / "cache"))
    summary = summarize(pipe, open_images(options["vae"]))
    assert summary["vae"]["active_units_by_variance"] == 4
    assert summary["vae"]["latent_dim"] > 4  # the others are pruned
