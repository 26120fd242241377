"""What a step costs on a device, counted on a simulated one, and which planted mistakes are found there.

    python benchmarks/devices.py

tests/devices/ holds the simulated accelerator, the scenarios and the mistakes. Its counts of kernel launches and of
waits are the same on every machine. The host's time is that of a second stage on tensors so small that nothing else
takes time: `train()`, the same compiled, and a bare forward, backward and optimizer step, each in turn, on the CPU.
"""

import copy
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, Clock, benchmark, goal, in_turn, train_and_time

from hf_vaeplus import VAEPlusVAEConfig, VAEPlusVAEModel
from hf_vaeplus.training.codes import TensorRows
from hf_vaeplus.training.options import TrainingOptions

ROWS, DIM = 4, 4
# Of a step of the second stage, by the same simulated device, before the loop stopped to wait (commit 1aeb7a8).
LAUNCHES_BEFORE, WAITS_BEFORE = 230, 3


def counted(args, folder: Path) -> dict:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "devices")]
    import launching
    from mistakes import MISTAKES

    few = args.pick(["stages", "second_stage"], launching.SCENARIOS, launching.SCENARIOS)
    alone = launching.alone(folder / "alone", few, args.pick(launching.OF_ONE[:1], launching.OF_ONE, launching.OF_ONE))
    found = {"scenarios": alone["scenarios"], "mistakes": alone["mistakes"], "steps": alone["steps"]}
    if not args.smoke:
        together = launching.together(folder / "together", folder / "alone")
        found = {kind: {**rows, **together.get(kind, {})} for kind, rows in found.items()}
    return {
        "steps": [{"stage": stage, **counts} for stage, counts in found["steps"].items()],
        "scenarios": [{"scenario": name, "failed": error} for name, error in found["scenarios"].items()],
        "mistakes": [
            {"mistake": MISTAKES[name].what, "kind": MISTAKES[name].kind, "found_by": error}
            for name, error in found["mistakes"].items()
        ],
    }


def host_milliseconds(args, folder: Path) -> list[dict]:
    config = VAEPlusVAEConfig(
        input_shape=(DIM,), latent_dim=DIM, hidden_dim=8, num_blocks=3, gamma="learned", gamma_init=0.1
    )
    torch.manual_seed(0)
    model, rows = VAEPlusVAEModel(config), TensorRows({"posterior": torch.rand(1_000, 2 * DIM)})

    def prepare(batch, noise, step):
        mean, std = batch["posterior"].chunk(2, dim=1)
        return {"inputs": torch.addcmul(mean, std, noise(DIM)), "noise": noise(DIM)}

    num_steps = args.pick(5, 300, 1_000)

    def whole(**more):
        options = TrainingOptions(
            output_dir=tempfile.mkdtemp(dir=folder), max_train_steps=num_steps, train_batch_size=ROWS,
            mixed_precision="bf16", use_ema=True, max_grad_norm=1.0, logging_steps=10**6, checkpointing_steps=10**6,
            **more,
        )  # fmt: skip
        return train_and_time(copy.deepcopy(model), rows, prepare, options)

    def bare():
        trained, clock = copy.deepcopy(model).train(), Clock()
        optimizer = torch.optim.AdamW(trained.parameters(), fused=True)
        inputs, noise = torch.rand(ROWS, DIM), torch.rand(ROWS, DIM)
        for _ in range(num_steps):
            clock.tick()
            with torch.autocast("cpu", torch.bfloat16):
                loss = trained(inputs, noise=noise).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return clock.seconds_per_step

    candidates = {"bare": bare, "train()": whole}
    if not args.smoke and shutil.which("g++"):
        candidates["train(), compiled"] = lambda: whole(torch_compile=True)
    seconds = in_turn(candidates, args, "host time")
    return [
        {"candidate": name, "ms_per_step": 1e3 * each, "over_bare": each / seconds["bare"]}
        for name, each in seconds.items()
    ]


def measure(args) -> dict:
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        counts = counted(args, Path(folder))
        host = host_milliseconds(args, Path(folder))
    second = next(row for row in counts["steps"] if row["stage"] == "second_stage")
    ours = next(row for row in host if row["candidate"] == "train()")
    missed = sum(row["found_by"] is None for row in counts["mistakes"])
    goals = [
        goal("waits of the host per step, second stage", second["waits"], "<= 0"),
        goal("launches per step over those before, second stage", second["launches"] / LAUNCHES_BEFORE, "<= 0.5"),
        goal("host milliseconds per step, second stage, tiny tensors", ours["ms_per_step"], "<= 1.2"),
        goal("planted mistakes that nobody notices", missed, "<= 0"),
    ]
    before = {"launches": LAUNCHES_BEFORE, "waits": WAITS_BEFORE, "commit": "1aeb7a8"}
    return {**counts, "before": before, "host_time": host, "goals": goals}


if __name__ == "__main__":
    raise SystemExit(benchmark("devices", __doc__, measure))
