"""Pictures of what pruning leaves."""

import numpy as np
from PIL import Image, ImageDraw

from jaxprune.loading import Params
from jaxprune.processing import pixel_values

DROPPED = 0.25  # brightness of a patch that is gone


def what_the_model_sees(params: Params, image: Image.Image) -> Image.Image:
    """An RGB image after resizing and cropping, as the vision tower gets it."""
    assert params.processor is not None
    size = params.config.vision_config.image_size
    pixels = pixel_values(params.processor, [image], size)[0]
    processor = params.processor.image_processor
    levels = (pixels * processor.image_std + processor.image_mean) * 255
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def kept_patches(image: Image.Image, indices: np.ndarray, grid: int, *, side: int) -> Image.Image:
    """The image with the patches that are gone darkened.

    Args:
        image: square RGB, what the model sees.
        indices: int `[K]`, kept patches in raster order of a grid; -1 stands for a token of
            no single patch and is not drawn.
        grid: patches along a side.
        side: pixels along a side of the result.
    """
    picture = image.resize((side, side), Image.Resampling.NEAREST)
    dark = picture.point(lambda level: int(level * DROPPED))
    mask = Image.new("L", (side, side), 0)
    canvas = ImageDraw.Draw(mask)
    edges = [round(i * side / grid) for i in range(grid + 1)]
    for index in indices[indices >= 0]:
        row, column = divmod(int(index), grid)
        corners = (edges[column], edges[row], edges[column + 1] - 2, edges[row + 1] - 2)
        canvas.rectangle(corners, fill=255)
    return Image.composite(picture, dark, mask)
