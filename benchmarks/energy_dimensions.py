"""Does an autoencoder that is trained by the energy score find the number r of factors?

    python benchmarks/energy_dimensions.py --factors 4 8 --seeds 1

Drawings of r known factors, and a code of 16 numbers whose first k are kept while noise stands for the others; k is
drawn for each image (Shen and Meinshausen 2024, distributional principal autoencoder). The decoder is trained by the
energy score of whole images, so that it draws images given these k numbers. In theory numbers beyond the r-th then
say nothing, and the score of unseen images stops falling at k = r. Writes results/bench_energy_dimensions.json.
"""

import math

import torch
from common import benchmark, goal, now

from hf_vaeplus import VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel
from hf_vaeplus.data.rendered_faces import factors_of, render_faces
from hf_vaeplus.progress import tqdm

CODE, SIZE = 16, 32
SHARE = 0.02  # of the fall of the score: what is left of it counts as nothing


def add_options(parser):
    parser.add_argument("--factors", type=int, nargs="+", default=[4, 8], help="r of the drawings")
    parser.add_argument("--seeds", type=int, default=1)


def drawings(first: int, count: int, r: int) -> torch.Tensor:
    pixels = render_faces(factors_of(range(first, first + count), r), SIZE)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def score(model: VAEPlusAutoencoderModel, images: torch.Tensor, kept: torch.Tensor, noise: torch.Tensor):
    """E |x_1 - x| - 1/2 E |x_1 - x_2| of each image (Gneiting and Raftery 2007, Eq. 21), by two draws.

    Args:
        kept: shape `(n, 1)`: how many numbers of each code are kept.
        noise: shape `(2, n, CODE)`.
    """
    code, place = model.encode(images), torch.arange(CODE)
    draws = [model.decode(torch.where(place < kept, code, each)).flatten(1) for each in noise]
    apart = [(draw - images.flatten(1)).norm(dim=1) for draw in draws]
    return 0.5 * (apart[0] + apart[1] - (draws[0] - draws[1]).norm(dim=1))


def fit(images: torch.Tensor, steps: int, seed: int, desc: str) -> VAEPlusAutoencoderModel:
    torch.manual_seed(seed)
    config = VAEPlusAutoencoderConfig(image_size=SIZE, latent_dim=CODE, hidden_channels=[32, 64], num_blocks=1)
    model = VAEPlusAutoencoderModel(config).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    for step in tqdm(range(steps), desc=desc):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = images[torch.randint(len(images), (64,))]
        kept = torch.randint(CODE + 1, (len(batch), 1))
        loss = score(model, batch, kept, torch.randn(2, len(batch), CODE)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def scores_by_kept(model: VAEPlusAutoencoderModel, images: torch.Tensor) -> list[float]:
    noise = torch.randn(2, len(images), CODE, generator=torch.Generator().manual_seed(1))
    kept = [torch.full((len(images), 1), k) for k in range(CODE + 1)]
    return [float(score(model, images, each, noise).mean()) for each in tqdm(kept, desc="scores")]


def measure(args) -> dict:
    steps, count = args.pick(2, 200, 4000), args.pick(200, 2000, 20_000)
    rows = []
    for r in args.factors:
        images, unseen = drawings(0, count, r), drawings(10**6, args.pick(50, 500, 2000), r)
        for seed in range(args.seeds):
            start = now()
            model = fit(images, steps, seed, f"r = {r}, seed {seed}")
            seconds, scores = now() - start, scores_by_kept(model, unseen)
            fall = max(max(scores) - min(scores), 1e-9)
            left = [(each - min(scores)) / fall for each in scores]
            found = next(k for k, share in enumerate(left) if share <= SHARE)
            told = " ".join(f"{share:.3f}" for share in left)
            rows.append({"r": r, "seed": seed, "found": found, "left": told, "scores": scores, "seconds": seconds})
            print(rows[-1], flush=True)
    off = max(abs(row["found"] - row["r"]) for row in rows)
    return {"dimensions": rows, "goals": [goal("numbers that count less or more than r", off, "<= 0")]}


if __name__ == "__main__":
    raise SystemExit(benchmark("energy_dimensions", __doc__, measure, add_options))
