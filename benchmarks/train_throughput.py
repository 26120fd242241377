"""Training throughput: us against pythae's trainer, a plain PyTorch loop, and the machine's convolution rate.

    python benchmarks/train_throughput.py --peer pythae

All candidates train copies of the same networks, with the same batch size, AdamW and data, in turn and on as many
threads; the first steps of each do not count. Ours reads uint8 from the cache, scales it, logs, watches for divergence
and can resume; the others hold float32 images in memory. `ratio` is pythae's seconds over ours, of the first case.
"""

import copy
import importlib.util
import tempfile
from pathlib import Path

import torch
from common import Clock, benchmark, goal, in_turn, seconds_of, synthetic_images, train_and_time
from torch.nn.functional import conv2d
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from hf_vaeplus import VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel, VAEPlusVAEConfig, VAEPlusVAEModel
from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.training.options import TrainingOptions

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}
CASES = {"conv64": (64, 64), "conv128": (128, 32), "mlp": (28, 128)}  # image size, batch size


def build(case: str):
    """Our model, and `prepare` of the training loop."""
    torch.manual_seed(0)
    if case != "mlp":
        model = VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(image_size=CASES[case][0]))
        return model, lambda batch, noise, step: {"pixel_values": to_unit_range(batch["pixel_values"])}
    # The MLP of MNIST examples: 784-512-512-512-16 and back, without shortcuts.
    plain = dict(encoder_residual=False, decoder_residual=False, affine_skip=False, num_blocks=1)
    model = VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(1, 28, 28), latent_dim=16, hidden_dim=512, **plain))
    model.set_input_statistics(torch.full_like(model.input_mean, 0.5), torch.full_like(model.input_std, 0.5))

    def prepare(batch, noise, step):
        return {"inputs": to_unit_range(batch["pixel_values"]), "noise": noise(model.config.latent_dim)}

    return model, prepare


def plain_loop(model, images: torch.Tensor, batch_size: int, compute_loss) -> float:
    """Seconds per step of the loop that tutorials show: float32, default layout, default AdamW."""
    clock, optimizer = Clock(), torch.optim.AdamW(model.parameters(), **ADAMW)
    total = 0.0
    for (pixels,) in DataLoader(TensorDataset(images), batch_size, shuffle=True):
        clock.tick()
        loss = compute_loss(model, pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return clock.seconds_per_step


def measure_case(case: str, args, folder: Path) -> list[dict]:
    size, batch_size = CASES[case]
    batch_size = args.pick(4, batch_size, batch_size)
    num_steps = Clock.warmup + 1 + (args.pick(2, 3, 12) if case != "mlp" else args.pick(2, 60, 300))
    model, prepare = build(case)
    channels = 1 if case == "mlp" else 3
    images = synthetic_images(folder / case, batch_size * num_steps, size, channels)
    floats = images.pixels(0, len(images)).contiguous()

    def ours(precision):
        options = TrainingOptions(
            output_dir=tempfile.mkdtemp(dir=folder),
            max_train_steps=num_steps,
            train_batch_size=batch_size,
            learning_rate=ADAMW["lr"],
            mixed_precision=precision,
        )
        return train_and_time(copy.deepcopy(model), images, prepare, options)

    candidates = {"ours, bf16": lambda: ours("bf16"), "ours, float32": lambda: ours("no")}
    if args.peer == "pythae":
        import pythae_peer

        def pythae():
            copied = copy.deepcopy(model)
            shape, latent_dim = (channels, size, size), model.config.latent_dim
            wrapped = pythae_peer.wrap(copied.encoder, copied.decoder, shape, latent_dim, is_vae=case == "mlp")
            return pythae_peer.train_and_time(wrapped, floats, batch_size, Path(tempfile.mkdtemp(dir=folder)), ADAMW)

        candidates["pythae, float32"] = pythae
    candidates["plain PyTorch, float32"] = lambda: plain_loop(
        copy.deepcopy(model), floats, batch_size, lambda model, pixels: model(pixels).loss
    )
    flops = flops_of_step(model, floats[:batch_size])
    rates = {name: work / seconds for name, (work, seconds) in timed_rates(candidates, args, case).items()}
    rows = []
    for name in candidates:
        precision = "bf16" if "bf16" in name else "float32"
        rows.append(
            {
                "case": f"{case}, batch {batch_size}",
                "candidate": name,
                "images_per_second": batch_size * rates[name],
                "ms_per_step": 1e3 / rates[name],
                "gflops": flops * rates[name] / 1e9,
                "of_convolution_rate": flops * rates[name] / rates[f"convolution, {precision}"],
                "of_matrix_product_rate": flops * rates[name] / rates[f"matrix product, {precision}"],
            }
        )
    for name, rate in rates.items():
        if name not in candidates:
            rows.append({"case": "ceiling", "candidate": name, "gflops": rate / 1e9})
    return rows


def flops_of_step(model, pixels: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(pixels).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def timed_rates(candidates: dict, args, name: str) -> dict[str, tuple[float, float]]:
    """Name -> (work, seconds): one step of each candidate, and the floating-point operations of each ceiling."""
    work, ceilings = dict.fromkeys(candidates, 1.0), {}
    batch, side = args.pick(1, 32, 64), args.pick(64, 1024, 2048)
    for precision, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        # Forward and both backward products of the shape that most suits a processor: many channels, a whole grid.
        hidden = torch.randn(batch, 256, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        hidden.requires_grad_()
        weight.requires_grad_()
        gradient = torch.ones_like(hidden)

        def convolve(hidden=hidden, weight=weight, gradient=gradient):
            torch.autograd.grad(conv2d(hidden, weight, padding=1), (hidden, weight), gradient)

        matrix = torch.randn(side, side, dtype=dtype)
        calls = args.pick(1, 3, 5)
        ceilings[f"convolution, {precision}"] = seconds_of(convolve, calls, min)
        ceilings[f"matrix product, {precision}"] = seconds_of(lambda matrix=matrix: matrix @ matrix, calls, min)
        work[f"convolution, {precision}"] = 3 * 2 * batch * 16 * 16 * 256 * 256 * 9
        work[f"matrix product, {precision}"] = 2 * side**3
    seconds = in_turn({**candidates, **ceilings}, args, name)
    return {each: (work[each], seconds[each]) for each in seconds}


def measure(args) -> dict:
    cases, rows = args.cases or args.pick([*CASES], ["conv64", "mlp"], [*CASES]), []
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        for case in cases:
            rows += measure_case(case, args, Path(folder))

    def of(case, candidate, key):
        found = [row for row in rows if row["case"].startswith(case) and row["candidate"] == candidate]
        return found[0].get(key) if found else None

    def speedup(case, ours, theirs):
        ours, theirs = of(case, ours, "images_per_second"), of(case, theirs, "images_per_second")
        return ours / theirs if ours and theirs else None

    theirs = ("pythae, float32", "plain PyTorch, float32")
    speedups = [
        {"case": case, "ours": ours, **{f"times {each}": speedup(case, ours, each) for each in theirs}}
        for case in cases
        for ours in ("ours, bf16", "ours, float32")
    ]
    goals = [
        goal("conv64 bf16 over pythae", speedup("conv64", "ours, bf16", "pythae, float32"), ">= 2.5"),
        goal("MLP VAE bf16 over pythae", speedup("mlp", "ours, bf16", "pythae, float32"), ">= 4"),
        goal("conv64 of the bf16 convolution rate", of("conv64", "ours, bf16", "of_convolution_rate"), ">= 0.5"),
    ]
    ratio = speedup(cases[0], "ours, bf16", "pythae, float32")
    return {"ratio": ratio, "throughput": rows, "speedups": speedups, "goals": goals}


def options(parser):
    installed = importlib.util.find_spec("pythae") is not None
    parser.add_argument("--peer", choices=("pythae", "none"), default="pythae" if installed else "none")
    parser.add_argument("--cases", nargs="+", choices=[*CASES], help="default: all; of a quick run conv64 and mlp")


if __name__ == "__main__":
    raise SystemExit(benchmark("train_throughput", __doc__, measure, options))
