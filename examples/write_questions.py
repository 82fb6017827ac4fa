"""Write questions as a folder that `jaxprune evaluate`, `calibrate` and training read.

    python examples/write_questions.py --data fashion --out data/fashion
    jaxprune evaluate --data data/fashion/questions.jsonl --method prumerge_plus

easy-vqa: `pip install easy-vqa`. fashion: `apt-get install dataset-fashion-mnist`, or --source
with the four files of Fashion-MNIST. scenes: drawn. The split `held-out` is what nothing that
ships was trained or calibrated on.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Iterator

from PIL import Image

from jaxprune.data import easy_vqa, fashion, scenes
from jaxprune.data.folder import write_questions
from jaxprune.errors import UserError

Asked = Iterator[tuple[Image.Image | pathlib.Path, scenes.Question]]


def questions(data: str, split: str, source: pathlib.Path | None, seed: int) -> Asked:
    """The questions of a split; of what is drawn from a seed, as many as are asked for."""
    if data == "easy-vqa":
        yield from easy_vqa.read(split, source)
    elif data == "fashion":
        photographs = fashion.read(split, source)
        for index in itertools.count():
            collage, question = fashion.sample(photographs, seed, index)
            yield fashion.draw(collage, photographs), question
    else:
        for index in itertools.count():
            scene, question = scenes.sample(split, seed, index)
            yield scenes.draw(scene), question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("easy-vqa", "fashion", "scenes"), required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--split", choices=scenes.SPLITS, default="held-out")
    parser.add_argument("--samples", type=int, default=2000, help="questions, from the first")
    parser.add_argument("--source", type=pathlib.Path, help="where the data set is")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        asked = questions(args.data, args.split, args.source, args.seed)
        print(write_questions(args.out, itertools.islice(asked, args.samples)))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
