"""A diagnosis on one page."""

import os

import numpy as np

from .text import title
from .verdict import Verdict

_COLOURS = {"under": "#d08a1d", "balanced": "#3b8f4e", "over": "#b5433a"}
_GREY = "#c4c8cc"


def draw(verdict: Verdict, measures: dict, path: str | os.PathLike) -> None:
    """Write the figure to `path`: the verdict on a scale, and four panels that it follows from."""
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplot_mosaic(
        [["scale", "scale", "scale", "scale"], ["units", "dimensions", "error", "prior"]], height_ratios=[0.7, 3]
    )
    _scale(axes["scale"], verdict, measures)
    _units(axes["units"], verdict, measures)
    _dimensions(axes["dimensions"], verdict, measures)
    _error(axes["error"], verdict, measures)
    _prior(axes["prior"], measures)
    figure.savefig(path, dpi=100)


def _scale(axis, verdict: Verdict, measures: dict):
    places = {"under": 0, "balanced": 1, "over": 2}
    labels = ("under-regularised\ntoo many dimensions", "balanced", "over-regularised\ntoo few, or drowned in noise")
    for (name, place), label in zip(places.items(), labels, strict=True):
        on = name == verdict.regularization
        axis.barh(0, 1, left=place, color=_COLOURS[name] if on else "#eceeef", edgecolor="white", height=0.9)
        axis.text(place + 0.5, 0, label, ha="center", va="center", fontsize=12 if on else 10,
                  color="white" if on else "#8a8f94", fontweight="bold" if on else "normal")  # fmt: skip
    axis.set(xlim=(0, 3), ylim=(-0.5, 0.5))
    axis.set_axis_off()
    size = " x ".join(map(str, measures["code_shape"]))
    axis.set_title(f"{measures['model']}, code of {size}: {title(verdict)}", fontsize=13, loc="left")
    found = ", ".join(name.replace("_", " ") for name in verdict.names)
    axis.text(0, -0.62, f"also: {found}" if found else "nothing else found", va="top", fontsize=11)


def _units(axis, verdict: Verdict, measures: dict):
    units = measures["units"]
    bars = [("all", measures["latent_dim"], _GREY), ("active", units["active"], _COLOURS[verdict.regularization])]
    if verdict.estimated_r is not None:
        bars.append(("data\nhave ~", verdict.estimated_r, "#44607a"))
    bars.append(("decoder\nrank", measures["jacobian_rank"], "#9fb3c4"))
    names, values, colours = zip(*bars, strict=True)
    drawn = axis.bar(range(len(bars)), values, color=colours)
    axis.bar_label(drawn, [f"{value:.1f}".removesuffix(".0") for value in values], fontsize=9)
    axis.set_xticks(range(len(bars)), names, fontsize=8)
    if max(values) > 20 * max(1e-9, min(values)):
        axis.set_yscale("symlog", linthresh=1)
    axis.set_title("dimensions of the code", fontsize=10)


def _dimensions(axis, verdict: Verdict, measures: dict):
    rows = measures["dimensions"]
    known = rows[0]["kl"] is not None
    values = sorted((row["kl"] if known else row["variance_of_mean"] for row in rows), reverse=True)[:64]
    losses = [row["loss"] for row in sorted(rows, key=lambda row: -(row["kl"] if known else row["variance_of_mean"]))]
    axis.bar(range(len(values)), values, color=_COLOURS[verdict.regularization])
    unit = "channel" if len(measures["code_shape"]) > 1 else "dimension"
    axis.set_title(
        f"{'KL (nats)' if known else 'variance'} of each {unit}\ndots: loss if replaced by noise", fontsize=10
    )
    axis.set_xlabel(f"{unit}s, sorted")
    axis.xaxis.get_major_locator().set_params(integer=True)
    other = axis.twinx()
    other.plot(range(len(values)), [100 * (loss or 0.0) for loss in losses[:64]], ".", color="#222222", ms=4)
    other.set_ylabel("% of the variance", fontsize=8)
    other.set_ylim(bottom=0)


def _error(axis, verdict: Verdict, measures: dict):
    error = measures["error"]
    pca = error["unexplained_by_pca"]
    axis.plot(range(len(pca)), [100 * max(left, 1e-5) for left in pca], color="#9fb3c4", label="PCA")
    active = min(measures["units"]["active"], len(pca) - 1)
    for name, mark, label in (("unexplained", "o", "this model"), ("unexplained_of_samples", "x", "with its noise")):
        axis.plot(
            active, 100 * max(error[name], 1e-5), mark, color=_COLOURS[verdict.regularization], label=label, ms=8
        )
    axis.set(
        yscale="log",
        xlabel=f"dimensions in use{'' if active == measures['units']['active'] else ' (more than shown)'}",
    )
    axis.set_title("% of the variance\nthat the reconstruction misses", fontsize=10)
    axis.legend(fontsize=8)


def _prior(axis, measures: dict):
    worst = measures["aggregate"]["worst"]
    edges = np.array(worst["edges"])
    middle = (edges[1:] + edges[:-1]) / 2
    width = edges[1] - edges[0]
    axis.bar(middle, worst["codes"], width, color="#9fb3c4", label="codes q(z)")
    axis.plot(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), color="#222222", label="prior N(0, 1)")
    if "second_stage" in worst:
        axis.step(middle, worst["second_stage"], where="mid", color="#3b8f4e", label="second stage")
    axis.set_title(f"codes beside the prior where they\ndiffer most (number {worst['unit']})", fontsize=10)
    axis.set_yticks([])
    axis.legend(fontsize=8)
