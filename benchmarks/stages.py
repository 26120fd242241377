"""First VAE and second stage: steps per second, and seconds to a given NLL and KL.

    python benchmarks/stages.py

The preset quickstart (drawn faces of 8 factors, 32 x 32) trains its three stages with the real loop; seconds are those
of the training steps, without start and end. An NLL counts as reached in the first line of stats.jsonl that is below
`--vae_nll` or `--second_stage_nll`, a KL in the first above `--vae_kl` or `--second_stage_kl`; `-` is never. A quick
run stops long before: its steps per second count, its seconds to a goal do not.
"""

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from common import Clock, benchmark

from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import STAGES, load_preset
from hf_vaeplus.training.stages import all_stage_options, build_stage


def run(options) -> tuple[list[float], list[dict]]:
    """Train one stage; the moment at which each step began, and the lines of stats.jsonl."""
    stage, clock = build_stage(options), Clock()

    def timed(batch, noise, step):
        clock.tick()
        return stage.prepare(batch, noise, step)

    train(replace(stage, prepare=timed, preview=None), options)
    clock.tick()
    return clock, [
        json.loads(line)
        for line in (Path(options.output_dir) / "stats.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def seconds_to(clock: list[float], lines: list[dict], reached) -> float | None:
    steps = (line["step"] for line in lines if reached(line))
    step = next(steps, None)
    return None if step is None else clock[min(step, len(clock) - 1)] - clock[0]


def median(values: list) -> float | None:
    """Of runs that all reached it."""
    return None if None in values else statistics.median(values)


def measure(args) -> dict:
    steps, preset = args.pick(4, 120, None), load_preset("quickstart")
    more = {"max_train_samples": args.pick(64, 2_000, None)}
    more |= {"max_train_steps": steps, "logging_steps": args.pick(2, 20, 20)} if steps else {}
    goals = {stage: (getattr(args, f"{stage}_nll"), getattr(args, f"{stage}_kl")) for stage in STAGES[1:]}
    found = {stage: [] for stage in STAGES}
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        for seed in range(args.repeats if args.pick(False, False, True) else 1):
            preset["common"]["seed"] = seed
            stages = all_stage_options(preset, Path(folder) / str(seed), cache_dir=folder, **more)
            for stage, options in stages.items():
                clock, lines = run(options)
                nll, kl = goals.get(stage, (None, None))
                found[stage].append(
                    {
                        "steps_per_second": 1 / clock.seconds_per_step,
                        "last_nll": lines[-1].get("nll"),
                        "last_kl": lines[-1].get("kl"),
                        "seconds_to_nll": nll and seconds_to(clock, lines, lambda line, nll=nll: line["nll"] <= nll),
                        "seconds_to_kl": kl and seconds_to(clock, lines, lambda line, kl=kl: line["kl"] >= kl),
                    }
                )
    rows = []
    for stage, runs in found.items():
        nll, kl = goals.get(stage, (None, None))
        medians = {key: median([each[key] for each in runs]) for key in runs[0]}
        rows.append({"stage": stage, "seeds": len(runs), "steps": stages[stage].max_train_steps,
                     "batch": stages[stage].global_batch_size, "nll_goal": nll, "kl_goal": kl, **medians})  # fmt: skip
    return {"stages": rows}


def options(parser):
    parser.add_argument("--vae_nll", type=float, default=-1_000.0, help="nats per image of 3 x 32 x 32 values")
    parser.add_argument("--vae_kl", type=float, default=15.0, help="nats")
    parser.add_argument("--second_stage_nll", type=float, default=25.0, help="nats per latent of 24 dimensions")
    # Its KL starts high and falls: there is no least KL to wait for.
    parser.add_argument("--second_stage_kl", type=float, default=None, help="nats")


if __name__ == "__main__":
    raise SystemExit(benchmark("stages", __doc__, measure, options))
