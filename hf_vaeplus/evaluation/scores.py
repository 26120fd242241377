"""Scores of single images: how well a model fits each, and how well the scores tell labels apart."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from .tables import aligned

if TYPE_CHECKING:
    from ..pipeline_vaeplus import VAEPlusPipeline

SCORES = ("log_likelihood", "bits_per_dimension", "squared_error", "latent_distance")
MAX_LABELS = 20  # that AUROCs are given for


def score_images(
    pipe: "VAEPlusPipeline",
    batches: Iterable[tuple[list[dict], torch.Tensor]],
    num_importance_samples: int = 16,
    seed: int = 0,
    batch_size: int = 64,
    prior: str | None = None,
) -> tuple[list[dict], dict]:
    """`pipe.score` of many images. Every image meets the same noise, so its scores do not depend on the others.

    Args:
        pipe ([`VAEPlusPipeline`]).
        batches: facts about each image, such as its name, and uint8 images of the pipeline's size `(n, C, H, W)`.
        num_importance_samples (`int`), batch_size (`int`), prior (`str`, *optional*): as in `pipe.score`.
        seed (`int`): of the noise.

    Returns:
        The facts of each image with its `SCORES`; and what holds for all: `num_importance_samples`, `prior` and
        `latent_distance_is`, as in [`~hf_vaeplus.pipeline_vaeplus.VAEPlusScores`].
    """
    rows, common = [], {}
    for facts, images in batches:
        noise = [torch.Generator().manual_seed(seed) for _ in facts]
        found = pipe.score(images, num_importance_samples, noise, batch_size, prior, preprocess=False)
        columns = {name: found[name].tolist() for name in SCORES if found[name] is not None}
        for place, fact in enumerate(facts):
            rows.append(fact | {name: values[place] for name, values in columns.items()})
        common = {name: found[name] for name in ("num_importance_samples", "prior", "latent_distance_is")}
    return rows, common


def most_unusual_first(rows: list[dict], score: str) -> list[dict]:
    """Rows of [`score_images`] by one of the `SCORES`."""
    return sorted(rows, key=lambda row: unusualness(row, score), reverse=True)


def unusualness(row: dict, score: str) -> float:
    """A score with its sign turned so that more is more unusual; a score that is NaN is the most unusual."""
    value = -row[score] if score == "log_likelihood" else row[score]
    return float("inf") if np.isnan(value) else value


def auroc_by_label(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Label -> score -> area under the ROC curve, by scikit-learn.

    It is the probability that an image of this label scores as more unusual than one of the other labels (ties count
    one half). Images without a label are left out.

    Returns:
        Empty for fewer than two labels, or more than `MAX_LABELS`.
    """
    from sklearn.metrics import roc_auc_score

    rows = [row for row in rows if row.get("label") is not None]
    labels = sorted({row["label"] for row in rows}, key=lambda label: (str(type(label)), label))
    if not 2 <= len(labels) <= MAX_LABELS:
        return {}
    largest = np.finfo(np.float64).max
    values = {
        score: np.clip([unusualness(row, score) for row in rows], -largest, largest)
        for score in SCORES
        if score in rows[0]
    }
    is_label = {str(label): [row["label"] == label for row in rows] for label in labels}
    return {
        label: {score: float(roc_auc_score(chosen, value)) for score, value in values.items()}
        for label, chosen in is_label.items()
    }


def scores_table(rows: list[dict], common: dict, auroc: dict, top: int, sort: str) -> str:
    """The first rows, and the AUROCs, for people."""
    shown = [score for score in SCORES if score in rows[0]]
    facts = [name for name in ("name", "label") if name in rows[0]]
    block = [[*facts, *shown]]
    for row in rows[:top]:
        texts = ["-" if row[name] is None else str(row[name]) for name in facts]
        block.append(
            [*texts, *(f"{row[score]:.4g}" if abs(row[score]) < 1e4 else f"{row[score]:.0f}" for score in shown)]
        )
    likelihood = (
        f"log-likelihood in nats, a bound by {common['num_importance_samples']} samples, p(z): {common['prior']}"
    )
    if "log_likelihood" not in shown:
        likelihood = "no likelihood: gamma of this model was measured on codes"
    distance = {
        "mahalanobis": "length of the posterior mean, its Mahalanobis distance under N(0, I)",
        "negative_log_density": "minus the second stage's log density of the posterior mean, in nats",
    }[common["latent_distance_is"]]
    blocks = [
        f"{len(rows):,} images, the most unusual first by {sort}\n{likelihood}\nlatent distance: {distance}",
        aligned(block),
    ]
    if auroc:
        heading = [["AUROC of the label", *shown]]
        blocks.append(
            aligned(heading + [[label, *(f"{v[score]:.3f}" for score in shown)] for label, v in auroc.items()])
        )
    return "\n\n".join(blocks)
