"""The plot of an evaluation, by the data on its axes."""

import numpy as np
from matplotlib.collections import LineCollection

from jaxprune.evaluate import Evaluation
from jaxprune.reports.accuracy_plot import draw_accuracy
from tests.cli.test_evaluate import FIRST, SECOND


def test_points_and_intervals():
    (axes,) = draw_accuracy(Evaluation([FIRST, SECOND], 12, {"mme": 12}, 5)).axes
    (line, *_) = axes.get_lines()  # the second has no FLOPs
    (bar,) = axes.collections
    assert isinstance(bar, LineCollection)
    np.testing.assert_allclose(line.get_xydata(), [[3, 90]])
    np.testing.assert_allclose(bar.get_segments()[0], [[3, 85], [3, 95.12]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none"]
    assert axes.get_xlabel() == "GFLOPs of the decoder for a prompt"
    assert axes.get_ylabel() == "accuracy, %" and axes.get_xlim()[0] == 0


def test_nothing_answered_is_an_empty_plot():
    (axes,) = draw_accuracy(Evaluation([SECOND], 12, {"mme": 12}, 5)).axes
    assert axes.get_legend() is None
