"""`import hf_vaeplus` alone: names on first use, and registration with `transformers` and `diffusers` in any order."""

import subprocess
import sys

import pytest
from helpers import make_pipeline

import hf_vaeplus

USES = {
    "config": "from transformers import AutoConfig\n"
    "assert type(AutoConfig.from_pretrained(folder + '/vae')).__name__ == 'VAEPlusVAEConfig'",
    "model": "from transformers import AutoModel\n"
    "assert type(AutoModel.from_pretrained(folder)).__name__ == 'VAEPlusEncoderModel'",
    "processor": "from transformers import AutoImageProcessor\n"
    "assert type(AutoImageProcessor.from_pretrained(folder)).__name__ == 'VAEPlusImageProcessor'",
    "features": "from transformers import pipeline\n"
    "assert type(pipeline('image-feature-extraction', model=folder).model).__name__ == 'VAEPlusEncoderModel'",
    "pipeline": "from diffusers import DiffusionPipeline\n"
    "assert type(DiffusionPipeline.from_pretrained(folder)).__name__ == 'VAEPlusPipeline'",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("registration") / "pipeline"
    pipe = make_pipeline()
    pipe.save_pretrained(folder)
    return str(folder)


def run(program: str, *argv: str):
    command = [sys.executable, "-c", program, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("use", USES)
def test_a_mere_import_registers_the_classes(use, folder):
    run(f"import hf_vaeplus, sys\nfolder = sys.argv[1]\n{USES[use]}", folder)


def test_registries_that_were_imported_before_get_the_classes(folder):
    registries = (
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel\nfrom diffusers import DiffusionPipeline"
    )
    run("\n".join([registries, "import hf_vaeplus, sys\nfolder = sys.argv[1]", *USES.values()]), folder)


def test_registration_waits_while_the_base_class_is_half_imported(folder):
    """`transformers.modeling_utils` imports the quantizers, which import the registry of configs."""
    run(f"import hf_vaeplus, sys\nimport transformers.quantizers\nfolder = sys.argv[1]\n{USES['model']}", folder)


def test_the_import_brings_neither_torch_nor_the_libraries():
    run(
        "import sys, hf_vaeplus\n"
        "assert 'VAEPlusPipeline' in dir(hf_vaeplus) and hf_vaeplus.__version__\n"
        "assert not {'torch', 'transformers', 'diffusers', 'accelerate', 'datasets'} & sys.modules.keys()"
    )


def test_all_public_names_are_there():
    assert set(hf_vaeplus.__all__) <= set(dir(hf_vaeplus))
    for name in hf_vaeplus.__all__:
        assert getattr(hf_vaeplus, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'VAEPlusModel'"):
        _ = hf_vaeplus.VAEPlusModel
