"""Pictures of the patches that pruning keeps."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxprune.engine.answer import Answer
from jaxprune.errors import UserError
from jaxprune.generate import generate
from jaxprune.inputs.pixels import pixel_values, size_of
from jaxprune.inputs.videos import Clip, visual_of
from jaxprune.model import Params

DROPPED = 0.25  # brightness of a patch that is gone
GAP, TITLE = 10, 22  # pixels between pictures, and for the line above each


@dataclasses.dataclass(frozen=True)
class View:
    """A picture, and where in it which patches are.

    Attributes:
        name: what it shows.
        picture: RGB.
        patches: int `[P]`, their numbers in `Answer.kept_indices`.
        boxes: float `[P, 4]`: left, top, right, bottom, as fractions of the picture.
    """

    name: str
    picture: Image.Image
    patches: np.ndarray
    boxes: np.ndarray


def views(params: Params, image: Image.Image | Clip) -> list[View]:
    """How a model sees an RGB image: once, or as a whole and in tiles; a video frame by frame."""
    config = params.config
    maps = config.tiling(size_of(image)).maps
    if isinstance(image, Clip):
        return [
            View(f"frame {i + 1}", what_the_model_sees(params, frame), patches.ravel(),
                 _grid_boxes(*patches.shape))
            for i, (frame, patches) in enumerate(zip(image.frames, maps, strict=True))
        ]  # fmt: skip
    if not maps:
        every = np.arange(config.tower.tokens_per_tile)
        seen = what_the_model_sees(params, image)
        return [View("", seen, every, _grid_boxes(*config.tower.grid))]
    return [
        View(name, image, patches.ravel(), _grid_boxes(*patches.shape))
        for name, patches in zip(("whole", "tiles"), maps, strict=True)
        if patches.size  # an extreme strip has none in tiles
    ]


def what_the_model_sees(params: Params, image: Image.Image) -> Image.Image:
    """An RGB image after resizing and cropping to the one tile that the vision tower gets."""
    assert params.processor is not None
    pixels = pixel_values(params.processor, [image], params.config)[0]
    processor = params.processor.image_processor
    levels = (pixels * processor.image_std + processor.image_mean) * 255
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def _grid_boxes(rows: int, columns: int) -> np.ndarray:
    row, column = (x.ravel() for x in np.mgrid[:rows, :columns])
    sides = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
    return np.stack(sides, axis=-1)


def kept_patches(view: View, indices: np.ndarray, *, side: int) -> Image.Image:
    """A view with the patches that are gone darkened.

    Args:
        view: the picture.
        indices: int `[K]`, kept patches; what is none of the view's is not drawn.
        side: pixels along the longer side of the result.
    """
    scale = side / max(view.picture.size)
    size = (
        max(1, round(view.picture.width * scale)),
        max(1, round(view.picture.height * scale)),
    )
    picture = view.picture.resize(size, Image.Resampling.NEAREST)
    dark = picture.point(lambda level: int(level * DROPPED))
    mask = Image.new("L", size, 0)
    canvas = ImageDraw.Draw(mask)
    corners = np.rint(view.boxes * (size * 2)).astype(int)
    for left, top, right, bottom in corners[np.isin(view.patches, indices)]:
        canvas.rectangle((left, top, max(left, right - 2), max(top, bottom - 2)), fill=255)
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
    """The patches of an image that reach the decoder, and those that pass some of its layers.

    Args:
        params: what `jaxprune.load` gives.
        image: one image or video, as for `jaxprune.generate`.
        prompt: the question; decoder-side methods prune by it.
        method: as for `jaxprune.generate`.
        layers: decoder layers to show, from 0; None chooses up to four among those that
            drop tokens.
        side: pixels along the longer side of each picture.
        **method_options: hyperparameters of a named method.

    Returns:
        An RGB image, the pictures side by side, each with its title. Of an image of several
        tiles there are two below each other: the patches of the tile that shows all of it,
        and those of the tiles that show it enlarged.

    Raises:
        UserError: as `jaxprune.generate`, and for a layer that the decoder does not have.
    """
    depth = params.config.text_config.num_hidden_layers
    for layer in layers or ():
        if not 0 <= layer < depth:
            raise UserError(f"layer {layer} is asked for; the decoder has 0 to {depth - 1}.")
    assert params.processor is not None
    seen = visual_of(image, params.processor.videos)
    answer: Answer = generate(
        params,
        image,
        prompt,
        method=method,
        max_new_tokens=1,
        return_details=True,
        **method_options,
    )
    shown = views(params, seen)
    columns = []
    for name, kept in _stages(answer, layers):
        pictures = [kept_patches(view, kept, side=side) for view in shown]
        columns.append((f"{name}: {len(kept)} tokens", pictures))
    return _sheet(columns, side)


def _stages(answer: Answer, layers: Sequence[int] | None) -> list[tuple[str, np.ndarray]]:
    """Names and kept patches, int32 `[K]`, before the decoder and after each of some layers."""
    cuts = {layer: kept[0] for layer, kept in answer.kept_by_layer.items()}
    if layers is None:
        places = np.unique(np.linspace(0, max(len(cuts) - 1, 0), 4).round().astype(int))
        layers = [list(cuts)[place] for place in places if cuts]
    found = [("before the decoder", answer.kept_indices[0])]
    for layer in layers:
        last = max((cut for cut in cuts if cut <= layer), default=None)
        kept = answer.kept_indices[0] if last is None else cuts[last]
        found.append((f"after layer {layer}", kept))
    return found


def _sheet(columns: Sequence[tuple[str, list[Image.Image]]], side: int) -> Image.Image:
    """Columns of pictures, equal in their sizes, side by side under their titles."""
    width = GAP + len(columns) * (side + GAP)
    height = GAP + TITLE + sum(picture.height + GAP for picture in columns[0][1])
    sheet = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (title, pictures) in enumerate(columns):
        left, top = GAP + i * (side + GAP), GAP + TITLE
        canvas.text((left, GAP), title, fill="black", font=font)
        for picture in pictures:
            sheet.paste(picture, (left, top))
            top += picture.height + GAP
    return sheet
