"""Results as tables for people."""


def results_table(results: dict) -> str:
    """What [`evaluate`] returned, for people."""
    protocol, sets = results["protocol"], results["sets"]
    crop = "largest square" if protocol["crop"] is None else f"{protocol['crop']} pixels"
    blocks = [
        f"{protocol['images']} {protocol['split']}: {protocol['num_images']:,} images in every set,"
        f" {protocol['resolution']} x {protocol['resolution']}, crop: {crop}, seed {protocol['seed']}\n"
        f"real against real: {protocol['real']}" + (" (needs as many more)" if "real" not in sets else "")
    ]
    if "images_are" in results:
        known = results["images_are"] or "not known whether seen or unseen"
        blocks[0] += f"\nreal images, reconstructions, posteriors and likelihoods: {known} in training"
    for extractor in protocol["extractors"]:
        found = {name: each["distances"][extractor["extractor"]] for name, each in sets.items()}
        block = [[found["downsample"]["distance"], "", "/ downsample", "kernel"]]
        told = "guard" in results  # not by a release before 0.1.0
        block[0] += ["sliced", *_NEIGHBOURS, "memorised", "in codes"] if told else []
        for name, each in found.items():
            ratio, kernel = each["frechet_over_downsample"], each["kernel"]
            row = [name, f"{each['frechet']:.4g}", _or_dash(ratio, ".3f"), _or_dash(kernel and kernel[0], ".3g")]
            if told:
                row.append(f"{each['sliced_wasserstein']:.4g}")
                row += [_or_dash(each["prdc"] and each["prdc"][key], ".3f") for key in _NEIGHBOURS]
                copies = each["memorised"], sets[name]["memorised_codes"]
                row += [_or_dash(each and each["share"], ".1%") for each in copies]
            block.append(row)
        blocks.append(aligned(block))
    if "guard" in results:
        blocks.append("\n".join(_guard_lines(results)))
    if bins := list(sets["downsample"]["ndb"]):
        split, count = protocol["training_split"], protocol["num_training_images"]
        block = [[f"bins of {split}, {count:,}"] + [f"{figure}/{k}" for k in bins for figure in ("NDB", "JS")]]
        for name, each in sets.items():
            pairs = [each["ndb"][k] for k in bins]
            block.append([name] + [text for p in pairs for text in (f"{p['ndb_over_k']:.3f}", f"{p['js']:.4f}")])
        blocks.append(aligned(block))
    block = []
    for prefix, title in (("autoencoder_", "autoencoder alone"), ("", "whole model")):
        if f"{prefix}psnr" in results:
            error, decibels = results[f"{prefix}squared_error"], results[f"{prefix}psnr"]
            shown = "no PSNR" if decibels is None else f"PSNR {decibels:.2f} dB"
            block.append([f"squared error per image, {title}", f"{error:.2f}", shown])
    for stage, title in (("vae", "first VAE"), ("second_stage", "second stage")):
        each = results.get(stage)
        if each and "model" in each:
            block.append([f"{title}: {each['model']}", f"{each['active_dims']} of {each['latent_dim']} dimensions"])
        elif each:
            units = f"{each['active_units_by_variance']} of {each['latent_dim']}"
            block.append([f"{title}: active units", units, f"by Burda's count {each['active_units']}"])
            block.append([f"{title}: KL", f"{each['kl']:.2f} nats", f"gamma {each['gamma']:.3g}"])
    block.append(["first VAE: MMD of q(z) and N(0, I)", f"{results['vae']['mmd']:.3g}"])
    if each := results.get("likelihood"):
        block.append(["ELBO per image", f"{each['elbo']:.2f} nats"])
        samples = f"{each['num_importance_samples']} importance samples"
        block.append(["negative log-likelihood per image", f"{each['nll']:.2f} nats", samples])
    return "\n\n".join([*blocks, aligned(block)])


_NEIGHBOURS = ("precision", "recall", "density", "coverage")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _guard_lines(results: dict) -> list[str]:
    """What the columns `memorised` mean, how far they can be trusted, and the warnings of all samplers."""
    protocol, guard = results["protocol"], results["guard"]
    if guard is None:
        told = ["memorised: the guard was not run, because no training images were given (--training_split)"]
    else:
        told = [
            f"memorised: share of the images that are nearer to one of {protocol['num_training_images']:,} training"
            f" images ({protocol['training_split']}) than 95% of held-out images are; 5% is expected"
        ]
        if left_out := protocol["training_images_left_out"]:
            told.append(f"memorised: copies of the {left_out:,} training images that were left out are not found")
        for space, each in guard.items():
            if each["copies"]:
                told.append(f"{space}: {each['copies']:.1%} of the held-out images are training images themselves")
            if not each["sees"]:
                told.append(f"{space}: the guard sees nothing, because held-out images must not be training images")
    for name, each in results["sets"].items():
        told += [f"warning: {name}, {sentence}" for sentence in each.get("warnings", [])]
    return told


def aligned(rows: list[list[str]]) -> str:
    """Rows of text in columns: the first to the left, the others to the right."""
    columns = range(max(map(len, rows)))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in columns]
    lines = []
    for row in rows:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]).rstrip())
    return "\n".join(lines)


def second_stage_row(second: dict) -> tuple[str, str]:
    """What a summary says of its second stage."""
    if "model" in second:
        return f"second stage: {second['model']}", f"{second['active_dims']} of {second['latent_dim']} dimensions"
    return "second stage: KL, gamma", f"{second['kl']:.2f} nats, {second['gamma']:.3g}"


def _seen(images_are: str | None) -> str:
    return f"{images_are} " if images_are else ""


def summary_table(summary: dict, seconds: float) -> str:
    vae = summary["vae"]
    known = f" (known factors: r = {summary['num_factors']})" if summary["num_factors"] else ""
    rows = [
        ("measured on", f"{summary['num_images']:,} {_seen(summary.get('images_are'))}images of {summary['images']}"),
        ("squared error per image, autoencoder alone", f"{summary['autoencoder_squared_error']:.2f}"),
        ("squared error per image, whole model", f"{summary['squared_error']:.2f}"),
        ("first VAE: active units", f"{vae['active_units_by_variance']} of {vae['latent_dim']}{known}"),
        ("first VAE: active units by Burda's count", f"{vae['active_units']}"),
        ("first VAE: KL, gamma", f"{vae['kl']:.2f} nats, {vae['gamma']:.3g}"),
        second_stage_row(summary["second_stage"]),
        ("wall time", f"{seconds:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows)])
