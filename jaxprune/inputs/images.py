"""Images as users have them -> RGB images. Files are data: broken ones are refused."""

import pathlib
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxprune.errors import UserError

MAX_PIXELS = 89_478_485
"""Pillow's own bound (a quarter of a gigabyte at 3 bytes); larger images are refused."""

MAX_ASPECT = 300
"""Longer strips are cropped to their middle before they are resized to a square: what a
centre crop would throw away anyway, but at the size of the resized strip."""


def load_image(image: Any) -> Image.Image:
    """A path, PIL image or uint8 array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]`, as RGB.

    Animations give their first frame; 16-bit images are scaled to 8, floats in [0, 1] to 255;
    CMYK, palette and grey images are converted; transparency is dropped, as `transformers`
    does; a file's EXIF orientation is applied.

    Raises:
        UserError: for what is no image, is damaged, or is larger than `MAX_PIXELS`.
    """
    if isinstance(image, str | pathlib.Path):
        return _to_rgb(_open(image))
    if isinstance(image, Image.Image):
        _check_size(image, "The image")
        try:
            return _to_rgb(image)
        except Exception as error:  # a PIL image reads its file late, and may fail in many ways
            raise UserError(f"The PIL image cannot be read ({error}); open it again.") from None
    if isinstance(image, np.ndarray) or hasattr(image, "__array__"):
        try:
            array = np.asarray(image)
        except Exception as error:  # whatever the array's own library raises
            raise UserError(f"image does not become a NumPy array ({error}).") from None
        return _from_array(array)
    raise UserError(
        f"image is a {type(image).__name__}; expected a path, a PIL image or a uint8 array."
    )


def _open(name: str | pathlib.Path) -> Image.Image:
    if str(name).startswith(("http:/", "https:/")):
        raise UserError(f"{str(name)[:200]} is a URL; download the image, nothing is fetched here.")
    try:
        path = pathlib.Path(name).expanduser()
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise UserError(f"The image {path} {what}; expected an image file.")
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a null character
        raise UserError(f"{str(name)[:60]!r} is not a path; expected an image file.") from None
    try:
        with warnings.catch_warnings():
            # Pillow warns of what _check_size refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            _check_size(image, str(path))
            image.load()
            return ImageOps.exif_transpose(image)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"The image {path} has far over {MAX_PIXELS:,} pixels; reduce it first."
        ) from None
    except UnidentifiedImageError:
        size = path.stat().st_size
        raise UserError(f"{path} ({size} bytes) is not an image that Pillow can read.") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UserError(f"The image {path} is damaged ({error}); save it again.") from None


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UserError(f"{name} has {width} x {height} pixels; expected at least one.")
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} in all are taken. "
            "Reduce it first."
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.asarray(image, np.float64)
        most = levels.max(initial=0)
        if image.mode.startswith("I;16") or most > 255:
            levels = levels / 257  # 16 bits, which Pillow would clip rather than scale
        elif image.mode == "F" and levels.min(initial=0) >= 0 and most <= 1:
            levels = levels * 255
        image = Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
    return image.convert("RGB")


def crop_strip(image: Image.Image) -> Image.Image:
    """The middle of a strip longer than `MAX_ASPECT`, any other image as it is."""
    long, short = max(image.size), min(image.size)
    if long <= MAX_ASPECT * short:
        return image
    margin = (long - MAX_ASPECT * short) // 2
    width, height = image.size
    if width > height:
        return image.crop((margin, 0, width - margin, height))
    return image.crop((0, margin, width, height - margin))


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"image is an array of {array.dtype} {list(array.shape)}; expected uint8 "
            "[height, width, 3], values 0 to 255."
        )
    if 0 in array.shape:
        raise UserError(f"image is an array of {list(array.shape)}; expected at least one pixel.")
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    _check_size(image, "image")
    return _to_rgb(image)
