"""The benchmarks run and say what they promise, at a scale whose numbers mean nothing: no assertion is of speed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(name, tmp_path, *options) -> dict:
    command = [sys.executable, FOLDER / f"{name}.py", "--smoke", "--json", "--threads", "1", "--output_dir", tmp_path]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / f"bench_{name}_smoke.json").read_text()) == printed
    assert printed["threads"] == 1 and printed["versions"]["torch"] and printed["machine"] and printed["commit"]
    return printed


def test_train_throughput(tmp_path):
    found = run("train_throughput", tmp_path, "--peer", "none", "--cases", "mlp")
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
def test_train_throughput_against_pythae(tmp_path):
    found = run("train_throughput", tmp_path, "--peer", "pythae", "--cases", "mlp")
    rate = {row["candidate"]: row.get("images_per_second") for row in found["throughput"]}
    assert found["ratio"] == pytest.approx(rate["ours, bf16"] / rate["pythae, float32"])


@pytest.mark.skipif(importlib.util.find_spec("pythae") is None, reason="pythae is not installed (extra bench)")
def test_pythae_computes_what_we_do():
    """The comparison is of one network: the peer's wrapped autoencoder gives our loss and our gradients."""
    code = (
        "import torch, train_throughput, pythae_peer, copy\n"
        "model, _ = train_throughput.build('conv64'); other = copy.deepcopy(model); x = torch.rand(2, 3, 64, 64)\n"
        "for m in (model, other):\n"
        "    torch.manual_seed(1)\n"
        "    for p in m.parameters(): p.data += 0.02 * torch.randn_like(p)\n"
        "peer = pythae_peer.wrap(other.encoder, other.decoder, (3, 64, 64), 64, is_vae=False)\n"
        "a, b = model(x).loss, peer({'data': x}).loss; a.backward(); b.backward()\n"
        "torch.testing.assert_close(a, b)\n"
        "pairs = list(zip(model.parameters(), other.parameters(), strict=True)); assert len(pairs) > 20\n"
        "for p, q in pairs: torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-3000:]


def test_loop_cost(tmp_path):
    found = run("loop_cost", tmp_path, "--cases", "mlp")
    assert [row["candidate"] for row in found["cost_of_the_loop"]] == ["bare", "train()", "train(), EMA and clipping"]
    pieces = {row["piece"]: row["ms"] for row in found["pieces"]}
    for piece in ("data", "forward", "backward", "optimizer", "moving average", "checkpoint"):
        assert pieces[piece] > 0, piece  # a renamed function of the loop would leave its piece empty


def test_data_routes(tmp_path):
    routes = {row["route"] for row in run("data_routes", tmp_path)["routes"]}
    assert {"cache", "folder, streamed", "parquet, streamed", "datasets stream, streamed"} <= routes


def test_sampling(tmp_path):
    found = run("sampling", tmp_path)
    ours, unet = found["parameters"]["ours"], found["parameters"]["unet"]
    assert abs(unet / ours - 1) < 0.2
    assert all(row["images_per_second"] > 0 for row in found["sampling"])


def test_stages(tmp_path):
    stages = {row["stage"]: row for row in run("stages", tmp_path, "--second_stage_nll", "1e9")["stages"]}
    assert stages["second_stage"]["seconds_to_nll"] > 0  # any line is below
    assert stages["vae"]["seconds_to_nll"] is None and stages["vae"]["steps"] == 4


def test_evaluation(tmp_path):
    found = run("evaluation", tmp_path, "--features", "pixels:4", "--sizes", "32", "64")
    assert [row["image_size"] for row in found["evaluation"] if row["part"].startswith("features")] == [32, 64]
    seconds = {row["part"]: row["seconds"] for row in found["evaluation"] if row["image_size"] == 32}
    parts = ("mean and covariance", "Frechet distance", "NDB, 4 bins", "MMD of q(z) and N(0, I)")
    assert seconds["Frechet, NDB and MMD"] == pytest.approx(sum(seconds[part] for part in parts))


def test_scaling(tmp_path):
    found = run("scaling", tmp_path)
    assert [row["processes"] for row in found["processes"]] == [1, 2]
    assert [row["images"] for row in found["cache"]] == [256, 512]
    assert found["stream"][0]["resumed_first_batch_ms"] > 0 and found["network"][0]["peak_mib"] > 0


def test_startup(tmp_path):
    rows = {row["program"]: row for row in run("startup", tmp_path)["start_up"]}
    # What the parent holds is not counted: Python alone takes some 10 MiB.
    assert 1 < rows["python alone"]["peak_mib"] < 100 < rows["import hf_vaeplus"]["peak_mib"]


def test_attempts(tmp_path):
    found = run("attempts", tmp_path)
    assert all(row["ms_per_step"] > 0 for row in found["steps"]) and len(found["steps"]) == 10
    assert len(found["gathers"]) == 4
