"""What the training loop costs beside its arithmetic, and where every millisecond of a step goes.

    python benchmarks/loop_cost.py

`train()` runs as it is, on the same model, batches, precision and memory layout as a bare forward, backward and
optimizer step; both in turn. The second table is a profile (cProfile) of one run of `train()`: it slows what is
written in Python, so its shares say where to look, and the first table what the loop costs.
"""

import copy
import cProfile
import pstats
import tempfile
from pathlib import Path

import common
import torch
from common import Clock, benchmark, goal, in_turn, synthetic_images, train_and_time
from train_throughput import ADAMW, CASES, build

from hf_vaeplus.training.loop import Stage, train
from hf_vaeplus.training.options import TrainingOptions
from hf_vaeplus.training.randomness import Noise

# How often they come in the preset celeba64-cpu, in steps.
LOG_EVERY, SAVE_EVERY = 50, 500
# The functions of loop.py that every step is made of.
LOOP = ("train", "take_step", "_accumulate_gradient", "_update", "look", "_accept")
# What they call, by the name of the function and part of its file's path.
PIECES = {
    "data": [("next", ""), ("__next__", "")],
    "arguments: pixels to floats, noise": [("prepare", ""), ("__init__", "randomness.py")],
    "forward": [("_wrapped_call_impl", ""), ("__call__", "module.py")],
    "backward": [("backward", "")],
    "gradient norm and clipping": [("_clip_gradients", "loop.py")],
    "optimizer": [("wrapper", "optim"), ("zero_grad", "")],
    "learning rate": [("step", "lr_scheduler"), ("get_last_lr", "")],
    "moving average": [("_update_average", "")],
    "progress bar": [("update", "tqdm")],
    "log": [("log", "loop.py")],
    "checkpoint": [("save", "loop.py")],
}


def options_of(folder: Path, precision: str, num_steps: int, batch_size: int, **more) -> TrainingOptions:
    return TrainingOptions(
        output_dir=tempfile.mkdtemp(dir=folder),
        max_train_steps=num_steps,
        train_batch_size=batch_size,
        learning_rate=ADAMW["lr"],
        mixed_precision=precision,
        logging_steps=LOG_EVERY,
        checkpointing_steps=SAVE_EVERY,
        **more,
    )


def bare(model, arguments: list[dict], precision: str) -> float:
    """Seconds per step of forward, backward and optimizer alone, on arguments that are there already."""
    model.to(memory_format=torch.channels_last).train()
    optimizer, clock = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True), Clock()
    for each in arguments:
        clock.tick()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**each).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return clock.seconds_per_step


def profile(model, images, prepare, options) -> list[dict]:
    """Milliseconds of what the loop calls, by piece; the rest of the loop's own lines come last."""
    profiler = cProfile.Profile(common.now)
    profiler.runcall(train, Stage(model, images, prepare), options)
    stats = pstats.Stats(profiler).stats
    loop = {key for key in stats if key[0].endswith("loop.py") and key[2] in LOOP}
    found = {piece: [0, 0.0] for piece in [*PIECES, "rest of the loop", "once, before and after"]}
    found["rest of the loop"] = [options.max_train_steps, sum(stats[key][2] for key in loop)]
    for called, (*_, callers) in stats.items():
        file, _, function = called
        for caller in loop & callers.keys() if called not in loop else ():
            _, calls, _, seconds = callers[caller]
            function = function.removesuffix(">").split(".")[-1].split()[-1]
            names = [piece for piece, known in PIECES.items() for n, part in known if n == function and part in file]
            other = "rest of the loop" if calls >= options.max_train_steps else "once, before and after"
            piece = found[names[0] if names else other]
            piece[0], piece[1] = max(piece[0], calls), piece[1] + seconds
    every = dict.fromkeys(found, 1) | {"log": LOG_EVERY, "checkpoint": SAVE_EVERY}
    rows = []
    for piece, (calls, seconds) in found.items():
        per_call = 1e3 * seconds / max(1, calls)
        once = piece == "once, before and after"
        if not once and every[piece] == 1:
            per_call = 1e3 * seconds / options.max_train_steps
        rows.append({"piece": piece, "ms": per_call, "every": "-" if once else f"{every[piece]} steps",
                     "ms_per_step": 0.0 if once else per_call / every[piece]})  # fmt: skip
    total = sum(row["ms_per_step"] for row in rows)
    return [row | {"share": f"{row['ms_per_step'] / total:.1%}"} for row in rows]


def measure(args) -> dict:
    cases, costs, pieces, overheads = args.pick(["conv64"], ["conv64"], ["conv64", "conv128", "mlp"]), [], [], {}
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        for case in args.cases or cases:
            size, batch_size = CASES[case]
            batch_size = args.pick(2, batch_size, batch_size)
            num_steps = Clock.warmup + 1 + (args.pick(2, 8, 20) if case != "mlp" else args.pick(2, 100, 500))
            model, prepare = build(case)
            images = synthetic_images(Path(folder) / case, 20 * batch_size, size, 1 if case == "mlp" else 3)
            arguments, noise = [], Noise(0, batch_size, torch.device("cpu"))
            for step in range(num_steps):
                start = step % 20 * batch_size
                batch = images.batch(range(start, start + batch_size))
                arguments.append(prepare(batch, noise.at(step, slice(batch_size)), step))

            def whole(case=case, num_steps=num_steps, batch_size=batch_size, images=images, prepare=prepare, **more):
                options = options_of(folder, args.precision, num_steps, batch_size, **more)
                return train_and_time(copy.deepcopy(build(case)[0]), images, prepare, options)

            candidates = {
                "bare": lambda case=case, arguments=arguments: bare(build(case)[0], arguments, args.precision),
                "train()": whole,
                "train(), EMA and clipping": lambda whole=whole: whole(use_ema=True, max_grad_norm=300.0),
            }
            seconds = in_turn(candidates, args, case)
            options = options_of(folder, args.precision, num_steps, batch_size, use_ema=True, max_grad_norm=300.0)
            found = [{"case": case} | row for row in profile(model, images, prepare, options)]
            pieces += found
            seldom = sum(row["ms_per_step"] for row in found if row["piece"] in ("log", "checkpoint")) / 1e3
            overheads[case] = (seconds["train()"] + seldom) / seconds["bare"] - 1
            costs += [
                {
                    "case": f"{case}, batch {batch_size}, {args.precision}",
                    "candidate": name,
                    "ms_per_step": 1e3 * each,
                    "over_bare": each / seconds["bare"] - 1,
                    "with_log_and_checkpoint": (each + seldom) / seconds["bare"] - 1 if name != "bare" else None,
                }
                for name, each in seconds.items()
            ]
    goals = [goal(f"loop overhead, {case}", overhead, "<= 0.05") for case, overhead in overheads.items()]
    return {"overhead": next(iter(overheads.values())), "cost_of_the_loop": costs, "pieces": pieces, "goals": goals}


def options(parser):
    parser.add_argument("--cases", nargs="+", choices=[*CASES], help="default: all; of a quick run conv64")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")


if __name__ == "__main__":
    raise SystemExit(benchmark("loop_cost", __doc__, measure, options))
