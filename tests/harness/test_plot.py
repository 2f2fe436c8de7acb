import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metax.harness import plot_curves, plot_panels
from metax.harness.plot import _draw_curve

LABELS = {"xlabel": "step", "ylabel": "loss"}


def draw(values, x=None):
    values = np.atleast_2d(np.asarray(values, float))
    axes: Axes = Figure().subplots()
    x = np.arange(1, values.shape[1] + 1) if x is None else x
    _draw_curve(axes, x, values, "label", "C0")
    return axes


def test_line_is_the_mean_and_band_runs_from_minimum_to_maximum():
    axes = draw([[1.0, 2.0], [3.0, 6.0]])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2.0, 4.0])
    corners = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} >= {(1, 1), (2, 2), (1, 3), (2, 6)}


def test_values_that_are_not_finite_are_left_out():
    axes = draw([[1.0, np.nan, np.nan], [3.0, np.inf, 5.0]])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2.0, np.nan, 5.0])


def test_single_seed_has_no_band():
    assert not draw([1.0, 2.0]).collections


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_figure_is_written_whole(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    curves = {
        "seeds": np.random.default_rng(0).uniform(1, 2, (3, 5)),
        "one": [1.0, np.nan, 3.0],
        "own x": ([10, 100], [[1.0, 2.0], [2.0, 3.0]]),
        "diverged": [np.nan, np.nan],
        "point": [1.0],
    }
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_curves(path, curves, title="losses", logx=True, logy=True, **LABELS)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size > 1000
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_panels_stand_in_rows(tmp_path):
    curves = {"a": [1.0, 2.0]}
    plot_panels(tmp_path / "1.png", {"one": curves}, **LABELS)
    panels = dict.fromkeys("abcd", curves)
    plot_panels(tmp_path / "4.png", panels, num_columns=2, **LABELS)
    height, width, _ = matplotlib.image.imread(tmp_path / "1.png").shape
    tall, wide, _ = matplotlib.image.imread(tmp_path / "4.png").shape
    assert tall == 2 * height
    assert wide > width


@pytest.mark.parametrize(
    ("curve", "shape"),
    [
        (np.ones((2, 2, 2)), r"values \[2, 2, 2\]"),
        (1.0, r"values \[\]"),
        ([], r"values \[0\]"),
        (([1, 2], [1.0, 2.0, 3.0]), r"values \[3\] and x \[2\]"),
    ],
)
def test_curves_of_other_shapes_are_named(tmp_path, curve, shape):
    with pytest.raises(ValueError, match=f"got 'bad' with {shape}"):
        plot_curves(tmp_path / "a.png", {"good": [1.0], "bad": curve}, **LABELS)
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have curves in each panel"):
        plot_curves(tmp_path / "a.png", {}, **LABELS)
    with pytest.raises(ValueError, match="must have a panel"):
        plot_panels(tmp_path / "a.png", {}, **LABELS)
