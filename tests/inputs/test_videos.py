"""Videos of every form, in prompts, and what bad input gets."""

import numpy as np
import pytest
from PIL import Image

import jaxprune
from jaxprune.inputs.prompts import as_messages, render, with_videos
from jaxprune.inputs.request import make_request
from jaxprune.inputs.videos import Frame
from jaxprune.models import internvl, video_llava
from jaxprune.reports.kept_patches import kept_over_depth
from tests import builders
from tests.cases import FEW, picture

SIZE = (24, 32)


def frames(number):
    """Squares of one grey each, so that a frame tells its number."""
    return [Image.new("RGB", SIZE[::-1], (8 * i, 8 * i, 8 * i)) for i in range(number)]


def greys(clip):
    return [round(np.asarray(frame).mean() / 8) for frame in clip.frames]


def as_folder(path, number):
    path.mkdir()
    for i, frame in enumerate(frames(number)):
        frame.save(path / f"{i:03}.png")
    (path / "notes.txt").write_text("no frame")
    return path


def as_gif(path, number):
    first, *rest = frames(number)
    first.save(path, save_all=True, append_images=rest, duration=40)
    return path


def as_mp4(path, number):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames(number):
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("video") / "m"
    builders.write_directory(directory, builders.tiny_video_config())
    return jaxprune.load(directory)


@pytest.fixture(scope="module")
def internvl_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("internvl") / "m"
    builders.write_directory(
        directory, builders.tiny_internvl_config(text={"max_position_embeddings": 1024})
    )
    return jaxprune.load(directory)


@pytest.mark.parametrize("number", [8, 20, 3])
@pytest.mark.parametrize("form", ["list", "folder", "gif", "mp4"])
def test_forms(form, number, tmp_path):
    made = {
        "list": lambda: frames(number),
        "folder": lambda: as_folder(tmp_path / "clip", number),
        "gif": lambda: as_gif(tmp_path / "a.gif", number),
        "mp4": lambda: as_mp4(tmp_path / "a.mp4", number),
    }[form]()
    video = jaxprune.Video(made)
    assert video.num_frames == number
    clip = video.clip(video_llava.FAMILY.videos)
    assert (clip.width, clip.height) == SIZE[::-1]
    assert greys(clip) == np.arange(0, number, number / 8).astype(int)[:8].tolist()
    assert video.clip(video_llava.FAMILY.videos) is clip  # decoded once


def test_which_frames_internvl_sees():
    """int(each / 2 + round(each i)), each = (n - 1) / 8."""
    assert internvl.FAMILY.videos.numbers(8) == [0, 1, 2, 3, 4, 4, 5, 6]
    assert internvl.FAMILY.videos.numbers(100) == [6, 18, 31, 43, 56, 68, 80, 93]
    assert max(internvl.FAMILY.videos.numbers(9)) < 9


PARTS = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
PROMPTS = [
    "What happens?",
    "<video>What happens?",
    "<video>\nWhat happens?",
    [{"role": "user", "content": PARTS}],
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_video_is_asked_about(prompt, model):
    video = jaxprune.Video(frames(12))
    answer = jaxprune.generate(
        model, video, prompt, max_new_tokens=2, buckets=FEW, return_details=True
    )
    assert answer.visual_tokens == [8 * 17]
    pruned = jaxprune.generate(
        model, video, prompt, method="prumerge", keep=16, max_new_tokens=2, buckets=FEW,
        return_details=True,
    )  # fmt: skip
    assert pruned.visual_tokens == [16 + 8 + 8]  # patches, CLS tokens, merged ones


def test_a_part_brings_its_video(model, tmp_path):
    path = as_gif(tmp_path / "a.gif", 9)
    content = [{"type": "video", "video": str(path)}, {"type": "text", "text": "What?"}]
    expected = jaxprune.generate(
        model, jaxprune.Video(path), "What?", max_new_tokens=3, buckets=FEW
    )
    found = jaxprune.generate(
        model, None, [{"role": "user", "content": content}], max_new_tokens=3, buckets=FEW
    )
    assert found == expected


def test_an_encoded_video(model):
    video = jaxprune.Video(frames(8))
    encoded = jaxprune.encode(model, video)
    options = {"max_new_tokens": 3, "return_details": True, "buckets": FEW}
    expected = jaxprune.generate(model, video, "What?", **options)
    found = jaxprune.generate(model, encoded, "What?", **options)
    assert found.token_ids == expected.token_ids and found.visual_tokens == [136]


def test_show_draws_every_frame(model):
    sheet = kept_over_depth(
        model, jaxprune.Video(frames(8)), "What?", method="fastv", side=60, layers=[2]
    )
    assert sheet.height > 8 * 60


def test_internvl_reads_frames_as_images(internvl_model):
    """Each one tile, whatever its size, behind its number."""
    video = jaxprune.Video(frames(16))
    answer = jaxprune.generate(
        internvl_model, video, "What?", max_new_tokens=1, return_details=True
    )
    assert answer.visual_tokens == [16] * 8
    processor = internvl_model.processor
    messages, images = as_messages("What?", [video])
    text = render(processor, with_videos(messages, images, processor.videos))
    expected = "".join(f"Frame{i}: <image>\n" for i in range(1, 9)) + "What?"
    assert expected in text
    row = make_request(processor, [[video]], ["<video>What?"], chat=False)
    assert len(row.rows[0].images) == 8 and isinstance(row.images[0], Frame)


def test_which_models_take_videos(tiny_model):
    with pytest.raises(jaxprune.UserError, match="takes no videos"):
        jaxprune.generate(tiny_model, jaxprune.Video(frames(8)), "What?")


def test_places_and_what_stands_there(model):
    video, image = jaxprune.Video(frames(8)), picture(0)
    options = {"max_new_tokens": 1, "buckets": FEW, "return_details": True}
    both = jaxprune.generate(model, [[image, video]], ["<image> <video> Which?"], **options)[0]
    assert both.visual_tokens == [16, 136]
    with pytest.raises(jaxprune.UserError, match="places for <video>, <image>, but there came"):
        jaxprune.generate(model, [[image, video]], ["<video> <image> Which?"], **options)


@pytest.mark.parametrize(
    "source, message",
    [
        ([], "has no frames"),
        ("{tmp}/none.mp4", "does not exist"),
        ("{tmp}/empty", "has no images; expected a folder"),
        ("{tmp}/broken.gif", "damaged"),
        ("{tmp}/text.mp4", "cannot be decoded|PyAV has to be installed"),
        ("{tmp}/still.png", "a single frame; pass it as an image"),
        ([b"nothing"] * 8, "Frame 1 of the video: .* is not an image"),
        (7, "The video is a int; expected a path"),
    ],
)
def test_what_is_refused(source, message, model, tmp_path):
    (tmp_path / "empty").mkdir()
    whole = as_gif(tmp_path / "whole.gif", 8).read_bytes()
    (tmp_path / "broken.gif").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    picture(0).save(tmp_path / "still.png")
    if isinstance(source, str):
        source = source.format(tmp=tmp_path)
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.generate(model, jaxprune.Video(source), "What?", buckets=FEW)
