"""Draw the picture that the README and the demo ask about.

    python examples/draw_demo.py --out jaxprune/assets/demo.png

It is a scene that the model was not trained on, chosen among many because the model answers 36 of
the 37 questions that can be asked about it rightly, about as many as elsewhere.
"""

import argparse

from jaxprune.data import scenes

SPLIT, SEED, INDEX, SIDE = "held-out", 7, 11239, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    scene = scenes.sample_scene(scenes.random_generator(SPLIT, SEED, INDEX))
    scenes.draw(scene, SIDE).save(args.out)


if __name__ == "__main__":
    main()
