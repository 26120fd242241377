"""The training loop: its randomness, its arithmetic, its checkpoints, and what it says when a run goes wrong.

Optimizers are compared with a large `adam_epsilon`: Adam divides a gradient by its size, which would blow up the
rounding error of gradients that are zero on paper.
"""

import json
import math
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import LoggerType
from faults.precision import fp16_on_cpu
from helpers import (
    DIM,
    LATENT_DIM,
    NUM_ROWS,
    TINY_RUN,
    Killed,
    contents,
    fit,
    killed_at,
    make_rows,
    make_vae,
    prepare_rows,
    resume,
    stats_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from hf_vaeplus import VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel
from hf_vaeplus.training import arithmetic
from hf_vaeplus.training.checkpoints import list_checkpoints
from hf_vaeplus.training.codes import TensorRows
from hf_vaeplus.training.logs import HealthWatch
from hf_vaeplus.training.loop import Stage, TrainingDiverged, train
from hf_vaeplus.training.options import RECORD, Schedule, StageOptions, Tracker, TrainingOptions, read_record
from hf_vaeplus.training.randomness import GlobalBatchSampler, Noise, derived_seed


def make_autoencoder() -> VAEPlusAutoencoderModel:
    torch.manual_seed(0)
    config = dict(image_size=32, num_channels=1, latent_dim=4, hidden_channels=(4,), num_blocks=1)
    return VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(**config))


def make_images() -> TensorRows:
    return TensorRows({"pixels": torch.rand(NUM_ROWS, 1, 32, 32, generator=torch.Generator().manual_seed(1))})


def prepare_images(batch, noise, step):
    return {"pixel_values": batch["pixels"]}


def spoilt_at(*steps):
    """`prepare_rows`, with a NaN in the first input of these steps."""

    def prepare(batch, noise, step):
        if step in steps:
            batch["x"] = batch["x"].clone()
            batch["x"][0, 0] = math.nan
        return prepare_rows(batch, noise, step)

    return prepare


def assert_close(left: dict, right: dict, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------ randomness

small = st.integers(1, 9)


def passes(num_samples, batch_size, rank, world_size, first, last, seed=0):
    return list(GlobalBatchSampler(num_samples, batch_size, seed, rank, world_size, first, last))


@settings(deadline=None)
@given(st.integers(1, 30), small, st.integers(1, 4), st.integers(0, 12), st.integers(1, 12))
def test_processes_share_the_batch_that_one_process_sees(num_samples, batch_size, world_size, first, count):
    parts = [passes(num_samples, batch_size, rank, world_size, first, first + count) for rank in range(world_size)]
    joined = [sum(batches, []) for batches in zip(*parts, strict=True)]
    assert joined == passes(num_samples, batch_size * world_size, 0, 1, first, first + count)
    assert {len(batch) for part in parts for batch in part} == {batch_size}


@settings(deadline=None)
@given(st.integers(1, 30), small, st.integers(1, 4), st.integers(0, 12), st.integers(0, 12), st.data())
def test_a_sampler_that_starts_later_gives_the_tail(num_samples, batch_size, world_size, first, count, data):
    rank = data.draw(st.integers(0, world_size - 1))
    whole = passes(num_samples, batch_size, rank, world_size, 0, first + count)
    assert passes(num_samples, batch_size, rank, world_size, first, first + count) == whole[first:]
    assert len(GlobalBatchSampler(num_samples, batch_size, 0, rank, world_size, first, first + count)) == count


@settings(deadline=None)
@given(st.integers(1, 30), small, st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(num_samples, batch_size, seed):
    batches = passes(num_samples, batch_size, 0, 1, 0, -(-4 * num_samples // batch_size), seed)
    sequence = sum(batches, [])
    for epoch in range(4):
        assert sorted(sequence[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


def test_epochs_and_seeds_have_different_orders():
    orders = [passes(100, 100, 0, 1, epoch, epoch + 1, seed)[0] for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6


def global_noise(seed, step, num_parts, num_rows=12, dims=(5, 3)):
    """The noise of a step in parts, each drawn as its own process would draw it."""
    size, cpu = num_rows // num_parts, torch.device("cpu")
    parts = [Noise(seed, num_rows, cpu).at(step, slice(first, first + size)) for first in range(0, num_rows, size)]
    return [torch.cat([noise(dim) for noise in parts]) for dim in dims]  # two draws each, as the second stage makes


@pytest.mark.parametrize("num_rows, dim", [(12, 5), (2**9, 2**9), (2**11, 2**10)])  # blocks of 64, 4 and 1 steps
def test_noise_does_not_depend_on_where_a_run_starts(num_rows, dim):
    """In the middle of a block, at its end, or after others."""
    rows = slice(1, 3)
    running = Noise(3, num_rows, torch.device("cpu"))
    from_the_start = [running.at(step, rows)(dim) for step in range(70)]
    for step in (0, 5, 63, 64, 69):
        assert torch.equal(Noise(3, num_rows, torch.device("cpu")).at(step, rows)(dim), from_the_start[step])
    assert len(torch.cat(from_the_start).unique(dim=0)) == 2 * 70


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_noise_does_not_depend_on_how_rows_are_shared_out(world_size):
    for together, shared in zip(global_noise(3, 7, 1), global_noise(3, 7, world_size), strict=True):
        assert torch.equal(together, shared)


def test_noise_is_new_in_every_row_draw_pass_and_seed():
    draws = [draw for key in ((3, 7), (3, 8), (4, 7)) for draw in global_noise(*key, 1, dims=(5, 5))]
    rows = torch.cat(draws)
    assert len(rows.unique(dim=0)) == 6 * 12


def test_noise_is_standard_normal_with_independent_rows():
    noise = Noise(0, 3, torch.device("cpu"))
    draws = torch.stack([noise.at(step, slice(3))(2).flatten() for step in range(4000)])
    assert draws.mean(0).abs().max() < 4 * 4000**-0.5
    assert (torch.cov(draws.T) - torch.eye(6)).abs().max() < 6 * 4000**-0.5


def test_derived_seeds_are_stable_and_distinct():
    keys = [(seed, kind, number) for seed in range(8) for kind in range(4) for number in range(8)]
    seeds = [derived_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, 1, 2) == 1535930435702422785  # with another value no old run could be repeated


def test_the_global_generators_play_no_part(tmp_path, reference):
    model = make_vae()
    torch.manual_seed(12345)
    np.random.seed(54321)
    fit(tmp_path, model, checkpoints_total_limit=10)
    assert contents(tmp_path) == contents(reference)


# ------------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(
    "precision, device, slowdown, said",
    [
        ("bf16", "cpu", 3.04, True),
        ("bf16", "cpu", 0.5, False),
        ("no", "cpu", 3.0, False),
        ("bf16", "cuda", 3.0, False),
    ],
)
def test_bf16_on_a_processor_without_it_is_advised_against(monkeypatch, caplog, precision, device, slowdown, said):
    assert arithmetic.slowdown_in_bf16() > 0
    monkeypatch.setattr(arithmetic, "slowdown_in_bf16", lambda: slowdown)
    arithmetic.advise_on_precision(TrainingOptions(output_dir="x", mixed_precision=precision), torch.device(device))
    assert ("3.0 times as long in bf16" in caplog.text) == said


@pytest.mark.parametrize("slowdown, precision, other", [(3.0, "no", 0.5), (0.5, "bf16", 3.0)])
def test_auto_is_the_faster_precision_and_stays_that_of_the_run(tmp_path, monkeypatch, slowdown, precision, other):
    run = dict(checkpoints_total_limit=10, max_train_steps=2)
    fit(tmp_path / "told", mixed_precision=precision, **run)
    monkeypatch.setattr(arithmetic, "slowdown_in_bf16", lambda: slowdown)
    fit(tmp_path / "auto", mixed_precision="auto", **run)
    assert contents(tmp_path / "auto") == contents(tmp_path / "told")
    monkeypatch.setattr(arithmetic, "slowdown_in_bf16", lambda: other)  # the run goes on, on another machine
    run |= dict(max_train_steps=4, resume_from_checkpoint="latest")
    for folder, asked in (("told", precision), ("auto", "auto")):
        fit(tmp_path / folder, mixed_precision=asked, **run)
    assert contents(tmp_path / "auto") == contents(tmp_path / "told")
    assert read_record(tmp_path / "auto")["mixed_precision"] == precision


def test_auto_refuses_to_go_on_in_fp16_on_a_cpu(tmp_path):
    (tmp_path / RECORD).write_text('{"mixed_precision": "fp16"}')
    with pytest.raises(ValueError, match="fp16 needs a GPU, and this is a CPU"):
        arithmetic.fit_to_machine(TrainingOptions(output_dir=str(tmp_path), mixed_precision="auto"))


@pytest.mark.parametrize("kind", ["autoencoder", "fixed", "learned"])
def test_two_accumulated_passes_equal_one_of_twice_the_batch(tmp_path, kind):
    def one(name, **options):
        if kind == "autoencoder":
            model, dataset, prepare = make_autoencoder(), make_images(), prepare_images
        else:  # the noise belongs to the row here, since that of the loop belongs to the pass
            model, dataset = make_vae(gamma=kind, gamma_init=0.5), rows
            prepare = lambda batch, noise, step: {"inputs": batch["x"], "noise": batch["eps"]}  # noqa: E731
        exact = dict(learning_rate=0.1, adam_epsilon=1.0, lr_scheduler="constant", logging_steps=1)
        return fit(tmp_path / name, model, dataset, prepare, **exact, **options).state_dict()

    rows = make_rows()
    double = one("double", train_batch_size=8)
    halves = one("halves", train_batch_size=4, gradient_accumulation_steps=2)
    assert_close(halves, double, rtol=2e-5, atol=1e-6)
    for left, right in zip(stats_of(tmp_path / "halves"), stats_of(tmp_path / "double"), strict=True):
        del left["grad_norm"], right["grad_norm"], left["learning_rate"], right["learning_rate"]
        left.pop("active_units", None), right.pop("active_units", None)  # a count over the rows of one pass
        assert left == pytest.approx(right, rel=1e-5)
    start = make_autoencoder() if kind == "autoencoder" else make_vae(gamma=kind, gamma_init=0.5)
    assert any(not torch.allclose(value, double[name], rtol=1e-3) for name, value in start.state_dict().items())


def trained_plainly(model, dataset, prepare, max_grad_norm, learning_rate, adam_epsilon, steps=8, batch_size=4):
    """What the loop comes to, without anything that makes it fast; the moving average of the weights."""
    gamma = [parameter for name, parameter in model.named_parameters() if name == "log_gamma"]
    others = [parameter for name, parameter in model.named_parameters() if name != "log_gamma"]
    groups = [{"params": others}] + [{"params": gamma, "lr": 10 * learning_rate}] * bool(gamma)
    settings = dict(lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, eps=adam_epsilon)
    optimizer = torch.optim.AdamW(groups, **settings, foreach=False, fused=False)
    learned, average = dict(model.named_parameters()), {}
    source = Noise(0, batch_size, torch.device("cpu"))
    for step, indices in enumerate(GlobalBatchSampler(len(dataset), batch_size, 0, 0, 1, 0, steps)):
        noise = source.at(step, slice(batch_size))
        optimizer.zero_grad(set_to_none=False)
        model(**prepare(dataset.__getitems__(indices), noise, step)).loss.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm, foreach=False)
        optimizer.step()
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        decay = min(0.999, (1 + step) / (10 + step))
        for name, tensor in weights.items():
            is_averaged = step > 0 and name in learned
            average[name] = decay * average[name] + (1 - decay) * tensor if is_averaged else tensor
    return average


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["autoencoder", "learned", "analytic"])
def test_speed_changes_nothing(tmp_path, kind, max_grad_norm):
    """Fused AdamW, channels last, gradients set to none, averaging and norms by foreach, against a plain loop."""
    if kind == "autoencoder":
        models, dataset, prepare = [make_autoencoder(), make_autoencoder()], make_images(), prepare_images
    else:
        models, dataset, prepare = [make_vae(gamma=kind), make_vae(gamma=kind)], make_rows(), prepare_rows
    exact = dict(learning_rate=0.1, adam_epsilon=1.0, max_grad_norm=max_grad_norm)
    start = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    plain = trained_plainly(models[0], dataset, prepare, **exact)
    ours = fit(tmp_path, models[1], dataset, prepare, **exact, lr_scheduler="constant")
    assert_close(dict(ours.state_dict()), plain, rtol=2e-5, atol=1e-6)
    assert any(not torch.allclose(value, plain[name], rtol=1e-3) for name, value in start.items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_the_run(tmp_path):
    runs = {flag: fit(tmp_path / str(flag), torch_compile=flag, adam_epsilon=1.0) for flag in (True, False)}
    assert_close(dict(runs[True].state_dict()), dict(runs[False].state_dict()), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_trains(tmp_path, name):
    fit(tmp_path, lr_scheduler=name)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert len(rates) == 4 and rates[1] > 0 and (rates[-1] == rates[1]) == name.startswith("constant")


def test_moving_average_is_its_recurrence(tmp_path):
    """a_1 = w_1; a_t = d a_{t-1} + (1 - d) w_t, where d is at most t / (t + 9)."""
    decay = 0.25  # 3 / 12: the cap binds from the fifth update on
    fit(tmp_path, ema_decay=decay, checkpointing_steps=1, checkpoints_total_limit=100, learning_rate=0.1)
    average = None
    for step in range(1, 9):
        weights = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        if average is None:
            average = {name: tensor.double() for name, tensor in weights.items()}
        now = min(decay, step / (step + 9))
        for name, tensor in weights.items():
            is_buffer = name in ("log_gamma", "gamma_updates", "input_mean", "input_std")  # gamma is a mean already
            average[name] = tensor.double() if is_buffer else now * average[name] + (1 - now) * tensor.double()
        saved = load_file(tmp_path / f"checkpoint-{step}" / "ema" / "model.safetensors")
        assert_close({name: tensor.double() for name, tensor in saved.items()}, average, rtol=1e-5, atol=1e-6)


def test_the_model_that_is_saved_and_returned_is_the_average_if_there_is_one(tmp_path):
    for use_ema in (True, False):
        model = fit(tmp_path / str(use_ema), use_ema=use_ema)
        folder = tmp_path / str(use_ema)
        saved = (folder / "model.safetensors").read_bytes()
        last = folder / "checkpoint-8"
        assert saved == (last / "ema" / "model.safetensors" if use_ema else last / "model.safetensors").read_bytes()
        assert_close(dict(model.state_dict()), load_file(folder / "model.safetensors"), rtol=0, atol=0)
        assert not model.training
    assert load_file(tmp_path / "True" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert (tmp_path / "True" / "model.safetensors").read_bytes() != saved


def test_learning_rate_warms_up_and_follows_the_cosine(tmp_path):
    fit(tmp_path, max_train_steps=12, lr_warmup_steps=4, learning_rate=0.01, logging_steps=1)
    for line in stats_of(tmp_path):
        step = line["step"]  # the rate of the step that comes next
        expected = step / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 8))
        assert line["learning_rate"] == pytest.approx(0.01 * expected, abs=1e-12)


def test_log_gamma_has_its_own_rate_and_no_decay(tmp_path):
    """Adam's first step is the learning rate times the sign of the gradient."""
    model = make_vae(gamma="learned", gamma_init=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    once = dict(max_train_steps=1, lr_scheduler="constant", learning_rate=1e-3, gamma_lr_multiplier=20.0)
    after = fit(tmp_path / "a", model, **once, use_ema=False, adam_weight_decay=10.0).state_dict()
    assert abs(after["log_gamma"] - before["log_gamma"]).item() == pytest.approx(20e-3, rel=1e-4)
    moved = after["affine_skip.weight"] - before["affine_skip.weight"] * (1 - 10.0 * 1e-3)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)


def test_clipping_bounds_the_step_and_reports_the_norm_before(tmp_path):
    sgd_like = dict(max_train_steps=1, lr_scheduler="constant", adam_epsilon=1e6, learning_rate=1.0, use_ema=False)
    before = make_vae().state_dict()

    def step_length(name, **options):
        after = fit(tmp_path / name, **sgd_like, **options).state_dict()
        moved = [(after[key].double() - before[key].double()).square().sum() for key in before if "gamma" not in key]
        return 1e6 * sum(moved).sqrt().item(), stats_of(tmp_path / name)[0]["grad_norm"]

    free, norm = step_length("free")
    clipped, same_norm = step_length("clipped", max_grad_norm=0.01)
    assert same_norm == norm > 1
    assert free == pytest.approx(norm, rel=0.05)
    assert clipped < 0.02


def flags() -> dict:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "tf32": (matmul.allow_tf32, cudnn.allow_tf32),
        "benchmark": cudnn.benchmark,
        "deterministic": (cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
    }


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"tf32": (False, False), "benchmark": True, "deterministic": (False, False)}),
        ({"allow_tf32": True}, {"tf32": (True, True), "benchmark": True, "deterministic": (False, False)}),
        ({"cudnn_benchmark": False}, {"tf32": (False, False), "benchmark": False, "deterministic": (False, False)}),
        ({"deterministic": True}, {"tf32": (False, False), "benchmark": False, "deterministic": (True, True)}),
    ],
)
def test_a_gpu_computes_as_the_options_say_while_it_trains(tmp_path, monkeypatch, options, expected):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before, seen = flags(), []

    def prepare(batch, noise, step):
        seen.append(flags())
        return prepare_rows(batch, noise, step)

    fit(tmp_path, prepare=prepare, **options)
    assert seen == [expected] * 8
    assert flags() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own


# ------------------------------------------------------------------------------------------------------ divergence


@pytest.fixture(params=["no", "fp16"])
def precision(request):
    """float32, and fp16 with a scaled loss."""
    with fp16_on_cpu():
        yield {"mixed_precision": request.param}


@pytest.mark.parametrize("good_steps", [0, 1, 5])
def test_nan_stops_the_run_and_leaves_the_state_before_it(tmp_path, good_steps, precision):
    """Also when only the second of two accumulated passes is spoilt: the first has moved the analytic gamma."""
    calls = []

    def prepare(batch, noise, step):
        calls.append(step)
        return (
            spoilt_at(good_steps)(batch, noise, step) if calls.count(step) == 2 else prepare_rows(batch, noise, step)
        )

    twice = dict(gradient_accumulation_steps=2, checkpointing_steps=1000, **precision)
    with pytest.raises(TrainingDiverged, match=rf"step {good_steps + 1} .*loss, nll, .*checkpoint-{good_steps}\b"):
        fit(tmp_path / "bad", prepare=prepare, **twice)
    assert [path.name for path in list_checkpoints(tmp_path / "bad")] == [f"checkpoint-{good_steps}"]
    if good_steps:
        fit(tmp_path / "good", **twice | dict(checkpointing_steps=good_steps, checkpoints_total_limit=10))
        stopped = contents(tmp_path / "bad" / f"checkpoint-{good_steps}")
        assert stopped == contents(tmp_path / "good" / f"checkpoint-{good_steps}")
    resume(tmp_path / "bad", **twice)  # the data is sound now
    fit(tmp_path / "straight", **twice)
    assert contents(tmp_path / "straight").items() <= contents(tmp_path / "bad").items()


@pytest.mark.parametrize("term", ["loss", "nll", "kl", "squared_error"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_term_is_named_even_if_the_gradient_is_finite(tmp_path, term, value, precision):
    def spoil(model, arguments, output):
        if model.gamma_updates == 3:
            output["loss"] = output.loss + value
            output[term] = output[term] + value

    model = make_vae()
    model.register_forward_hook(spoil)
    names = "loss" if term == "loss" else f"loss, {term}"
    with pytest.raises(TrainingDiverged, match=rf"step 3 .*\({names}\)"):
        fit(tmp_path, model, **precision)


def test_nan_in_the_gradient_alone_is_found(tmp_path):
    def prepare(batch, noise, step):
        if step == 2:
            model.affine_skip.bias.register_hook(lambda gradient: gradient * math.nan)
        return prepare_rows(batch, noise, step)

    model = make_vae()
    with pytest.raises(TrainingDiverged, match=r"step 3 .*\(the gradient\)"):
        fit(tmp_path, model, prepare=prepare)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gamma_that_is_not_finite_is_named_and_not_saved(tmp_path, value, precision):
    def prepare(batch, noise, step):
        if step == 4:
            model.log_gamma.data.fill_(value)
        return prepare_rows(batch, noise, step)

    model = make_vae(gamma="learned")
    with pytest.raises(TrainingDiverged, match=r"not finite \(gamma\).* last good state is checkpoint-3\. Resume"):
        fit(tmp_path, model, prepare=prepare, **precision)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    resumed = resume(tmp_path, model=make_vae(gamma="learned"), learning_rate=1e-4, **precision)
    assert all(tensor.isfinite().all() for tensor in resumed.state_dict().values())


@pytest.mark.parametrize("steps", [2, 8])  # the bad step is the last one, or not
def test_an_update_that_spoils_the_weights_is_not_saved(tmp_path, steps):
    """The loss and gradient of that step are finite; the rate of the second is beyond float32."""
    every = dict(checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=steps)
    with pytest.raises(TrainingDiverged, match=r"to step 2 .*\(gamma, .*weight.* last good state is checkpoint-1\."):
        fit(tmp_path, make_vae(gamma="learned"), learning_rate=1e39, **every)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not (tmp_path / "model.safetensors").exists()
    resumed = resume(tmp_path, model=make_vae(gamma="learned"), learning_rate=1e-3, **every)
    assert all(tensor.isfinite().all() for tensor in resumed.state_dict().values())


def test_the_checkpoint_before_a_divergence_is_kept(tmp_path):
    """What led to the NaN may be in the newest state already."""
    with pytest.raises(TrainingDiverged):
        fit(tmp_path, prepare=spoilt_at(5), checkpoints_total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-5"]


# ------------------------------------------------------------------------------------------------------------ fp16


def test_fp16_is_refused_on_a_cpu_where_nothing_would_be_half(tmp_path):
    with pytest.raises(ValueError, match="mixed_precision fp16 needs a GPU, and this is a CPU: use bf16, or no"):
        fit(tmp_path / "run", mixed_precision="fp16")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kill_step", [1, 2, 3, 5])  # steps 1 and 2 are skipped: the scale starts too high
def test_fp16_goes_on_bit_for_bit(tmp_path, kill_step):
    options = dict(mixed_precision="fp16", logging_steps=1, checkpointing_steps=1, checkpoints_total_limit=10)
    with fp16_on_cpu():
        fit(tmp_path / "straight", **options)
        with pytest.raises(Killed):
            fit(tmp_path / "killed", prepare=killed_at(kill_step), **options)
        resume(tmp_path / "killed", **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    saved = list_checkpoints(tmp_path / "straight")
    scales = [2.0**16] + [json.loads((path / "progress.json").read_text())["scaler"]["scale"] for path in saved]
    weights = [load_file(path / "model.safetensors")["affine_skip.weight"] for path in saved]
    skipped = [line["grad_norm"] is None for line in stats_of(tmp_path / "straight")]  # JSON has no infinity
    assert skipped == [True, True] + [False] * 6
    assert skipped == [after == before / 2 for before, after in pairwise(scales)]
    assert skipped[1:] == [torch.equal(before, after) for before, after in pairwise(weights)]


def test_fp16_stops_when_no_scale_helps(tmp_path):
    def prepare(batch, noise, step):
        if step == 4:
            model.affine_skip.bias.register_hook(lambda gradient: gradient * math.inf)
        return prepare_rows(batch, noise, step)

    model = make_vae()
    with fp16_on_cpu(), pytest.raises(
        TrainingDiverged, match=r"however small the loss is scaled.* checkpoint-32\. .*start anew .*bf16"
    ):  # fmt: skip
        fit(tmp_path, model, prepare=prepare, mixed_precision="fp16", max_train_steps=50, checkpointing_steps=4)
    last = list_checkpoints(tmp_path)[-1]
    assert last.name == "checkpoint-32"
    assert json.loads((last / "progress.json").read_text())["scaler"]["scale"] == 2.0**-14  # the first below 1e-4
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_names_and_pruning_of_checkpoints(tmp_path):
    fit(tmp_path, max_train_steps=11, checkpointing_steps=3, checkpoints_total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-11",
    ]  # not by the alphabet
    names = {"checksums.json", "config.json", "model.safetensors", "optimizer.safetensors", "progress.json"}
    assert set(contents(tmp_path / "checkpoint-11")) == names | {"ema/config.json", "ema/model.safetensors"}


def test_only_complete_checkpoints_are_listed(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", ".checkpoint-11.partial", "checkpoint-12.old", "checkpoint-", "x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("kill_step", [1, 3, 4, 7])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, kill_step, accumulation):
    options = dict(gradient_accumulation_steps=accumulation, checkpoints_total_limit=10)
    fit(tmp_path / "straight", **options)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", prepare=killed_at(kill_step), **options)
    with open(tmp_path / "killed" / "stats.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 0.1')  # killed in the middle of a line
    resume(tmp_path / "killed", **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert [line["step"] for line in stats_of(tmp_path / "killed")] == [2, 4, 6, 8]


@pytest.mark.parametrize("gamma", ["learned", "fixed"])
def test_resume_with_every_kind_of_gamma(tmp_path, gamma):
    """`log_gamma` has a parameter group, or is a buffer; the fixture's runs have the analytic one."""
    fit(tmp_path / "straight", make_vae(gamma=gamma))
    with pytest.raises(Killed):
        fit(tmp_path / "killed", make_vae(gamma=gamma), prepare=killed_at(5))
    resume(tmp_path / "killed", model=make_vae(seed=9, gamma=gamma))  # its own weights must not matter
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_resume_with_convolutions(tmp_path):
    """Their weights lie channels last in memory, and so must their moments when fused AdamW walks through both."""

    def images(name, steps, **options):
        return fit(
            tmp_path / name, make_autoencoder(), make_images(), prepare_images, max_train_steps=steps, **options
        )

    constant = dict(lr_scheduler="constant")  # so that a shorter run is the beginning of the longer one
    images("straight", 8, **constant)
    images("resumed", 6, **constant)
    images("resumed", 8, **constant, resume_from_checkpoint="latest")
    last = "checkpoint-8"
    assert contents(tmp_path / "resumed" / last) == contents(tmp_path / "straight" / last)


@pytest.mark.parametrize("steps", [3, 0])  # of the first part; 0: NaN at once
def test_a_run_goes_on_with_a_lower_learning_rate(tmp_path, steps):
    """Step t takes the rate that a run with the lower rate from its start would have had there."""
    options = dict(logging_steps=1, lr_warmup_steps=4, gamma_lr_multiplier=5.0, checkpointing_steps=1)
    fit(tmp_path / "lower", make_vae(gamma="learned"), learning_rate=1e-4, **options)
    with pytest.raises(TrainingDiverged):
        fit(tmp_path / "run", make_vae(gamma="learned"), prepare=spoilt_at(steps), **options)
    weights = []

    def prepare(batch, noise, step):
        weights.append((model.log_gamma.detach().clone(), model.affine_skip.bias.detach().clone()))
        return prepare_rows(batch, noise, step)

    model = make_vae(gamma="learned")
    resume(tmp_path / "run", model=model, prepare=prepare, learning_rate=1e-4, **options)
    rates = {name: [line["learning_rate"] for line in stats_of(tmp_path / name)][steps:] for name in ("run", "lower")}
    assert rates["run"] == rates["lower"]
    for before, after in pairwise(weights[:3]):  # Adam moves a weight by about its rate
        used = 1e-4 * (steps + 1 if before is weights[1] else steps) / 4
        assert (after[1] - before[1]).abs().max() <= 1.5 * used
        assert (after[0] - before[0]).abs() <= 5 * 1.5 * used


@pytest.mark.parametrize("name", ["{folder}/checkpoint-3", "checkpoint-3", "checkpoint-6/", "./checkpoint-3"])
def test_resume_from_a_named_checkpoint(interrupted, reference, monkeypatch, name):
    """A name means the checkpoint in the folder of the run, whatever is in the working folder."""
    elsewhere = interrupted.with_name("elsewhere")
    fit(elsewhere, make_vae(seed=1), checkpoints_total_limit=10)
    monkeypatch.chdir(elsewhere)
    named = name.format(folder=interrupted)
    fit(interrupted, resume_from_checkpoint=named, checkpoints_total_limit=10)
    assert contents(interrupted) == contents(reference)


def test_a_stream_is_resumed_where_it_stopped(tmp_path):
    class Stream(IterableDataset):
        def set_position(self, first_batch, batch_size, rank, world_size):
            self.first, self.size, self.place = first_batch, batch_size, (rank, world_size)

        def __iter__(self):
            assert self.place == (0, 1)
            for number in range(self.first, 10**6):
                yield {"x": torch.randn(self.size, DIM, generator=torch.Generator().manual_seed(number))}

    options = dict(gradient_accumulation_steps=2, dataset=Stream())
    fit(tmp_path / "straight", **options)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", prepare=killed_at(4), **options)
    resume(tmp_path / "killed", **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_what_is_half_written_is_ignored_and_removed(interrupted, reference):
    """A checkpoint, and a file such as the record."""
    partial = interrupted / ".checkpoint-7.partial"
    partial.mkdir()
    (partial / "progress.json").write_text('{"step": 7')
    for name in ("training_options.json", "model.safetensors"):
        (interrupted / f".partial.4711.{name}").write_text("{")
    resume(interrupted, checkpoints_total_limit=10)
    assert not list(interrupted.glob(".*partial*"))
    assert contents(interrupted) == contents(reference)


def test_old_statistics_survive_a_crash_while_they_are_cut(interrupted, monkeypatch):
    before = (interrupted / "stats.jsonl").read_text()
    real = os.replace

    def failing(source, target):
        if Path(target).name == "stats.jsonl":
            raise Killed
        return real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Killed):
        resume(interrupted)
    assert (interrupted / "stats.jsonl").read_text() == before != ""


def test_the_checkpoint_of_another_model_is_refused(interrupted):
    with pytest.raises(ValueError, match="does not fit the model: start with the model options that the run"):
        resume(interrupted, model=make_vae(hidden_dim=9))


def test_a_checkpoint_that_does_not_exist_is_refused(interrupted):
    with pytest.raises(FileNotFoundError, match=r"not a checkpoint of this project.*checkpoint-3.*checkpoint-6"):
        fit(interrupted, resume_from_checkpoint=str(interrupted / "checkpoint-5"))


def test_a_second_run_in_the_same_folder_is_refused(interrupted):
    before = contents(interrupted)
    with pytest.raises(FileExistsError, match="already holds a run up to step 6: resume it with --resume_from_check"):
        fit(interrupted)
    assert contents(interrupted) == before


def test_latest_without_any_checkpoint_starts_the_run(tmp_path, reference):
    with pytest.raises(Killed):
        fit(tmp_path, prepare=killed_at(2))
    resume(tmp_path, checkpoints_total_limit=10)
    assert contents(tmp_path) == contents(reference)


def test_a_finished_run_is_not_trained_again(tmp_path):
    fit(tmp_path)
    before = contents(tmp_path)
    resume(tmp_path, prepare=killed_at(0))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change, told",
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"adam_beta2": 0.5}, "adam_beta2 0.99 -> 0.5"),
        ({"train_batch_size": 5}, "train_batch_size 4 -> 5"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
        ({"use_ema": False}, "use_ema True -> False"),
        ({"mixed_precision": "bf16"}, "mixed_precision 'no' -> 'bf16'"),
    ],
)
def test_resuming_with_other_options_is_refused(interrupted, change, told):
    written = (interrupted / "training_options.json").read_text()
    with pytest.raises(ValueError, match=f"other options .{told}.: choose another --output_dir"):
        resume(interrupted, **change)
    assert (interrupted / "training_options.json").read_text() == written


def test_resuming_with_another_model_or_data_set_is_refused(tmp_path):
    def options(**changes):
        stage = dict(stage="vae", dataset_name="digits", model={"hidden_dim": 8}, output_dir=str(tmp_path))
        return StageOptions(**TINY_RUN | stage | changes)

    train(Stage(make_vae(), make_rows(), prepare_rows), options(max_train_steps=3))
    for change in ({"model": {"hidden_dim": 9}}, {"dataset_name": "mnist"}, {"kl_warmup_steps": 5}):
        with pytest.raises(ValueError, match=f"other options .{next(iter(change))} "):
            train(Stage(make_vae(), make_rows(), prepare_rows), options(**change, resume_from_checkpoint="latest"))


def test_options_that_do_not_change_the_weights_may_change(interrupted, reference):
    moved = interrupted.with_name("moved")
    shutil.move(interrupted, moved)
    resume(moved, checkpointing_steps=2, checkpoints_total_limit=9, logging_steps=3, dataloader_num_workers=1)
    assert (moved / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert [line["step"] for line in stats_of(moved)] == [2, 4, 6, 8]


# --------------------------------------------------------------------------------------------- statistics, warnings


def test_a_line_holds_the_means_since_the_line_before(tmp_path):
    fit(tmp_path / "fine", logging_steps=1, gradient_accumulation_steps=2)
    fit(tmp_path / "coarse", logging_steps=3, gradient_accumulation_steps=2)
    fine, coarse = stats_of(tmp_path / "fine"), stats_of(tmp_path / "coarse")
    assert [line["step"] for line in coarse] == [3, 6, 8]
    for name in ("loss", "nll", "kl", "squared_error", "gamma", "active_units"):
        values = [line[name] for line in fine]
        means = [np.mean(values[:3]), np.mean(values[3:6]), np.mean(values[6:])]
        assert [line[name] for line in coarse] == pytest.approx(means, rel=1e-12)


def line(step, kl=10.0, active_units=4.0):
    return {"step": step, "kl": kl, "active_units": active_units, "gamma": 0.1}


def test_a_low_kl_is_told_once_after_some_patience():
    watch = HealthWatch(latent_dim=4, first_step=10)
    told = [watch(line(step, kl=0.1, active_units=4.0)) for step in range(30)]
    first = 10 + HealthWatch.patience - 1
    assert [step for step, warnings in enumerate(told) if warnings] == [first]
    assert "KL has stayed below 0.5" in told[first][0] and "gamma_init=0.1" in told[first][0]


def test_a_kl_that_recovers_is_not_told():
    watch = HealthWatch(latent_dim=4, first_step=0)
    kl = ([0.1] * (HealthWatch.patience - 1) + [1.0]) * 4
    assert not any(watch(line(step, value)) for step, value in enumerate(kl))


def test_few_active_units_are_told_once():
    watch = HealthWatch(latent_dim=16, first_step=5)
    told = [watch(line(step, active_units=3.0)) for step in range(20)]
    assert [step for step, warnings in enumerate(told) if warnings] == [5]
    assert "only 3 of 16 latent dimensions" in told[5][0]


def test_a_healthy_vae_and_an_autoencoder_are_left_in_peace():
    watch = HealthWatch(latent_dim=16, first_step=0)
    assert not any(watch(line(step, kl=3.0, active_units=4.0)) for step in range(50))
    assert not any(watch({"step": step, "loss": 1.0}) for step in range(50))


def test_a_gamma_at_its_floor_is_told_once_and_is_no_warning():
    watch = HealthWatch(latent_dim=16, first_step=100, min_gamma=0.01)
    told = [watch({"step": step, "gamma": max(0.01, 1 / (step + 1))}) for step in range(200)]
    (sentence,) = sum(told, [])
    assert told[99] == [sentence]
    assert sentence.startswith("note: gamma has reached its floor of 0.01 at step 99: ")
    assert "as it should be" in sentence and "warning" not in sentence


@pytest.mark.parametrize("gamma, told", [("learned", 1), ("analytic", 1), ("fixed", 0)])
@pytest.mark.parametrize("min_gamma", [0.5, 1e-8])
def test_training_says_that_gamma_is_at_its_floor(tmp_path, capsys, gamma, told, min_gamma):
    """Inputs of variance 1e-4, which a VAE of that size need not even model."""
    rows = TensorRows({"x": 0.01 * torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(0))})
    options = dict(max_train_steps=40, logging_steps=5, lr_scheduler="constant", learning_rate=1e-2, use_ema=False)
    fit(tmp_path, make_vae(gamma=gamma, min_gamma=min_gamma, gamma_init=0.6), rows, **options)
    assert capsys.readouterr().err.count("gamma has reached its floor of 0.5 at step") == told * (min_gamma == 0.5)


@pytest.mark.parametrize("gamma_init, collapses", [(1.0, True), (0.1, False)])
def test_a_second_stage_that_starts_with_a_large_gamma_collapses_and_says_so(tmp_path, capsys, gamma_init, collapses):
    """Latents +-1 in every direction: the modes are found only while gamma is below their variance."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (512, DIM), generator=generator) * 2 - 1
    z = 0.95 * signs + (1 - 0.95**2) ** 0.5 * torch.randn(512, DIM, generator=generator)
    model = make_vae(gamma="learned", gamma_init=gamma_init, latent_dim=LATENT_DIM, hidden_dim=16)
    long = dict(max_train_steps=160, train_batch_size=64, learning_rate=2e-3, logging_steps=10, lr_warmup_steps=0)
    fit(tmp_path, model, TensorRows({"x": z}), checkpointing_steps=1000, **long)
    assert capsys.readouterr().err.count("this VAE has collapsed") == collapses
    assert (stats_of(tmp_path)[-1]["kl"] < HealthWatch.min_kl) == collapses


# ---------------------------------------------------------------------------------- pictures, trackers, Hub, options


def preview(model):
    assert not model.training and not torch.is_grad_enabled()
    return Image.new("RGB", (8, 8), (10, 20, 30))


def test_samples_are_drawn_on_the_way_and_at_the_end(tmp_path):
    fit(tmp_path, preview=preview, sample_steps=3)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-0000003.png", "step-0000006.png", "step-0000008.png"]


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(tmp_path, preview=preview, report_to="tensorboard", hub_token="hf_very_secret")
    events = accumulator.EventAccumulator(str(tmp_path / "logs" / "vaeplus")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.value for event in events.Scalars("kl")] == pytest.approx(
        [line["kl"] for line in stats_of(tmp_path)]
    )
    assert [image.step for image in events.Images("samples")] == [8]
    assert not [name for name, content in contents(tmp_path).items() if b"hf_very_secret" in content]


@pytest.mark.parametrize(
    "options, told",
    [
        *(({name: 0}, f"{name} must be positive, got 0") for name in (
            "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
            "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "adam_epsilon")),
        *(({name: -1}, f"{name} must not be negative, got -1") for name in (
            "lr_warmup_steps", "max_grad_norm", "sample_steps", "dataloader_num_workers", "seed",
            "gamma_lr_multiplier")),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must not be negative, got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must lie in \[0, 1\), got -0.1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16, auto, got 'fp8'"),
        ({"push_to_hub": True}, "push_to_hub needs hub_model_id"),
        ({"learning_rate": "1e-3"}, r"learning_rate must be .*got '1e-3' \(YAML needs the dot in 1.0e-3\)"),
        ({"max_train_steps": 10.5}, "max_train_steps must be int, got 10.5"),
        ({"max_train_steps": "10"}, "max_train_steps must be int, got '10'"),
        ({"max_train_steps": True}, "max_train_steps must be int, got True"),
        ({"learning_rate": True}, "learning_rate must be float or int, got True"),
        ({"use_ema": 1}, "use_ema must be bool, got 1"),
        ({"output_dir": None}, "output_dir must be str, got None"),
        ({"resume_from_checkpoint": 3}, "resume_from_checkpoint must be str or nothing, got 3"),
        ({"hub_token": True}, "hub_token must be str or nothing, got bool"),
    ],
)  # fmt: skip
def test_options_out_of_range_or_of_another_type_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        TrainingOptions(**options)


def test_a_whole_number_is_a_fine_float():
    assert TrainingOptions(learning_rate=1, max_grad_norm=2, ema_decay=0).learning_rate == 1


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the data set is empty"):
        fit(tmp_path, dataset=TensorRows({"x": torch.zeros(0, DIM)}))


def test_a_data_set_smaller_than_a_batch_is_repeated(tmp_path):
    seen = []

    def prepare(batch, noise, step):
        seen.append(batch["x"][:, 0].tolist())
        return prepare_rows(batch, noise, step)

    fit(tmp_path, dataset=TensorRows({"x": torch.arange(3.0)[:, None].expand(3, DIM)}), prepare=prepare)
    sequence = sum(seen, [])
    assert {len(batch) for batch in seen} == {4}
    assert all(sorted(sequence[start : start + 3]) == [0, 1, 2] for start in range(0, 30, 3))


def test_precision_may_differ_between_two_runs_of_one_process(tmp_path, reference):
    fit(tmp_path / "bf16", mixed_precision="bf16", checkpoints_total_limit=10)
    fit(tmp_path / "plain", checkpoints_total_limit=10)
    assert contents(tmp_path / "plain") == contents(reference) != contents(tmp_path / "bf16")
    assert PartialState().num_processes == 1


def test_the_trackers_are_those_of_accelerate():
    assert sorted(get_args(Tracker)) == sorted(["none", *(each.value for each in LoggerType)])
