"""Methods that compare a video's frames, against NumPy renderings of the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.ops.tiles import Tiling, one_tile, patches_of
from jaxprune.ops.visual import PROJECTED
from tests import builders
from tests.cases import FEW, picture
from tests.methods.builders import packing_of


def evs(x, keep_rate):
    """bool `[F, P]`"""
    F, P, _ = x.shape
    x = x.astype(np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    scores = np.full((F, P), 255.0)
    scores[1:] = 1 - (unit[1:] * unit[:-1]).sum(axis=-1)
    count = max(P, int(F * P * keep_rate))
    kept = np.zeros(F * P, bool)
    kept[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return kept.reshape(F, P)


def vidcom2_scores(x):
    """Each frame's likeness to the video, and all patches' to both means."""
    _, _, D = x.shape
    x = x.astype(np.float64)
    steady = np.argsort(x.reshape(-1, D).var(axis=0), kind="stable")[: D // 2]
    x = x[..., steady]
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    def likeness(c):
        distance = ((x - c) ** 2).sum(axis=-1)
        return sum(np.exp(-distance / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    to_video = likeness(x.mean(axis=(0, 1)))
    return to_video.mean(axis=1), to_video + likeness(x.mean(axis=1, keepdims=True))


def wanted_of(x, keep_rate):
    """Patches that each frame asks for, not rounded."""
    means, _ = vidcom2_scores(x)
    w = np.exp((means.min() - means) / 0.01)
    w /= w.sum()
    return np.minimum(1, keep_rate * (1 + w - w.mean())) * x.shape[1]


def published(wanted):
    return np.array([max(1, round(share)) for share in wanted])


def made_exact(wanted, P, keep_rate):
    k, total = published(wanted), max(len(wanted), round(keep_rate * len(wanted) * P))
    lacks = wanted - k
    while k.sum() != total:
        step = np.sign(total - k.sum())
        for frame in np.argsort(-step * lacks, kind="stable"):
            if k.sum() != total and 1 <= k[frame] + step <= P:
                k[frame] += step
    return k


def vidcom2(x, k):
    _, scores = vidcom2_scores(x)
    kept = np.zeros(scores.shape, bool)
    for frame, (own, number) in enumerate(zip(scores, k, strict=True)):
        kept[frame, np.argsort(own, kind="stable")[:number]] = True
    return kept


def video_of(frames, N):
    slots = np.arange(frames * N, dtype=np.int32)
    return Tiling(frames, slots, slots // N, video=True)


def chosen(method, parts):
    """What is kept of videos `[F, N, D]`, and of images, of a single tile, in one batch."""
    N = parts[0].shape[1]
    tilings = [one_tile(N) if len(x) == 1 else video_of(len(x), N) for x in parts]
    packing = packing_of(tilings)
    patches = patches_of({PROJECTED: jnp.concatenate(parts)}, packing, N)
    kept = np.asarray(jax.jit(method.choose)(patches).kept)
    assert not kept[np.asarray(patches.place) < 0].any()
    return [own[: len(x)] for own, x in zip(kept, parts, strict=True)]


def film(rng, frames, N, width=12):
    """Frames that change here and there, from a still beginning to a moving end."""
    steps = rng.normal(size=(frames, N, width)) * np.linspace(0.05, 2, frames)[:, None, None]
    return (rng.normal(size=(1, N, width)) + np.cumsum(steps, axis=0)).astype(np.float32)


@pytest.mark.parametrize("keep_rate", [0.01, 0.3, 0.5, 0.99, 1.0])
def test_evs(rng, keep_rate):
    parts = [film(rng, 8, 10), film(rng, 1, 10), film(rng, 3, 10)]
    found = chosen(jaxprune.EVS(keep_rate=keep_rate), parts)
    for part, kept in zip(parts, found, strict=True):
        expected = evs(part, keep_rate) if len(part) > 1 else np.ones((1, 10), bool)
        assert (kept == expected).all()


def test_evs_of_what_stands_still(rng):
    still = np.repeat(film(rng, 1, 10), 4, axis=0)
    still[2, 7] += 1
    (kept,) = chosen(jaxprune.EVS(keep_rate=0.3), [still])
    # The change and the change back, and no others.
    assert kept.sum(axis=1).tolist() == [10, 0, 1, 1] and kept[2:, 7].all()


@pytest.mark.parametrize("keep_rate", [0.01, 0.25, 0.33, 0.7, 1.0])
def test_vidcom2(rng, keep_rate):
    parts = [film(rng, 8, 17), film(rng, 1, 17), film(rng, 3, 17)]
    found = chosen(jaxprune.VidCom2(keep_rate=keep_rate), parts)
    for part, kept in zip(parts, found, strict=True):
        k = made_exact(wanted_of(part, keep_rate), 17, keep_rate)
        expected = vidcom2(part, k) if len(part) > 1 else np.ones((1, 17), bool)
        assert kept.sum() == expected.sum() and (kept == expected).all()


def test_vidcom2_is_the_published_code_where_that_is_exact(rng):
    parts = [film(rng, 4, 16) for _ in range(20)]
    published_k = [published(wanted_of(x, 0.25)) for x in parts]
    exact = [k.sum() == 16 for k in published_k]
    assert 5 < sum(exact) < 20
    for x, k, same, kept in zip(
        parts, published_k, exact, chosen(jaxprune.VidCom2(), parts), strict=True
    ):
        assert not same or (kept == vidcom2(x, k)).all()


def test_vidcom2_of_nothing():
    (kept,) = chosen(jaxprune.VidCom2(), [np.zeros((4, 8, 6), np.float32)])
    assert kept.tolist() == [[True, True, *[False] * 6]] * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("video") / "m"
    builders.write_directory(directory, builders.tiny_video_config())
    return jaxprune.load(directory)


def test_a_video_and_an_image_in_one_prompt(model, monkeypatch):
    frames, image = [picture(i) for i in range(8)], picture(9)
    video = jaxprune.Video(frames)
    options = {"buckets": FEW, "max_new_tokens": 1, "return_details": True}
    vision = jaxprune.encode(model, video, method="evs", keep_rate=0.4, buckets=FEW).vision
    x = np.asarray(vision.signals[PROJECTED][:8])
    monkeypatch.setattr("jaxprune.engine.stages.count", None)  # the numbers are known beforehand
    for method, expected in (
        (jaxprune.EVS(keep_rate=0.4), evs(x, 0.4)),
        (jaxprune.VidCom2(), vidcom2(x, made_exact(wanted_of(x, 0.25), 16, 0.25))),
    ):
        answer = jaxprune.generate(
            model, [[video, image]], ["<video><image>What?"], method=method, **options
        )[0]
        of_video, of_image = answer.kept_indices
        assert of_video[of_video >= 0].tolist() == np.flatnonzero(expected).tolist()
        assert of_image.tolist() == list(range(16))
        assert answer.visual_tokens == [8 + expected.sum(), 16]


@pytest.mark.parametrize(
    ("options", "patches", "extra"),
    [
        ({"method": "uniform", "keep": 5}, 5, 0),
        ({"method": "uniform", "keep": 5, "budget": "tile"}, 8 * 5, 0),
        ({"method": "visionzip", "keep": 9}, 8 * 8, 8),
        ({"method": "visionzip", "keep": 20}, 8 * 13, 8 * 3),
    ],
)
def test_a_number_kept_of_a_video_is_known_too(options, patches, extra, model, monkeypatch):
    monkeypatch.setattr("jaxprune.engine.stages.count", None)
    video = jaxprune.Video([picture(i) for i in range(8)])
    answer = jaxprune.generate(
        model, video, "What?", buckets=FEW, max_new_tokens=1, return_details=True, **options
    )
    assert (answer.kept_indices[0] >= 0).sum() == patches
    assert answer.visual_tokens == [patches + extra + 8]  # and CLS of each frame


def test_frames_that_are_images_are_refused(tmp_path):
    builders.write_directory(tmp_path / "m", builders.tiny_internvl_config())
    model = jaxprune.load(tmp_path / "m")
    video = jaxprune.Video([picture(i) for i in range(8)])
    with pytest.raises(jaxprune.UserError, match="sees frames as images of their own"):
        jaxprune.generate(model, video, "What?", method="vidcom2")
    with pytest.raises(jaxprune.UserError, match="sees frames as images of their own"):
        jaxprune.batch(model, video, "What?", method="vidcom2")


@pytest.mark.parametrize("keep_rate", [0, 1.5, "half"])
def test_a_share_is_one(keep_rate):
    with pytest.raises(jaxprune.UserError, match="keep_rate is"):
        jaxprune.EVS(keep_rate=keep_rate)
