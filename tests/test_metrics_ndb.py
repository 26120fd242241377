"""NDB against a plain reading of its recipe, known values, and samplers whose faults are known."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from hf_vaeplus.metrics.ndb import NDB, compare_bins


def faces(count: int, seed: int, dim: int = 12, weights=(0.4, 0.3, 0.2, 0.1)) -> torch.Tensor:
    """Images (count, 3, 2, dim / 6) in [0, 1] from four separate clusters."""
    source = np.random.default_rng(seed)
    centres = np.random.default_rng(99).uniform(0.2, 0.8, (len(weights), dim))
    rows = centres[source.choice(len(weights), count, p=weights)] + 0.02 * source.standard_normal((count, dim))
    return torch.from_numpy(rows).float().clamp(0, 1).reshape(count, 3, 2, dim // 6)


def naive_compare(n1s, n2s, alpha):
    """The z-test and JS of the recipe, one bin at a time."""
    n1, n2 = sum(n1s), sum(n2s)
    different, js = 0, 0.0
    for c1, c2 in zip(n1s, n2s, strict=True):
        p1, p2 = c1 / n1, c2 / n2
        p = (p1 * n1 + p2 * n2) / (n1 + n2)
        se = math.sqrt(p * (1 - p) * (1 / n1 + 1 / n2))
        if se > 0:
            different += 2 * (1 - NormalDist().cdf(abs(p1 - p2) / se)) < alpha
        m = (p1 + p2) / 2
        js += sum(0.5 * q * math.log(q / m) for q in (p1, p2) if q > 0)
    return different, js


def naive_ndb(reference, samples, num_bins, whiten, seed, dims):
    """The recipe from pixels to counts, with loops."""
    reference, samples = (images.flatten(1).double().numpy() for images in (reference, samples))
    if whiten:
        mean, std = reference.mean(0), reference.std(0) + 1e-6
        reference, samples = (reference - mean) / std, (samples - mean) / std
    labels = KMeans(num_bins, n_init=10, max_iter=100, random_state=seed).fit(reference[:, dims]).labels_
    centres = [reference[labels == k].mean(0) for k in range(num_bins)]
    counts = [0] * num_bins
    for sample in samples:
        counts[int(np.argmin([((sample - centre)[dims] ** 2).sum() for centre in centres]))] += 1
    return [int((labels == k).sum()) for k in range(num_bins)], counts


# ----------------------------------------------------------------------------------------------- parity, known values


@pytest.mark.parametrize("whiten", [True, False])
def test_ndb_equals_the_recipe_step_by_step(whiten):
    reference, samples = faces(300, 0), faces(200, 1, weights=(0.25, 0.3, 0.25, 0.2))
    ndb = NDB.fit(reference, 4, whiten=whiten, seed=3)
    counts = ndb.count(samples)
    expected = naive_ndb(reference, samples, 4, whiten, 3, np.arange(12))
    assert sorted(zip(ndb.counts.tolist(), counts.tolist(), strict=True)) == sorted(zip(*expected, strict=True))
    different, js = naive_compare(*expected, alpha=0.05)
    result = ndb.compare(counts)
    assert (result["ndb"], result["ndb_over_k"]) == (different, different / 4) and 0 < different < 4
    assert result["js"] == pytest.approx(js, rel=1e-12)


def test_ndb_of_large_images_uses_a_seeded_sixth_of_their_pixels():
    reference, samples = faces(60, 0, dim=1002), faces(40, 1, dim=1002)
    ndb = NDB.fit(reference, 4, seed=5, n_init=2)
    assert len(ndb.dims.unique()) == len(ndb.dims) == 167 and ndb.centres.shape == (4, 1002)
    assert NDB.fit(reference, 4, seed=6, n_init=2).dims.tolist() != ndb.dims.tolist()
    assert NDB.fit(reference, 4, max_dims=1002, n_init=2).dims.tolist() == list(range(1002))
    expected = naive_ndb(reference, samples, 4, True, 5, ndb.dims.numpy())
    pairs = zip(ndb.counts.tolist(), ndb.count(samples).tolist(), strict=True)
    assert sorted(pairs) == sorted(zip(*expected, strict=True))


def test_whitening_is_that_of_the_reference_as_numpy_counts_it():
    rows = faces(30, 0).flatten(1).double().numpy()
    ndb, plain = (NDB.fit(faces(30, 0), 4, whiten=whiten) for whiten in (True, False))
    torch.testing.assert_close(ndb.mean, torch.from_numpy(rows.mean(0)), rtol=1e-12, atol=0)
    torch.testing.assert_close(ndb.scale, torch.from_numpy(rows.std(0) + 1e-6), rtol=1e-12, atol=0)
    assert plain.mean.eq(0).all() and plain.scale.eq(1).all()


def test_an_image_belongs_to_the_nearest_centre():
    source = torch.Generator().manual_seed(0)
    centres, images, mean, scale = (
        torch.rand(shape, generator=source, dtype=torch.float64) for shape in ((9, 6), (1500, 6), (6,), (6,))
    )
    ndb = NDB(centres, mean, scale + 0.1, torch.tensor([0, 2, 5]), torch.ones(9, dtype=torch.long))
    differences = ((images[:, None] - centres) / (scale + 0.1))[:, :, [0, 2, 5]]
    assert ndb.assign(images).equal(differences.norm(dim=2).argmin(1))


def test_the_other_pixels_play_no_part():
    reference = faces(60, 0, dim=1002)
    ndb = NDB.fit(reference, 4, n_init=2)
    others = torch.ones(1002, dtype=torch.bool)
    others[ndb.dims] = False
    spoilt = reference.flatten(1).clone()
    spoilt[:, others] = 0
    assert ndb.assign(spoilt).equal(ndb.assign(reference))


@given(
    counts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=2, max_size=12),
    alpha=st.sampled_from([0.01, 0.05, 0.3]),
)
@settings(max_examples=100, deadline=None)
def test_comparison_equals_the_recipe_bin_by_bin_and_is_symmetric(counts, alpha):
    one, other = ([1 + first, *rest] for first, *rest in zip(*counts, strict=True))  # no empty set
    result, swapped = (compare_bins(torch.tensor(a), torch.tensor(b), alpha) for a, b in ((one, other), (other, one)))
    different, js = naive_compare(one, other, alpha)
    assert result["ndb"] == swapped["ndb"] == different
    assert result["js"] == pytest.approx(js, abs=1e-12) == swapped["js"]
    assert -1e-12 <= result["js"] <= math.log(2) + 1e-12
    assert compare_bins(torch.tensor(one), torch.tensor(one), alpha)["js"] == 0


def test_known_counts():
    # Bin 0: p = .4, se = sqrt(.24 / 50), z = .2 / se = 2.8868. Bin 1: z = 0. Bin 2: p = .3, z = -.2 / sqrt(.21 / 50).
    result = compare_bins(torch.tensor([50, 30, 20, 0]), torch.tensor([30, 30, 40, 0]))
    assert result["p_values"].tolist() == pytest.approx([0.0038924171, 1.0, 0.0020282311, 1.0], rel=1e-7)
    assert (result["ndb"], result["ndb_over_k"]) == (2, 0.5)
    assert result["js"] == pytest.approx(0.0296234806, rel=1e-8)
    assert result["proportions"].tolist() == [0.3, 0.3, 0.4, 0.0]


def test_disjoint_sets_have_a_js_of_ln_2_and_equal_ones_differ_nowhere():
    assert compare_bins(torch.tensor([0, 7]), torch.tensor([3, 0]))["js"] == pytest.approx(math.log(2), rel=1e-15)
    same = compare_bins(torch.tensor([4, 0, 6]), torch.tensor([8, 0, 12]))
    assert (same["ndb"], same["js"], same["p_values"].tolist()) == (0, 0.0, [1.0] * 3)


# ----------------------------------------------------------------------------------------------------------- direction


def test_direction_of_real_collapsed_and_partial_samplers():
    source = torch.Generator().manual_seed(0)
    reference, real = torch.rand(4000, 8, generator=source), torch.rand(2000, 8, generator=source)
    ndb = NDB.fit(reference, 50, n_init=1)
    over_k = {
        "real": ndb.compare(ndb.count(real))["ndb_over_k"],
        "half missing": ndb.compare(ndb.count(torch.cat([real[real[:, 0] > 0.5]] * 2)))["ndb_over_k"],
        "collapsed": ndb.compare(ndb.count(real[:1].expand(2000, -1)))["ndb_over_k"],
    }
    assert over_k["real"] <= 0.14  # alpha is .05; 7 of 50 bins are three standard deviations above
    assert 0.5 < over_k["half missing"] < over_k["collapsed"] == 1
    itself = ndb.compare(ndb.count(reference))
    assert (itself["ndb"], itself["js"]) == (0, 0.0)


# ------------------------------------------------------------------------------------------------------- construction


def test_centres_are_mean_images_and_bins_do_not_depend_on_the_batches():
    reference, samples = faces(120, 0), faces(50, 1)
    ndb = NDB.fit(reference, 4)
    bins = ndb.assign(reference)
    means = torch.stack([reference.flatten(1)[bins == k].double().mean(0) for k in range(4)])
    torch.testing.assert_close(ndb.centres, means)
    assert ndb.counts.sum() == 120 and ndb.count(samples).equal(sum(ndb.count(batch) for batch in samples.split(7)))


def test_uint8_and_unit_range_say_the_same():
    images = (faces(80, 0) * 255).round().to(torch.uint8)
    one, other = NDB.fit(images, 4), NDB.fit(images / 255, 4)
    torch.testing.assert_close(one.centres, other.centres)
    assert one.assign(images / 255).equal(other.assign(images))


def test_a_pixel_that_never_changes_is_no_obstacle():
    images = faces(80, 0).flatten(1)
    images[:, 3] = 0.5
    assert NDB.fit(images, 4).counts.sum() == 80


def test_the_seed_decides_and_a_saved_state_is_the_same_state(tmp_path):
    reference = torch.rand(200, 5, generator=torch.Generator().manual_seed(0))
    one, same, other = (NDB.fit(reference, 6, n_init=1, seed=seed) for seed in (0, 0, 1))
    assert one.centres.equal(same.centres) and not one.centres.equal(other.centres)
    one.save(tmp_path / "bins.safetensors")
    loaded = NDB.load(tmp_path / "bins.safetensors")
    assert all(getattr(loaded, name).equal(value) for name, value in vars(one).items())
    assert loaded.count(reference).equal(one.counts)


def test_a_file_of_other_tensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weight.*expected.*centres"):
        NDB.load(tmp_path / "model.safetensors")


def test_wrong_input_is_refused():
    images = faces(40, 0)
    for num_bins in (1, 41):
        with pytest.raises(ValueError, match="from 2 to the 40"):
            NDB.fit(images, num_bins)
    with pytest.raises(ValueError, match="2 different images"):
        NDB.fit(images[:2].repeat(5, 1, 1, 1), 4)
    for wrong in (images * 255, images - 0.9, images * torch.nan, images.long()):
        with pytest.raises(ValueError, match="uint8, or floats in"):
            NDB.fit(wrong, 4)
    ndb = NDB.fit(images, 4, n_init=1)
    for shape in ((5, 11), (12,)):
        with pytest.raises(ValueError, match="12 values each"):
            ndb.assign(torch.zeros(shape))


@pytest.mark.parametrize(
    ("counts", "alpha", "message"),
    [
        (torch.tensor([1, 2, 3]), 0.05, "one shape"),
        (torch.tensor([0, 0]), 0.05, "not all 0"),
        (torch.tensor([3, -1]), 0.05, ">= 0"),
        (torch.tensor([0.5, 0.5]), 0.05, "integers"),
        (torch.tensor([1, 1]), 0.0, "alpha"),
        (torch.tensor([1, 1]), 1.0, "alpha"),
    ],
)
def test_wrong_counts_are_refused(counts, alpha, message):
    with pytest.raises(ValueError, match=message):
        compare_bins(torch.tensor([1, 2]), counts, alpha)
