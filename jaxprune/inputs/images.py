"""Images as users have them -> RGB images. Files are data: broken ones are refused."""

import base64
import dataclasses
import http.client
import io
import os
import pathlib
import re
import time
import urllib.parse
import urllib.request
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxprune.errors import UserError, check_whole, is_number
from jaxprune.files import as_path
from jaxprune.ops.visual import VisionOutput

MAX_PIXELS = 89_478_485
"""Pillow's own bound (a quarter of a gigabyte at 3 bytes); larger images are refused."""

MAX_ASPECT = 300
"""Longer strips are cropped to their middle before they are resized to a square: what a
centre crop would throw away anyway, but at the size of the resized strip."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image that has been through the tower, to be asked about; `jaxprune.encode` makes one.

    Attributes:
        height, width: its pixels.
        frames: of a video that is seen as one; 1 for an image.
        tower: parameters of the model's, by which it is known.
        vision: what the tower gives for its tiles, and for others that pad them.
    """

    height: int
    width: int
    tower: Any
    vision: VisionOutput
    frames: int = 1


_URL = re.compile("(https?):/+")  # a path has lost one of its slashes


def load_image(image: Any) -> Image.Image | EncodedImage:
    """An image of any form as RGB; one that is encoded already as it is.

    Args:
        image: a path, a "file:" or "data:" URL, the bytes of a file, a file opened for reading
            bytes, a PIL image, or a uint8 array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or
            `[H, W, 4]`. Nothing is fetched; for that there is `fetch_image`.

    Animations give their first frame; 16-bit images are scaled to 8, floats in [0, 1] to 255;
    CMYK, palette and grey images are converted; transparency is dropped, as `transformers`
    does with files; EXIF orientation is applied.

    Raises:
        UserError: for what is no image, is damaged, or is larger than `MAX_PIXELS`.
    """
    if isinstance(image, EncodedImage):
        return image
    if isinstance(image, Image.Image):
        return _decoded(image, "The PIL image", "open it again")
    if isinstance(image, bytes | bytearray | memoryview):
        return _opened(io.BytesIO(image), f"The image of {len(image)} bytes")
    if isinstance(image, str) and image.startswith("data:"):
        return load_image(_data_of(image))
    if isinstance(image, str | os.PathLike):
        return _from_path(image)
    if isinstance(image, np.ndarray) or hasattr(image, "__array__"):
        try:
            array = np.asarray(image)
        except Exception as error:  # whatever the array's own library raises
            raise UserError(f"image does not become a NumPy array ({error}).") from None
        return _from_array(array)
    if hasattr(image, "read"):
        try:
            content = image.read()
        except Exception as error:  # whatever the file's own library raises
            raise UserError(f"The image's file cannot be read ({error}).") from None
        if not isinstance(content, bytes):
            raise UserError("The image's file gives text; open it in binary mode.")
        return load_image(content)
    raise UserError(
        f"image is a {type(image).__name__}; expected a path, bytes, a PIL image or a uint8 array."
    )


def picture_of(image: Any) -> Image.Image:
    """What `load_image` gives, where an image is needed that can be looked at.

    Raises:
        UserError: as `load_image`, and for one that is encoded.
    """
    found = load_image(image)
    if isinstance(found, EncodedImage):
        raise UserError("An encoded image has no pixels; pass the image itself here.")
    return found


def fetch_image(url: str, *, timeout: float = 10.0, most_bytes: int = 50_000_000) -> Image.Image:
    """An image from the web, which nothing else here fetches.

    Args:
        url: "http:" or "https:".
        timeout: seconds that it may take in all.
        most_bytes: that it may have.

    Raises:
        UserError: for anything but an image that comes in time.
    """
    if not isinstance(url, str) or not url.startswith(_WEB):
        raise UserError(f"url is {url!r}; expected one that starts with http:// or https://.")
    if not is_number(timeout) or not 0 < timeout <= MOST_SECONDS:
        raise UserError(f"timeout is {timeout!r}; expected seconds, above 0 to {MOST_SECONDS}.")
    check_whole("most_bytes", most_bytes)
    began, content = time.monotonic(), bytearray()
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            while part := answer.read1(1 << 16):
                content += part
                if len(content) > most_bytes:
                    raise UserError(f"{url} has over {most_bytes:,} bytes; raise most_bytes.")
                if time.monotonic() - began > timeout:
                    raise TimeoutError(f"over {timeout:g} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{url} cannot be fetched ({error}).") from None
    return picture_of(bytes(content))


_WEB = ("http://", "https://")
MOST_SECONDS = 3600


def _data_of(url: str) -> bytes:
    """The bytes of a "data:" URL."""
    head, comma, written = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        if head.endswith(";base64"):
            return base64.b64decode("".join(urllib.parse.unquote(written).split()), validate=True)
        return urllib.parse.unquote_to_bytes(written)
    except ValueError as error:
        raise UserError(f"The image's data: URL cannot be read ({error}).") from None


def check_image_file(name: str | os.PathLike[str]) -> None:
    """Raise `UserError` for a path that by its header is no image; its pixels are not read."""
    path = _path_of(name)
    with _headed(path, f"The image {path}") as image:
        _check_size(image, f"The image {path}")


def _from_path(name: str | os.PathLike[str]) -> Image.Image:
    path = _path_of(name)
    return _opened(path, f"The image {path}")


def _path_of(name: str | os.PathLike[str]) -> pathlib.Path:
    if str(name).startswith(("http:/", "https:/")):
        url = _URL.sub(r"\1://", str(name)[:200])
        raise UserError(
            f"{url} is a URL, and nothing is fetched here; download the image, or in Python pass "
            "jaxprune.fetch_image(url)."
        )
    if isinstance(name, str) and name.startswith("file:"):
        try:
            name = urllib.request.url2pathname(urllib.parse.urlparse(name).path)
        except ValueError as error:
            raise UserError(f"The image's file: URL cannot be read ({error}).") from None
    path = as_path(name, "The image")
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"The image {path} {what}; expected an image file.")
    return path


def _opened(file: pathlib.Path | io.BytesIO, name: str) -> Image.Image:
    """The image of a file."""
    with _headed(file, name) as image:
        return _decoded(image, name, "save it again")


def _headed(file: pathlib.Path | io.BytesIO, name: str) -> Image.Image:
    """The image of a file, of which the header is read."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of what _check_size refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file)
    except Image.DecompressionBombError:
        raise UserError(f"{name} has far over {MAX_PIXELS:,} pixels; reduce it first.") from None
    except UnidentifiedImageError:
        size = len(file.getbuffer()) if isinstance(file, io.BytesIO) else file.stat().st_size
        raise UserError(f"{name} ({size} bytes) is not an image that Pillow can read.") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UserError(f"{name} is damaged ({error}); save it again.") from None


def _decoded(image: Image.Image, name: str, advice: str) -> Image.Image:
    _check_size(image, name)
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Exception as error:  # Pillow reads late, and fails in many ways on damaged files
        raise UserError(f"{name} is damaged ({error}); {advice}.") from None


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
        if not np.isfinite(levels).all():
            raise UserError("The image holds NaN or infinity; repair it.")
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
