"""Small folders of the forms of easy-VQA and Fashion-MNIST, written from their descriptions."""

import gzip
import json

import numpy as np
from PIL import Image


def write_easy_vqa(directory):
    """Four training images and two for the test, each of a teal triangle, three questions each."""
    for name, number in (("train", 4), ("test", 2)):
        (directory / name / "images").mkdir(parents=True)
        asked = []
        for image in range(number):
            pixels = np.full((64, 64, 3), 240, np.uint8)
            pixels[20 : 40 + image, 20:40] = 0, 128, 128
            Image.fromarray(pixels).save(directory / name / "images" / f"{image}.png")
            asked += [
                ["what is the teal shape?", "triangle", image],
                ["what color is the shape?", "teal", image],
                ["is no teal shape present?", "no", image],
            ]
        (directory / name / "questions.json").write_text(json.dumps(asked))
    return directory


def photographs(number, seed):
    """Noise, with each of the ten labels equally often."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, 28, 28), dtype=np.uint8)
    return images, rng.permutation(np.arange(number, dtype=np.uint8) % 10)


def write_idx(directory, name, images, labels, pack=gzip.compress):
    """A pair of files of the IDX format."""
    end = ".gz" if pack is gzip.compress else ""
    sizes = b"".join(n.to_bytes(4, "big") for n in (2051, len(images), 28, 28))
    path = directory / f"{name}-images-idx3-ubyte{end}"
    path.write_bytes(pack(sizes + images.tobytes()))
    sizes = b"".join(n.to_bytes(4, "big") for n in (2049, len(labels)))
    path = directory / f"{name}-labels-idx1-ubyte{end}"
    path.write_bytes(pack(sizes + labels.tobytes()))


def write_fashion(directory):
    """80 photographs to train on and 40 for the test."""
    directory.mkdir(exist_ok=True)
    write_idx(directory, "train", *photographs(80, 0))
    write_idx(directory, "t10k", *photographs(40, 1))
    return directory
