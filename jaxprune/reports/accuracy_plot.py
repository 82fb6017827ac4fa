"""Plots of evaluations; needs matplotlib."""

import pathlib
from typing import TYPE_CHECKING

from jaxprune.evaluate.results import Evaluation
from jaxprune.reports.recipe_plot import figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_accuracy(found: Evaluation, path: str | pathlib.Path) -> None:
    """Write accuracies against the decoder's FLOPs, with their intervals, as a picture.

    Args:
        found: what `jaxprune.evaluate` gives.
        path: the file; its suffix says the format.

    Raises:
        UserError: without matplotlib, or where the file cannot be written.
    """
    save_figure(draw_accuracy(found), path)


def draw_accuracy(found: Evaluation) -> "Figure":
    """What `plot_accuracy` writes, as a figure: a point with its interval for each method.

    A method that answered nothing has no FLOPs and is left out.

    Raises:
        UserError: without matplotlib.
    """
    made, axes = figure()
    for row in found.rows:
        if row.macs is None:
            continue
        y = 100 * row.accuracy
        bars = [[y - 100 * row.interval[0]], [100 * row.interval[1] - y]]
        axes.errorbar([2e-9 * row.macs], [y], bars, fmt="o", capsize=3, label=row.method)
    axes.set(xlabel="GFLOPs of the decoder for a prompt", ylabel="accuracy, %")
    axes.set_xlim(left=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return made
