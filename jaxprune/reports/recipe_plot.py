"""Plots of recipes; needs matplotlib."""

import pathlib
from typing import TYPE_CHECKING

import numpy as np

from jaxprune.engine.cost import most_tokens
from jaxprune.errors import UserError
from jaxprune.files import as_path
from jaxprune.methods import DecoderMethod, Depth, FitPrune, GSearch, Iti, PSigmoid, resolve
from jaxprune.methods.recipes import Recipe
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import depth_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEVEN_B = Depth(32, frozenset({"llava-1.5-7b"}))
PUBLISHED: list[tuple[str, DecoderMethod]] = [
    ("FitPrune 40 %, LLaVA-1.5-7B", FitPrune(save=0.4)),
    ("FitPrune 60 %, LLaVA-1.5-7B", FitPrune(save=0.6)),
    ("G-Search, LLaVA-1.5-7B", GSearch()),
    ("P-Sigmoid .262, LLaVA-1.5-7B", PSigmoid(keep_rate=0.262)),
]


def figure() -> "tuple[Figure, Axes]":
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


def plot_recipe(recipe: Recipe, config: ModelConfig, path: str | pathlib.Path) -> None:
    """Write the keep rate over depth of a recipe, beside the published curves, as a picture.

    Args:
        recipe: the recipe.
        config: the config of the model that it was made for.
        path: the file; its suffix says the format.

    Raises:
        UserError: without matplotlib, or where the file cannot be written.
    """
    save_figure(draw_recipe(recipe, config), path)


def save_figure(made: "Figure", path: str | pathlib.Path) -> None:
    """Write a figure to a file, whose suffix says the format.

    Raises:
        UserError: where it cannot be written.
    """
    target = as_path(path, "The plot")
    try:
        made.savefig(target)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot write the plot {path} ({error}).") from None


def draw_recipe(recipe: Recipe, config: ModelConfig) -> "Figure":
    """What `plot_recipe` writes, as a figure: a step line for each curve, the recipe's last.

    Raises:
        UserError: without matplotlib.
    """
    made, axes = figure()
    for label, published in PUBLISHED:
        x, y = keep_curve(published, SEVEN_B, 576)
        axes.step(x, y, where="post", lw=1, ls="--", alpha=0.7, label=label)
    label = f"this recipe ({recipe.method})"
    axes.step(*_curve_of(recipe, config), where="post", lw=2.5, color="black", label=label)
    axes.set(xlabel="depth (0 first layer, 1 last)", ylabel="visual tokens kept", ylim=(0, 1.03))
    axes.legend(fontsize=8)
    return made


def _curve_of(recipe: Recipe, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    method = resolve(recipe, depth_of(config)).decoder
    assert method is not None
    depths, shares = keep_curve(method, depth_of(config), most_tokens(config))
    if recipe.method == Iti.name:  # its decoder gets what its first stage kept
        shares = shares * recipe.reached.get("stage1_keep_rate", 1.0)
    return depths, shares
