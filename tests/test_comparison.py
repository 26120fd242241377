"""Twenty of twenty: generators that win distances without having learnt anything are found, held-out rows are not."""

import torch

from hf_vaeplus.evaluation.comparison import FeatureComparison, warnings_of

RUNS, COUNT, DIM = 20, 300, 6


def draw_modes(count: int, generator: torch.Generator, num_modes: int = 5) -> torch.Tensor:
    """Of five Gaussians in a row, the first ones."""
    mode = torch.randint(num_modes, (count, 1), generator=generator)
    rows = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return rows + 5 * mode * (torch.arange(DIM) < 2)


def test_twenty_of_twenty():
    flagged = {}
    for seed in range(RUNS):
        generator = torch.Generator().manual_seed(seed)
        training, reference, real, honest = (draw_modes(n, generator) for n in (1000, COUNT, COUNT, COUNT))
        comparison = FeatureComparison(reference, training)
        other, limit = comparison(real), comparison.sliced_limit(real)
        noise = torch.randn(COUNT, DIM, generator=generator, dtype=torch.float64)
        copies = training[torch.randint(len(training), (COUNT,), generator=generator)]
        sets = {
            "held-out": honest,
            "smoothed bootstrap": copies + 0.1 * noise,
            "dropped mode": draw_modes(COUNT, generator, num_modes=4),
            "matched moments": training.mean(0) + noise @ torch.linalg.cholesky(training.T.cov()).T,
        }
        for name, samples in sets.items():
            found = comparison(samples)
            flagged.setdefault(name, []).append(" ".join(warnings_of(found, other, limit)))
            # Without other real images copies are found, and nothing else.
            alone = warnings_of(found, None, None)
            assert bool(alone) == (name == "smoothed bootstrap")
    assert flagged.pop("held-out") == [""] * RUNS
    assert all("repeat training images" in told for told in flagged["smoothed bootstrap"])
    assert all("some real images have no samples near them: coverage" in told for told in flagged["dropped mode"])
    assert all("where real images are rare: density" in told for told in flagged["matched moments"])
