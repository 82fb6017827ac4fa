"""Plots of recipes; needs matplotlib."""

import pathlib
from typing import Any

import numpy as np

from jaxprune.errors import UserError
from jaxprune.methods import (
    DecoderMethod,
    Depth,
    FitPrune,
    GSearch,
    Iti,
    PSigmoid,
    depth_of,
    resolve,
)
from jaxprune.methods.recipes import Recipe

PUBLISHED: list[tuple[str, DecoderMethod]] = [
    ("FitPrune 40 %, LLaVA-1.5-7B", FitPrune(save=0.4)),
    ("FitPrune 60 %, LLaVA-1.5-7B", FitPrune(save=0.6)),
    ("G-Search, LLaVA-1.5-7B", GSearch()),
    ("P-Sigmoid .262, LLaVA-1.5-7B", PSigmoid(keep_rate=0.262)),
]


def figure() -> Any:
    """A matplotlib figure that belongs to no window, and its axes.

    Raises:
        UserError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Plots need matplotlib; install jaxprune[viz].") from None
    made = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    return made, made.subplots()


def keep_curve(
    method: DecoderMethod, depth: Depth, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Relative depth and the share of the visual tokens that each layer gets: `[L]` both."""
    removed = method.removed(num_tokens, depth)
    entering = num_tokens - np.concatenate([[0], removed[:-1]])
    L = depth.num_hidden_layers
    return np.arange(L) / max(L - 1, 1), entering / num_tokens


def plot_recipe(recipe: Recipe, config: Any, path: Any) -> None:
    """Keep rate over depth of a recipe, beside the published curves.

    Raises:
        UserError: without matplotlib, or where the file cannot be written.
    """
    made, axes = figure()
    for label, published in PUBLISHED:
        x, y = keep_curve(published, Depth("llava", 32), 576)
        axes.step(x, y, where="post", lw=1, ls="--", alpha=0.7, label=label)
    method = resolve(recipe, config).decoder
    assert method is not None
    stage1 = 1.0
    if recipe.method == Iti.name:
        stage1 = recipe.reached.get("stage1_keep_rate", 1.0)
    x, y = keep_curve(method, depth_of(config), config.num_image_tokens)
    axes.step(
        x, stage1 * y, where="post", lw=2.5, color="black", label=f"this recipe ({recipe.method})"
    )
    axes.set(xlabel="depth (0 first layer, 1 last)", ylabel="visual tokens kept", ylim=(0, 1.03))
    axes.legend(fontsize=8)
    try:
        made.savefig(pathlib.Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot write the plot {path} ({error}).") from None
