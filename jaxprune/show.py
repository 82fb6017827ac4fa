"""Pictures of what pruning leaves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxprune.errors import UserError
from jaxprune.generate import generate
from jaxprune.images import load_image
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


def kept_over_depth(
    params: Params,
    image: Any,
    prompt: str,
    *,
    method: Any,
    layers: Sequence[int] | None = None,
    side: int = 288,
    **method_options: Any,
) -> Image.Image:
    """What is left of an image in front of the decoder and behind some of its layers.

    Args:
        params: what `jaxprune.load` gives.
        image: one image, as for `jaxprune.generate`.
        prompt: the question; decoder-side methods prune by it.
        method: as for `jaxprune.generate`.
        layers: decoder layers to show, from 0; None chooses up to four among those that
            drop tokens.
        side: pixels along a side of each picture.

    Returns:
        An RGB image, the pictures side by side, each with its title.

    Raises:
        UserError: as `jaxprune.generate`, and for a layer that the decoder does not have.
    """
    depth = params.config.text_config.num_hidden_layers
    for layer in layers or ():
        if not 0 <= layer < depth:
            raise UserError(f"layer {layer} is asked for; the decoder has 0 to {depth - 1}.")
    seen = load_image(image)
    answer = generate(
        params, seen, prompt, method=method, max_new_tokens=1, return_details=True, **method_options
    )
    cuts = answer.kept_by_layer
    if layers is None:
        places = np.unique(np.linspace(0, max(len(cuts) - 1, 0), 4).round().astype(int))
        layers = [list(cuts)[place] for place in places if cuts]
    panels = [("before the decoder", answer.kept_indices[0])]
    for layer in layers:
        behind = [cut for cut in cuts if cut <= layer]
        kept = cuts[max(behind)][0] if behind else answer.kept_indices[0]
        panels.append((f"behind layer {layer}", kept))

    picture = what_the_model_sees(params, seen)
    grid = params.config.vision_config.grid_size
    font = ImageFont.load_default(14)
    gap, title = 10, 22
    width = len(panels) * (side + gap) + gap
    sheet = Image.new("RGB", (width, side + title + 2 * gap), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (name, kept) in enumerate(panels):
        left = gap + i * (side + gap)
        canvas.text((left, gap), f"{name}: {len(kept)} tokens", fill="black", font=font)
        sheet.paste(kept_patches(picture, kept, grid, side=side), (left, gap + title))
    return sheet
