"""Write the tables of docs/posteriors.md, between their markers, from results/posteriors.json.

python examples/posteriors/tables.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"drawings": "drawings", "mnist": "MNIST", "celeba128": "faces"}


def tables(results: dict) -> dict[str, str]:
    """Name of a table -> Markdown."""
    return {name: _markdown(*rows(results[use])) for name, (use, rows) in TABLES.items()}


def _anomalies(found):
    head = ["pictures", "anomaly", "squared error", "log-likelihood", "latent distance", "local error"]
    names = ("squared_error", "log_likelihood", "latent_distance", "local_error")
    rows = [[MODELS[model], anomaly, *(f"{auroc[name]:.3f}" for name in names)]
            for model in MODELS for anomaly, auroc in found[model]["auroc"].items()]  # fmt: skip
    return head, rows


def _restoration(found):
    kinds = ("search", "nearest training image", "encoder alone", "mean training image")
    rows = [[MODELS[model], damage, *(_error(errors[kind]) for kind in kinds),
             f"{100 * errors['better than nearest']:.0f}%"]
            for model in MODELS for damage, errors in found[model]["squared_error"].items()]  # fmt: skip
    return ["pictures", "damage", *kinds, "better than nearest"], rows


def _error(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _directions(found):
    rows = [[name, f"{each['squared error before']:.2f}", f"{each['after']:.2f}",
             f"{100 * each['of the change']:.0f}%"]
            for name, each in found["drawings"]["directions"].items()]  # fmt: skip
    return ["factor", "squared error without the edit", "with it", "of the change is made"], rows


def _measured(found):
    rows = [[MODELS[model], name, f"{each['change']:.2f}", f"{each['largest change of another']:.2f}"]
            for model in ("mnist", "celeba128") for name, each in found[model]["directions"].items()]  # fmt: skip
    return ["pictures", "direction", "its own change", "largest change of another"], rows


def _neighbours(found):
    rows = []
    for model, what in (("drawings", "squared distance of factors"), ("mnist", "same label")):
        rows.append([MODELS[model], what, *(f"{found[model][space][what]:.3f}" for space in ("code space", "pixels"))])
    return ["pictures", "measured", "neighbour in code space", "neighbour in pixels"], rows


TABLES = {
    "anomalies": ("anomalies", _anomalies),
    "directions": ("directions", _directions),
    "measured": ("directions", _measured),
    "restoration": ("restoration", _restoration),
    "neighbours": ("neighbours", _neighbours),
}


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    page = ROOT / "docs" / "posteriors.md"
    text = page.read_text(encoding="utf-8")
    for name, table in tables(json.loads((ROOT / "results" / "posteriors.json").read_text(encoding="utf-8"))).items():
        pattern = f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda found, table=table: found[1] + table + found[2], text, flags=re.DOTALL)
        assert count == 1, f"{page} has no markers for the table {name}"
    page.write_text(text, encoding="utf-8")
