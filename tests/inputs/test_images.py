import base64
import http.server
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

import jaxprune
from jaxprune.inputs.images import crop_strip, load_image


@pytest.fixture
def rgb(rng):
    return Image.fromarray(rng.integers(0, 256, size=(20, 30, 3), dtype=np.uint8))


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return load_image(tmp_path / name)


def test_modes_are_converted(tmp_path, rgb):
    names = {"L": "g.png", "P": "p.gif", "CMYK": "c.tif", "RGBA": "a.png", "1": "b.png"}
    for mode, name in names.items():
        image = saved(tmp_path, rgb.convert(mode), name)
        assert image.mode == "RGB"
        assert image.size == (30, 20)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    found = np.asarray(saved(tmp_path, Image.fromarray(levels), "deep.png"))
    np.testing.assert_allclose(found[..., 0], np.rint(levels / 257), atol=1)


def test_animation_gives_its_first_frame(tmp_path, rgb):
    other = Image.new("RGB", rgb.size, "red")
    rgb.save(tmp_path / "a.gif", save_all=True, append_images=[other, other])
    first = np.asarray(load_image(tmp_path / "a.gif"), int)
    assert np.abs(first - np.asarray(rgb, int)).mean() < 20


def test_orientation_of_a_file_is_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert saved(tmp_path, rgb, "turned.jpg", exif=exif).size == (20, 30)


def test_a_photo_is_the_same_by_any_way(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    rgb.save(path, exif=exif)
    content = path.read_bytes()
    url = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    with path.open("rb") as file:
        ways = [path, str(path), content, bytearray(content), file, url, path.as_uri()]
        ways.append(Image.open(path))
        found = [np.asarray(load_image(way)) for way in ways]
    assert found[0].shape == (30, 20, 3)
    for other in found[1:]:
        assert (other == found[0]).all()


@pytest.mark.parametrize(
    "image, message",
    [
        (b"", "of 0 bytes .0 bytes. is not an image"),
        ("data:image/png;base64,@@@", "data: URL cannot be read"),
        ("data:image/png", "data: URL cannot be read .it has no comma"),
        (io.StringIO("a"), "open it in binary mode"),
        ("https://example.org/a.png", r"jaxprune.fetch_image\(url\)"),
        ("", "which is not a path"),
        ("a\0b", "which is not a path"),
        ("~nobody-of-this-name/a.png", "which is not a path"),
        ("x" * 5000, "which is not a path"),
        (None, "image is a NoneType"),
        (5, "image is a int"),
        (Image.fromarray(np.array([[0.5, np.nan]], np.float32)), "holds NaN or infinity"),
        (np.zeros((4, 4, 3)), "array of float64"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(jaxprune.UserError, match=message):
        load_image(image)


@pytest.fixture
def server(tmp_path, rgb):
    rgb.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"x" * 5000)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def do_GET(self):
            if "slow" in self.path:
                time.sleep(2)
            super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_the_web_is_asked_by_name_alone(server, rgb):
    assert (np.asarray(jaxprune.fetch_image(f"{server}/a.png")) == np.asarray(rgb)).all()
    for url, options, message in (
        (f"{server}/none.png", {}, "cannot be fetched .HTTP Error 404"),
        (f"{server}/b.png", {"most_bytes": 1000}, "has over 1,000 bytes"),
        (f"{server}/b.png", {}, "is not an image"),
        (f"{server}/slow.png", {"timeout": 0.3}, "cannot be fetched"),
        ("file:///etc/passwd", {}, "expected one that starts with http"),
        (server, {"timeout": 0}, "timeout is 0"),
    ):
        with pytest.raises(jaxprune.UserError, match=message):
            jaxprune.fetch_image(url, **options)


def test_arrays(rng):
    array = rng.integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
    assert (np.asarray(load_image(array)) == array).all()
    assert load_image(array[..., 0]).size == (6, 5)
    assert load_image(array[..., :1]).size == (6, 5)
    assert load_image(np.dstack([array, array[..., :1]])).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (10_000, 40), (40, 10_000), (90_000, 1)])
def test_odd_sizes_are_answered(size, small_model):
    """A picture of one colour is the same whatever its shape."""
    ask = "What color is the circle?"
    square = jaxprune.generate(small_model, Image.new("RGB", (96, 96), "red"), ask)
    assert jaxprune.generate(small_model, Image.new("RGB", size, "red"), ask) == square


def test_a_long_strip_is_cropped_to_its_middle():
    strip = Image.new("RGB", (90_000, 1))
    assert load_image(strip).size == (90_000, 1)
    assert crop_strip(strip).size == (300, 1)


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))
    return b"\x89PNG\r\n\x1a\n" + data


def test_broken_files_are_named(tmp_path, rgb):
    rgb.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    cases = {
        "zero.png": (b"", r"\(0 bytes\) is not an image"),
        "text.png": (b"hello", "is not an image"),
        "cut.png": (whole[: len(whole) // 2], "is damaged"),
        "huge.png": (png_header(60_000, 60_000), "pixels"),
        "large.png": (png_header(12_000, 9_000), "12000 x 9000"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(jaxprune.UserError, match=message):
            load_image(tmp_path / name)
    with pytest.raises(jaxprune.UserError, match="does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(jaxprune.UserError, match="is a directory"):
        load_image(tmp_path)


def test_levels_of_deep_images():
    """16 bits are 16 bits however dark; floats are read as [0, 1] where they fit into it."""
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert np.asarray(load_image(dark)).max() == 1
    half = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert np.asarray(load_image(half)).max() == 128
    levels = Image.fromarray(np.full((4, 4), 77.0, np.float32))
    assert np.asarray(load_image(levels)).max() == 77
