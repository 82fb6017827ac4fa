"""The plot of a recipe, by the data on its axes."""

import dataclasses
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import jaxprune
from jaxprune.reports.recipe_plot import PUBLISHED, SEVEN_B, draw_recipe, plot_recipe
from tests.builders import tiny_config
from tests.methods.test_recipes import recipe_for


def lines_of(figure):
    (axes,) = figure.axes
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_the_recipe_is_the_last_line_beside_the_published_ones():
    config = tiny_config()
    lines = lines_of(draw_recipe(recipe_for(config), config))
    assert list(lines) == [*(label for label, _ in PUBLISHED), "this recipe (gsearch)"]
    own = lines["this recipe (gsearch)"]
    np.testing.assert_allclose(own, [(0, 1), (0.5, 0.5), (1, 0.25)])


def test_published_curves_are_those_of_their_methods():
    config = tiny_config()
    lines = lines_of(draw_recipe(recipe_for(config), config))
    for label, method in PUBLISHED:
        depths, shares = lines[label].T
        np.testing.assert_allclose(depths, np.arange(32) / 31)
        left = 576 - method.removed(576, SEVEN_B)
        np.testing.assert_allclose(shares, np.array([576, *left[:-1]]) / 576)


def test_both_stages_of_iti_count():
    config = tiny_config()
    recipe = recipe_for(
        config,
        method="iti",
        options={"stage2": 0.5, "layer": 1},
        score={"queries": ["text"], "heads": "mean", "later": True},
        reached={"stage1_keep_rate": 0.5},
    )
    for reached, stage1 in ((recipe.reached, 0.5), ({}, 1.0)):
        lines = lines_of(draw_recipe(dataclasses.replace(recipe, reached=reached), config))
        shares = lines["this recipe (iti)"][:, 1]
        np.testing.assert_allclose(shares, stage1 * np.array([1, 0.5, 0.5]))


def test_axes_are_named_and_hold_every_share():
    config = tiny_config()
    (axes,) = draw_recipe(recipe_for(config), config).axes
    assert axes.get_xlabel() == "depth (0 first layer, 1 last)"
    assert axes.get_ylabel() == "visual tokens kept"
    assert axes.get_ylim() == (0, 1.03)
    listed = [text.get_text() for text in axes.get_legend().get_texts()]
    assert listed == [line.get_label() for line in axes.get_lines()]


def test_the_file(tmp_path):
    config = tiny_config()
    plot_recipe(recipe_for(config), config, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        written = np.asarray(picture)
    canvas = FigureCanvasAgg(draw_recipe(recipe_for(config), config))
    canvas.draw()
    np.testing.assert_array_equal(written, np.asarray(canvas.buffer_rgba()))
    with pytest.raises(jaxprune.UserError, match="Cannot write the plot"):
        plot_recipe(recipe_for(config), config, tmp_path / "no" / "plot.png")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    config = tiny_config()
    with pytest.raises(jaxprune.UserError, match=r"install jaxprune\[viz\]"):
        draw_recipe(recipe_for(config), config)
