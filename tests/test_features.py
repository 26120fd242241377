"""Feature extractors: what they compute, what they call themselves, and what they refuse to open."""

import hashlib
import importlib
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vaeplus.evaluation.features import FIDInception, distance_name, open_extractor

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FLOAT, UINT8, INT64 = 1, 2, 7  # ONNX element types


# ---------------------------------------------------------------------------------------------- a network in 200 bytes


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def message(**fields) -> bytes:
    """Protocol buffer: fields f1=..., f2=... hold numbers, strings, messages, or lists of these."""
    content = b""
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            tag = int(name[1:]) << 3
            if isinstance(value, int):
                content += varint(tag) + varint(value)
            else:
                value = value.encode() if isinstance(value, str) else value
                content += varint(tag | 2) + varint(len(value)) + value
    return content


def tensor_info(name: str, element: int, shape: list) -> bytes:
    dims = [message(f1=size) if isinstance(size, int) else message(f2=size) for size in shape]
    return message(f1=name, f2=message(f1=message(f1=element, f2=message(f1=dims))))


def channel_means(inputs=((UINT8, ["batch", 3, "height", "width"]),), output=("batch", 3)) -> bytes:
    """An ONNX model (opset 13) that averages its first input over height and width, as float32."""
    to_float = message(f1="in0", f2="pixels", f4="Cast", f5=message(f1="to", f3=FLOAT, f20=2))
    axes, keep = message(f1="axes", f8=[2, 3], f20=7), message(f1="keepdims", f3=0, f20=2)
    mean = message(f1="pixels", f2="features", f4="ReduceMean", f5=[axes, keep])
    infos = [tensor_info(f"in{index}", *info) for index, info in enumerate(inputs)]
    graph = message(f1=[to_float, mean], f2="means", f11=infos, f12=tensor_info("features", FLOAT, list(output)))
    return message(f1=8, f7=graph, f8=message(f2=13))


@pytest.fixture
def means_file(tmp_path):
    path = tmp_path / "means.onnx"
    path.write_bytes(channel_means())
    return path


# -------------------------------------------------------------------------------------------------------------- pixels


def test_pixels_are_the_images_in_unit_range():
    extractor = open_extractor("pixels")
    features = extractor(IMAGES)
    assert features.dtype == torch.float32 and features.equal(IMAGES.flatten(1) / 255)
    assert extractor(IMAGES[:, :1].repeat(1, 3, 1, 1)).shape == (5, 192)
    expected = {"extractor": "pixels", "weights_sha256": None, "resize": None, "input_size": None, "dim": 192}
    assert extractor.description() == expected


def test_pixels_of_a_size_are_averages_of_blocks():
    extractor = open_extractor("pixels:4")
    expected = (IMAGES.float() / 255).reshape(5, 3, 4, 2, 4, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(extractor(IMAGES), expected)
    description = {"extractor": "pixels:4", "weights_sha256": None, "resize": "area", "input_size": [4, 4], "dim": 48}
    assert extractor.description() == description
    with pytest.raises(ValueError, match="smaller images"):
        open_extractor("pixels:9")(IMAGES)


def test_grey_pixels_keep_one_channel():
    assert open_extractor("pixels")(IMAGES[:, :1]).shape == (5, 64)


# ---------------------------------------------------------------------------------------------------------------- ONNX


def test_onnx_features_name_and_description(means_file):
    extractor = open_extractor(str(means_file))
    torch.testing.assert_close(extractor(IMAGES), IMAGES.float().mean((2, 3)))
    torch.testing.assert_close(extractor(IMAGES[:2, :, :3, :5]), IMAGES[:2, :, :3, :5].float().mean((2, 3)))
    assert extractor.description() == {
        "extractor": "means.onnx",
        "weights_sha256": hashlib.sha256(means_file.read_bytes()).hexdigest(),
        "resize": None,
        "input_size": None,
        "dim": 3,
    }


def test_onnx_networks_of_floats_get_the_unit_range(tmp_path):
    (tmp_path / "float.onnx").write_bytes(channel_means([(FLOAT, ["batch", 3, "height", "width"])]))
    features = open_extractor(str(tmp_path / "float.onnx"))(IMAGES)
    torch.testing.assert_close(features, (IMAGES.float() / 255).mean((2, 3)))


def test_onnx_networks_get_grey_images_three_times(means_file):
    grey = IMAGES[:, :1]
    torch.testing.assert_close(open_extractor(str(means_file))(grey), grey.float().mean((2, 3)).expand(-1, 3))


def test_onnx_networks_of_one_size_refuse_another(tmp_path):
    (tmp_path / "fixed.onnx").write_bytes(channel_means([(UINT8, ["batch", 3, 8, 8])]))
    extractor = open_extractor(str(tmp_path / "fixed.onnx"))
    assert extractor.description()["input_size"] == [8, 8] and extractor(IMAGES).shape == (5, 3)
    with pytest.raises(ValueError, match=r"takes images of \[8, 8\], got \[4, 8\]"):
        extractor(IMAGES[:, :, :4])


@pytest.mark.parametrize(
    "model",
    [
        channel_means([(INT64, ["batch", 3, "height", "width"])]),
        channel_means([(UINT8, ["batch", 1, "height", "width"])], output=("batch", 1)),
        channel_means([(UINT8, [1, 3, "height", "width"])], output=(1, 3)),
        channel_means([(UINT8, ["batch", 3, "height", "width"]), (FLOAT, ["batch"])]),
    ],
    ids=["type", "channels", "fixed batch", "two inputs"],
)
def test_other_onnx_networks_are_refused(tmp_path, model):
    (tmp_path / "other.onnx").write_bytes(model)
    with pytest.raises(ValueError, match="other.onnx must have one input, uint8 or float32"):
        open_extractor(str(tmp_path / "other.onnx"))


def test_what_is_no_onnx_file_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(ValueError, match="text.onnx is not an ONNX model"):
        open_extractor(str(tmp_path / "text.onnx"))


# ----------------------------------------------------------------------------------------------------------------- FID


def state_dict(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value = torch.ones_like(value)
        elif value.ndim > 1:  # keeps the size of activations through ReLU
            value = torch.randn(value.shape, generator=source) * (2 / value[0].numel()) ** 0.5
        weights[name] = value.contiguous()
    return weights


@pytest.fixture(scope="module")
def fid_file(tmp_path_factory):
    """Random weights for the true network: the features mean nothing, the way from a file to them is the real one."""
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported ({error}); see the extra `eval`")

    class Empty(module.FeatureExtractorInceptionV3):  # its constructor wants weights to begin with
        def load_state_dict(self, state_dict):
            pass

    folder = tmp_path_factory.mktemp("fid")
    torch.save({}, folder / "empty.pth")
    network = Empty("inception-v3-compat", ["2048"], str(folder / "empty.pth"))
    save_file(state_dict(network), folder / "inception.safetensors")
    return folder / "inception.safetensors"


def test_fid_network_through_torch_fidelity(fid_file):
    extractor = open_extractor(f"fid:{fid_file}")
    features = extractor(IMAGES)
    assert features.shape == (5, 2048) and features.dtype == torch.float32 and features.std() > 0
    torch.testing.assert_close(extractor(IMAGES[3:4])[0], features[3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(extractor(IMAGES[:1, :1]), extractor(IMAGES[:1, :1].repeat(1, 3, 1, 1)))
    assert distance_name(extractor) == "FID"
    assert extractor.description() == {
        "extractor": "Inception-v3 2015-12-05",
        "weights_sha256": hashlib.sha256(fid_file.read_bytes()).hexdigest(),
        "resize": "bilinear as in TensorFlow 1",
        "input_size": [299, 299],
        "dim": 2048,
    }


def test_fid_weights_with_the_known_hash_are_read_without_running_their_pickle(fid_file, tmp_path, monkeypatch):
    weights = load_file(fid_file)
    torch.save(weights, tmp_path / "inception.pth")
    known_hash(monkeypatch)
    features = FIDInception(tmp_path / "inception.pth")(IMAGES[:1])
    assert features.equal(FIDInception(fid_file)(IMAGES[:1]))


def test_fid_weights_of_another_network_are_refused(fid_file, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the state dict"):
        open_extractor(f"fid:{tmp_path / 'other.safetensors'}")


def known_hash(monkeypatch):
    """Let every file pass for the published weights."""
    sha256 = hashlib.sha256

    class Known:
        def __init__(self, content):
            self._digest = sha256(content).hexdigest()

        def hexdigest(self):
            return "6726825d" + self._digest[8:]

    monkeypatch.setattr("hf_vaeplus.evaluation.features.hashlib.sha256", Known)


class Attack:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return type(self.victim).touch, (self.victim,)


def test_no_pickle_runs_code(tmp_path, monkeypatch):
    victim = tmp_path / "touched"
    (tmp_path / "attack.pth").write_bytes(pickle.dumps({"weight": Attack(victim)}, protocol=2))
    with pytest.raises(ValueError, match="expected 6726825d"):
        open_extractor(f"fid:{tmp_path / 'attack.pth'}")
    known_hash(monkeypatch)  # even with the right hash, which eight digits do not guarantee
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        open_extractor(f"fid:{tmp_path / 'attack.pth'}")
    assert not victim.exists()


@pytest.mark.parametrize("error", [ImportError("none"), RuntimeError("operator torchvision::nms does not exist")])
def test_fid_without_torch_fidelity_says_what_to_install(tmp_path, monkeypatch, error):
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torch_fidelity"):
                raise error

    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    monkeypatch.setattr("sys.meta_path", [Missing(), *importlib.sys.meta_path])
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ImportError, match=r"FID needs torch-fidelity and the torchvision.*hf-vaeplus\[eval\]"):
        open_extractor(f"fid:{tmp_path / 'weights.safetensors'}")


# -------------------------------------------------------------------------------------------------- names and refusals


def test_only_the_fid_network_gives_a_fid(means_file):
    renamed = means_file.rename(means_file.with_name("FID.onnx"))
    assert distance_name(open_extractor(str(renamed))) == "Frechet distance (FID.onnx)"
    assert distance_name(open_extractor("pixels:4")) == "Frechet distance (pixels:4)"


@pytest.mark.parametrize("spec", ["", "inception", "pixels:", "pixels:-1", "pixels:0", "PIXELS", "weights.pth"])
def test_other_specs_are_refused(spec):
    with pytest.raises(ValueError, match="pixels, pixels:SIZE, fid:WEIGHTS or a file"):
        open_extractor(spec)


@pytest.mark.parametrize("spec", ["missing.onnx", "fid:missing.pth", "fid:"])
def test_a_missing_file_is_named(spec):
    with pytest.raises(FileNotFoundError, match="give the path of the weights"):
        open_extractor(spec)


@pytest.mark.parametrize(
    "images",
    [IMAGES / 255, IMAGES[0], IMAGES[:0], IMAGES[:, :2], IMAGES.permute(0, 2, 3, 1)],
    ids=["float", "no batch", "empty", "two channels", "channels last"],
)
def test_other_images_are_refused(images, means_file):
    for spec in ("pixels", str(means_file)):
        with pytest.raises(ValueError, match="images must be uint8 of shape"):
            open_extractor(spec)(images)


def test_images_of_another_size_do_not_mix():
    extractor = open_extractor("pixels")
    extractor(IMAGES)
    with pytest.raises(ValueError, match="48 features after 192"):
        extractor(IMAGES[:, :, :4, :4])
