"""Videos as users have them -> frames. Files are data: broken ones are refused."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageSequence, UnidentifiedImageError

from jaxprune.errors import UserError, first_line
from jaxprune.files import as_path
from jaxprune.inputs.images import EncodedImage, load_image, picture_of
from jaxprune.models.family import VideoForm

MOST_FRAMES = 100_000
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Video:
    """A video, to be passed where an image is.

    Only frames that the model looks at are decoded; which they are, the model decides.

    Args:
        source: frames in any form that images have, as a list; a folder of images, in the order of
            their names; an animated image file (GIF, WebP, PNG); or a video file, for which
            PyAV has to be installed (the extra `video`).

    Attributes:
        num_frames: how many there are.

    Raises:
        UserError: for what has no frames, or cannot be read.
    """

    def __init__(self, source: Any) -> None:
        self._read: Callable[[Sequence[int]], list[Image.Image]]
        if isinstance(source, list | tuple):
            frames = list(source)
            self.num_frames = len(frames)
            self._read = lambda numbers: [_frame(frames[n], n) for n in numbers]
        else:
            self.num_frames, self._read = _opened(as_path(source, "The video"))
        if not self.num_frames:
            raise UserError("The video has no frames; pass a list of images, or a file.")
        if self.num_frames > MOST_FRAMES:
            raise UserError(
                f"The video has {self.num_frames:,} frames; expected at most {MOST_FRAMES:,}."
            )
        self._known: dict[tuple[int, ...], Clip] = {}

    def __repr__(self) -> str:
        return f"Video({self.num_frames} frames)"

    def clip(self, form: VideoForm) -> "Clip":
        """The frames that a model looks at, RGB.

        Raises:
            UserError: for frames that cannot be decoded, or too few.
        """
        if self.num_frames < 2:
            raise UserError("The video has a single frame; pass it as an image.")
        numbers = tuple(form.numbers(self.num_frames))
        if numbers not in self._known:
            self._known[numbers] = Clip(tuple(self._read(numbers)))
        return self._known[numbers]


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """Frames that are seen as one: RGB images."""

    frames: tuple[Image.Image, ...]

    @property
    def width(self) -> int:
        return self.frames[0].width

    @property
    def height(self) -> int:
        return self.frames[0].height


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A frame that is seen as an image of a single tile."""

    picture: Image.Image

    @property
    def width(self) -> int:
        return self.picture.width

    @property
    def height(self) -> int:
        return self.picture.height


Visual = Image.Image | EncodedImage | Clip | Frame
"""What a model sees of an image, which may be encoded already, or of a video."""


def seen_as(item: Any, form: VideoForm | None) -> list[Visual]:
    """What an image or a video is to a model: one thing, or several frames.

    Args:
        item: a `Video`, or an image in any form.
        form: how the model sees videos.

    Raises:
        UserError: for a broken image or video, and for a video where the model takes none.
    """
    if not isinstance(item, Video):
        return [load_image(item)]
    if form is None:
        raise UserError("The model takes no videos; pass the frames that matter as images.")
    clip = item.clip(form)
    return [clip] if form.text is None else [Frame(frame) for frame in clip.frames]


def visual_of(item: Any, form: VideoForm | None) -> Image.Image | Clip:
    """An image or a video as the one thing that a model sees of it, with pixels.

    Raises:
        UserError: as `seen_as`; for what is encoded, and a video whose frames are seen one by one.
    """
    if not isinstance(item, Video):
        return picture_of(item)
    found = seen_as(item, form)
    if not isinstance(found[0], Clip):
        raise UserError(
            "The model sees a video's frames one by one; pass those that matter here as images."
        )
    return found[0]


def _frame(image: Any, number: int) -> Image.Image:
    try:
        return picture_of(load_image(image))
    except UserError as error:
        raise UserError(f"Frame {number + 1} of the video: {error}") from None


def _opened(path: pathlib.Path) -> tuple[int, Callable[[Sequence[int]], list[Image.Image]]]:
    """How many frames a folder or a file has, and what reads some of them."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise UserError(f"{path} has no images; expected a folder of a video's frames.")
        return len(files), lambda numbers: [_frame(files[n], n) for n in numbers]
    if not path.is_file():
        raise UserError(f"The video {path} does not exist; expected a file or a folder of frames.")
    try:
        with Image.open(path) as image:
            number = int(getattr(image, "n_frames", 1))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return _with_av(path)
    return number, lambda numbers: _animated(path, numbers)


def _animated(path: pathlib.Path, numbers: Sequence[int]) -> list[Image.Image]:
    """Frames of an animated image."""
    wanted: dict[int, Image.Image] = {}
    try:
        with Image.open(path) as image:
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                if number in numbers:
                    wanted[number] = picture_of(frame.copy())
                if number >= max(numbers):
                    break
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UserError(f"The video {path} is damaged ({first_line(error)}).") from None
    return _every(path, wanted, numbers)


def _with_av(path: pathlib.Path) -> tuple[int, Callable[[Sequence[int]], list[Image.Image]]]:
    """A video file, through PyAV."""
    try:
        import av
    except ImportError:
        raise UserError(
            f"{path} is no image, and to read a video file PyAV has to be installed: "
            "pip install 'jaxprune[video]'. A list of frames or a folder of them works without."
        ) from None

    def decoded(numbers: Sequence[int] | None) -> tuple[int, dict[int, Image.Image]]:
        """All frames counted, or some of them."""
        wanted: dict[int, Image.Image] = {}
        count = 0
        try:
            with av.open(os.fspath(path)) as file:
                for count, frame in enumerate(file.decode(video=0), 1):
                    if numbers is not None and count - 1 in numbers:
                        wanted[count - 1] = frame.to_image().convert("RGB")
                    if count > (MOST_FRAMES if numbers is None else max(numbers)):
                        break
        except Exception as error:  # PyAV's own types, of its libraries
            raise UserError(f"The video {path} cannot be decoded ({first_line(error)}).") from None
        return count, wanted

    number, _ = decoded(None)
    return number, lambda numbers: _every(path, decoded(numbers)[1], numbers)


def _every(
    path: pathlib.Path, found: dict[int, Image.Image], numbers: Sequence[int]
) -> list[Image.Image]:
    missing = sorted(set(numbers) - found.keys())
    if missing:
        raise UserError(f"Frame {missing[0] + 1} of the video {path} cannot be read; repair it.")
    return [found[n] for n in numbers]
