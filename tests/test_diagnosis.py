"""The diagnosis: measures against closed forms, planted faults against the verdict, and every kind of model."""

import copy
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers import SIZE, importing_from, make_pipeline, make_prior, make_vae, run
from PIL import Image

import hf_vaeplus
from hf_vaeplus import VAEPlusPipeline, VAEPlusVAEConfig, VAEPlusVAEModel
from hf_vaeplus.diagnosis import verdict as rules
from hf_vaeplus.diagnosis.measures import measure
from hf_vaeplus.diagnosis.models import as_autoencoder, load_autoencoder
from hf_vaeplus.diagnosis.verdict import judge

ROOT = Path(__file__).parents[1]
with importing_from(ROOT / "benchmarks"):
    from diagnose import affine_cases, is_right

COUNT = 600


def pictures(count=120, channels=3, size=SIZE, seed=0):
    """Smooth pictures of three factors, uint8."""
    a, b, c = torch.rand(3, count, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    x = torch.linspace(0, 1, size)
    drawn = 0.5 + 0.3 * torch.sin(3 * a + 5 * b * x[None, None, :, None] + 4 * c * x[None, None, None, :])
    return (255 * drawn.expand(count, channels, size, size)).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------- planted affine models


@pytest.fixture(scope="module")
def affine():
    """The planted affine models (Theorem 1) by the last words of their names, with their measures."""
    found = {}
    for case in affine_cases(dim=40, kappa=10, rank=5, held_out=COUNT):
        model, rows = case.build(3)
        found[case.name.split(": ")[1]] = case, model, rows, measure(model, rows)
    return found


@pytest.mark.parametrize(
    "name", ["gamma near 0", "gamma above most eigenvalues", "each direction coded several times", "data in clusters"]
)
def test_planted_affine_models(affine, name):
    case, _, _, measures = affine[name]
    verdict = judge(measures)
    assert is_right(case, verdict), (verdict.regularization, verdict.names)
    assert verdict.doubts == [f"only {COUNT} images: dimensions and distances want 2,000 or more"]
    assert verdict.prescriptions or verdict.regularization == "balanced"


def test_measures_of_an_affine_model_in_closed_form(affine):
    _, model, rows, measures = affine["gamma near 0"]
    gamma, kappa, r = 1e-3, 10, 5
    _, logvar = model.encode(rows)
    posterior = logvar[0].double().exp()
    # Only in the optimum is the noise of the posterior gamma sum_j (1 - s_j^2): the implied gamma is the stated one.
    assert measures["gamma"]["implied"] == pytest.approx(gamma, rel=0.1)
    assert measures["gamma"]["error_per_value"] == pytest.approx(gamma * r / 40, rel=0.15)
    assert measures["units"] == {"by_mean": r, "by_variance": r, "active": r, "by_loss": r, "by_loss_of": kappa}
    found = [row["posterior_variance"] for row in measures["dimensions"]]
    assert found == pytest.approx(posterior.tolist(), rel=1e-5)
    # E KL of N(mu, s^2) with E mu^2 = 1 - s^2: -log s
    kl = [row["kl"] for row in measures["dimensions"]]
    assert kl == pytest.approx((-0.5 * posterior.log()).tolist(), rel=0.1, abs=1e-6)
    # Replaced by the code of another image, a unit costs twice the variance of its direction.
    variances = rows.double().var(0).sum()
    column = model.decode(torch.eye(kappa)).double().square().sum(1)
    loss = [row["loss"] for row in measures["dimensions"]]
    assert loss == pytest.approx((2 * column / variances).tolist(), rel=0.35, abs=1e-6)
    share = column[:r] / column[:r].sum()
    assert measures["jacobian_rank"] == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=0.1)
    assert measures["aggregate"]["prior"]["holes"] == pytest.approx(1, abs=0.1)
    assert measures["scale_factor"] == pytest.approx(1, abs=0.05)


def test_unexplained_by_pca_is_that_of_the_eigenvalues(affine):
    _, _, rows, measures = affine["gamma near 0"]
    values = torch.linalg.eigvalsh(torch.cov(rows.double().T)).flip(0)
    left = [1.0, *(1 - values.cumsum(0) / values.sum()).clamp(min=0).tolist()]
    assert measures["error"]["unexplained_by_pca"][:41] == pytest.approx(left, abs=1e-6)


def test_same_seed_same_figures_whatever_the_batch(affine):
    _, model, rows, measures = affine["data in clusters"]
    again = measure(model, rows, batch_size=33)
    assert json.dumps(again) != json.dumps(measure(model, rows, seed=1))
    assert again["error"]["squared_error"] == pytest.approx(measures["error"]["squared_error"], rel=1e-5)
    assert again["aggregate"]["prior"] == pytest.approx(measures["aggregate"]["prior"], rel=1e-4)


def second_stage(dead: bool) -> VAEPlusVAEModel:
    """A second stage that draws clusters at +-1 in each of five active dimensions, or nothing but noise."""
    config = dict(input_shape=(10,), latent_dim=10, network="affine", gamma="fixed", gamma_init=1.0 if dead else 0.02)
    model = VAEPlusVAEModel(VAEPlusVAEConfig(**config))
    with torch.no_grad():
        model.decoder.weight.zero_()
        model.encoder.weight.zero_()
        model.decoder.bias.zero_()
    if not dead:
        with torch.no_grad():
            model.logvar.fill_(-4)
            model.decoder.weight.copy_(torch.eye(10))
        model.decode = lambda u, condition=None: torch.cat([u[:, :5].sign(), u[:, 5:]], 1)
    return model


@pytest.mark.parametrize("dead", [True, False])
def test_second_stages(affine, dead):
    _, model, rows, _ = affine["data in clusters"]
    joined = copy.copy(model)
    joined.second_stage = second_stage(dead)
    verdict = judge(measure(joined, rows))
    assert "prior_hole" not in verdict.names  # samples do not come from the prior
    assert ("dead_second_stage" in verdict.names) == dead
    assert verdict.second_stage == ("does not help" if dead else "helps")


# ---------------------------------------------------------------------------------------------------------- the rules


def test_every_rule_from_the_measures_alone(affine):
    """Numbers moved across a threshold change the verdict, and nothing else does."""
    base = copy.deepcopy(affine["gamma near 0"][3])
    base["num_images"] = 5_000

    def verdict(**changes):
        measures = copy.deepcopy(base)
        for path, value in changes.items():
            *place, last = path.split("__")
            inner = measures
            for name in place:
                inner = inner[name]
            inner[last] = value
        return judge(measures)

    assert verdict().regularization == "balanced" and verdict().confidence == "high" and not verdict().names
    assert verdict(error__unexplained=0.6).regularization == "over"
    assert verdict(units__active=0).regularization == "over"
    few = verdict(units__active=3, error__unexplained=0.1)
    assert few.regularization == "over" and "affine skip" in few.prescriptions[0]
    assert verdict(units__active=3, error__unexplained=0.01).regularization == "balanced"
    narrow = verdict(units__active=3, latent_dim=3, error__unexplained=0.1)
    assert narrow.regularization == "over" and "kappa" in narrow.prescriptions[0]
    noisy = verdict(gamma__over_error=30.0, error__unexplained_of_samples=0.1)
    assert noisy.regularization == "over" and noisy.names == ["large_gamma"]
    surplus = verdict(units__active=9, redundancy__half=0.9)
    assert surplus.regularization == "under" and "learn gamma" in surplus.prescriptions[0]
    wide = verdict(units__active=9, redundancy__half=0.1)  # more than r, but none determined by others
    assert wide.regularization == "balanced" and wide.confidence == "medium"
    plain = verdict(units__active=9, redundancy__half=0.9, deterministic=True, gamma=None)
    assert plain.regularization == "under" and "first VAE" in plain.prescriptions[0]
    assert verdict(gamma__over_error=0.01).names == ["small_gamma"]
    for name, limit in (("sliced", rules.HOLE_SLICED), ("worst_axis", rules.HOLE_AXIS), ("holes", rules.HOLE_NEAR)):
        assert verdict(**{f"aggregate__prior__{name}": 1.01 * limit}).names == ["prior_hole"]
    silent = {"second_stage": {"latent_dim": 10, "active_units": 0, "gamma": 1.0}}
    silent["aggregate__second_stage"] = base["aggregate"]["prior"] | {"sliced": 0.03, "worst_axis": 0.06}
    normal = {"aggregate__prior__sliced": 0.03, "aggregate__prior__worst_axis": 0.06}
    assert not verdict(**silent, **normal).names  # q(z) is normal: nothing is left to learn
    assert verdict(**silent, **normal | {"aggregate__prior__worst_axis": 0.2}).names == ["dead_second_stage"]
    assert verdict(num_images=300).confidence == "medium"
    rows = copy.deepcopy(base["dimensions"])
    rows[2]["variance_of_mean"], rows[7]["loss"] = 0.005, 0.1  # active in name alone; silent, and yet it costs
    assert verdict().disagreements == [] and verdict(dimensions=rows).disagreements == [2, 7]
    unknown = verdict(intrinsic_dimension__images=None)
    assert unknown.estimated_r is None and unknown.confidence == "medium"


# --------------------------------------------------------------------------------------------------- kinds of models


def small(kind: str):
    torch.manual_seed(0)
    blocks = dict(block_out_channels=(4, 4), norm_num_groups=2)
    ends = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    if kind == "AutoencoderKL":
        return diffusers.AutoencoderKL(**ends, **blocks, latent_channels=2, mid_block_add_attention=False)
    if kind == "VQModel":
        return diffusers.VQModel(**ends, **blocks, latent_channels=2, num_vq_embeddings=16)
    if kind == "AutoencoderTiny":
        blocks = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
        widths = dict(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4))
        return diffusers.AutoencoderTiny(**blocks, **widths, latent_channels=2)
    stages = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
    stages |= {f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")}
    stages |= {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
    return diffusers.AutoencoderDC(**stages, latent_channels=2)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel"])
def test_diffusers_autoencoders_from_a_folder(kind, tmp_path):
    model = small(kind).eval()
    model.save_pretrained(tmp_path / "model")
    diagnosis = hf_vaeplus.diagnose(tmp_path / "model", pictures())
    measures = diagnosis.measures
    assert measures["model"] == kind and measures["deterministic"] == (kind != "AutoencoderKL")
    pixels = pictures().float() / 255
    with torch.no_grad():
        decoded = model(2 * pixels - 1).sample / 2 + 0.5
    error = (decoded - pixels).square().flatten(1).sum(1).mean()
    assert measures["error"]["squared_error"] == pytest.approx(float(error), rel=1e-4)
    assert len(measures["dimensions"]) == measures["code_shape"][0] == 2
    assert json.loads(json.dumps(diagnosis.to_dict())) and kind in str(diagnosis)


def test_the_vae_of_a_diffusers_pipeline(tmp_path):
    small("AutoencoderKL").save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "AnyPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    assert load_autoencoder(str(tmp_path)).name == "AutoencoderKL"


@pytest.mark.parametrize("second", [True, False])
def test_our_pipelines(second, tmp_path):
    pipe = make_pipeline(second_stage=second)
    pipe.save_pretrained(tmp_path)
    images = pictures()
    measures = hf_vaeplus.diagnose(tmp_path, images).measures
    mean = pipe.encode(images, 50).mean
    with torch.no_grad():
        decoded = pipe.autoencoder.decode(pipe.vae.decode(mean))
    error = (decoded - images / 255).square().flatten(1).sum(1).mean()
    assert measures["error"]["squared_error"] == pytest.approx(float(error), rel=1e-4)
    assert measures["gamma"]["stated"] == pytest.approx(0.02) and ("second_stage" in measures) == second
    assert measures["latent_dim"] == 4


@pytest.mark.parametrize("kind", ["flow_matching", "mixture", "coupling_flow"])
@pytest.mark.parametrize("of", ["latents", "codes"])
def test_pipelines_whose_second_stage_is_no_vae(kind, of):
    if kind == "coupling_flow":
        pytest.importorskip("zuko")
    whole = make_pipeline()
    second = make_prior(kind, whole.autoencoder.config.latent_dim if of == "codes" else 4)
    pipe = VAEPlusPipeline(None if of == "codes" else whole.vae, whole.autoencoder, second)
    diagnosis = hf_vaeplus.diagnose(pipe, pictures())
    assert diagnosis.measures["second_stage"] == {"latent_dim": second.config.latent_dim}
    assert diagnosis.measures["aggregate"]["second_stage"]["sliced"] > 0
    assert "second stage" in str(diagnosis) and "active units of the second stage" not in str(diagnosis)
    assert diagnosis.verdict.second_stage in ("helps", "does not help", "is not needed")


def test_gamma_of_codes_is_compared_with_the_error_of_codes():
    pipe = make_pipeline(reconstruction_space="code", gamma="learned")
    images = pictures()
    gamma = hf_vaeplus.diagnose(pipe, images).measures["gamma"]
    with torch.no_grad():
        codes = pipe.autoencoder.encode(images / 255)
        posterior = pipe.vae.encode(codes)
        errors = [(pipe.vae.decode(posterior.sample()) - codes).square().mean() for _ in range(20)]
    assert gamma["error_per_value"] == pytest.approx(float(sum(errors) / 20), rel=0.2)


def test_stages_callables_and_objects():
    pipe, images = make_pipeline(), pictures()
    assert hf_vaeplus.diagnose(pipe.autoencoder, images).measures["deterministic"]
    rows = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
    vae = make_vae(input_shape=(5,))
    by_model = hf_vaeplus.diagnose(vae, rows).measures
    by_pair = hf_vaeplus.diagnose((vae.encode, vae.decode), rows).measures
    two = hf_vaeplus.diagnose((lambda x: (vae.encode(x).mean, vae.encode(x).logvar), vae.decode), rows).measures
    assert by_pair == two and by_pair["dimensions"] == by_model["dimensions"]
    assert by_model["gamma"]["stated"] is not None and by_pair["gamma"]["stated"] is None

    class Plain:
        encode = staticmethod(lambda x: x[:, :2])
        decode = staticmethod(lambda z: torch.cat([z, torch.zeros(len(z), 3)], 1))

    assert hf_vaeplus.diagnose(Plain(), rows).measures["deterministic"]


def test_wae_has_no_posterior():
    vae = make_vae(input_shape=(5,))
    with torch.no_grad():
        vae.encoder[-1].weight[vae.config.latent_dim :] = 0
        vae.encoder[-1].bias[vae.config.latent_dim :] = -30
    assert hf_vaeplus.diagnose(vae, torch.randn(120, 5)).measures["deterministic"]


def test_kinds_of_data_are_one(tmp_path):
    pipe, images = make_pipeline(), pictures()
    arrays = images.permute(0, 2, 3, 1).numpy()
    expected = hf_vaeplus.diagnose(pipe, images).measures
    for data in (images / 255, arrays, (arrays / 255).astype(np.float32), [Image.fromarray(each) for each in arrays]):
        found = hf_vaeplus.diagnose(pipe, data).measures
        assert found["error"]["squared_error"] == pytest.approx(expected["error"]["squared_error"], rel=1e-5)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{number:03d}.png")
    found = hf_vaeplus.diagnose(pipe, tmp_path).measures
    assert found["error"]["squared_error"] == pytest.approx(expected["error"]["squared_error"], rel=1e-5)
    assert hf_vaeplus.diagnose(pipe, images, num_images=100).measures["num_images"] == 100


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(model=3), TypeError, "diagnose needs a pipeline"),
        (dict(data=pictures(50)), ValueError, "at least 100 images, got 50"),
        (dict(data=pictures(size=16)), ValueError, "takes images of shape"),
        (dict(data=pictures() / 100), ValueError, "must lie in"),
        (dict(data=pictures().long()), ValueError, "uint8 or floats"),
        (dict(data=[1, 2]), TypeError, "data must be"),
        (dict(data=torch.full((120, 3, SIZE, SIZE), 7, dtype=torch.uint8)), ValueError, "all images are the same"),
        (dict(num_images=5), ValueError, "num_images must be at least 100"),
        (dict(seed=-1), ValueError, "seed in"),
        (dict(model=(lambda x: x[:5], lambda z: z)), ValueError, "one code for each"),
        (dict(model=(lambda x: "code", lambda z: z)), TypeError, "encode must return"),
        (dict(model=(lambda x: x.flatten(1)[:, :3], lambda z: z)), ValueError, "decode must return"),
        (dict(model=(lambda x: x.flatten(1)[:, :3] / 0, lambda z: z)), ValueError, "NaN or infinity"),
    ],
)
def test_refused(change, error, message):
    given = dict(model=make_pipeline(), data=pictures()) | change
    with pytest.raises(error, match=message):
        hf_vaeplus.diagnose(given.pop("model"), given.pop("data"), **given)


# --------------------------------------------------------------------------------------------------- the command line


def test_command(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("diagnose", str(home / "pipeline"), "--dataset_name", "rendered-faces", "--max_images", "120")
    code, output, errors = run(*words, "--json")
    assert code == 0, errors
    found = json.loads(output)
    assert found["files"] == ["diagnosis.json", "diagnosis.png"] and "verdict:" in errors
    written = json.loads(Path("diagnosis.json").read_text())
    assert written["verdict"] == found["verdict"] and written["commit"] and written["measures"]["num_images"] == 120
    with Image.open("diagnosis.png") as picture:
        assert picture.width > 1_000 and len(np.unique(np.asarray(picture)[..., :3].reshape(-1, 3), axis=0)) > 50
    code, _, errors = run(*words)
    assert code == 2 and "diagnosis.json exists" in errors


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("nowhere/at/all", "--dataset_name", "digits"), "there is no folder nowhere/at/all"),
        (("vae", "--dataset_name", "digits"), "takes inputs of shape (6,)"),
        ((".", "--dataset_name", "digits"), "holds neither model_index.json nor config.json"),
        (("other", "--dataset_name", "digits"), "a model of the kind 'bert'"),
        (("vae", "--dataset_name", "digits", "--output", "a.png"), "must name a file such as diagnosis.json"),
    ],
)
def test_command_refuses(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pipeline().vae.save_pretrained("vae")
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "bert"}')
    code, _, errors = run("diagnose", *words)
    assert code == 2 and sentence in errors
    assert not Path("diagnosis.json").exists()


def test_public_name():
    assert hf_vaeplus.diagnose.__module__ == "hf_vaeplus.diagnosis.diagnose"
    assert as_autoencoder(make_pipeline()).image_shape == (3, SIZE, SIZE)
