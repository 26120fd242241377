"""Draw docs/images/speed.png from results/bench_train_throughput.json and results/bench_scaling.json.

python benchmarks/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def draw(throughput: dict, scaling: dict) -> Figure:
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    speed, pixels, count = figure.subplots(1, 3, width_ratios=[1.4, 1, 1])

    cases = list(dict.fromkeys(row["case"] for row in throughput["throughput"] if row["case"] != "ceiling"))
    rates = {(row["case"], row["candidate"]): row.get("images_per_second") for row in throughput["throughput"]}
    candidates = ["plain PyTorch, float32", "pythae, float32", "ours, float32", "ours, bf16"]
    for place, candidate in enumerate(candidates):
        bars = [rates[case, candidate] / rates[case, "pythae, float32"] for case in cases]
        speed.bar([x + 0.2 * (place - 1.5) for x in range(len(cases))], bars, 0.19, label=candidate)
    speed.set_xticks(range(len(cases)), [case.split(",")[0] for case in cases])
    speed.set_title("training throughput over pythae's", fontsize=10)
    speed.set_ylim(0, 3)
    speed.legend(fontsize=7, ncols=2, loc="upper left")

    others = ("batch", "latent_dim")
    base, *rest = scaling["network"]
    same = [base] + [row for row in rest if all(row[key] == base[key] for key in others)]
    rows = sorted(same, key=lambda row: row["size"])
    pixels.loglog([row["size"] for row in rows], [row["ms_per_step"] / row["batch"] for row in rows], "o-")
    pixels.set_title("training: ms an image against its side", fontsize=10)
    pixels.set_xticks([row["size"] for row in rows], [row["size"] for row in rows], minor=False)
    pixels.minorticks_off()

    sizes = [row["images"] for row in scaling["cache"]]
    for key, label in (("images_per_second_in_training", "in training"), ("images_per_second", "loader alone")):
        first = scaling["cache"][1][key]
        count.semilogx(sizes, [row[key] / first for row in scaling["cache"]], "o-", label=label)
    count.set_ylim(0, 1.4)
    count.set_title(f"images/s against images, over {sizes[1]:,}", fontsize=10)
    count.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    names = ("train_throughput", "scaling")
    draw(*(json.loads((ROOT / f"results/bench_{name}.json").read_text(encoding="utf-8")) for name in names)).savefig(
        ROOT / "docs/images/speed.png", dpi=110
    )
