"""Sampling: the pipeline against its bare decoders, against diffusion with as many parameters, and against pythae.

    python benchmarks/sampling.py

Networks are as the preset celeba64-cpu trains them, at 64 x 64, with fresh weights: what they have learnt takes no
time. The pipeline has the preset's detail model only where that is named. The diffusion model is an unconditional
UNet2DModel without attention, the cheapest of its size. DDIM takes 50 steps; the 1,000 of DDPM are calculated from the
first of them. pythae draws from N(0, I) and has no second stage, so it is compared with our pipeline without one as
well. Everything in float32.

A sixth of the time can be page faults: whether glibc reuses the memory of one batch for the next depends on what else
the heap holds, and differs from process to process. MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ of 1000000000
in the environment, take them away from all candidates; the result says whether they were set.
"""

import importlib.util

import torch
from common import benchmark, goal, in_turn, seconds_of
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusDetailConfig,
    VAEPlusDetailModel,
    VAEPlusFlowMatchingConfig,
    VAEPlusFlowMatchingModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.training.options import load_preset

SIZE, BATCH, DDIM_STEPS, DDPM_STEPS = 64, 64, 50, 1000


def parameters(*models) -> int:
    return sum(parameter.numel() for model in models for parameter in model.parameters())


def our_pipeline() -> VAEPlusPipeline:
    torch.manual_seed(0)
    sizes = dict(latent_dim=64, hidden_dim=512, num_blocks=3)
    flow = VAEPlusFlowMatchingModel(VAEPlusFlowMatchingConfig(**sizes)).eval()
    flow.start_distillation(flow)  # it draws in one pass
    pipe = VAEPlusPipeline(
        VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(64,), reconstruction_space="image", **sizes)).eval(),
        VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(image_size=SIZE, latent_dim=64)).eval(),
        flow,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_detail(pipe: VAEPlusPipeline) -> VAEPlusPipeline:
    """The same with the detail model of the preset."""
    torch.manual_seed(0)
    detail = VAEPlusDetailModel(VAEPlusDetailConfig(image_size=SIZE, **load_preset("celeba64-cpu")["detail"]["model"]))
    whole = VAEPlusPipeline(pipe.vae, pipe.autoencoder, pipe.second_stage, detail.eval())
    whole.set_progress_bar_config(disable=True)
    return whole


def unet(target: int) -> UNet2DModel:
    """The UNet whose width brings it closest to `target` parameters."""

    def build(width):
        return UNet2DModel(
            sample_size=SIZE,
            block_out_channels=(width, 2 * width, 2 * width, 4 * width),
            down_block_types=("DownBlock2D",) * 4,
            up_block_types=("UpBlock2D",) * 4,
            add_attention=False,
            norm_num_groups=8,
        )

    def distance(width):
        with torch.device("meta"):
            return abs(parameters(build(width)) - target)

    return build(min(range(8, 129, 8), key=distance)).eval()


@torch.no_grad()
def bare_decoders(pipe, count: int, keep: bool):
    """What a sample needs and nothing else: noise through the three decoders; the images are kept or dropped."""
    images = []
    for start in range(0, count, BATCH):
        rows = min(BATCH, count - start)
        z = pipe.second_stage.sample(torch.randn(rows, 64), torch.randn(rows, 64))
        decoded = pipe.autoencoder.decode(pipe.vae.decode(z))
        images += [decoded] if keep else []
    return torch.cat(images) if keep else None


class Diffusion:
    """DDIM through diffusers' pipeline, and a single step of DDPM."""

    def __init__(self, target: int, steps: int):
        self.unet, self.steps = unet(target), steps
        self.ddim, self.ddpm = DDIMPipeline(self.unet, DDIMScheduler()), DDPMScheduler()
        self.ddim.set_progress_bar_config(disable=True)

    def sample(self, count: int):
        self.ddim(count, num_inference_steps=self.steps, output_type="np")

    @torch.no_grad()
    def ddpm_step(self, count: int):
        noise = torch.randn(count, 3, SIZE, SIZE)
        self.ddpm.step(self.unet(noise, DDPM_STEPS - 1).sample, DDPM_STEPS - 1, noise)


def pythae_sampler(pipe):
    import pythae_peer
    from pythae.samplers import NormalSampler

    # Both decoders as one network: the autoencoder's own [-1, 1] is what the peer's wrapper expects.
    decoder = torch.nn.Sequential(_Decode(pipe.vae), pipe.autoencoder.decoder)
    model = pythae_peer.wrap(pipe.vae.encoder, decoder, (3, SIZE, SIZE), 64, is_vae=True).eval()
    model.device = "cpu"
    return NormalSampler(model)


class _Decode(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latents):
        return self.vae.decode(latents)


def measure(args) -> dict:
    pipe = our_pipeline()
    detailed = with_detail(pipe)
    prior = VAEPlusPipeline(pipe.vae, pipe.autoencoder)
    prior.set_progress_bar_config(disable=True)
    total = parameters(pipe.autoencoder, pipe.vae, pipe.second_stage)
    diffusion = Diffusion(total, args.pick(2, DDIM_STEPS, DDIM_STEPS))
    bulk, few = args.pick(8, 256, 2048), args.pick(1, 1, 8)  # images of ours, and of diffusion
    runs = {  # candidate -> images of one call, what makes them, and by how much its time is multiplied
        "pipeline, tensors": (bulk, lambda n: pipe(n, output_type="pt"), 1),
        "pipeline with detail, tensors": (bulk, lambda n: detailed(n, output_type="pt"), 1),
        "pipeline, PIL images": (bulk, lambda n: pipe(n), 1),
        "bare decoders": (bulk, lambda n: bare_decoders(pipe, n, keep=True), 1),
        "bare decoders, images dropped": (bulk, lambda n: bare_decoders(pipe, n, keep=False), 1),
        "pipeline without second stage": (bulk, lambda n: prior(n, output_type="pt"), 1),
        f"DDIM, {diffusion.steps} steps": (few, diffusion.sample, 1),
        f"DDPM, {DDPM_STEPS} steps (calculated)": (few, diffusion.ddpm_step, DDPM_STEPS),
    }
    if importlib.util.find_spec("pythae"):
        sampler = pythae_sampler(pipe)
        # It keeps the graph of gradients until it drops it with the images: that is its own cost.
        runs["pythae, NormalSampler"] = (bulk, lambda n: sampler.sample(n, batch_size=BATCH), 1)
    # One call of ours in a round scatters by a tenth, more than the goal allows.
    timed = {
        name: seconds_of(lambda make=make, n=n: make(n), args.pick(1, 5, 5) if n == bulk else 1)
        for name, (n, make, _) in runs.items()
    }
    seconds = in_turn(timed, args, "bulk")
    calls = args.pick(1, 5, 20)
    single = {n: seconds_of(lambda make=make: make(1), calls) for n, (count, make, _) in runs.items() if count > 1}
    latency = {**seconds, **in_turn(single, args, "one image")}
    rate = {name: runs[name][0] / (each * runs[name][2]) for name, each in seconds.items()}
    ours = rate["pipeline, tensors"]
    ddim = next(value for name, value in rate.items() if name.startswith("DDIM"))
    rows = [
        {
            "candidate": name,
            "images": runs[name][0],
            "images_per_second": rate[name],
            "ours_over_it": ours / rate[name],
            "ms_for_one_image": 1e3 * latency[name] * runs[name][2],
        }
        for name in runs
    ]
    return {
        "parameters": {"ours": total, "unet": parameters(diffusion.unet)},
        "sampling": rows,
        "goals": [
            *(goal(f"pipeline over {bare}", ours / rate[bare], ">= 0.95") for bare in rate if bare.startswith("bare")),
            goal("with detail over without", rate["pipeline with detail, tensors"] / ours, ">= 0.8"),
            goal("pipeline over DDIM-50", ours / ddim if diffusion.steps == DDIM_STEPS else None, ">= 200"),
        ],
    }


if __name__ == "__main__":
    raise SystemExit(benchmark("sampling", __doc__, measure))
