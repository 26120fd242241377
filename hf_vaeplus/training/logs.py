"""What a run writes down for people: warnings in words and lines of stats.jsonl."""

import json
import math
from pathlib import Path

from ..files import write_text


class HealthWatch:
    """Says in words, once each, that a VAE is collapsing or its gamma at its floor. Fed with lines of stats.jsonl.

    Args:
        latent_dim: dimensions that could be active.
        first_step: before it no VAE counts as collapsed.
        min_gamma: the floor of gamma; 0 if it has none.
    """

    min_kl = 0.5  # nats: a posterior that says less than this about its input says nothing
    patience = 5  # lines

    def __init__(self, latent_dim: int, first_step: int, min_gamma: float = 0.0):
        self.latent_dim, self.first_step, self.min_gamma = latent_dim, first_step, min_gamma
        self.low_kl_lines, self.said = 0, set()

    def __call__(self, stats: dict) -> list[str]:
        """What, if anything, this line of statistics gives cause to say."""
        found = {}
        if stats.get("gamma", math.inf) <= 1.01 * self.min_gamma:  # an analytic gamma comes ever nearer to its floor
            found["floor"] = (
                f"note: gamma has reached its floor of {self.min_gamma:g} at step {stats['step']}: whatever varies by"
                " less than that counts as noise. This is as it should be where min_gamma was set for it; if not, the"
                " inputs are reproduced all but exactly: see whether they vary, or set a lower min_gamma."
            )
        if "kl" in stats and stats["step"] >= self.first_step:
            self.low_kl_lines = self.low_kl_lines + 1 if stats["kl"] < self.min_kl else 0
            if self.low_kl_lines >= self.patience:
                found["kl"] = (
                    f"warning: KL has stayed below {self.min_kl} nats up to step {stats['step']} ({stats['kl']:.3g}"
                    " now): the posterior equals the prior and this VAE has collapsed. Start gamma lower"
                    " (gamma_init=0.1) or use kl_warmup_steps."
                )
            elif stats["active_units"] < self.latent_dim / 4:
                found["units"] = (
                    f"warning: only {stats['active_units']:.0f} of {self.latent_dim} latent dimensions are active at"
                    f" step {stats['step']}. That is balanced regularization if the data has no more factors than"
                    f" that; if reconstructions are poor, gamma ({stats['gamma']:.3g}) lags behind the error and"
                    " prunes: use gamma='analytic' or a larger gamma_lr_multiplier."
                )
        new = [text for kind, text in found.items() if kind not in self.said]
        self.said.update(found)
        return new


def drop_lines_after(path: Path, step: int):
    """Forget what a killed run logged after the checkpoint that it is resumed from, a half-written line included."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    write_text(path, "".join(line + "\n" for line in kept))


def postfix(stats: dict, speed: float) -> dict:
    shown = {name: f"{stats[name]:.4g}" for name in ("loss", "kl", "gamma", "active_units") if name in stats}
    return {**shown, "images/s": f"{speed:.0f}"}
