"""Teach the small model that ships third-party pictures, and what it is weak at.

    pip install easy-vqa; apt-get install dataset-fashion-mnist
    python examples/continue_small_llava.py --out runs/continued --export runs/continued/model

It begins with the shipped weights and goes on with three kinds of pictures: drawn scenes,
easy-VQA's drawings and collages of Fashion-MNIST's photographs. `train_small_llava.py` is what
the weights are from; its losses and its loop are used here.

    heads    what only training needs, anew, as it does not ship; all else rests
    tower    the tower on its two losses, until it tells garments apart
    look-up  projector and decoder on answers, with 48 of the 144 patches
    compare  the same, at a high rate again, and comparisons most of all: they are learned only
             when names are looked up well
    answers  the same with all patches

Many of the questions about scenes are comparisons, which were learned least; a new kind of
question, for a size, and a loss on the names in a question are to teach what they need. Words
that are new get tokens of their own behind the old ones, so old texts have the ids that they had.

A run that was interrupted goes on from its last checkpoint.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from tokenizers import Tokenizer
from train_small_llava import (
    GRID,
    PATCH,
    PROMPT_BEFORE_IMAGE,
    QUESTION,
    VOCABULARY,
    Stage,
    answer_logits,
    answer_loss,
    export_model,
    init_heads,
    means,
    object_labels,
    packed,
    patch_labels,
    question_states,
    segment_text,
    shown,
    some_patches,
    stacked,
    train_stage,
    vision_losses,
    word_loss,
)

import jaxprune
from jaxprune.data import easy_vqa, fashion, scenes
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import family_of

SIDE = GRID * PATCH
# Labels of patches and captions count on behind those of the scenes.
COLORS = (*scenes.COLORS, *(c for c in easy_vqa.COLORS if c not in scenes.COLORS))
SHAPES = (*scenes.SHAPES, "rectangle", *fashion.GARMENTS)
COUNTS = tuple(1 + len(kind) for kind in (COLORS, SHAPES, scenes.SIZES, scenes.POSITIONS))
NEW_WORDS = (
    *(f" {word}" for word in (*COLORS, *SHAPES) if word != "t-shirt"),  # which is three words
    *("shirt", " shoes", " items", " at", " in", " image", " contain", " what", " does", " not"),
    *(" present", "what", "does", "Are"),
)
# What is asked about a picture of each source, in the shares of how often it stands here.
SIZE = "size"
ASKED = {
    "scenes": (*scenes.KINDS, "color", "count", "position", SIZE, *["comparison"] * 6),
    "easy-vqa": ("color", "shape", "yes/no", "yes/no"),
    "fashion": ("garment", "garment", "count", "position", "comparison", "comparison", "yes/no"),
}
NAMES = tuple(
    f"{source} {kind}" for source, asked in ASKED.items() for kind in dict.fromkeys(asked)
)
QUESTIONS = 8  # a picture
# Pictures of a step.
SEEN = {"scenes": 9, "easy-vqa": 2, "fashion": 13}
READ = {"scenes": 9, "easy-vqa": 1, "fashion": 3}
CHECKED = {"scenes": 24, "easy-vqa": 8, "fashion": 16}


# ---- pictures


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to learn from.

    Attributes:
        pixels: uint8 `[96, 96, 3]`.
        patches: int32 `[N, 4]`, what each patch shows.
        captions: int32 `[objects, 4]`, what there is.
        named: position and size, as in `patches`, of what a question may name.
        ask: `(kind, rng) -> question`, of another kind where the picture allows none.
    """

    pixels: np.ndarray
    patches: np.ndarray
    captions: np.ndarray
    named: dict[str, tuple[int, int]]
    ask: Callable[[str, np.random.Generator], scenes.Question]


def scene_picture(rng: np.random.Generator) -> Picture:
    scene = scenes.sample_scene(rng)

    def ask(what: str, rng: np.random.Generator) -> scenes.Question:
        if what != SIZE:
            return scenes.ask(scene, what, rng) or ask("position", rng)
        item = scene.objects[rng.integers(len(scene.objects))]
        return scenes.Question(SIZE, f"What size is the {item.name}?", item.size)

    labels = np.array([object_labels(item) for item in scene.objects], np.int32)
    named = {item.name: (p, s) for item, (_, _, s, p) in zip(scene.objects, labels, strict=True)}
    return Picture(np.asarray(scenes.draw(scene)), patch_labels(scene), labels, named, ask)


def collage_picture(photographs: fashion.Photographs, rng: np.random.Generator) -> Picture:
    collage = fashion.sample_collage(photographs, rng)
    patches = np.zeros((GRID, GRID, 4), np.int32)
    labels = np.zeros((len(collage.garments), 4), np.int32)
    centers = (np.arange(GRID) + 0.5) * PATCH
    for label, item in zip(labels, collage.garments, strict=True):
        position = scenes.POSITIONS.index(item.position)
        label[:] = 0, 1 + SHAPES.index(item.name), 0, 1 + position
        rows = (centers > item.y) & (centers < item.y + fashion.SIDE)
        columns = (centers > item.x) & (centers < item.x + fashion.SIDE)
        patches[np.ix_(rows, columns)] = label

    def ask(what: str, rng: np.random.Generator) -> scenes.Question:
        return fashion.ask(collage, what, rng) or ask("garment", rng)

    pixels = np.asarray(fashion.draw(collage, photographs))
    named = {item.name: (label[3], 0) for label, item in zip(labels, collage.garments, strict=True)}
    return Picture(pixels, patches.reshape(-1, 4), labels, named, ask)


def drawing_pictures(split: str, directory: Any) -> list[Picture]:
    """Easy-VQA's drawings of a split whose questions tell color and shape."""
    of_image: dict[pathlib.Path, list[scenes.Question]] = {}
    for path, question in easy_vqa.read(split, directory):
        of_image.setdefault(path, []).append(question)
    return [
        drawing_picture(path, asked, *told)
        for path, asked in of_image.items()
        if (told := color_and_shape(asked)) is not None
    ]


def color_and_shape(asked: list[scenes.Question]) -> tuple[str, str] | None:
    """What a drawing shows, by words that are answers, or that a question takes for granted."""
    told = " ".join(f"{q.question[:-1]} {q.answer}" for q in asked if q.kind != "yes/no").split()
    colors, shapes = ({w for w in told if w in known} for known in (COLORS, easy_vqa.SHAPES))
    return (colors.pop(), shapes.pop()) if colors and shapes else None


def drawing_picture(
    path: pathlib.Path, asked: list[scenes.Question], color: str, shape: str
) -> Picture:
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized)
    # The ground is of one pale color, so what differs from a corner is the shape.
    there = np.abs(pixels.astype(int) - pixels[0, 0]).sum(-1) > 60
    rows, columns = np.nonzero(there)
    cell = 3 * int(3 * rows.mean() / SIDE) + int(3 * columns.mean() / SIDE)
    label = np.array([1 + COLORS.index(color), 1 + SHAPES.index(shape), 0, 1 + cell], np.int32)
    covered = there.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).reshape(-1, 1) > 0.3

    def ask(what: str, rng: np.random.Generator) -> scenes.Question:
        fitting = [q for q in asked if q.kind == what] or asked
        return fitting[rng.integers(len(fitting))]

    return Picture(pixels, np.where(covered, label, 0), label[None], {}, ask)


# ---- batches


def make_batch(
    tokenizer: Tokenizer,
    sources: dict[str, Callable[[np.random.Generator], Picture]],
    rows: dict[str, int],
    more: tuple[str, ...],
    split: str,
    seed: int,
    step: int,
) -> dict[str, np.ndarray]:
    """The batch of one step, `rows` pictures of each source, as `train_small_llava` has it."""
    rng = scenes.random_generator(split, seed, step)
    return stacked(
        [
            make_row(tokenizer, source, sources[source](rng), more, rng)
            for source, number in rows.items()
            for _ in range(number)
        ]
    )


def make_row(
    tokenizer: Tokenizer,
    source: str,
    picture: Picture,
    more: tuple[str, ...],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """A picture with questions; `more` weighs kinds of scenes up."""
    captions = np.zeros((scenes.MAX_OBJECTS, 4), np.int32)
    captions[: len(picture.captions)] = picture.captions
    asked = (*ASKED[source], *(more if source == "scenes" else ()))
    kinds = rng.choice(asked, size=QUESTIONS)
    asked = [picture.ask(str(kind), rng) for kind in kinds]
    named = [(f"{source} {q.kind}", q.question, q.answer) for q in asked]
    row = packed(tokenizer, named, NAMES, QUESTION * QUESTIONS)
    return {
        "pixels": picture.pixels,
        "patches": picture.patches,
        "captions": captions,
        **row,
        "named": name_labels(tokenizer, asked, row["segments"], picture.named),
    }


def name_labels(
    tokenizer: Tokenizer,
    asked: list[scenes.Question],
    segments: np.ndarray,
    named: dict[str, tuple[int, int]],
) -> np.ndarray:
    """At each name's last token in a question where it is and how large: int32 `[T, 2]`, else 0."""
    labels = np.zeros((len(segments), 2), np.int32)
    for k, question in enumerate(asked):
        own = np.flatnonzero(segments == k)
        text = segment_text(question.question)
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        ends = {end: i for i, (_, end) in enumerate(offsets)}
        for name, label in named.items():
            start = text.find(f" the {name}")
            if own.size and start >= 0:
                labels[own[ends[start + len(f" the {name}")]]] = label
    return labels


# ---- losses


def answers_loss(
    params: dict,
    batch: dict,
    *,
    config: LlavaConfig,
    before: jax.Array,
    words: dict[str, np.ndarray],
    stage: Stage,
) -> tuple[jax.Array, dict]:
    """Of projector and decoder, as in `train_small_llava`; the tower rests."""
    features, _, _ = vision_losses(jax.lax.stop_gradient(params), config, batch)
    visual = family_of(config).project(params["model"], config, features)
    alignment = word_loss(params, visual, batch["patches"], words)
    places = jnp.broadcast_to(jnp.arange(visual.shape[1]), visual.shape[:2])
    if stage.patches is not None:
        places = some_patches(batch, shown(batch), stage.patches)
        visual = jnp.take_along_axis(visual, places[..., None], axis=1)
    reading = (params, config, visual, places, batch, before, GRID * GRID)
    answers, right = answer_loss(answer_logits(*reading), batch, NAMES)
    half_way = question_states(*reading, layers=config.text_config.num_hidden_layers // 2)
    found = name_loss(params["name_heads"], half_way, batch["named"])
    metrics = {"answer": answers, "words": alignment, "named": found, **right}
    return 0.5 * alignment + 0.5 * found + answers, metrics


def name_loss(heads: list[jax.Array], states: jax.Array, labels: jax.Array) -> jax.Array:
    """Half-way through the decoder a name in a question shall know what it names.

    A comparison needs two look-ups before anything can be compared. By the answers alone the
    decoder does them late, if at all; with this, what is left is to compare.

    Args:
        heads: of position and size, `[D, classes]` each.
        states: `[B, T, D]`.
        labels: int32 `[B, T, 2]`, 0 where nothing is named.
    """
    states = states * jax.lax.rsqrt(jnp.mean(states**2, axis=-1, keepdims=True) + 1e-6)
    total = jnp.zeros(())
    for i, head in enumerate(heads):
        known = labels[..., i] > 0
        loss = optax.softmax_cross_entropy_with_integer_labels(states @ head, labels[..., i])
        total += jnp.sum(loss * known) / jnp.maximum(jnp.sum(known), 1)
    return total


def checker(
    loss: Callable[[dict, dict], tuple[jax.Array, dict]], batches: list[dict[str, np.ndarray]]
) -> Callable[[dict], dict[str, float]]:
    """A function `params -> metrics` of held-out batches."""
    metrics_of = jax.jit(lambda params, batch: loss(params, batch)[1])

    def check(params: dict) -> dict[str, float]:
        return means([metrics_of(params, batch) for batch in batches])

    return check


# ---- the shipped model with more words


def extended_tokenizer(tokenizer: Tokenizer, words: tuple[str, ...]) -> Tokenizer:
    """One that has a token for each of the words, built up from the left behind all old ones."""
    fields = json.loads(tokenizer.to_str())
    vocabulary, merges = fields["model"]["vocab"], fields["model"]["merges"]
    for word in words:
        while len(pieces := tokenizer.encode(word, add_special_tokens=False).tokens) > 1:
            merges.append(pieces[:2])
            vocabulary[pieces[0] + pieces[1]] = len(vocabulary)
            tokenizer = Tokenizer.from_str(json.dumps(fields))
    if len(vocabulary) > VOCABULARY:
        raise ValueError(f"{len(vocabulary)} tokens do not fit into {VOCABULARY}")
    return tokenizer


def first_tokens(tokenizer: Tokenizer, words: tuple[str, ...]) -> np.ndarray:
    return np.array([tokenizer.encode(f" {w}", add_special_tokens=False).ids[0] for w in words])


def sources_of(
    split: str, args: argparse.Namespace
) -> dict[str, Callable[[np.random.Generator], Picture]]:
    """A function that gives a picture, for each source."""
    photographs = fashion.read(split, args.fashion)
    drawings = drawing_pictures(split, args.easy_vqa)
    return {
        "scenes": scene_picture,
        "easy-vqa": lambda rng: drawings[rng.integers(len(drawings))],
        "fashion": functools.partial(collage_picture, photographs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/continued"))
    parser.add_argument("--export", type=pathlib.Path, help="write the Hugging Face directory here")
    parser.add_argument("--easy-vqa", type=pathlib.Path, help="its data; else the package's")
    parser.add_argument("--fashion", type=pathlib.Path, help="its folder; else Debian's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads-steps", type=int, default=100)
    parser.add_argument("--tower-steps", type=int, default=450)
    parser.add_argument("--look-up-steps", type=int, default=1400)
    parser.add_argument("--compare-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

    sources = {split: sources_of(split, args) for split in ("train", "held-out")}
    args.out.mkdir(parents=True, exist_ok=True)
    small = jaxprune.load(dtype="float32")
    config = small.config
    shipped = Tokenizer.from_file(str(jaxprune.SMALL_MODEL / "tokenizer.json"))
    tokenizer = extended_tokenizer(shipped, NEW_WORDS)
    before = jnp.asarray(tokenizer.encode(PROMPT_BEFORE_IMAGE).ids, jnp.int32)
    words = {
        name: first_tokens(tokenizer, kind) for name, kind in (("color", COLORS), ("shape", SHAPES))
    }

    def batches(
        rows: dict[str, int], seed: int, more: tuple[str, ...] = (), split: str = "train"
    ) -> Callable[[int], dict[str, np.ndarray]]:
        return functools.partial(make_batch, tokenizer, sources[split], rows, more, split, seed)

    def of_vision(params: dict, batch: dict) -> tuple[jax.Array, dict]:
        _, loss, metrics = vision_losses(params, config, batch)
        return loss, metrics

    model = dict(small.arrays)
    stage = Stage(
        name="heads", steps=args.heads_steps, batch=sum(SEEN.values()), rate=3e-3, answers=False
    )
    params = train_stage(
        stage,
        {"heads": init_heads(config, jax.random.key(args.seed), COUNTS)},
        lambda params, batch: of_vision({"model": model, **params}, batch),
        batches(SEEN, args.seed + 10),
        args.out,
    )
    stage = Stage(
        name="tower", steps=args.tower_steps, batch=sum(SEEN.values()), rate=8e-4, answers=False
    )
    params = train_stage(
        stage, {"model": model, **params}, of_vision, batches(SEEN, args.seed + 11), args.out
    )
    read = functools.partial(Stage, batch=sum(READ.values()))
    stages = (
        read(name="look-up", steps=args.look_up_steps, rate=8e-3, patches=48, more=()),
        read(
            name="compare",
            steps=args.compare_steps,
            rate=8e-3,
            patches=48,
            more=("comparison",) * 8,
        ),
        read(name="answers", steps=args.steps, rate=3e-3, more=("comparison",) * 4),
    )
    width = config.text_config.hidden_size
    params["name_heads"] = [jnp.zeros((width, COUNTS[label])) for label in (3, 2)]
    loss = functools.partial(answers_loss, config=config, before=before, words=words)
    make = batches(CHECKED, args.seed, split="held-out")
    check = checker(functools.partial(loss, stage=stages[-1]), [make(i) for i in range(3)])
    for seed, stage in enumerate(stages, start=args.seed + 12):
        of_stage = functools.partial(loss, stage=stage)
        params = train_stage(
            stage, params, of_stage, batches(READ, seed, stage.more), args.out, check
        )
    if args.export:
        export_model(params["model"], config, tokenizer, args.export)


if __name__ == "__main__":
    main()
