"""The quick tour runs from its first cell to its last."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quick_tour.ipynb"


def test_the_quick_tour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for whole, small in (
        ("STEPS = {}", 'STEPS = {"max_train_steps": 10, "max_train_samples": 1000}'),
        ("max_samples=20_000", "max_samples=1_000"),
    ):
        assert whole in code
        code = code.replace(whole, small)
    found = {}
    exec(compile(code, NOTEBOOK.name, "exec"), found)
    plt.close("all")
    assert found["samples"].shape == (32, 3, 32, 32)
    assert found["path"].shape == (3, 8, 3, 32, 32)
    assert found["real"].mean() > found["noise"].mean()
    printed = capsys.readouterr().out
    assert all(name in printed for name in found["sets"])
