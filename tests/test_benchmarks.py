"""The benchmarks run and say what they promise, at a scale whose numbers mean nothing: no assertion is of speed."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import importing_from, make_pipeline, run_script
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a benchmark as a program, in this process, and returns the result that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *options) -> dict:
        own = ("--smoke", "--json", "--threads", "1", "--output_dir", tmp_path)
        code, output, errors = run_script(FOLDER / f"{name}.py", *own, *options)
        assert code == 0, errors[-3000:]
        printed = json.loads(output.splitlines()[-1])
        assert json.loads((tmp_path / f"bench_{name}_smoke.json").read_text()) == printed
        assert printed["threads"] == 1 and printed["versions"]["torch"] and printed["machine"] and printed["commit"]
        return printed

    return run


def test_train_throughput(run):
    found = run("train_throughput", "--peer", "none", "--cases", "mlp")
    assert found["ratio"] is None  # no peer
    rows = {row["candidate"]: row for row in found["throughput"]}
    assert {"ours, bf16", "ours, float32", "plain PyTorch, float32", "convolution, bf16"} <= set(rows)
    ours = rows["ours, bf16"]
    assert ours["images_per_second"] * ours["ms_per_step"] == pytest.approx(4 * 1000)  # a batch of 4
    # Forward and two backward products of the linear layers, none to the inputs of the first; 2 operations each.
    layers = [784 * 512, 512 * 512, 512 * 512, 512 * 32, 16 * 512, 512 * 512, 512 * 512, 512 * 784]
    operations = 4 * 2 * (3 * sum(layers) - layers[0])
    assert ours["gflops"] * ours["ms_per_step"] * 1e6 == pytest.approx(operations)


@pytest.mark.skipif(importlib.util.find_spec("pythae") is None, reason="pythae is not installed (extra bench)")
def test_train_throughput_against_pythae(run):
    found = run("train_throughput", "--peer", "pythae", "--cases", "mlp")
    rate = {row["candidate"]: row.get("images_per_second") for row in found["throughput"]}
    assert found["ratio"] == pytest.approx(rate["ours, bf16"] / rate["pythae, float32"])


@pytest.mark.skipif(importlib.util.find_spec("pythae") is None, reason="pythae is not installed (extra bench)")
def test_pythae_computes_what_we_do():
    """The comparison is of one network: the peer's wrapped autoencoder gives our loss and our gradients."""
    with importing_from(FOLDER):
        import pythae_peer
        import train_throughput
    model, _ = train_throughput.build("conv64")
    other, pixels = copy.deepcopy(model), torch.rand(2, 3, 64, 64)
    for each in (model, other):
        torch.manual_seed(1)
        for parameter in each.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    peer = pythae_peer.wrap(other.encoder, other.decoder, (3, 64, 64), 64, is_vae=False)
    ours, theirs = model(pixels).loss, peer({"data": pixels}).loss
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert len(pairs) > 20
    for one, another in pairs:
        torch.testing.assert_close(one.grad, another.grad, rtol=1e-3, atol=1e-2)


def test_loop_cost(run):
    found = run("loop_cost", "--cases", "mlp")
    assert [row["candidate"] for row in found["cost_of_the_loop"]] == ["bare", "train()", "train(), EMA and clipping"]
    pieces = {row["piece"]: row["ms"] for row in found["pieces"]}
    for piece in ("data", "forward", "backward", "optimizer", "moving average", "checkpoint"):
        assert pieces[piece] > 0, piece  # a renamed function of the loop would leave its piece empty


@pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated accelerator needs the compiler g++")
def test_devices(run):
    found = run("devices")
    assert [row["waits"] for row in found["steps"]] == [0, 0, 0]
    assert all(row["found_by"] for row in found["mistakes"])
    assert {row["candidate"] for row in found["host_time"]} == {"bare", "train()"}


@pytest.mark.slow
def test_data_routes(run):
    routes = {row["route"] for row in run("data_routes")["routes"]}
    assert {"cache", "folder, streamed", "parquet, streamed", "datasets stream, streamed"} <= routes


def test_sampling(run):
    found = run("sampling")
    ours, unet = found["parameters"]["ours"], found["parameters"]["unet"]
    assert abs(unet / ours - 1) < 0.2
    assert all(row["images_per_second"] > 0 for row in found["sampling"])


@pytest.mark.slow
def test_stages(run):
    stages = {row["stage"]: row for row in run("stages", "--second_stage_nll", "1e9")["stages"]}
    assert stages["second_stage"]["seconds_to_nll"] > 0  # any line is below
    assert stages["vae"]["seconds_to_nll"] is None and stages["vae"]["steps"] == 4


@pytest.mark.slow
def test_evaluation(run):
    found = run("evaluation", "--features", "pixels:4", "--sizes", "32", "64")
    assert [row["image_size"] for row in found["evaluation"] if row["part"].startswith("features")] == [32, 64]
    seconds = {row["part"]: row["seconds"] for row in found["evaluation"] if row["image_size"] == 32}
    parts = ("mean and covariance", "Frechet distance", "NDB, 4 bins", "MMD of q(z) and N(0, I)")
    assert seconds["Frechet, NDB and MMD"] == pytest.approx(sum(seconds[part] for part in parts))


def test_gaming(run):
    found = run("gaming", "--runs", "1")
    rows = {row["generator"]: row for row in found["generators"]}
    assert rows["copies"]["memorised"] == rows["bootstrap, 0.1"]["memorised"] == 1 and rows["copies"]["copies"] == 1
    assert rows["other real images"]["flagged"] is None and rows["held-out"]["flagged"] == 0
    assert rows["dropped modes"]["coverage"] < rows["held-out"]["coverage"]
    assert found["protocol"][0]["training_images"] == 1_797 - 4 * 200


@pytest.mark.slow
def test_scaling(run):
    found = run("scaling")
    assert [row["processes"] for row in found["processes"]] == [1, 2]
    assert [row["images"] for row in found["cache"]] == [256, 512]
    assert found["stream"][0]["resumed_first_batch_ms"] > 0 and found["network"][0]["peak_mib"] > 0


@pytest.mark.slow
def test_startup(run):
    rows = {row["program"]: row for row in run("startup")["start_up"]}
    # What the parent holds is not counted: the package alone, which waits with torch, takes some 10 MiB.
    assert 1 < rows["import hf_vaeplus"]["peak_mib"] < 100 < rows["import torch"]["peak_mib"]


@pytest.mark.slow
def test_attempts(run):
    found = run("attempts")
    assert all(row["ms_per_step"] > 0 for row in found["steps"]) and len(found["steps"]) == 10
    assert len(found["gathers"]) == 4


@pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="zuko is not installed (extra flows)")
@pytest.mark.slow
def test_priors(run, tmp_path):
    found = run("priors", "--only", "bimodal", "--work_dir", tmp_path / "work")
    rows = {row["prior"]: row["between"] for row in found["bimodal"]}
    assert rows.keys() == {"data", "mixture", "coupling_flow", "flow_matching"}
    assert rows["data"] == pytest.approx(0.0378, abs=0.01)  # two modes at +-0.951 of width 0.31, between -0.4 and 0.4
    assert run("priors", "--only", "bimodal", "--work_dir", tmp_path / "work")["bimodal"] == found["bimodal"]


def test_conditional(run, tmp_path):
    found = run("conditional", "--only", "drawings", "--priors", "vae", "--work_dir", tmp_path / "work")
    rows = {row["drawings"]: row for row in found["drawings"]}
    assert rows.keys() == {"real drawings", "their reconstructions", "vae"}
    # The judge sees nearly the same where the model decodes real drawings.
    assert rows["their reconstructions"]["r2"] == pytest.approx(rows["real drawings"]["r2"], abs=0.05)
    assert found["goals_of_drawings"][0]["measured"] == rows["vae"]["r2"]
    with importing_from(FOLDER):
        import conditional
    wanted = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    torch.testing.assert_close(conditional.r2(wanted, wanted), torch.ones(2).double())
    torch.testing.assert_close(conditional.r2(wanted.mean(0).expand(3, 2), wanted), torch.zeros(2).double())


def test_detail_trains_and_judges_its_candidates(tmp_path):
    """On pictures of noise."""
    for split, count in (("train", 60), ("validation", 100)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{number}.png")
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    words = f"{tmp_path / 'pipeline'} --train_data_dir {tmp_path / 'data'} --features pixels:8 --seconds 0.2"
    words += f" --num_images 100 --work_dir {tmp_path / 'work'} --output {tmp_path / 'found.json'}"
    code, _, errors = run_script(FOLDER / "detail.py", *words.split())
    assert code == 0, errors[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    names = [(row["candidate"], row.get("detail_temperature")) for row in found["rows"]]
    assert names == [
        ("mean", None), ("compute", 0), ("bands", 0), ("feature", 0), ("pixels", 0.6), ("pixels", 1.0),
        ("energy", 0.6), ("energy", 1.0),
    ]  # fmt: skip
    distances = [row[kind]["pixels:8"] for row in found["rows"] for kind in ("samples", "reconstructions")]
    assert min(distances) > 0 and all(row["squared_error"] > 0 for row in found["rows"])
    assert found["commit"] and (tmp_path / "work" / "samples.png").is_file()


def test_energy_dimensions(run):
    """With the whole code kept there is no noise, and the score is the error; else that of the two draws."""
    found = run("energy_dimensions", "--factors", "4")
    (row,) = found["dimensions"]
    assert row["r"] == 4 and len(row["scores"]) == 17 and 0 <= row["found"] <= 16
    with importing_from(FOLDER):
        import energy_dimensions as study
    images = torch.rand(3, 3, study.SIZE, study.SIZE)
    model = study.fit(images, 2, 0, "")
    kept, noise = torch.tensor([[0], [16], [16]]), torch.randn(2, 3, study.CODE)
    with torch.no_grad():
        scores = study.score(model, images, kept, noise)
        draws = [model.decode(each[:1]) for each in noise]
        error = (model.decode(model.encode(images)) - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(scores[1:], error[1:])
    apart = [(draw - images[:1]).norm() for draw in draws]
    torch.testing.assert_close(scores[0], 0.5 * (apart[0] + apart[1] - (draws[0] - draws[1]).norm()))
