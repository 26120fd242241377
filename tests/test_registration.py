"""`import hf_vaeplus` alone: names on first use, and registration with `transformers` and `diffusers` in any order."""

import json
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
    make_pipeline().save_pretrained(folder)
    return str(folder)


# Runs programs in processes that are forked off this one, which has imported what transformers and diffusers import,
# and nothing of these two.
FORKS = """
import json, os, sys, traceback
import accelerate, huggingface_hub.hf_api, jinja2.sandbox, PIL.ImageOps, psutil, regex, requests, scipy.stats
import tokenizers, torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp
assert not {"transformers", "diffusers", "hf_vaeplus"} & sys.modules.keys()
for name, program in json.load(sys.stdin).items():
    child = os.fork()
    if not child:
        try:
            exec(program, {"folder": sys.argv[1]})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


def run(program: str, *argv: str, given: str = ""):
    """A Python program, which must end well and print nothing."""
    command = [sys.executable, "-c", program, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, input=given)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_a_mere_import_registers_the_classes(folder):
    """In registries that are imported afterwards, or were before; it waits while their base class is half imported:
    `transformers.modeling_utils` imports the quantizers, which import the registry of configs."""
    before = (
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel\nfrom diffusers import DiffusionPipeline"
    )
    programs = {use: f"import hf_vaeplus\n{program}" for use, program in USES.items()}
    programs["imported before"] = "\n".join([before, "import hf_vaeplus", *USES.values()])
    programs["half imported"] = f"import hf_vaeplus, transformers.quantizers\n{USES['model']}"
    run(FORKS, folder, given=json.dumps(programs))


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


def test_finders_of_other_tools_are_asked_as_well(monkeypatch):
    """Such as those that measure coverage; the package once hid its modules from them."""

    class Finder:
        asked = []

        def find_spec(self, name, path=None, target=None):
            self.asked.append(name)

    (registration,) = (each for each in sys.meta_path if type(each).__name__ == "_Registration")
    place = sys.meta_path.index(registration) + 1
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path[:place], Finder(), *sys.meta_path[place:]])
    assert registration.find_spec("hf_vaeplus.demo", hf_vaeplus.__path__).name == "hf_vaeplus.demo"
    assert registration.find_spec("transformers.no_module", hf_vaeplus.__path__) is None
    assert Finder.asked == ["hf_vaeplus.demo", "transformers.no_module"]
