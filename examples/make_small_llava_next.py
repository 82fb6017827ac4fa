"""The small LLaVA's weights in the shape of a LLaVA-NeXT, for trying tiles without a download.

    python examples/make_small_llava_next.py --out runs/small_llava_next

Tiles of 96 pixels and 144 patches, tilings of 192 pixels; 744 visual tokens at most. The newline
is the mean of the tokens' embeddings. Nothing is trained: the decoder has met neither tiles nor
positions over 300, so this shows machinery and what pruning costs such a model, no more.
"""

import argparse
import json
import pathlib

import jax.numpy as jnp

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.models.llava_next import LlavaNextConfig
from jaxprune.processing import processor_files

SIDE = 96
PINPOINTS = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()

    small = jaxprune.load(dtype="float32")
    fields = {**small.config.to_hf(), "image_grid_pinpoints": [list(p) for p in PINPOINTS]}
    fields["text_config"] = {**fields["text_config"], "max_position_embeddings": 2048}
    config = LlavaNextConfig.from_hf(fields)
    embedding = small["language_model"]["embed_tokens"]["embedding"]
    params = {**small.arrays, "image_newline": jnp.mean(embedding, axis=0)}
    checkpoints_convert.export(params, config, args.out, companions=jaxprune.SMALL_MODEL)
    for name, content in processor_files(config).items():
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{args.out}: {config.num_image_tokens} visual tokens at most.")


if __name__ == "__main__":
    main()
