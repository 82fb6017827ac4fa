"""RGB images -> the pixels that a vision tower takes."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from jaxprune.errors import UserError, first_line, is_whole
from jaxprune.inputs.images import crop_strip, picture_of
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.videos import Clip, Frame, Visual
from jaxprune.models.family import ModelConfig
from jaxprune.ops.tiles import VisualSize

MOST_ENLARGED = 16  # sides of a tile that an image may be resized to before it is cropped


def size_of(image: Visual) -> VisualSize:
    """The pixels of an image, as a config's `tiling` asks for them."""
    frames = len(image.frames) if isinstance(image, Clip) else getattr(image, "frames", 1)
    most = 1 if isinstance(image, Frame) else None
    return VisualSize(image.height, image.width, frames, most)


def _without_old_names(image_processor: Any) -> dict[str, Any]:
    """What makes an image processor call pixels "pixel_values", where it would not."""
    name = "return_legacy_image_output"  # Video-LLaVA's, up to transformers 5.2x
    known = inspect.signature(image_processor.preprocess).parameters
    return {name: False} if name in known else {}


def _whole_numbers(fields: Any) -> Iterator[int]:
    """Every whole number of nested settings: among them all sizes that images are brought to."""
    if isinstance(fields, Mapping):
        fields = list(fields.values())
    if isinstance(fields, list | tuple):
        for part in fields:
            yield from _whole_numbers(part)
    elif is_whole(fields):
        yield fields


def pixel_values(
    processor: Processor, images: Sequence[Visual], config: ModelConfig
) -> Float[np.ndarray, "F H W 3"]:
    """RGB images -> normalised pixels of all their tiles, float32.

    The tiles of an image stand next to each other; `config.tiling` says how many there are. The
    frames of a video that is seen as one are its tiles.

    Raises:
        UserError: when the processor's tiles are not what the vision tower takes.
    """
    size = config.tower.tile_size
    largest = max(_whole_numbers(processor.image_processor.to_dict()), default=0)
    if largest > MOST_ENLARGED * size:
        raise UserError(
            f"{processor.image_file} speaks of {largest} pixels, but the vision tower takes "
            f"{size}; it is of another model."
        )
    tiles: list[np.ndarray] = []
    for image in images:
        visual, each = size_of(image), _pictures(image)
        tiling = config.tiling(visual)
        squares = tiling.tiles == len(each)
        found = np.concatenate(
            [_tiles(processor, picture, visual, size, squares=squares) for picture in each]
        )
        if len(found) != tiling.tiles:
            raise UserError(
                f"The image processor cuts an image of {image.width} x {image.height} pixels into "
                f"{len(found)} tiles, but the model expects {tiling.tiles}; config.json and "
                f"{processor.image_file} say different things of tiles (image_grid_pinpoints)."
            )
        tiles.append(found)
    return np.concatenate(tiles)


def _pictures(image: Visual) -> Sequence[Image.Image]:
    """What the image processor is given one by one."""
    if isinstance(image, Clip):
        return image.frames
    return [image.picture if isinstance(image, Frame) else picture_of(image)]


def _tiles(
    processor: Processor, image: Image.Image, visual: VisualSize, size: int, *, squares: bool
) -> Float[np.ndarray, "F H W 3"]:
    """The tiles of an image or of a frame, of `size` x `size` pixels each.

    Args:
        squares: each picture is one tile.
    """
    if squares and getattr(processor.image_processor, "do_center_crop", False):
        image = crop_strip(image)
    try:
        with np.errstate(all="ignore"):  # what is not finite is told below
            made = processor.image_processor(
                np.asarray(image),
                input_data_format="channels_last",
                **processor.image_arguments(visual),
                **_without_old_names(processor.image_processor),
            )
        found = np.asarray(made["pixel_values"], np.float32)
        found = np.moveaxis(found.reshape(-1, *found.shape[-3:]), 1, -1)
    except Exception as error:  # whatever transformers makes of odd settings
        raise UserError(
            f"The image processor fails ({first_line(error)}); check {processor.image_file}."
        ) from None
    if found.shape[1:] != (size, size, 3):
        raise UserError(
            f"The image processor gives {found.shape[1]} x {found.shape[2]} pixels, but the "
            f"vision tower takes {size} x {size}; {processor.image_file} is of another model."
        )
    if not np.isfinite(found).all():
        raise UserError(
            "The image processor gives pixels that are not finite; check image_std in "
            f"{processor.image_file}."
        )
    return found
