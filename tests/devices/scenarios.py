"""What the package does on a device, in a process of its own: each scenario raises where something is wrong.

`Watch` counts, for each step of a run, the kernel launches and the waits of the host.
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import simgpu
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.cli.main import main
from hf_vaeplus.training import loop, stages
from hf_vaeplus.training.options import STAGES, stage_options

DEVICE = torch.device("simgpu")
ALLOWED = {"event of earlier work"}  # in a step
COMMON = dict(
    dataset_name="digits", resolution=32, num_channels=1, max_train_samples=40, max_train_steps=6, train_batch_size=5,
    logging_steps=3, checkpointing_steps=3, checkpoints_total_limit=10, max_grad_norm=1.0, use_ema=True,
    lr_warmup_steps=2,
)  # fmt: skip
MODELS = {
    "autoencoder": dict(latent_dim=6, hidden_channels=[4, 8], num_blocks=1),
    "vae": dict(latent_dim=4, hidden_dim=8, num_blocks=1, reconstruction_space="pullback"),
    "second_stage": dict(hidden_dim=8, num_blocks=1),
}


class Watch:
    """While it is entered, looks at every step: `launches` and `waits` hold one entry for each."""

    def __enter__(self):
        self.launches, self.waits, self.calls, runs = [], [], [], set()
        whole_step = loop._Run.take_step

        def step(run):
            before = Counter(simgpu.launches())
            with simgpu.waits() as waits:
                result = whole_step(run)
            self.calls.append(dict(Counter(simgpu.launches()) - before))
            self.launches.append(sum(self.calls[-1].values()))
            self.waits.append(waits if run in runs else Counter())  # the first step of a run sets things up
            runs.add(run)
            return result

        self.patch = mock.patch.object(loop._Run, "take_step", step)
        self.patch.start()
        return self

    def __exit__(self, *exception):
        self.patch.stop()

    def check(self):
        """No step waits, but the first of a run."""
        for waits in self.waits:
            found = {f"{why} in {place}": n for (why, place), n in waits.items() if why not in ALLOWED}
            assert not found, f"the host waits in a step: {found}"

    def counts(self) -> dict:
        """Medians over the steps after the first two."""
        waits = [sum(n for (why, _), n in each.items() if why not in ALLOWED) for each in self.waits[2:]]
        return {"launches": statistics.median(self.launches[2:]), "waits": max(waits)}


class Scenarios:
    """The scenarios by name. Those after `stages` use the folders that it leaves.

    Args:
        folder: for all that is written.
        home (*optional*): the folder in which `stages` has run already.
    """

    def __init__(self, folder: Path, home: Path | None = None):
        self.folder, self.home, self.number = folder, home or folder, 0

    def options(self, stage: str, **changes):
        earlier = {name: str(self.home / "trained" / name) for name in STAGES[: STAGES.index(stage)]}
        self.number += 1
        own = dict(output_dir=str(self.folder / f"{stage}-{self.number}"), model=MODELS[stage])
        return stage_options(stage, **{**COMMON, "mixed_precision": "bf16", **earlier, **own, **changes})

    def train(self, stage: str, wrap=None, **changes):
        """Train a stage under `Watch`; `wrap` changes its `Stage`."""
        options = self.options(stage, **changes)
        built = stages.build_stage(options)
        with Watch() as watch:
            model = loop.train(built if wrap is None else wrap(built), options)
        watch.check()
        assert model.device.type == DEVICE.type
        assert all(tensor.isfinite().all() for tensor in load_file(f"{options.output_dir}/model.safetensors").values())
        return options, watch

    def stages(self):
        """The command `train`, all three stages: its pipeline is there, and every stage has learned something."""
        preset = self.folder / "preset.json"
        preset.write_text(
            json.dumps({"common": COMMON | {"sample_steps": 4}} | {s: {"model": MODELS[s]} for s in STAGES})
        )
        with Watch() as watch:
            places = ["--output_dir", str(self.folder / "trained"), "--cache_dir", str(self.folder / "cache")]
            assert main(["train", "--config", str(preset), *places]) == 0
        watch.check()
        for stage in STAGES:
            first, last = (
                load_file(self.folder / "trained" / stage / f"checkpoint-{n}/model.safetensors") for n in (3, 6)
            )
            still = [name for name in first if torch.equal(first[name], last[name]) and "weight" in name]
            assert not still, f"{stage}: {still} have not moved"

    def image_error(self):
        """A first VAE through the frozen decoder, in accumulated passes, with a learned gamma."""
        model = MODELS["vae"] | dict(reconstruction_space="image", gamma="learned")
        self.train("vae", model=model, gradient_accumulation_steps=2)

    def second_stage(self):
        return self.train("second_stage")

    def streaming(self):
        for stage in STAGES:
            once = dict(match_spectrum=False, match_moments=False)  # of thousands of images, which `stages` does too
            options = self.options(stage, streaming=True, max_train_steps=3, **once)
            stages.run_stage(options)

    def wasserstein(self):
        """A WAE on pixels, whose learned gamma no loss uses."""
        small = dict(latent_dim=4, network="conv", hidden_channels=[4], gamma="learned")
        stages.run_stage(self.options("vae", autoencoder=None, mmd_weight=10.0, model=small, max_train_steps=3))

    def resume(self):
        """A run that is killed and resumed is the run that was not, bit for bit; so is its noise."""
        straight, _ = self.train("second_stage")

        class Killed(BaseException):
            pass

        def killing(stage):
            def prepare(batch, noise, step):
                if step == 5:
                    raise Killed
                return stage.prepare(batch, noise, step)

            return replace(stage, prepare=prepare)

        options = self.options("second_stage")
        with contextlib.suppress(Killed):
            loop.train(killing(stages.build_stage(options)), options)
        resumed = replace(options, resume_from_checkpoint="latest")
        loop.train(stages.build_stage(resumed), resumed)
        for file in ("model.safetensors", "checkpoint-6/optimizer.safetensors", "stats.jsonl"):
            files = (Path(folder, file).read_bytes() for folder in (straight.output_dir, options.output_dir))
            assert len(set(files)) == 1, f"{file} differs after a resume"

    def divergence(self):
        """A step that goes wrong leaves the state before it, though the host learns of it a step later."""

        def spoiling(stage):
            def prepare(batch, noise, step):
                if step == 4:  # the gradient alone: an analytic gamma has moved by then
                    stage.model.affine_skip.bias.register_hook(lambda gradient: gradient * math.nan)
                return stage.prepare(batch, noise, step)

            return replace(stage, prepare=prepare)

        straight, _ = self.train("vae", checkpointing_steps=4)
        options = self.options("vae", checkpointing_steps=4)
        try:
            loop.train(spoiling(stages.build_stage(options)), replace(options, checkpointing_steps=5))
        except loop.TrainingDiverged as error:
            assert "step 5 gave" in str(error) and "checkpoint-4" in str(error), error
        else:
            raise AssertionError("a NaN was not noticed")
        for file in ("model.safetensors", "ema/model.safetensors", "optimizer.safetensors", "progress.json"):
            files = (Path(o.output_dir, "checkpoint-4", file).read_bytes() for o in (straight, options))
            assert len(set(files)) == 1, f"{file} is not that of the step before"

    def evaluate(self):
        pipeline, output = str(self.home / "trained" / "pipeline"), str(self.folder / "evaluation.json")
        flags = "--dataset_name digits --num_images 20 --device simgpu --overwrite".split()
        assert main(["evaluate", pipeline, *flags, "--num_importance_samples", "2", "--output", output]) == 0

    def encode(self):
        pipeline, output = str(self.home / "trained" / "pipeline"), str(self.folder / f"latents-{self.number}")
        self.number += 1
        flags = "--dataset_name digits --max_images 20 --device simgpu".split()
        assert main(["encode", pipeline, *flags, "--output", output]) == 0

    def pipeline(self):
        """Every method gives what it gives on the CPU, with generators of the CPU and of the device."""
        pipes = [VAEPlusPipeline.from_pretrained(self.home / "trained" / "pipeline") for _ in range(2)]
        pipes[1].to(DEVICE)
        pixels = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        for name, call in {
            "sample": lambda pipe: pipe(3, torch.Generator().manual_seed(1), sharpness=0.5, output_type="pt").images,
            "encode": lambda pipe: pipe.encode(pixels).mean,
            "reconstruct": lambda pipe: pipe.reconstruct(pixels, output_type="pt"),
            "interpolate": lambda pipe: pipe.interpolate(pixels[:1], pixels[1:2], 3, output_type="pt"),
            "log_likelihood": lambda pipe: pipe.log_likelihood(pixels, 4, torch.Generator().manual_seed(1)),
        }.items():
            on_cpu, on_device = map(call, pipes)
            torch.testing.assert_close(
                on_device, on_cpu, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
        own = torch.Generator(DEVICE).manual_seed(1)
        assert pipes[1](2, own, output_type="pt").images.isfinite().all()

    def demo(self):
        from hf_vaeplus.demo import Handlers

        handlers = Handlers(VAEPlusPipeline.from_pretrained(self.home / "trained" / "pipeline").to(DEVICE))
        handlers.sample(0, 2, 1.0)
        z, *values = handlers.start_from_sample(0)[:1]
        handlers.explore(z, *[0.0] * len(handlers.directions))

    def two_processes(self):
        """A mean gamma, an unused gamma, and a stage that goes on, in two processes: both come to the same model."""
        folder = self.folder / f"two-{self.number}"
        settings = dict(max_train_steps=3, checkpointing_steps=2, logging_steps=1)
        for stage in ("vae", "second_stage"):
            options = self.options(stage, output_dir=str(folder / stage), **settings)
            model = stages.run_stage(options)
            accelerator = Accelerator()
            for name, tensor in model.state_dict().items():
                parts = accelerator.gather(tensor.float().reshape(1, -1))
                assert torch.equal(parts[0], parts[1]), f"{name} of stage {stage} differs between the processes"
        resumed = replace(options, max_train_steps=4, resume_from_checkpoint="latest")
        stages.run_stage(resumed)
        small = dict(latent_dim=4, network="conv", hidden_channels=[4], gamma="learned")
        own = dict(output_dir=str(folder / "wae"), autoencoder=None, mmd_weight=10.0, model=small)
        stages.run_stage(self.options("vae", **own, **settings))


def run(folder: Path, home: Path | None, names: list[str], mistakes: list[str], result: Path):
    """Run scenarios and then plant mistakes, in this process; write what was found as JSON."""
    import mistakes as planted

    simgpu.set_float64("refuse")
    found = {"scenarios": {}, "mistakes": {}, "seconds": {}}
    scenarios = Scenarios(folder, home)

    def failure(scenarios, name) -> str | None:
        start = time.perf_counter()
        try:
            getattr(scenarios, name)()
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        finally:
            found["seconds"][name] = round(time.perf_counter() - start, 2)

    for name in names:
        found["scenarios"][name] = failure(scenarios, name)
    for number, name in enumerate(mistakes):
        other = Scenarios(folder / f"mistake-{number}", home or folder)
        other.folder.mkdir(exist_ok=True)
        mistake = planted.MISTAKES[name]
        with mistake.plant():
            found["mistakes"][name] = next(filter(None, (failure(other, each) for each in mistake.scenarios)), None)
    if "second_stage" in names:
        found["steps"] = {stage: scenarios.train(stage, max_train_steps=12)[1].counts() for stage in STAGES}
    if int(os.environ.get("RANK", 0)) == 0:
        result.write_text(json.dumps(found))
