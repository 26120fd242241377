"""Import and start-up times, and peak memory: each in a fresh process.

python benchmarks/startup.py
"""

import os
import subprocess
import sys
import tempfile

from common import ROOT, benchmark, in_turn, run_python

from hf_vaeplus import VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel, VAEPlusPipeline, VAEPlusVAEConfig
from hf_vaeplus import VAEPlusVAEModel as VAE

# MiB, without the helpers' own imports: they would bring torch.
PEAK = "print([int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
PROGRAMS = {
    "python alone": "pass",
    "import torch": "import torch",
    "import torch, transformers, diffusers": "import torch, transformers, diffusers",
    "import hf_vaeplus": "import hf_vaeplus",
    "hf_vaeplus: the autoencoder's class": "from hf_vaeplus import VAEPlusAutoencoderModel",
    "hf_vaeplus: the pipeline's class": "from hf_vaeplus import VAEPlusPipeline",
    "import torch, transformers": "import torch, transformers",
    "import torch, transformers, hf_vaeplus": "import torch, transformers, hf_vaeplus",
    "vaeplus --version": "from hf_vaeplus.cli.main import main\ntry: main(['--version'])\nexcept SystemExit: pass",
    "vaeplus --help": "from hf_vaeplus.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "vaeplus trian, a usage error": "from hf_vaeplus.cli.main import main\nmain(['trian'])",
    "vaeplus completion bash": "from hf_vaeplus.cli.main import main\nmain(['completion', 'bash'])",
    "load a pipeline and draw an image": (
        "import sys; from hf_vaeplus import VAEPlusPipeline\nVAEPlusPipeline.from_pretrained(sys.argv[1])()"
    ),
    "first training step, with its start and end": (
        "import sys\nfrom hf_vaeplus.training.options import StageOptions\n"
        "from hf_vaeplus.training.stages import run_stage\n"
        "run_stage(StageOptions(output_dir=sys.argv[2], cache_dir=sys.argv[3], dataset_name='digits', resolution=32,"
        " num_channels=1, max_train_steps=1, match_spectrum=False))"
    ),
}


def measure(args) -> dict:
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        vae = VAE(VAEPlusVAEConfig(reconstruction_space="image"))
        autoencoder = VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig())
        VAEPlusPipeline(vae, autoencoder, VAE(VAEPlusVAEConfig())).save_pretrained(f"{folder}/pipeline")

        def run(name):
            words = f"{folder}/pipeline", tempfile.mkdtemp(dir=folder), f"{folder}/cache"
            seconds, printed = run_python(f"{PROGRAMS[name]}\n{PEAK}", *words, args=args)
            peaks[name] = float(printed[-1])
            return seconds

        names = args.pick(["import hf_vaeplus", "import torch"], [*PROGRAMS][1::2], [*PROGRAMS])
        seconds = in_turn({name: lambda name=name: run(name) for name in names}, args, "start-up")
        slowest = _slowest_imports(args.pick(2, 8, 15))
    rows = [{"program": name, "seconds": seconds[name], "peak_mib": peaks[name]} for name in names]
    return {"start_up": rows, "slowest_imports_of_the_pipeline": slowest}


def _slowest_imports(count: int) -> list[dict]:
    """Modules by the time of their own lines, as `python -X importtime` says."""
    command = [sys.executable, "-X", "importtime", "-c", "from hf_vaeplus import VAEPlusPipeline"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    lines = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=env).stderr.splitlines()
    rows = []
    for line in lines:
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdecimal():
            own, whole = (int(part) / 1e3 for part in parts[:2])
            rows.append({"module": parts[2].strip(), "own_ms": own, "with_its_imports_ms": whole})
    return sorted(rows, key=lambda row: -row["own_ms"])[:count]


if __name__ == "__main__":
    raise SystemExit(benchmark("startup", __doc__, measure))
