"""Curves with bands, drawn without a display and without global state."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from metax.harness.files import replacing
from metax.harness.processes import is_first

__all__ = ["plot_curves", "plot_panels"]

Curves = Mapping[str, Any]


def plot_curves(
    path: str | os.PathLike,
    curves: Curves,
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    logx: bool = False,
    logy: bool = False,
) -> None:
    """Draws one line a label: the mean over seeds, in a band from minimum to maximum.

    At each step mean and band are those of the finite values; where no seed is finite
    the line has a gap. A curve whose seeds diverge is therefore that of the survivors:
    say how many there are in its label.

    Args:
      path: the picture; its suffix says the format (.png, .pdf, .svg).
      curves: label to values of shape [steps] or [seeds, steps], or to a pair (x,
        values) where x, of shape [steps], is not 1, 2, 3, ...
      xlabel: name and unit of the horizontal axis.
      ylabel: name and unit of the vertical axis.
      title: above the axes.
      logx: logarithmic horizontal axis.
      logy: logarithmic vertical axis.

    Raises:
      ValueError: there is no curve, or one has another shape.
    """
    panels = {title or "": curves}
    plot_panels(path, panels, xlabel=xlabel, ylabel=ylabel, logx=logx, logy=logy)


def plot_panels(
    path: str | os.PathLike,
    panels: Mapping[str, Curves],
    *,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    logy: bool = False,
    num_columns: int = 3,
) -> None:
    """Draws several panels of curves in one figure.

    Args:
      path: the picture; its suffix says the format (.png, .pdf, .svg).
      panels: title to curves, which are as in `plot_curves`. A label has one colour in
        all panels.
      xlabel: name and unit of the horizontal axes.
      ylabel: name and unit of the vertical axes.
      logx: logarithmic horizontal axes.
      logy: logarithmic vertical axes.
      num_columns: panels side by side before the next row begins.

    Raises:
      ValueError: there is no panel, one is empty, or a curve has another shape.
    """
    from matplotlib.figure import Figure

    drawn = {title: _read_curves(title, curves) for title, curves in panels.items()}
    if not drawn:
        raise ValueError("`plot_panels(panels=...)` must have a panel; got none.")
    if num_columns < 1:
        raise ValueError(
            f"`plot_panels(num_columns=...)` must be at least 1; got {num_columns}."
        )
    labels = list(dict.fromkeys(label for curves in drawn.values() for label in curves))
    columns = min(len(drawn), num_columns)
    rows = -(-len(drawn) // columns)
    # a Figure of its own draws with Agg and registers nowhere
    figure = Figure(figsize=(1.5 + 4.5 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, curves) in zip(grid, drawn.items(), strict=False):
        for label, (x, values) in curves.items():
            _draw_curve(axes, x, values, label, f"C{labels.index(label) % 10}")
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.set(xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    if is_first():
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120)


def _read_curves(title: str, curves: Curves) -> dict[str, tuple[np.ndarray, Any]]:
    if not curves:
        raise ValueError(
            f"`plot_panels(panels=...)` must have curves in each panel; got {title!r} "
            "without."
        )
    return {label: _read_curve(label, curve) for label, curve in curves.items()}


def _read_curve(label: str, curve: Any) -> tuple[np.ndarray, np.ndarray]:
    x, values = curve if isinstance(curve, tuple) else (None, curve)
    values = np.asarray(values, dtype=np.float64)
    num_steps = values.shape[-1] if values.ndim in (1, 2) else 0
    x = np.arange(1, num_steps + 1) if x is None else np.asarray(x, dtype=np.float64)
    if values.ndim not in (1, 2) or x.shape != (num_steps,) or not values.size:
        raise ValueError(
            f"`plot_curves(curves=...)` must have values [steps] or [seeds, steps], "
            f"and x [steps]; got {label!r} with values {list(values.shape)} and x "
            f"{list(x.shape)}."
        )
    return x, np.atleast_2d(values)


def _draw_curve(axes: Any, x: np.ndarray, values: Any, label: str, color: str) -> None:
    finite = np.ma.masked_invalid(values)
    low, mean, high = finite.min(axis=0), finite.mean(axis=0), finite.max(axis=0)
    marker = "o" if len(x) == 1 else None
    axes.plot(x, mean.filled(np.nan), label=label, color=color, marker=marker)
    if len(values) > 1:
        low, high = low.filled(np.nan), high.filled(np.nan)
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
