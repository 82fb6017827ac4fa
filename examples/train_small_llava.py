"""Train the small LLaVA that ships with jaxprune, from nothing, on drawn scenes.

    python examples/train_small_llava.py --out runs/small_llava --export jaxprune/assets/small_llava

Four stages:
    vision   the tower alone, as CLIP is trained: a contrastive image-text loss on the CLS
             token, plus a loss on what each patch shows;
    look-up  projector and decoder on answers, the tower at rest, with a few of the patches
             of each image: finding the right one among 24 is learned much sooner than
             among 144, which by itself stays on a plateau for thousands of steps;
    answers  the same with all patches;
    polish   once more, with more of the kinds that are learned last.
One row of the later stages asks several questions about one image: the questions share the
image's tokens and do not see each other, so an image is encoded and read once for all.

A run that was interrupted goes on from its last checkpoint: the data of a step depends
on the seed and the step alone.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxprune import checkpoints_convert
from jaxprune.data import scenes
from jaxprune.models.clip import ClipVisionConfig, ClipVisionTower
from jaxprune.models.llama import LlamaConfig, LlamaDecoder, text_tokens
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.llava.images import CLIP_MEAN, CLIP_STD
from jaxprune.models.registry import family_of
from jaxprune.train.checkpoints import Checkpoints
from jaxprune.train.log import Log, Progress
from jaxprune.train.prefetch import prefetched
from jaxprune.train.stopping import stopping

MEAN, STD = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
PROMPT_BEFORE_IMAGE = "USER: "
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
VOCABULARY = 512
QUESTION = 14  # tokens of a question with its answer, on average
GRID, PATCH = 12, 8
COLOR, SHAPE = 0, 1  # of the four labels of an object
LISTING = "What is there?"  # asked beside the six kinds of question
KINDS = (*scenes.KINDS, "listing")


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE fitted to the questions: any text can be spelled, common words are short."""
    lines = [PROMPT_BEFORE_IMAGE, "ASSISTANT:"]
    for index in range(6000):
        _, question = scenes.sample("train", 1, index)
        lines.append(segment_text(question.question) + f" {question.answer}")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return tokenizer


def segment_text(question: str) -> str:
    """What follows the image in LLaVA's chat template."""
    return f"\n{question} ASSISTANT:"


def small_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=ClipVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=GRID * PATCH,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
        ),
        image_token_index=SPECIAL_TOKENS.index("<image>"),
    )


# ---- data


def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """What each patch shows: int32 `[N, 4]`, as `object_labels` has it, 0 for the ground."""
    centers = (np.arange(GRID) + 0.5) * PATCH
    labels = np.zeros((GRID, GRID, 4), np.int32)
    for item in scene.objects:
        reach = scenes.SIZES[item.size] + 1
        rows = np.abs(centers - item.y) < reach
        columns = np.abs(centers - item.x) < reach
        labels[np.ix_(rows, columns)] = object_labels(item)
    return labels.reshape(-1, 4)


def object_labels(item: scenes.Object) -> tuple[int, int, int, int]:
    """Colour, shape, size and position as numbers from 1; 0 is left for "nothing"."""
    return (
        1 + list(scenes.COLORS).index(item.color),
        1 + scenes.SHAPES.index(item.shape),
        1 + list(scenes.SIZES).index(item.size),
        1 + scenes.POSITIONS.index(item.position),
    )


def list_objects(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """Two of the objects with their places: a look-up at every word, not one a question."""
    chosen = rng.permutation(len(scene.objects))[:2]
    return ", ".join(f"{scene.objects[i].name} {scene.objects[i].position}" for i in chosen)


def ask_more(scene: scenes.Scene, what: str, rng: np.random.Generator) -> tuple[str, str]:
    """One more question of a kind, or for a listing, with its answer."""
    if what == "listing":
        return LISTING, list_objects(scene, rng)
    asked = scenes.ask(scene, what, rng) or scenes.ask(scene, "count", rng)
    assert asked is not None
    return asked.question, asked.answer


def make_batch(
    tokenizer: Tokenizer, seed: int, step: int, size: int, more: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """The batch of one step; `more` is asked beside a question of each kind.

    Returns:
        pixels uint8 `[B, 96, 96, 3]`; patches int32 `[B, N, 4]`; captions int32
        `[B, objects, 4]`; and what `packed` gives of each row.
    """
    rows = []
    for row in range(size):
        rng = scenes.random_generator("train", seed, step * size + row)
        scene = scenes.sample_scene(rng)
        captions = np.zeros((scenes.MAX_OBJECTS, 4), np.int32)
        captions[: len(scene.objects)] = [object_labels(item) for item in scene.objects]
        seen = {
            "pixels": np.asarray(scenes.draw(scene)),
            "patches": patch_labels(scene),
            "captions": captions,
        }
        rows.append(seen | ask_all(tokenizer, scene, more, rng))
    return stacked(rows)


def ask_all(
    tokenizer: Tokenizer, scene: scenes.Scene, more: tuple[str, ...], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A question of each kind and of `more`, packed."""
    asked = [(what, *ask_more(scene, what, rng)) for what in (*scenes.KINDS, *more)]
    return packed(tokenizer, asked, KINDS, QUESTION * len(asked))


def packed(
    tokenizer: Tokenizer, asked: list[tuple[str, str, str]], names: tuple[str, ...], length: int
) -> dict[str, np.ndarray]:
    """Questions with their answers one behind the other, as many as fit.

    Args:
        tokenizer: the model's.
        asked: kind, question and answer of each.
        names: of the kinds.
        length: tokens of a row, `T`.

    Returns:
        token_ids int32 `[T]`; targets bool `[T]`, the answer tokens and the end of sequence;
        segments int32 `[T]`, which question a token is of, -1 for the padding; places int32
        `[T]`, where in its question it stands; kinds int32 `[questions]`, -1 for what did not fit.
    """
    row = {
        "token_ids": np.full(length, SPECIAL_TOKENS.index("<pad>"), np.int32),
        "targets": np.zeros(length, bool),
        "segments": np.full(length, -1, np.int32),
        "places": np.zeros(length, np.int32),
        "kinds": np.full(len(asked), -1, np.int32),
    }
    start = 0
    for k, (kind, question, answer) in enumerate(asked):
        prompt = tokenizer.encode(segment_text(question), add_special_tokens=False).ids
        reply = tokenizer.encode(f" {answer}", add_special_tokens=False).ids
        ids = [*prompt, *reply, SPECIAL_TOKENS.index("</s>")]
        end = start + len(ids)
        if end > length:
            break
        row["token_ids"][start:end] = ids
        row["targets"][start + len(prompt) : end] = True
        row["segments"][start:end] = k
        row["places"][start:end] = np.arange(len(ids))
        row["kinds"][k] = names.index(kind)
        start = end
    return row


def stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows as one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


# ---- losses


class TrainingHeads(nn.Module):
    """What only training needs: the patch classifier and the text side of the CLIP loss.

    Attributes:
        width: of the tower.
        counts: how many values each of the four labels has, "nothing" among them.
    """

    width: int
    counts: tuple[int, ...]

    @nn.compact
    def __call__(
        self, patches: jax.Array, cls: jax.Array, captions: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """Patch logits for each label, and `[B, B]` image-caption similarities.

        Args:
            patches: `[B, N, C]`.
            cls: `[B, C]`.
            captions: int32 `[B, objects, 4]`, a bag of described objects, 0 = no object.
        """
        logits = [nn.Dense(n, name=f"patch_{i}")(patches) for i, n in enumerate(self.counts)]

        words = [
            nn.Embed(n, self.width, name=f"word_{i}")(captions[..., i])
            for i, n in enumerate(self.counts)
        ]
        described = nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(sum(words))))
        present = (captions[..., SHAPE, None] > 0).astype(described.dtype)
        text = nn.Dense(self.width, name="text")(jnp.sum(described * present, axis=1))
        image = nn.Dense(self.width, name="image")(cls)
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
        image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
        scale = self.param("logit_scale", lambda _: jnp.asarray(np.log(10.0), jnp.float32))
        return logits, jnp.exp(jnp.minimum(scale, np.log(100.0))) * image @ text.T


def normalise(pixels: jax.Array) -> jax.Array:
    return (pixels.astype(jnp.float32) / 255 - MEAN) / STD


def vision_losses(
    params: dict, config: LlavaConfig, batch: dict
) -> tuple[jax.Array, jax.Array, dict]:
    """Features `[B, N, C]` of LLaVA's feature layer, the two vision losses' sum, and metrics."""
    tower = ClipVisionTower(config.vision_config)
    states, pooled = tower.apply(
        {"params": params["model"]["vision_tower"]}, normalise(batch["pixels"])
    )
    features = states[config.feature_layers[0]][:, 1:]
    counts = tuple(params["heads"][f"patch_{i}"]["bias"].size for i in range(4))
    heads = TrainingHeads(config.vision_config.hidden_size, counts)
    logits, similarity = heads.apply(
        {"params": params["heads"]}, features, pooled, batch["captions"]
    )

    # Objects cover a tenth of the patches: weigh ground down, or it drowns them.
    xent = optax.softmax_cross_entropy_with_integer_labels
    weight = jnp.where(shown(batch), 1.0, 0.1)
    losses = [xent(x, batch["patches"][..., i]) for i, x in enumerate(logits)]
    patch_loss = sum(jnp.sum(x * weight) for x in losses) / jnp.sum(weight)
    named = logits[SHAPE].argmax(-1) == batch["patches"][..., SHAPE]

    diagonal = jnp.arange(similarity.shape[0])
    clip_loss = (xent(similarity, diagonal) + xent(similarity.T, diagonal)).mean() / 2
    metrics = {
        "patch": patch_loss,
        "patch_shape": jnp.sum(named & shown(batch)) / jnp.sum(shown(batch)),
        "clip": clip_loss,
        "clip_accuracy": (similarity.argmax(-1) == diagonal).mean(),
    }
    return features, patch_loss + clip_loss, metrics


def word_loss(
    params: dict, visual: jax.Array, patches: jax.Array, words: dict[str, np.ndarray]
) -> jax.Array:
    """Visual tokens shall point where the words for their colour and shape point.

    Without it the decoder has to find out by the answers alone that a patch and a word can
    mean the same; with it, looking up "the red one" is a matter of similarity.

    Args:
        visual: `[B, N, D]`, projected.
        patches: int32 `[B, N, 4]`, 0 for the ground.
        words: token ids of the colours and of the shapes.
    """
    embedding = params["model"]["language_model"]["embed_tokens"]["embedding"]

    def normed(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    total = jnp.zeros(())
    for label, name in ((COLOR, "color"), (SHAPE, "shape")):
        logits = normed(visual) @ normed(embedding[words[name]]).T / visual.shape[-1] ** 0.5
        shown = patches[..., label] > 0
        labels = jnp.maximum(patches[..., label] - 1, 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        total += jnp.sum(loss * shown) / jnp.maximum(jnp.sum(shown), 1)
    return total


def answer_logits(
    params: dict,
    config: LlavaConfig,
    visual: jax.Array,
    places: jax.Array,
    batch: dict,
    before: jax.Array,
    image_length: int,
) -> jax.Array:
    """Next-token logits `[B, T, vocabulary]` of all questions of each image.

    Args:
        params, config: the model.
        visual: `[B, K, D]`, projected.
        places: int32 `[B, K]`, where these stand in the image.
        batch: the questions.
        before: int32 `[n]`, the prompt in front of the image.
        image_length: visual tokens of a whole image; the questions stand behind them.
    """
    states = question_states(params, config, visual, places, batch, before, image_length)
    decoder = LlamaDecoder(config.text_config)
    return decoder.apply({"params": params["model"]["language_model"]}, states, method="logits")


def question_states(
    params: dict,
    config: LlavaConfig,
    visual: jax.Array,
    places: jax.Array,
    batch: dict,
    before: jax.Array,
    image_length: int,
    layers: int | None = None,
) -> jax.Array:
    """Hidden states `[B, T, D]` of the questions after some layers, or all; as `answer_logits`."""
    B, T = batch["token_ids"].shape
    depth = config.text_config.num_hidden_layers if layers is None else layers
    decoder = LlamaDecoder(dataclasses.replace(config.text_config, num_hidden_layers=depth))
    variables = {"params": params["model"]["language_model"]}
    ids = jnp.concatenate([jnp.broadcast_to(before, (B, before.size)), batch["token_ids"]], axis=1)
    text = decoder.apply(variables, ids, method="embed")
    x = jnp.concatenate([text[:, : before.size], visual, text[:, before.size :]], axis=1)

    # Slots: what all see (text and image), then the questions, each of which sees itself and
    # begins at the same position.
    prefix = before.size + visual.shape[1]
    segments = jnp.pad(1 + batch["segments"], ((0, 0), (prefix, 0)))
    same = (segments[:, None] == segments[:, :, None]) | (jnp.arange(prefix + T) < prefix)
    positions = [
        jnp.broadcast_to(jnp.arange(before.size), (B, before.size)),
        before.size + places,
        before.size + image_length + batch["places"],
    ]
    positions = jnp.concatenate(positions, axis=1).astype(jnp.int32)
    tokens = text_tokens(x)._replace(positions=positions)
    prefilled = decoder.apply(variables, tokens, new_slots=0, mask=jnp.tril(same), method="prefill")
    return prefilled.tokens.x[:, prefix:]


def loss_function(
    params: dict,
    batch: dict,
    *,
    config: LlavaConfig,
    before: jax.Array,
    words: dict[str, np.ndarray],
    stage: "Stage",
) -> tuple[jax.Array, dict]:
    features, loss, metrics = vision_losses(params, config, batch)
    if not stage.answers:
        return loss, metrics
    # The tower rests: it has learned to see, and answers would make it forget first.
    features, loss = jax.lax.stop_gradient((features, loss))
    visual = family_of(config).project(params["model"], config, features)
    alignment = word_loss(params, visual, batch["patches"], words)
    places = jnp.broadcast_to(jnp.arange(visual.shape[1]), visual.shape[:2])
    if stage.patches is not None:
        places = some_patches(batch, shown(batch), stage.patches)
        visual = jnp.take_along_axis(visual, places[..., None], axis=1)
    logits = answer_logits(params, config, visual, places, batch, before, GRID * GRID)
    answers, right = answer_loss(logits, batch, KINDS)
    metrics |= {"answer": answers, "words": alignment, **right}
    return 0.5 * (loss + alignment) + answers, metrics


def shown(batch: dict) -> jax.Array:
    """Which patches show an object: bool `[B, N]`."""
    return batch["patches"][..., SHAPE] > 0


def answer_loss(
    logits: jax.Array, batch: dict, names: tuple[str, ...]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the answers' tokens; right answers of each kind, and all of them."""
    labels, targets = batch["token_ids"][:, 1:], batch["targets"][:, 1:]
    logits = logits[:, :-1]
    xent = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    wrong = targets & (logits.argmax(-1) != labels)
    question = jnp.arange(batch["kinds"].shape[1])
    spoiled = wrong[..., None] & (batch["segments"][:, 1:, None] == question)
    right = ~jnp.any(spoiled, axis=1)  # [B, questions]
    shares = {
        name: jnp.stack([jnp.sum(right & (batch["kinds"] == k)), jnp.sum(batch["kinds"] == k)])
        for k, name in enumerate(names)
    }
    return jnp.sum(xent * targets) / jnp.sum(targets), shares


def some_patches(batch: dict, shown: jax.Array, number: int) -> jax.Array:
    """The places of a random few patches, ascending: int32 `[B, number]`.

    Args:
        batch: what makes the draw another one at every step.
        shown: bool `[B, N]`, patches of objects, which are preferred.
        number: how many.
    """
    noise = jax.random.uniform(jax.random.key(batch["token_ids"].sum()), shown.shape)
    return jnp.sort(jax.lax.top_k(noise + 0.6 * shown, number)[1], axis=-1)


# ---- training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training.

    Attributes:
        steps: how many.
        batch: images a step.
        rate: the learning rate's peak.
        answers: train projector and decoder on answers; without, the tower on its losses.
        patches: show the decoder so many patches of an image; None shows all.
        more: what is asked beside a question of each kind: listings, which look something
            up at every word, or again a kind that is learned late.
    """

    name: str
    steps: int
    batch: int
    rate: float
    answers: bool = True
    patches: int | None = None
    more: tuple[str, ...] = ("listing", "listing")


def optimizer(stage: Stage) -> optax.GradientTransformation:
    """AdamW for the tower alone; Muon, which leaves plateaus sooner, for the rest."""

    def rate(share: float) -> optax.Schedule:
        warmup, peak = min(100, stage.steps // 10), share * stage.rate
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, stage.steps)

    if stage.answers:
        # Weights without a gradient do not move: neither has a decay.
        inner = optax.contrib.muon(rate(1.0), adam_b2=0.98, adam_learning_rate=rate(0.1))
    else:
        inner = optax.adamw(rate(1.0), b2=0.98, weight_decay=0.02)
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


def init_params(config: LlavaConfig, seed: int) -> dict:
    model, heads = jax.random.split(jax.random.key(seed))
    kinds = (scenes.COLORS, scenes.SHAPES, scenes.SIZES, scenes.POSITIONS)
    return {
        "model": family_of(config).init_params(config, model),
        "heads": init_heads(config, heads, tuple(1 + len(kind) for kind in kinds)),
    }


def init_heads(config: LlavaConfig, key: jax.Array, counts: tuple[int, ...]) -> dict:
    width = config.vision_config.hidden_size
    captions = jnp.zeros((1, scenes.MAX_OBJECTS, 4), jnp.int32)
    shapes = (jnp.zeros((1, GRID * GRID, width)), jnp.zeros((1, width)), captions)
    return TrainingHeads(width, counts).init(key, *shapes)["params"]


def means(metrics: list[dict]) -> dict[str, float]:
    """Of several steps: of numbers, and the shares of pairs of right answers and all."""
    found = {}
    for name in metrics[0]:
        values = np.stack([one[name] for one in metrics])
        part, whole = (values.sum(), len(values)) if values.ndim == 1 else values.sum(axis=0)
        if whole:
            found[name] = round(float(part / whole), 4)
    return found


def train_stage(
    stage: Stage,
    params: dict,
    loss: Any,
    make: Any,
    out: pathlib.Path,
    check: Any = None,
) -> dict:
    """One stage, from its checkpoint if there is one.

    Args:
        stage: what is trained, and how long.
        params: what it starts from.
        loss: `(params, batch) -> (loss, metrics)`.
        make: `step -> batch`.
        out: the folder in which the stage has one, of its checkpoints and its log.
        check: `params -> metrics` of other data, logged with each checkpoint.
    """
    if not stage.steps:
        return params
    transform = optimizer(stage)

    @functools.partial(jax.jit, donate_argnums=(0,))
    def update(state: tuple, batch: dict) -> tuple[tuple, jax.Array, dict]:
        params, opt_state = state
        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, opt_state = transform.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), total, metrics

    place = out / stage.name
    checkpoints = Checkpoints(place / "checkpoints", stage, identity={}, keep=1)
    state = (params, transform.init(params))
    found = checkpoints.restore(state)
    first, state = (0, state) if found is None else (found.step, found.state)
    source = prefetched(map(make, range(first, stage.steps)), 4)
    log = Log(place / "log.jsonl", after=first)
    bar = Progress(first, stage.steps, name=stage.name, devices=jax.devices()[:1], show=None)
    recent: list[dict] = []
    with contextlib.closing(source), stopping() as asked_to_stop, log, bar:
        for step, batch in enumerate(source, start=first + 1):
            began = time.perf_counter()
            state, total, metrics = update(state, batch)
            recent.append(jax.device_get(metrics))
            seconds = time.perf_counter() - began
            bar.show(step, loss=float(total), tokens=batch["token_ids"].size, seconds=seconds)
            if step % 50 == 0 or step == stage.steps:
                log.write({"update": step, **means(recent)})
                recent = []
            if step % 100 == 0 or step == stage.steps or asked_to_stop():
                checkpoints.save(step, state, data={})
                if check is not None and not asked_to_stop():
                    log.write({"update": step, "held-out": check(state[0])})
            if asked_to_stop():
                raise SystemExit(f"Stopped after {step} steps of {stage.name}; go on as you began.")
    return state[0]


# ---- the Hugging Face directory

CHAT_TEMPLATE = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def export_model(
    params: dict, config: LlavaConfig, tokenizer: Tokenizer, directory: pathlib.Path
) -> None:
    """Write weights, configs, tokenizer and processor as `transformers` reads them."""
    token_ids = {
        f"{name}_token_id": SPECIAL_TOKENS.index(token)
        for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))
    }
    files = {
        "config.json": token_ids,
        "generation_config.json": token_ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.text_config.max_position_embeddings,
        },
        **family_of(config).processor_files(config),
    }
    with tempfile.TemporaryDirectory() as name:
        companions = pathlib.Path(name)
        for file, fields in files.items():
            (companions / file).write_text(json.dumps(fields, indent=2) + "\n")
        (companions / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        tokenizer.save(str(companions / "tokenizer.json"))
        checkpoints_convert.export(params, config, directory, companions=companions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/small_llava"))
    parser.add_argument("--export", type=pathlib.Path, help="write the Hugging Face directory here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=2200)
    parser.add_argument("--look-up-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--polish-steps", type=int, default=650)
    parser.add_argument("--vision-batch", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = args.out / "tokenizer.json"
    if not tokenizer_path.exists():
        build_tokenizer().save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))

    config = small_config()
    params = init_params(config, args.seed)
    stages = (
        Stage(
            name="vision",
            steps=args.vision_steps,
            batch=args.vision_batch,
            rate=1.5e-3,
            answers=False,
        ),
        Stage(name="look-up", steps=args.look_up_steps, batch=args.batch, rate=2e-2, patches=24),
        Stage(
            name="answers",
            steps=args.steps,
            batch=args.batch,
            rate=1e-2,
            more=("comparison", "comparison"),
        ),
        Stage(
            name="polish",
            steps=args.polish_steps,
            batch=args.batch,
            rate=8e-3,
            more=("color", "comparison", "comparison", "comparison"),
        ),
    )
    before = jnp.asarray(tokenizer.encode(PROMPT_BEFORE_IMAGE).ids, jnp.int32)
    words = {
        name: np.array([tokenizer.encode(f" {w}", add_special_tokens=False).ids[0] for w in values])
        for name, values in (("color", scenes.COLORS), ("shape", scenes.SHAPES))
    }
    for i, stage in enumerate(stages):
        loss = functools.partial(
            loss_function, config=config, before=before, words=words, stage=stage
        )
        make = functools.partial(
            make_batch, tokenizer, args.seed + i, size=stage.batch, more=stage.more
        )
        params = train_stage(stage, params, loss, make, args.out)
    if args.export:
        export_model(params["model"], config, tokenizer, args.export)


if __name__ == "__main__":
    main()
