"""The pipeline's Hub side: safe loading from a folder or a repository, and uploads.

The class has the name of the one in `pipeline_vaeplus.py`, which it extends: what it saves names that class, and an
exported repository carries that file alone.
"""

import os
from pathlib import Path

import diffusers
from diffusers.pipelines import pipeline_loading_utils
from huggingface_hub.errors import HTTPError

from .. import pipeline_vaeplus
from ..image_processing_vaeplus import VAEPlusImageProcessor
from ..modeling_vaeplus import VAEPlusEncoderConfig
from .client import explain
from .repository import push

_LOADING_OPTIONS = frozenset(
    "cache_dir device_map disable_mmap dtype force_download local_files_only low_cpu_mem_usage max_memory"
    " offload_folder offload_state_dict proxies quantization_config revision token torch_dtype trust_remote_code"
    " use_safetensors variant".split()
)
_PLACE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class VAEPlusPipeline(pipeline_vaeplus.VAEPlusPipeline):
    __doc__ = pipeline_vaeplus.VAEPlusPipeline.__doc__

    @property
    def image_processor(self) -> VAEPlusImageProcessor:
        """What makes pictures of any size into images of this pipeline, as in training. It is saved with the pipeline.

        Without one beside the stored pipeline it takes the largest square of a picture.
        """
        if self._image_processor is None:
            channels, size, _ = self.image_shape
            stored = _stored_processor(self.name_or_path) if self.name_or_path else None
            self._image_processor = stored or VAEPlusImageProcessor(size, channels)
        return self._image_processor

    @image_processor.setter
    def image_processor(self, processor: VAEPlusImageProcessor) -> None:
        self._image_processor = processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "VAEPlusPipeline":
        """Load a folder or a Hub repository, with or without the code files of an export.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or repository id.
            kwargs: components that replace the stored ones (`None` drops an optional one), `dtype`, `revision`,
                `variant` and the other options of `DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError: an unknown option; weights that are missing, damaged, of another config or not safetensors.
            OSError: the Hub has no such repository or revision, refuses, or cannot be reached, and no copy is cached.
        """
        unknown = sorted(kwargs.keys() - pipeline_vaeplus.COMPONENTS.keys() - _LOADING_OPTIONS)
        if unknown:
            known = sorted(pipeline_vaeplus.COMPONENTS.keys() | _LOADING_OPTIONS)
            raise ValueError(f"from_pretrained got the unknown option {unknown[0]!r}: it takes {', '.join(known)}.")
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False is refused: pickled weights can run code, so leave it out.")
        try:
            pipe = super().from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **kwargs)
        except OSError as error:  # of the Hub, whose reason is in the cause
            if not isinstance(error.__cause__, HTTPError):
                raise
            raise OSError(f"{pretrained_model_name_or_path} cannot be loaded: {explain(error.__cause__)}") from error
        where = {name: value for name, value in kwargs.items() if name in _PLACE_OPTIONS}
        pipe._image_processor = _stored_processor(pretrained_model_name_or_path, **where)
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file, **kwargs):
        # An exported index names the code files of the repository: its classes are those installed here, so that
        # users of the package are not asked to trust remote code. Local folders and Hub downloads both pass here.
        try:
            index = super()._dict_from_json_file(json_file, **kwargs)
        except RecursionError as error:
            raise ValueError(f"{json_file} is nested too deeply for the index of a pipeline: name one.") from error
        if not isinstance(index, dict):
            raise ValueError(f"{json_file} must hold the index of a pipeline, got a {type(index).__name__}.")
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = (index["_class_name"] or [None])[-1]
        if not isinstance(index.get("_class_name"), str):
            raise ValueError(f"{json_file} must name the class of a pipeline, got {index.get('_class_name')!r}.")
        for name in pipeline_vaeplus.COMPONENTS:
            entry = index.get(name, [None, None])
            if not isinstance(entry, list) or [type(word) for word in entry] not in ([str, str], [type(None)] * 2):
                raise ValueError(f"{json_file} must name the library and the class of its {name}, got {entry!r}.")
            library, class_name = entry
            if library in ("modeling_vaeplus", "modeling_priors", "modeling_detail"):
                index[name] = ["hf_vaeplus", class_name]
            elif library not in ("hf_vaeplus", None):  # diffusers would import any module that an index names
                raise ValueError(
                    f"{json_file} takes its {name} from {library!r}, so it is no pipeline of this package: name one."
                )
        return index

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        *args,
        **kwargs,
    ) -> None:
        """`DiffusionPipeline.save_pretrained`; what it writes is also a feature extractor for `transformers`.

        `transformers.pipeline("image-feature-extraction", save_directory)` reads the `config.json` of a
        [`VAEPlusEncoderModel`], which takes its weights from the folders of the stages, and the
        `preprocessor_config.json` of the image processor. A pipeline that is there is no pipeline until the new one is
        complete: nobody loads stages of both.
        """
        if variant is None:
            for index in ("model_index.json", "config.json"):
                Path(save_directory, index).unlink(missing_ok=True)
        super().save_pretrained(save_directory, safe_serialization, variant, *args, **kwargs)
        stages = [name for name in ("autoencoder", "vae") if getattr(self, name) is not None]
        VAEPlusEncoderConfig(stages=stages).save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        tag: str | None = None,
        variant: str | None = None,
    ) -> str:
        """Upload the pipeline, in one commit, as a repository that also loads without this package.

        The `README.md` and the PNGs of the folder that the pipeline was loaded from go with it (`vaeplus card` writes
        them); without these, a repository that has no card gets a short one.

        Args:
            repo_id (`str`): `organisation/name`, or `name` for a repository of the user; created if need be.
            commit_message (`str`, *optional*): title of the commit.
            private (`bool`, *optional*): of a repository that is created; the account's default if not given.
            token (`str`, *optional*): write token; the one that `hf auth login` stored if not given.
            revision (`str`, *optional*): branch, created if it does not exist.
            tag (`str`, *optional*): name for the new commit.
            variant (`str`, *optional*): add the weights alone, as `model.<variant>.safetensors`, to this pipeline in
                the repository; for example `pipe.to(torch.bfloat16).push_to_hub(repo_id, variant="bf16")`.

        Returns:
            `str`: address of the commit.

        Raises:
            ValueError: an id that the Hub would refuse, a tag that exists, the card of another repository, a variant
                for a repository that holds no such pipeline.
            huggingface_hub.errors.HfHubHTTPError: the Hub refused or failed; push again, it goes on where it stopped.
        """
        options = dict(commit_message=commit_message, private=private, token=token)
        return push(self, repo_id, **options, revision=revision, tag=tag, variant=variant)


def _stored_processor(source: str | os.PathLike, **options) -> VAEPlusImageProcessor | None:
    """The image processor beside a stored pipeline, if there is one."""
    try:
        return VAEPlusImageProcessor.from_pretrained(source, **options)
    except OSError:
        if os.path.isfile(os.path.join(source, "preprocessor_config.json")):  # it is there and damaged
            raise
        return None


# Without these an index names modules that the Hub route cannot find (diffusers issue 6563).
_base_class = {"VAEPlusPreTrainedModel": ["save_pretrained", "from_pretrained"]}
pipeline_loading_utils.LOADABLE_CLASSES.setdefault("hf_vaeplus", _base_class)
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(_base_class)
diffusers.VAEPlusPipeline = VAEPlusPipeline  # where `DiffusionPipeline.from_pretrained` looks up a class by its name
