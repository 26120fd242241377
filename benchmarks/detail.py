"""Sharper images from the same code: losses for what is added to a decoder's mean, after equal processor time.

    python benchmarks/detail.py PIPELINE --train_data_dir FOLDER --features JUDGE.onnx

All candidates train the network of `VAEPlusDetailModel` over the frozen autoencoder of the pipeline:

    compute   squared error of the mean: a decoder with more of the compute
    bands     squared errors of Laplacian bands, each under its own learned gamma: a frequency-aware likelihood
    feature   squared error of pixels and of feature maps, without noise: a perceptual loss
    pixels    energy score of pixel patches: the `detail` stage as it is
    energy    energy score of pixel patches and feature maps: the `detail` stage with a backbone

`--feature_loss` names the backbone of `feature` and `energy`, by default the one that the package carries. The judge
must be another network. Reconstructions of held-out images and samples of the pipeline are judged, with detail at
several temperatures of its noise. Writes results/bench_detail.json, and into `--work_dir` the networks and a picture
of the first samples of all rows.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Unseen
from torch import nn

from hf_vaeplus import VAEPlusDetailModel, VAEPlusPipeline
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.evaluation.evaluate import sample_images
from hf_vaeplus.files import write_json
from hf_vaeplus.modeling_detail import VAEPlusDetailOutput
from hf_vaeplus.pictures import image_grid
from hf_vaeplus.progress import tqdm
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.options import stage_options
from hf_vaeplus.training.randomness import GlobalBatchSampler, Noise
from hf_vaeplus.training.stages import detail_stage


class Deterministic(VAEPlusDetailModel):
    """The network without noise, under another loss."""

    loss = "compute"

    def __init__(self, config):
        super().__init__(config)
        if self.loss == "bands":
            self.log_gamma = nn.Parameter(torch.full((4,), -6.0))

    def forward(self, features, mean, noise, pixel_values, directions, views):
        image = mean + self.sample(features, torch.zeros_like(noise[:, 0]))
        error = (image - pixel_values).square().flatten(1).sum(1).mean()
        if self.loss == "compute":
            loss = error / pixel_values[0].numel()
        elif self.loss == "bands":
            squares = [band.square().mean() for band in laplacian(image - pixel_values)]
            nlls = [square / g.exp() + g for square, g in zip(squares, self.log_gamma, strict=True)]
            loss = torch.stack(nlls).mean()
        else:
            with torch.no_grad():
                targets = views(pixel_values)
            loss = torch.stack([F.mse_loss(*pair) for pair in zip(views(image), targets, strict=True)]).mean()
        return VAEPlusDetailOutput(loss=loss, squared_error=error.detach(), reconstruction=image)


class Bands(Deterministic):
    loss = "bands"


class Feature(Deterministic):
    loss = "feature"


def laplacian(images: torch.Tensor, count: int = 4) -> list[torch.Tensor]:
    """Bands of a Laplacian pyramid, from fine to coarse; the last one is what is left."""
    bands = []
    for _ in range(count - 1):
        coarse = F.avg_pool2d(images, 2)
        bands.append(images - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False))
        images = coarse
    return [*bands, images]


CANDIDATES = {
    "compute": Deterministic,
    "bands": Bands,
    "feature": Feature,
    "pixels": VAEPlusDetailModel,
    "energy": VAEPlusDetailModel,
}


def fit(options, images, model_class, seconds: float) -> tuple[nn.Module, int, dict]:
    """The moving average of the model after `seconds` of processor time, the images that it saw, and its last losses.

    The loop of the library counts steps; this one ends by time, and otherwise does the same.
    """
    stage = detail_stage(options, images)
    torch.manual_seed(options.seed)
    model = stage.model if model_class is VAEPlusDetailModel else model_class(stage.model.config)
    model.train().to(memory_format=torch.channels_last)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    batch = options.train_batch_size
    sampler = GlobalBatchSampler(len(stage.dataset), batch, options.seed, 0, 1, 0, 10**9)
    noise = Noise(options.seed, batch, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=options.adam_weight_decay)
    start, step, recent = time.process_time(), 0, []
    with tqdm(total=seconds, desc=options.output_dir, unit="s", bar_format="{l_bar}{bar}{postfix}") as bar:
        for rows in sampler:
            share = (time.process_time() - start) / seconds
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min(1, share / 0.03 + 0.01) * (1 - share)
            output = model(**stage.prepare(stage.dataset.__getitems__(rows), noise.at(step, slice(batch)), step))
            optimizer.zero_grad()
            output.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            step += 1
            weight = 1 - min(0.998, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(average, list(model.parameters()), weight)
            told = {
                name: float(value.detach()) for name, value in output.items() if value is not None and value.ndim == 0
            }
            recent = [*recent[-99:], told]
            bar.n = share * seconds
            bar.set_postfix(step=step, loss=recent[-1]["loss"])
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), average, strict=True):
            parameter.copy_(mean)
    losses = {name: sum(row[name] for row in recent) / len(recent) for name in recent[-1]}
    return model.eval(), step * batch, losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a saved pipeline without detail")
    parser.add_argument("--train_data_dir", required=True, help="folder of parquet files named by split")
    parser.add_argument("--split", default="validation", help="of the images to judge by")
    parser.add_argument("--features", required=True, nargs="+", help="judges, as in `vaeplus evaluate`")
    parser.add_argument("--feature_loss", default="efficientnet-lite0", help="backbone")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.6, 1.0])
    parser.add_argument("--seconds", type=float, default=600, help="of processor time, for each candidate")
    parser.add_argument("--num_images", type=int, default=1000, help="of each set that is judged")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/detail"))
    parser.add_argument("--output", default="results/bench_detail.json")
    args = parser.parse_args()

    made, plain = provenance(), VAEPlusPipeline.from_pretrained(args.pipeline)
    images = load_images(
        train_data_dir=args.train_data_dir, split="train", resolution=plain.image_shape[1],
        crop=plain.image_processor.crop, random_flip=True, max_samples=args.max_train_samples,
    )  # fmt: skip
    unseen, rows, pictures = Unseen(plain, args), [], []
    args.work_dir.mkdir(parents=True, exist_ok=True)

    def note(name: str, pipe, setting: dict, **told):
        pipe.set_progress_bar_config(disable=True)
        rows.append({"candidate": name, **told, **unseen.compare(pipe, **setting)})
        print(rows[-1], flush=True)
        write_json(Path(args.output), {**made, **unseen.told, "seconds_each": args.seconds, "rows": rows})
        pictures.extend(sample_images(pipe, [range(10)], args.seed, **setting))
        image_grid(torch.cat(pictures) / 255, columns=10).save(args.work_dir / "samples.png")

    note("mean", plain, {"deterministic": True})
    for name in args.candidates:
        options = stage_options(
            "detail",
            autoencoder=str(Path(args.pipeline) / "autoencoder"),
            output_dir=str(args.work_dir / name),
            train_batch_size=32,
            learning_rate=2e-3,
            adam_weight_decay=0.05,
            max_grad_norm=10.0,
            num_directions=16,
            feature_loss=args.feature_loss if name in ("feature", "energy") else None,
            seed=args.seed,
        )
        model, seen, losses = fit(options, images, CANDIDATES[name], args.seconds)
        model.save_pretrained(args.work_dir / name)
        pipe = VAEPlusPipeline(plain.vae, plain.autoencoder, plain.second_stage, model)
        for temperature in args.temperatures if CANDIDATES[name] is VAEPlusDetailModel else [0.0]:
            setting = {"detail_temperature": temperature, "deterministic": False}
            note(name, pipe, setting, images_seen=seen, losses=losses)


if __name__ == "__main__":
    main()
