"""`torch.device("simgpu")`: the simulated accelerator of simgpu.cpp, compiled once for each PyTorch and source.

Importing this file registers the device in the whole process, so it is imported only in processes of their own.
"""

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections import Counter
from pathlib import Path

import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("simgpu.cpp")


def build() -> Path:
    """The compiled extension; the first call on a machine takes half a minute."""
    paths = sysconfig.get_paths()
    home = Path(torch.__file__).parent
    made_of = SOURCE.read_bytes() + f"{torch.__version__} {home} {sys.version}".encode()
    folder = (
        Path(tempfile.gettempdir()) / f"vaeplus-simgpu-{os.getuid()}"
    )  # not the cache: tests have one of their own
    name = "simgpu_kernels" + sysconfig.get_config_var("EXT_SUFFIX")
    library = folder / hashlib.sha256(made_of).hexdigest()[:16] / name
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not library.exists():
            partial = library.with_suffix(".partial")
            headers = [home / "include", home / "include/torch/csrc/api/include", paths["include"]]
            flags = f"-O1 -std=c++20 -shared -fPIC -w -D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
            libraries = f"-ltorch -ltorch_cpu -ltorch_python -lc10 -Wl,-rpath,{home / 'lib'}".split()
            places = [*(f"-I{each}" for each in headers), SOURCE, "-o", partial, f"-L{home / 'lib'}"]
            subprocess.run(["g++", *flags.split(), *places, *libraries], check=True, capture_output=True, text=True)
            os.replace(partial, library)
    return library


def _load():
    spec = importlib.util.spec_from_file_location("simgpu_kernels", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = _load()
set_float64, launches, forget_launches = kernels.set_float64, kernels.launches, kernels.forget_launches


def _index(device) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


torch.utils.rename_privateuse1_backend("simgpu")
torch._register_device_module("simgpu", _module := types.ModuleType("torch.simgpu"))
for _name, _function in {
    "_is_in_bad_fork": lambda: False,
    "_lazy_init": lambda: None,
    "current_device": kernels.current_device,
    "device_count": lambda: 2,
    "empty_cache": lambda: None,
    "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    "get_rng_state": lambda device="simgpu": torch.Generator(device).get_state(),
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "memory_allocated": lambda device=None: 0,
    "set_device": lambda device: kernels.set_device(_index(device)),
    "set_rng_state": lambda state, device="simgpu": None,
    "synchronize": lambda device=None: None,
}.items():
    setattr(_module, _name, _function)
torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=False)


@contextlib.contextmanager
def waits():
    """Counts the waits of the host: `(why, "file.py:function")` of the innermost function of the package."""
    found = Counter()

    def note(why):
        frame = sys._getframe(1)
        while frame is not None and "hf_vaeplus/" not in frame.f_code.co_filename:
            frame = frame.f_back
        code = frame and frame.f_code
        found[why, f"{os.path.basename(code.co_filename)}:{code.co_name}" if code else "elsewhere"] += 1

    kernels.set_wait_listener(note)
    try:
        yield found
    finally:
        kernels.set_wait_listener(None)
