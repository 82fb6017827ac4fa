"""A small LLaVA-NeXT: the small model that ships, taught to read tiles and newlines.

    python examples/train_small_llava_next.py --out runs/small_llava_next

Tiles of 96 pixels and 144 patches, tilings of up to 192 pixels; 744 visual tokens at most. It
begins with the shipped model's weights and the mean of the tokens' embeddings as the newline,
and learns from scenes of 192 pixels whose shapes are half as large: what color and shape they
have is seen in the tiles alone. The tower rests. A step shows the decoder a few of an image's
tokens at their own positions, and the last stage all of them.

A run that was interrupted goes on from its last checkpoint. Without training (`--steps 0
--polish-steps 0`) the model shows the machinery, but answers hardly better than by guessing.
"""

import argparse
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from train_small_llava import (
    KINDS,
    PROMPT_BEFORE_IMAGE,
    Stage,
    answer_logits,
    answer_loss,
    ask_all,
    some_patches,
    stacked,
    train_stage,
)

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.data import scenes
from jaxprune.engine.cost import most_tokens
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.processor import load_processor
from jaxprune.models.llava_next import LlavaNextConfig
from jaxprune.models.registry import family_of
from jaxprune.ops.tiles import NEWLINE, VisualSize

TILE = 96
SIDE = 2 * TILE
SHRINK = 0.5
PINPOINTS = ((TILE, SIDE), (SIDE, TILE), (SIDE, SIDE))


def untrained() -> jaxprune.Params:
    """The shipped weights in the shape of a LLaVA-NeXT."""
    small = jaxprune.load(dtype="float32")
    fields = {**small.config.to_hf(), "image_grid_pinpoints": [list(p) for p in PINPOINTS]}
    fields["text_config"] = {**fields["text_config"], "max_position_embeddings": 2048}
    config = LlavaNextConfig.from_hf(fields)
    embedding = small["language_model"]["embed_tokens"]["embedding"]
    arrays = {**small.arrays, "image_newline": jnp.mean(embedding, axis=0)}
    return jaxprune.Params(arrays, config, small.processor)


def export(params: dict, config: LlavaNextConfig, directory: pathlib.Path) -> None:
    """The model as `transformers` reads it, with the shipped model's tokenizer."""
    checkpoints_convert.export(params, config, directory, companions=jaxprune.SMALL_MODEL)
    for name, content in family_of(config).processor_files(config).items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def objects(scene: scenes.Scene, grid: int) -> np.ndarray:
    """Which patches of a grid over the scene show an object: bool `[grid, grid]`."""
    centers = (np.arange(grid) + 0.5) * scenes.SCENE_SIZE / grid
    found = np.zeros((grid, grid), bool)
    for item in scene.objects:
        reach = SHRINK * scenes.SIZES[item.size] + 1
        rows, columns = np.abs(centers - item.y) < reach, np.abs(centers - item.x) < reach
        found |= rows[:, None] & columns
    return found


def make_batch(
    step: int,
    *,
    model: jaxprune.Params,
    tokenizer: Tokenizer,
    seed: int,
    size: int,
    more: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """The batch of one step.

    Returns:
        pixels float32 `[B * 5, 96, 96, 3]`; shown bool `[B, 744]`, the visual tokens that show
        an object; and the questions as in `train_small_llava`.
    """
    images, rows = [], []
    grid = model.config.vision_config.grid_size
    for row in range(size):
        rng = scenes.random_generator("train", seed, step * size + row)
        scene = scenes.sample_scene(rng)
        images.append(scenes.draw(scene, SIDE, shrink=SHRINK))
        lines = np.pad(objects(scene, 2 * grid), ((0, 0), (0, 1)))  # newlines show nothing
        shown = np.concatenate([objects(scene, grid).ravel(), lines.ravel()])
        rows.append({"shown": shown, **ask_all(tokenizer, scene, more, rng)})
    return {"pixels": pixel_values(model.processor, images, model.config), **stacked(rows)}


def loss_function(
    params: dict, batch: dict, *, config: LlavaNextConfig, before: jax.Array, stage: Stage
) -> tuple[jax.Array, dict]:
    family, slots = family_of(config), config.tiling(VisualSize(SIDE, SIDE)).slots  # [744]
    vision = family.encode(params["model"], config, batch["pixels"])
    features = jax.lax.stop_gradient(vision.features)  # [B * 5, 144, C]
    patches = features.reshape(len(batch["shown"]), -1, features.shape[-1])
    visual = family.project(params["model"], config, patches[:, np.maximum(slots, 0)])
    newline = (slots == NEWLINE)[None, :, None]
    visual = jnp.where(newline, params["model"]["image_newline"], visual)
    places = jnp.broadcast_to(jnp.arange(len(slots)), visual.shape[:2])
    if stage.patches is not None:
        places = some_patches(batch, batch["shown"], stage.patches)
        visual = jnp.take_along_axis(visual, places[..., None], axis=1)
    logits = answer_logits(params, config, visual, places, batch, before, len(slots))
    loss, right = answer_loss(logits, batch, KINDS)
    return loss, {"answer": loss, **right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the model's directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--polish-steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    model = untrained()
    assert model.processor is not None
    working = args.out.with_name(args.out.name + ".training")
    working.mkdir(parents=True, exist_ok=True)
    family = family_of(model.config)
    for name, content in family.processor_files(model.config).items():
        (working / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(jaxprune.SMALL_MODEL / name, working)
    model = jaxprune.Params(model.arrays, model.config, load_processor(working, model.config))

    tokenizer = Tokenizer.from_file(str(jaxprune.SMALL_MODEL / "tokenizer.json"))
    before = jnp.asarray(tokenizer.encode(PROMPT_BEFORE_IMAGE).ids, jnp.int32)
    more = ("comparison", "position")
    stages = (
        Stage(name="some", steps=args.steps, batch=args.batch, rate=8e-3, patches=256, more=more),
        Stage(name="all", steps=args.polish_steps, batch=args.batch, rate=3e-3, more=more),
    )
    params = {"model": model.arrays}
    for i, stage in enumerate(stages):
        if not stage.steps:
            continue
        loss = functools.partial(loss_function, config=model.config, before=before, stage=stage)
        make = functools.partial(
            make_batch,
            model=model,
            tokenizer=tokenizer,
            seed=100 + args.seed + i,
            size=stage.batch,
            more=stage.more,
        )
        params = train_stage(stage, params, loss, make, working)
    export(params["model"], model.config, args.out)
    shutil.rmtree(working)
    print(f"{args.out}: {most_tokens(model.config)} visual tokens at most.")


if __name__ == "__main__":
    main()
