"""Estimators of the intrinsic dimension against numbers known by hand, and on surfaces of known dimension."""

import math

import pytest
import torch

from hf_vaeplus.metrics.intrinsic_dimension import (
    LEVINA_BICKEL_OF,
    TABLE_DIMENSIONS,
    TABLE_POINTS,
    TWO_NN_OF,
    corrected_dimensions,
    levina_bickel,
    nearest_distances,
    table_cell,
    two_nn,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 2.5, 20])
def test_two_nn_of_exact_quantiles(dim):
    """Ratios that are the quantiles of a Pareto law with exponent d lie on the fitted line."""
    rank = torch.arange(1, 101, dtype=torch.float64)
    ratios = (1 - rank / 101) ** (-1 / dim)
    distances = torch.stack([torch.full_like(ratios, 0.3), 0.3 * ratios], 1)
    assert two_nn(distances) == pytest.approx(dim, rel=1e-9)


def test_levina_bickel_by_hand():
    # log(T_3 / T_1) + log(T_3 / T_2) is 2 at the first point and 4 at the second: (3 - 2) / mean(2, 4)
    distances = torch.tensor([[1.0, 1.0, math.e], [2.0, 2.0, 2 * math.e**2]], dtype=torch.float64)
    assert levina_bickel(distances) == pytest.approx(1 / 3)


def test_nearest_distances_by_hand_and_copies_left_out():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    expected = [[1.0, 5.0], [18**0.5, 5.0], [1.0, 18**0.5]]
    torch.testing.assert_close(nearest_distances(points, 2), torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="got 3"):
        nearest_distances(points, 3)


def test_agrees_with_scikit_learn_far_from_the_origin():
    from sklearn.neighbors import NearestNeighbors

    points = 100 + normal(300, 20)
    distances, _ = NearestNeighbors(n_neighbors=6).fit(points.double().numpy()).kneighbors()
    torch.testing.assert_close(nearest_distances(points, 6), torch.from_numpy(distances), rtol=1e-5, atol=1e-5)


def sphere(dim):
    points = normal(1_000, dim + 1)
    return points / points.norm(dim=1, keepdim=True)


SURFACES = {  # name -> dimension, points in 12 dimensions
    "circle": (1, sphere(1)),
    "sphere": (2, sphere(2)),
    "roll": (2, torch.stack([(t := 3 + 9 * torch.rand(1_000, generator=torch.Generator().manual_seed(1))) * t.cos(),
                             t * t.sin(), 20 * torch.rand(1_000, generator=torch.Generator().manual_seed(2))], 1)),
    "sphere of 6": (6, sphere(6)),
    "normal of 9": (9, normal(1_000, 9, seed=3)),
}  # fmt: skip


@pytest.mark.parametrize("name", SURFACES)
def test_surfaces_of_known_dimension(name):
    dim, points = SURFACES[name]
    turned = points @ torch.linalg.qr(normal(12, 12, seed=4))[0][: points.shape[1]]
    found = corrected_dimensions(nearest_distances(turned, 10))
    assert abs(found["middle"] - dim) < 0.15 * dim + 0.1
    assert found["low"] <= found["middle"] <= found["high"] and found["num_points"] == 1_000


def test_a_cell_of_the_tables_is_what_it_says():
    row, column = TABLE_POINTS.index(500), TABLE_DIMENSIONS.index(8)
    for law in ("cube", "normal"):
        found = table_cell(law, 8, 500, draws=6, seed=9)
        assert found == pytest.approx((TWO_NN_OF[law][row][column], LEVINA_BICKEL_OF[law][row][column]), rel=0.06)
