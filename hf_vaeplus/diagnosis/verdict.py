"""The verdict: a few rules on the measures, each with a threshold, a reason and a prescription of the paper.

`regularization` is one of
    "over"      dimensions are missing, or drowned in noise, and the reconstruction suffers   (Section 1; Section 4)
    "under"     the code has more active dimensions than the data need                        (Section 1; Section 5)
    "balanced"  near perfect reconstructions from about as many dimensions as the data have

Beside it stand findings that any of the three can have: a hole in the prior, a second stage that is dead or leaves
the hole open, a gamma far from the error, channels without information.
"""

from dataclasses import dataclass

# Every threshold of the rules. docs/diagnose.md says where each comes from.
MISSING = 0.8  # active dimensions below this share of r are too few (and at least one is missing)
SURPLUS = 1.25  # above this multiple of r, and above r + 1.5, too many
# Shares of the active dimensions that the others determine, from half and from three quarters of them: from either of
# these on, the code repeats itself.
REDUNDANT, REDUNDANT_FROM_MOST = 0.5, 0.7
PERFECT = 0.02  # unexplained share of the variance up to which a reconstruction is near perfect
POOR = 0.5  # and from which hardly anything is left
LARGE_GAMMA, SMALL_GAMMA = 10.0, 0.1  # gamma over the error per value; 1 at the optimum
NOISE_COST = 0.02  # share of the variance that the noise of the posteriors costs, beyond which a large gamma matters
HOLE_SLICED, HOLE_AXIS, HOLE_NEAR = 0.15, 0.4, 1.25  # distances of q(z) to the prior that leave a hole
LOSS_OF_UNIT = 1e-3  # share of the data's variance that an active unit costs when it is replaced
UNUSED_KL, UNUSED_LOSS = 0.05, 0.01  # nats a position, and share of the largest loss, below which a channel is unused
MOST_DIMENSIONS = 20.0  # beyond, thousands of images do not tell the dimension of the data


@dataclass
class Finding:
    """A name for programs, and sentences for people: the reason and what to do."""

    name: str
    reason: str
    prescription: str


@dataclass
class Verdict:
    """See the top of this file.

    Args:
        confidence (`str`): "high", "medium" or "low"; `doubts` say why it is not high.
        reasons, prescriptions (list of `str`): of `regularization`.
        findings (list of [`Finding`]): what else was found.
        estimated_r (`float`, *optional*): dimensions of the data, from the distances between images.
        second_stage (`str`): "helps", "does not help", "would help" or "is not needed".
        disagreements (list of `int`): dimensions, or channels, that one criterion counts as active and another not.
    """

    regularization: str
    confidence: str
    reasons: list[str]
    prescriptions: list[str]
    findings: list[Finding]
    doubts: list[str]
    estimated_r: float | None
    second_stage: str
    disagreements: list[int]

    @property
    def names(self) -> list[str]:
        """The names of the findings."""
        return [finding.name for finding in self.findings]


def judge(measures: dict) -> Verdict:
    """The verdict on what [`~hf_vaeplus.diagnosis.measures.measure`] returned: a function of these numbers alone."""
    regularization, reasons, prescriptions, doubts, estimated_r = _regularization(measures)
    findings = [*_gamma(measures), *_prior(measures), *_second_stage(measures), *_channels(measures)]
    if measures["num_images"] < 1_000:
        doubts.append(f"only {measures['num_images']} images: dimensions and distances want 2,000 or more")
    confidence = ("high", "medium", "low")[min(2, len(doubts))]
    helps = _second_stage_helps(measures)
    unsure = _disagreements(measures["dimensions"])
    return Verdict(regularization, confidence, reasons, prescriptions, findings, doubts, estimated_r, helps, unsure)


def _disagreements(rows: list[dict]) -> list[int]:
    found = []
    for row in rows:
        says = set() if row["loss"] is None else {row["loss"] > LOSS_OF_UNIT}
        if row["posterior_variance"] is not None:
            says |= {row["posterior_variance"] < 0.5, row["variance_of_mean"] > 0.01}
        if len(says) > 1:
            found.append(row["unit"])
    return found


def _regularization(measures: dict) -> tuple[str, list[str], list[str], list[str], float | None]:
    error, units, gamma = measures["error"], measures["units"], measures["gamma"] or {}
    active, dim = units["active"], measures["latent_dim"]
    left = error["unexplained"]
    redundancy, from_most = (measures["redundancy"][name] for name in ("half", "three_quarters"))
    redundant = redundancy >= REDUNDANT or from_most >= REDUNDANT_FROM_MOST
    over_error = gamma.get("over_error")
    of_images = measures["intrinsic_dimension"]["images"]
    r = None if of_images is None else of_images["middle"]
    doubts = []
    if r is None:
        doubts.append("nearly all images are copies: the dimension of the data is not known")
    elif r > MOST_DIMENSIONS:
        doubts.append(
            f"the data have many dimensions (estimate {r:.0f}): from so few images the estimate is rough and tends to"
            " be too low"
        )
    said = f"{active} of {dim} dimensions are active" + ("" if r is None else f", the data have about {r:.1f}")

    surplus = r is None or active >= max(r * SURPLUS, r + 1.5)
    determined = f"half of them determine {redundancy:.0%} of the others, three quarters {from_most:.0%}"
    if measures["deterministic"]:
        if redundant and surplus:
            reasons = [
                f"{said}; {determined}",
                "the encoder adds no noise and pays for no dimension, so nothing makes it drop one",
            ]
            return "under", reasons, [_TRAIN_VAE], doubts, r
        doubts.append("without posteriors only the geometry of the codes can be judged, not what the noise costs")
    if active == 0 or left >= POOR:
        reasons = [f"{said}; the reconstruction leaves {left:.0%} of the variance unexplained"]
        return "over", reasons, _against_over(measures, over_error), doubts, r
    missing = r is not None and active <= min(r * MISSING, r - 1)
    if missing and left > PERFECT:
        reasons = [f"{said}; the reconstruction leaves {left:.1%} of the variance unexplained"]
        if active == dim:
            reasons.append("every dimension is in use: the bottleneck kappa is below r")
        return "over", reasons, _against_over(measures, over_error), doubts, r
    noisy = error["unexplained_of_samples"]
    if over_error is not None and over_error > LARGE_GAMMA and noisy - left > NOISE_COST:
        reasons = [
            f"gamma is {over_error:.0f} times the error per value: the noise of the posteriors costs detail, samples"
            f" of them leave {noisy:.1%} of the variance unexplained, their means {left:.1%}"
        ]
        return "over", reasons, _against_over(measures, over_error), doubts, r
    if redundant and surplus:
        reasons = [f"{said}; {determined}"]
        prescriptions = [_LEARN_GAMMA]
        if over_error is not None and over_error < SMALL_GAMMA:
            reasons.append(f"gamma is {over_error:.2g} times the error per value: dimensions cost next to nothing")
        if redundancy < REDUNDANT + 0.1 and from_most < REDUNDANT_FROM_MOST + 0.1:
            doubts.append("the redundancy is near its threshold")
        return "under", reasons, prescriptions, doubts, r

    reasons = [f"{said}; the reconstruction leaves {left:.1%} of the variance unexplained"]
    if redundancy > REDUNDANT / 2:
        doubts.append(f"some redundancy: of the active dimensions {determined}")
    if surplus and r is not None:
        reasons.append(
            f"the active dimensions exceed the estimate of r, but {determined}: too little to call them superfluous"
        )
        if r <= MOST_DIMENSIONS:
            doubts.append(f"{active} active dimensions, but the data seem to have {r:.1f}")
    if missing:
        doubts.append("fewer active dimensions than the data seem to have, and yet a near perfect reconstruction")
    if left > 0.1:
        doubts.append(f"{left:.0%} of the variance is unexplained: a larger network might need more dimensions")
    return "balanced", reasons, [], doubts, r


_LEARN_GAMMA = (
    "learn gamma (gamma='learned' or 'analytic', starting near the variance of the data) or raise the weight of the KL"
    " term: only then does a dimension that is not needed cost more than it brings (Section 5)"
)
_TRAIN_VAE = (
    "train a first VAE with a learned gamma on these codes (stage 1 of VAE+): it switches the superfluous dimensions"
    " off (Sections 4 and 5)"
)
_RAISE_KAPPA = "raise kappa, the number of latent dimensions, above r: those not needed are switched off (Section 2)"
_SKIP = (
    "give the decoder an affine skip connection and residual blocks, so that a dimension that has fallen silent can"
    " come back (Section 4, Eq. 5)"
)
_START_GAMMA = "start gamma at the variance of the data and let it fall with the error, without a floor above it"


def _against_over(measures: dict, over_error: float | None) -> list[str]:
    active, dim = measures["units"]["active"], measures["latent_dim"]
    if over_error is not None and over_error > LARGE_GAMMA:
        return ["learn gamma, or lower the weight of the KL term: both are the same (Eq. 3, Section 5)"]
    if active == dim:
        return [_RAISE_KAPPA]
    if measures["deterministic"]:
        return [_RAISE_KAPPA, _SKIP]
    return [_SKIP, _START_GAMMA]


def _gamma(measures: dict) -> list[Finding]:
    gamma = measures["gamma"]
    if not gamma or gamma["over_error"] is None:
        return []
    ratio, source = gamma["over_error"], "stated" if gamma["stated"] is not None else "implied by the posteriors"
    error = measures["error"]
    costs = error["unexplained_of_samples"] - error["unexplained"] > NOISE_COST
    if ratio > LARGE_GAMMA and (costs or error["unexplained"] >= POOR):
        return [Finding("large_gamma", f"gamma ({source}) is {ratio:.0f} times the error per value",
                        "learn gamma or lower the weight of the KL term")]  # fmt: skip
    if ratio < SMALL_GAMMA:
        return [Finding("small_gamma", f"gamma ({source}) is {ratio:.2g} times the error per value",
                        "learn gamma or raise the weight of the KL term")]  # fmt: skip
    return []


def _has_hole(distances: dict) -> bool:
    return _misfit(distances) > 1


def _shown(distances: dict) -> str:
    return (
        f"sliced Wasserstein {distances['sliced']:.2f}, worst axis {distances['worst_axis']:.2f}, nearest code"
        f" {distances['holes']:.2f} times as far"
    )


def _prior(measures: dict) -> list[Finding]:
    aggregate = measures["aggregate"]
    if "second_stage" in measures:  # which is sampled from
        return []
    if not measures["units"]["active"] or not _has_hole(aggregate["prior"]):
        return []
    reason = f"samples of N(0, I) do not lie where the codes are: {_shown(aggregate['prior'])}"
    cure = "train a second stage on the codes, and sample from it (Section 4)"
    if measures["deterministic"]:
        cure = "train a VAE on the codes, and a second stage on its latents (stages 1 and 2 of VAE+, Section 4)"
    if not _has_hole(aggregate["scaled_prior"]):
        cure = f"multiply codes by {measures['scale_factor']:.4g}, dimension by dimension if need be; or {cure}"
    return [Finding("prior_hole", reason, cure)]


def _second_stage(measures: dict) -> list[Finding]:
    stage, aggregate = measures.get("second_stage"), measures["aggregate"]
    if stage is None or not measures["units"]["active"]:
        return []
    before, after = aggregate["prior"], aggregate["second_stage"]
    reason = _shown(after)
    if "active_units" in stage:  # of a VAE
        units = f"{stage['active_units']} of {stage['latent_dim']} dimensions of the second stage are active"
        reason = f"{units}; {reason}"
        # A silent second stage draws N(mean, gamma I), which is right where q(z) is normal.
        differ = any(_differs(each, measures["num_images"]) for each in (before, after))
        if stage["active_units"] <= 0.5 * measures["units"]["active"] and differ:
            cure = "start its gamma well below 1 (gamma_init=0.1), cap it (max_gamma) or warm up the KL term"
            return [Finding("dead_second_stage", reason, cure)]
    if _has_hole(after):
        return [Finding("second_stage_leaves_hole", reason, "train the second stage longer or make it larger")]
    return []


def _differs(distances: dict, num_images: int) -> bool:
    """Whether two sets of latents differ by more than twice the distances of two samples of one distribution."""
    chance = num_images**-0.5
    return distances["sliced"] > 5 * chance or distances["worst_axis"] > 8 * chance or _has_hole(distances)


def _second_stage_helps(measures: dict) -> str:
    aggregate = measures["aggregate"]
    before = _misfit(aggregate["prior"])
    if "second_stage" in aggregate:
        after = _misfit(aggregate["second_stage"])
        if max(before, after) <= 1:
            return "is not needed"
        return "helps" if after < 0.8 * before else "does not help"
    return "would help" if before > 1 and measures["units"]["active"] else "is not needed"


def _misfit(distances: dict) -> float:
    """The largest of the three distances in units of its threshold: above 1 there is a hole."""
    return max(
        distances["sliced"] / HOLE_SLICED,
        distances["worst_axis"] / HOLE_AXIS,
        (distances["holes"] - 1) / (HOLE_NEAR - 1),
    )


def _channels(measures: dict) -> list[Finding]:
    rows, shape = measures["dimensions"], measures["code_shape"]
    if len(shape) < 2:  # of a vector: unused dimensions are what balance consists of
        return []
    positions = measures["latent_dim"] / shape[0]
    least = max(LOSS_OF_UNIT, UNUSED_LOSS * max(row["loss"] or 0.0 for row in rows))
    unused = [
        row["unit"]
        for row in rows
        if (row["loss"] or 0.0) < least and (row["kl"] is None or row["kl"] / positions < UNUSED_KL)
    ]
    if not unused:
        return []
    names = ", ".join(map(str, unused))
    return [Finding("unused_channels", f"{len(unused)} of {shape[0]} channels carry nothing: {names}",
                    f"latent_channels={shape[0] - len(unused)} would do")]  # fmt: skip
