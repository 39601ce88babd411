"""Every script of the gallery runs without a warning and leaves pictures that can be drawn."""

import runpy
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("agg")

import matplotlib.pyplot as plt

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
SCRIPTS = sorted(GALLERY.glob("plot_*.py"))


@pytest.fixture
def figures(monkeypatch):
    """What a script leaves open; closed afterwards."""
    monkeypatch.setattr(plt, "show", lambda: None)
    with plt.rc_context():
        yield lambda: [plt.figure(number) for number in plt.get_fignums()]
        plt.close("all")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_runs(script, figures):
    runpy.run_path(str(script))
    drawn = figures()
    assert drawn
    for figure in drawn:
        figure.canvas.draw()  # a layout that does not fit warns here
        assert all(axes.has_data() for axes in figure.axes)
