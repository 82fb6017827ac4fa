"""Reading pictures of white images: a kept patch is white, a dropped one dark."""

import numpy as np
from PIL import Image

from jaxprune.reports.kept_patches import DROPPED, GAP, TITLE

BRIGHT, DARK = 255, int(255 * DROPPED)


def white(width, height):
    return Image.new("RGB", (width, height), "white")


def brightness(picture, boxes):
    """The level in the middle of each box, `[P]`."""
    levels = np.asarray(picture)
    assert (levels == levels[..., :1]).all()  # grey
    height, width = levels.shape[:2]
    left, top, right, bottom = boxes.T
    x, y = (left + right) / 2 * width, (top + bottom) / 2 * height
    return levels[y.astype(int), x.astype(int), 0]


def expected(view, kept):
    return np.where(np.isin(view.patches, kept), BRIGHT, DARK)


def panels(sheet, side, heights):
    """The pictures of a sheet, column by column; it must have the size that holds them."""
    number = (sheet.width - GAP) // (side + GAP)
    assert sheet.width == GAP + number * (side + GAP)
    assert sheet.height == GAP + TITLE + sum(height + GAP for height in heights)
    found = []
    for i in range(number):
        left, top, column = GAP + i * (side + GAP), GAP + TITLE, []
        for height in heights:
            column.append(sheet.crop((left, top, left + side, top + height)))
            top += height + GAP
        found.append(column)
    return found
