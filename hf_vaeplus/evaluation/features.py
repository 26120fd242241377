"""Images in, features out: the extractors that the distances between sets of images are measured with.

Every number names its extractor: a distance without it cannot be compared with anything.
"""

import hashlib
import io
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch.nn.functional import interpolate

from ..data.pixels import to_unit_range
from ..fields import from_home


class FeatureExtractor:
    """Callable: uint8 images of shape `(batch, 1 or 3, height, width)` to float32 features `(batch, dim)` on the CPU.

    `name` is what a number made with it carries. `dim` is known from the first call on.
    """

    name: str
    weights_sha256 = None  # of the file, where there is one
    resize = None  # filter; `None` leaves images at their size
    input_size = None  # height and width that the network sees, or `None` for any
    dim = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            ValueError: images that are not uint8, of another shape, or of a size that the extractor refuses.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or images.dtype != torch.uint8:
            raise ValueError(
                "images must be uint8 of shape (batch >= 1, 1 or 3, height, width), got"
                f" {images.dtype} of shape {tuple(images.shape)}: see hf_vaeplus.data.pixels.to_uint8."
            )
        with torch.no_grad():
            features = self._features(images).float().cpu()
        if self.dim not in (None, features.shape[1]):
            raise ValueError(f"images must keep one size: got {features.shape[1]} features after {self.dim}.")
        self.dim = features.shape[1]
        return features

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def description(self) -> dict:
        """What has to be equal for two numbers to be compared, ready for JSON."""
        return {
            "extractor": self.name,
            "weights_sha256": self.weights_sha256,
            "resize": self.resize,
            "input_size": self.input_size,
            "dim": self.dim,
        }


class Pixels(FeatureExtractor):
    """Pixels in [0, 1], flattened; grey images keep their one channel.

    Args:
        size (`int`, *optional*): height and width to average the images down to.
    """

    def __init__(self, size: int | None = None):
        self.name = "pixels" if size is None else f"pixels:{size}"
        if size is not None:
            self.resize, self.input_size = "area", [size, size]

    def _features(self, images):
        if self.input_size is None:
            return to_unit_range(images).flatten(1)
        if min(images.shape[2:]) < self.input_size[0]:
            raise ValueError(f"{self.name} averages pixels, got smaller images: {tuple(images.shape[2:])}.")
        return interpolate(to_unit_range(images), self.input_size, mode="area").flatten(1)


class ONNXExtractor(FeatureExtractor):
    """A network in an .onnx file, on the CPU. Grey images are repeated to three channels.

    Its one input is `(batch, 3, height, width)`, uint8 0 to 255 or float32 in [0, 1]; its one output `(batch, dim)`.
    Images are not resized: a network that wants one height and width gets images of that size.

    Args:
        path (`Path`): the file; its name becomes the name of the extractor.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: no readable ONNX file, or other inputs and outputs.
    """

    def __init__(self, path: Path):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                ".onnx extractors need onnxruntime: run `pip install 'hf-vaeplus[eval]'`, or use the extractor pixels."
            ) from error
        content = Path(path).read_bytes()
        self.name = Path(path).name
        self.weights_sha256 = hashlib.sha256(content).hexdigest()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise ValueError(f"{path} is not an ONNX model that onnxruntime can run: {error}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        signature = [(value.type, value.shape) for value in inputs + outputs]
        match signature:
            case [
                ("tensor(uint8)" | "tensor(float)" as pixels, [batch, 3, height, width]),
                ("tensor(float)", [rows, _]),
            ] if not isinstance(batch, int) and not isinstance(rows, int) and len(inputs) == 1:
                self._takes_uint8 = pixels == "tensor(uint8)"
            case _:
                raise ValueError(
                    f"{self.name} must have one input, uint8 or float32 (batch, 3, height, width), and one output,"
                    f" float32 (batch, dim), with a free batch; got {len(inputs)} inputs, then outputs: {signature}."
                )
        if isinstance(height, int) and isinstance(width, int):
            self.input_size = [height, width]

    def _features(self, images):
        if self.input_size not in (None, list(images.shape[2:])):
            raise ValueError(
                f"{self.name} takes images of {self.input_size}, got {list(images.shape[2:])}: resize them first."
            )
        images = images.cpu().expand(-1, 3, -1, -1)
        pixels = images if self._takes_uint8 else to_unit_range(images)
        return torch.from_numpy(self._session.run(None, {self._session.get_inputs()[0].name: pixels.numpy()})[0])


class FIDInception(FeatureExtractor):
    """The network of FID: Inception-v3 of 2015-12-05 through torch-fidelity, pooled to 2,048 features.

    Grey images are repeated to three channels. Resized to 299x299 by TensorFlow 1's bilinear filter, which does not
    smooth when shrinking.

    Args:
        path (`Path`): the weights that torch-fidelity and pytorch-fid publish (a .pth whose SHA-256 begins with
            6726825d), or their state dict as .safetensors. Nothing is downloaded. A .safetensors file is taken at
            its word: what tells one from another is the SHA-256 in [`description`].
        device (`str` or `torch.device`): where the network runs.

    Raises:
        ImportError: torch-fidelity, or the torchvision that it needs, cannot be imported.
        ValueError: another file.
    """

    name = "Inception-v3 2015-12-05"
    resize = "bilinear as in TensorFlow 1"
    input_size = [299, 299]
    dim = 2048

    def __init__(self, path: Path, device: str | torch.device = "cpu"):
        content = Path(path).read_bytes()
        self.weights_sha256 = hashlib.sha256(content).hexdigest()
        if Path(path).suffix == ".safetensors":
            try:
                state_dict = load_safetensors(content)
            except SafetensorError as error:
                raise ValueError(f"{path} is no safetensors file ({error}): download it again.") from error
        elif self.weights_sha256.startswith("6726825d"):
            # The bytes that were hashed. Eight digits can be forged, so code in the pickle is refused all the same.
            state_dict = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        else:
            raise ValueError(
                f"{path} has SHA-256 {self.weights_sha256[:8]}..., expected 6726825d... (pt_inception-2015-12-05): no"
                " other pickle is read; pass that file, or its state dict as .safetensors."
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
            raise ImportError(
                "FID needs torch-fidelity and the torchvision that matches the installed torch"
                f" ({torch.__version__}): run `pip install 'hf-vaeplus[eval]'`."
            ) from error
        # Its constructor unpickles what it is given, without a check: it gets a pickle of tensors made here.
        checked = io.BytesIO()
        torch.save(state_dict, checked)
        checked.seek(0)
        try:
            self._network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], checked).to(device)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold the state dict of Inception-v3 2015-12-05: {error}") from error
        self._device = device

    def _features(self, images):
        return self._network(images.to(self._device).expand(-1, 3, -1, -1))[0]


def open_extractor(spec: str, device: str | torch.device = "cpu") -> FeatureExtractor:
    """The extractor that a command line names.

    Args:
        spec (`str`): `"pixels"`; `"pixels:32"`, averaged down to 32x32; the path of an .onnx file; or `"fid:PATH"`
            with the path of the FID weights.
        device (`str` or `torch.device`): for `"fid:PATH"`; the others run on the CPU.

    Raises:
        ValueError: another spec, or a file that the extractor refuses.
        FileNotFoundError: there is no such file.
        ImportError: the extractor needs a package of the extra `eval`.
    """
    kind, _, rest = spec.partition(":")
    if spec == "pixels":
        return Pixels()
    if kind == "pixels" and rest.isdecimal() and int(rest) > 0:
        return Pixels(int(rest))
    path = Path(from_home(rest if kind == "fid" else spec))
    if kind != "fid" and path.suffix != ".onnx":
        raise ValueError(f"the extractor must be pixels, pixels:SIZE, fid:WEIGHTS or a file *.onnx, got {spec!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} for the extractor {spec!r}: give the path of the weights.")
    return FIDInception(path, device) if kind == "fid" else ONNXExtractor(path)


def distance_name(extractor: FeatureExtractor) -> str:
    """What a Frechet distance of these features is called: "FID" for the one network that defines it."""
    return "FID" if isinstance(extractor, FIDInception) else f"Frechet distance ({extractor.name})"
