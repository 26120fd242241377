"""`transformers.pipeline("image-feature-extraction")`: the features are the posterior means, without torchvision."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import make_pipeline, perturbed
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

from hf_vaeplus import (
    VAEPlusEncoderConfig,
    VAEPlusEncoderModel,
    VAEPlusImageProcessor,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.hub.repository import export
from hf_vaeplus.training.stages import train_all

TASK = "image-feature-extraction"
SIZE = 32


@pytest.fixture(scope="module")
def pipe() -> VAEPlusPipeline:
    return make_pipeline(second_stage=False)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def pictures(count: int = 3) -> list[Image.Image]:
    """Noise of several sizes."""
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40 + 7 * i, 50, 3), dtype=np.uint8))
        for i in range(count)
    ]


def fitted(picture: Image.Image) -> Image.Image:
    """The largest square from the centre, shrunk: written out once more."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BOX)


# ------------------------------------------------------------------------------------------------------- pipelines


def test_the_features_of_a_saved_pipeline_are_its_posterior_means(pipe, folder, tmp_path):
    expected = pipe.encode([fitted(picture) for picture in pictures()]).mean
    extractor = pipeline(TASK, model=str(folder))
    features = extractor(pictures(), return_tensors=True)
    assert [each.shape for each in features] == 3 * [(1, 4)]
    torch.testing.assert_close(torch.cat(features), expected, rtol=1e-5, atol=1e-5)
    as_lists = extractor(pictures()[1])
    assert as_lists == features[1].tolist() and isinstance(as_lists[0][0], float)
    batched = extractor(pictures(), return_tensors=True, batch_size=2)
    torch.testing.assert_close(torch.cat(batched), expected, rtol=1e-5, atol=1e-5)
    pictures()[2].save(tmp_path / "picture.png")
    assert extractor(str(tmp_path / "picture.png")) == features[2].tolist()
    assert VAEPlusPipeline.from_pretrained(folder).encode(fitted(pictures()[0])).mean.equal(features[0])


def test_the_code_is_the_feature_of_a_bare_autoencoder(pipe):
    model = VAEPlusEncoderModel(pipe.autoencoder)
    extractor = pipeline(TASK, model=model, image_processor=VAEPlusImageProcessor(SIZE))
    pixels = torch.from_numpy(np.array(fitted(pictures()[0]))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        torch.testing.assert_close(extractor(pictures()[0], return_tensors=True), pipe.autoencoder.encode(pixels))
        assert model(pixels).logvar is None


def test_a_pixel_vae_has_features_as_well(tmp_path):
    torch.manual_seed(0)
    config = VAEPlusVAEConfig(input_shape=(1, SIZE, SIZE), network="conv", latent_dim=3, hidden_channels=(4, 8))
    pipe = VAEPlusPipeline(perturbed(VAEPlusVAEModel(config)).eval())
    pipe.save_pretrained(tmp_path)
    features = pipeline(TASK, model=str(tmp_path))(pictures()[0], return_tensors=True)
    torch.testing.assert_close(features, pipe.encode(fitted(pictures()[0].convert("L"))).mean)


def test_an_extractor_can_be_saved_and_loaded_again(folder, tmp_path):
    extractor = pipeline(TASK, model=str(folder))
    extractor.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.safetensors"))  # the weights are in the folders of the stages
    again = pipeline(TASK, model=str(tmp_path / "again"))
    assert again(pictures()[0]) == extractor(pictures()[0])
    posterior = AutoModel.from_pretrained(tmp_path / "again")(again.image_processor(pictures(), "pt").pixel_values)
    direct = VAEPlusEncoderModel.from_pretrained(tmp_path, subfolder="again")
    assert posterior.features.equal(direct(again.image_processor(pictures(), "pt").pixel_values).features)
    assert posterior.logvar.shape == (3, 4)


def test_what_is_set_on_the_config_of_an_extractor_is_loaded_again(pipe, tmp_path):
    model = VAEPlusEncoderModel(pipe.autoencoder, pipe.vae)
    model.config.made_by = "hand"
    model.save_pretrained(tmp_path)
    assert VAEPlusEncoderModel.from_pretrained(tmp_path).config.made_by == "hand"


@pytest.mark.parametrize("load", [VAEPlusPipeline.from_pretrained, DiffusionPipeline.from_pretrained])
def test_a_pipeline_keeps_its_crop_from_folder_to_folder(pipe, load, tmp_path):
    VAEPlusPipeline(pipe.vae, pipe.autoencoder).save_pretrained(tmp_path / "first")
    assert AutoImageProcessor.from_pretrained(tmp_path / "first").crop is None  # not known: the largest square
    VAEPlusImageProcessor(SIZE, crop=40).save_pretrained(tmp_path / "first")
    loaded = load(tmp_path / "first")
    assert loaded.image_processor(pictures()[0], "pt").pixel_values.shape == (1, 3, SIZE, SIZE)
    loaded.save_pretrained(tmp_path / "second")
    assert pipeline(TASK, model=str(tmp_path / "second")).image_processor.crop == 40
    loaded.image_processor = VAEPlusImageProcessor(SIZE, crop=36)
    loaded.save_pretrained(tmp_path / "second")
    assert load(tmp_path / "second").image_processor.crop == 36


def test_an_unknown_key_of_a_stored_image_processor_is_kept_and_named(folder, tmp_path, caplog):
    newer = shutil.copytree(folder, tmp_path / "newer")
    stored = json.loads((newer / "preprocessor_config.json").read_text())
    (newer / "preprocessor_config.json").write_text(json.dumps(stored | {"antialias": True}))
    VAEPlusPipeline.from_pretrained(newer).save_pretrained(tmp_path / "again")
    assert AutoImageProcessor.from_pretrained(tmp_path / "again").antialias is True
    assert [each.getMessage() for each in caplog.records if "unknown" in each.getMessage()] == [
        "The stored VAEPlusImageProcessor has the unknown keys ['antialias']: they are kept as attributes and change"
        " nothing."
    ]
    (newer / "preprocessor_config.json").write_text(json.dumps(stored | {"preprocess": 3}))
    with pytest.raises(ValueError, match="cannot keep the key 'preprocess': remove it from the file"):
        VAEPlusImageProcessor.from_pretrained(newer)


def test_a_damaged_image_processor_is_not_replaced_by_another(folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "preprocessor_config.json").write_text("{")
    with pytest.raises(OSError, match="preprocessor_config.json"):
        VAEPlusPipeline.from_pretrained(damaged)


def test_training_leaves_an_extractor_that_prepares_pictures_as_training_did(tmp_path):
    (tmp_path / "faces").mkdir()
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (150, 140, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "faces" / f"{number}.png")
    steps = dict(max_train_steps=1, train_batch_size=2, use_ema=False, sample_steps=0, match_moments=False)
    data = dict(dataset_name="celeba", train_data_dir=str(tmp_path / "faces"), resolution=SIZE)
    preset = {
        "common": {**steps, **data, "cache_dir": str(tmp_path / "cache")},
        "autoencoder": {"model": {"latent_dim": 4, "hidden_channels": [4, 8]}},
        "vae": {"model": {"latent_dim": 3, "hidden_dim": 8}},
    }
    pipe, _ = train_all(preset, tmp_path / "run")
    images = load_images(**data, cache_dir=tmp_path / "cache", progress=False)
    extractor = pipeline(TASK, model=str(tmp_path / "run" / "pipeline"))
    assert extractor.image_processor.crop == 128  # of the data set's short name
    found = extractor([str(tmp_path / "faces" / f"{number}.png") for number in range(6)], return_tensors=True)
    torch.testing.assert_close(torch.cat(found), pipe.encode(images.pixels(0, 6)).mean, rtol=1e-5, atol=1e-5)


WITHOUT = """
import json, sys
sys.modules.update(hf_vaeplus=None, torchvision=None)
from PIL import Image
from transformers import pipeline
extractor = pipeline("image-feature-extraction", model=sys.argv[1], trust_remote_code=True)
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([extractor(Image.open(sys.argv[2])), pipe.encode(sys.argv[2]).mean.tolist()]))
"""


def test_an_exported_folder_works_by_trust_without_the_package_and_without_torchvision(pipe, tmp_path):
    exported = tmp_path / "exported"
    pipe = VAEPlusPipeline(pipe.vae, pipe.autoencoder)
    pipe.image_processor = VAEPlusImageProcessor(SIZE, crop=36)
    export(pipe, exported)
    pictures()[0].save(tmp_path / "picture.png")
    command = [sys.executable, "-c", WITHOUT, str(exported), str(tmp_path / "picture.png")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    cropped = pictures()[0].crop((7, 2, 43, 38)).resize((SIZE, SIZE), Image.Resampling.BOX)
    expected = pipe.encode(cropped, preprocess=False).mean
    np.testing.assert_allclose(json.loads(found.stdout), 2 * [expected.tolist()], rtol=1e-5, atol=1e-5)
    with_package = pipeline(TASK, model=str(exported))  # asks for no trust
    assert type(with_package.model) is VAEPlusEncoderModel
    assert type(with_package.image_processor) is VAEPlusImageProcessor
    assert "torchvision" not in sys.modules


# --------------------------------------------------------------------------------------------- processor and model


@pytest.mark.parametrize("channels, crop", [(3, None), (1, None), (3, 20), (1, 40)])
def test_the_processor_makes_what_training_saw(channels, crop, tmp_path):
    for number, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{number}.png")
    options = dict(resolution=SIZE, num_channels=channels, crop=crop, cache_dir=tmp_path / "cache", progress=False)
    images = load_images(train_data_dir=tmp_path, **options)
    processor = VAEPlusImageProcessor(np.int64(SIZE), channels, crop and np.int32(crop))
    processor.save_pretrained(tmp_path / "saved")
    VAEPlusEncoderConfig().save_pretrained(tmp_path / "saved")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    for each in (processor, loaded):
        assert each(pictures(), return_tensors="pt").pixel_values.equal(images.pixels(0, 3))
    arrays = processor([np.asarray(picture) for picture in pictures()])
    np.testing.assert_array_equal(np.stack(arrays.pixel_values), images.pixels(0, 3))
    assert arrays.pixel_values.dtype == np.float32
    one = processor(pictures()[2], return_tensors="np").pixel_values
    np.testing.assert_array_equal(one, images.pixels(2, 3))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: VAEPlusImageProcessor(image_sise=64), TypeError, "unknown argument 'image_sise'.*image_size"),
        (lambda: VAEPlusImageProcessor(0), ValueError, "at least 1"),
        (lambda: VAEPlusImageProcessor(num_channels=2), ValueError, "1 or 3"),
        (lambda: VAEPlusImageProcessor(crop=0), ValueError, "crop of at least 1"),
        (lambda: VAEPlusImageProcessor()([]), ValueError, "empty list"),
        (lambda: VAEPlusImageProcessor()(torch.zeros(3, 8, 8)), TypeError, "must be PIL images.*got Tensor"),
        (lambda: VAEPlusImageProcessor(crop=41)(pictures()), ValueError, "image 0 is 50x40, smaller than crop=41"),
        (lambda: VAEPlusEncoderConfig(stages=("vae", "autoencoder")), ValueError, "must be of autoencoder and vae"),
        (lambda: VAEPlusEncoderModel(), ValueError, "must be of autoencoder and vae"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_stages_that_do_not_fit_are_refused(pipe):
    other = VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(5,), hidden_dim=8, num_blocks=1))
    with pytest.raises(ValueError, match=r"input_shape=\(5,\) but the autoencoder's codes have 6"):
        VAEPlusEncoderModel(pipe.autoencoder, other)
    with pytest.raises(ValueError, match=r"pixel_values must be floats of shape \(batch, 3, 32, 32\)"):
        VAEPlusEncoderModel(pipe.autoencoder, pipe.vae)(torch.zeros(1, 3, 16, 16))


def test_weights_that_are_missing_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "vae" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        VAEPlusEncoderModel.from_pretrained(tmp_path / "cut")
