"""A diagnosis as a text for people."""

from .verdict import Verdict

_NAMES = {
    "over": "over-regularised",
    "under": "under-regularised",
    "balanced": "balanced",
}
_MOST_ROWS = 16


def title(verdict: Verdict) -> str:
    """The verdict in one line."""
    return f"{_NAMES[verdict.regularization]} (confidence: {verdict.confidence})"


def as_text(verdict: Verdict, measures: dict) -> str:
    shape = " x ".join(map(str, measures["image_shape"]))
    code = " x ".join(map(str, measures["code_shape"]))
    lines = [
        f"{measures['model']}: {measures['num_images']:,} images of {shape}, code of {code}",
        "",
        f"verdict: {title(verdict)}",
        *[f"  - {reason}" for reason in verdict.reasons],
        *[f"  -> {each}" for each in verdict.prescriptions],
    ]
    for finding in verdict.findings:
        lines += ["", finding.name.replace("_", " "), f"  - {finding.reason}", f"  -> {finding.prescription}"]
    if verdict.doubts:
        lines += ["", "doubts", *[f"  - {doubt}" for doubt in verdict.doubts]]
    rows = figures(verdict, measures)
    width = max(len(name) for name, _ in rows)
    lines += ["", *[f"{name:<{width}}  {value}" for name, value in rows], "", *_dimensions(measures)]
    return "\n".join(lines)


def figures(verdict: Verdict, measures: dict) -> list[tuple[str, str]]:
    """Names and values of the overall figures."""
    error, units, gamma = measures["error"], measures["units"], measures["gamma"]
    pca = error["unexplained_by_pca"]
    rows = [
        ("squared error per image", f"{error['squared_error']:.4g} at the mean of the posterior"),
        ("", f"{error['squared_error_of_samples']:.4g} at samples of it"),
        ("variance left unexplained", f"{error['unexplained']:.2%}"),
    ]
    if verdict.estimated_r is not None:
        components = min(len(pca) - 1, max(1, round(verdict.estimated_r)))
        rows.append((f"  by PCA with {components} components", f"{pca[components]:.2%}"))
    by_variance = units["by_variance"]
    counts = [] if by_variance is None else [f"{by_variance} by posterior variance"]
    counts += [f"{units['by_mean']} by variance of the mean", f"{units['by_loss']} of {units['by_loss_of']} by loss"]
    rows.append((f"active units of {measures['latent_dim']}", ", ".join(counts)))
    if unsure := verdict.disagreements:
        shown = ", ".join(map(str, unsure[:_MOST_ROWS])) + (", ..." if len(unsure) > _MOST_ROWS else "")
        rows.append(("  where these disagree", f"number {shown}"))
    rows.append(("effective rank of the decoder's Jacobian", f"{measures['jacobian_rank']:.1f}"))
    for name, found in measures["intrinsic_dimension"].items():
        if found is not None:
            rows.append((f"intrinsic dimension of the {name}",
                         f"{found['middle']:.1f} ({found['low']:.1f} to {found['high']:.1f}; TwoNN"
                         f" {found['two_nn']:.1f}, Levina-Bickel {found['levina_bickel']:.1f})"))  # fmt: skip
    rows.append(("share of the code that half of it determines", f"{measures['redundancy']['half']:.0%}"))
    if gamma is not None:
        named = [f"{gamma[name]:.3g} {name}" for name in ("stated", "implied") if gamma[name] is not None]
        rows.append(("gamma, decoder variance", ", ".join(named) or "not known"))
        rows.append(("squared error per value", f"{gamma['error_per_value']:.3g}"))
    for name, label in (
        ("prior", "N(0, I)"),
        ("scaled_prior", "N(mean, variances)"),
        ("second_stage", "second stage"),
    ):
        if name in measures["aggregate"]:
            found = measures["aggregate"][name]
            rows.append((f"q(z) to {label}",
                         f"MMD {found['mmd']:.3g}, Frechet {found['frechet']:.3g}, sliced Wasserstein"
                         f" {found['sliced']:.2f}, nearest code {found['holes']:.2f}"))  # fmt: skip
    stage = measures.get("second_stage", {})
    if "active_units" in stage:
        rows.append(("active units of the second stage", f"{stage['active_units']} of {stage['latent_dim']}"))
    rows.append(("a second stage", verdict.second_stage))
    if measures["scale_factor"] is not None:
        rows.append(("latent scale factor for unit variance", f"{measures['scale_factor']:.4g}"))
    return rows


def _dimensions(measures: dict) -> list[str]:
    rows = sorted(
        measures["dimensions"], key=lambda row: -(row["variance_of_mean"] if row["kl"] is None else row["kl"])
    )
    unit = "channel" if len(measures["code_shape"]) > 1 else "dimension"
    lines = [f"{unit:<10}{'KL (nats)':>10}{'posterior variance':>20}{'variance of mean':>18}{'loss if replaced':>18}"]

    def shown(value, form):
        return "-" if value is None else format(value, form)

    for row in rows[:_MOST_ROWS]:
        lines.append(
            f"{row['unit']:<10}{shown(row['kl'], '.2f'):>10}{shown(row['posterior_variance'], '.4f'):>20}"
            f"{row['variance_of_mean']:>18.3f}{shown(row['loss'], '.2%'):>18}"
        )
    if len(rows) > _MOST_ROWS:
        lines.append(f"and {len(rows) - _MOST_ROWS} more, all of them in the JSON file")
    return lines
