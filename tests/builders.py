"""Tiny random models for tests."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.engine import stages
from jaxprune.engine.engine import Clock, Engine
from jaxprune.engine.sampling import Ask
from jaxprune.engine.session import begin
from jaxprune.generate import plan_of
from jaxprune.inputs.request import make_request
from jaxprune.models import llava, llava_next
from jaxprune.models.clip import ClipVisionConfig
from jaxprune.models.family import Embedded
from jaxprune.models.llama import LlamaConfig
from jaxprune.models.registry import family_of
from jaxprune.ops.tiles import VisualSize, pack_tilings


def tiny_config(*, vision=None, text=None, **fields):
    """A LLaVA of 16 visual tokens, for the shipped model's tokenizer (512 ids)."""
    vision_config = ClipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    text_config = LlamaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
    )
    return llava.LlavaConfig(
        vision_config=dataclasses.replace(vision_config, **(vision or {})),
        text_config=dataclasses.replace(text_config, **(text or {})),
        image_token_index=4,
        **fields,
    )


def tiny_next_config(**fields):
    """A LLaVA-NeXT of tiles of 16 patches, at most 88 visual tokens."""
    plain = tiny_config(**fields)
    own = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    points = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
    return llava_next.LlavaNextConfig(**own, image_grid_pinpoints=points)


def random_params(config, seed=0):
    """Random parameters with biases and norms off their usual zeros and ones."""
    # NumPy's: to draw them in JAX takes seconds of compilation for every file of tests.
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if len(leaf.shape) > 1:
            noise /= np.sqrt(leaf.shape[-2 if path[-1].key == "kernel" else -1])
        else:
            noise = 0.05 * noise + (path[-1].key == "scale")
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree.map_with_path(draw, family_of(config).param_shapes(config))


def write_directory(directory, config, seed=0):
    """A Hugging Face directory with random weights and the shipped model's tokenizer."""
    params = random_params(config, seed)
    checkpoints_convert.export(params, config, directory, companions=jaxprune.SMALL_MODEL)
    set_image_size(directory, config.vision_config.image_size)
    if not config.one_tile:
        for name, fields in family_of(config).processor_files(config).items():
            (directory / name).write_text(json.dumps(fields))
    return params


def edit(directory, name, **fields):
    """Set fields of a JSON file, by names with "__" between levels; ... takes one away."""
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    for joined, value in fields.items():
        *parents, last = joined.split("__")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is ...:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def set_image_size(directory, size):
    path = directory / "preprocessor_config.json"
    text = path.read_text().replace("96", str(size))
    path.write_text(text)


def llama_tokenizer(prefix="first"):
    """A tokenizer of LLaMA's making, 290 ids: bytes, a few letters, words in two pieces.

    Args:
        prefix: where a space is put: at the "first" word of a text only, or "always" after
            a special token too, as old releases did.
    """
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += [*"▁AESTUNIRhatWiseoub:?", "▁U", "▁US", "ER", "▁USER", "▁W", "▁Wh", "Wh"]
    vocabulary += ["at", "What", "▁What"]
    merges = [("▁", "U"), ("▁U", "S"), ("E", "R"), ("▁US", "ER"), ("▁", "W"), ("▁W", "h")]
    merges += [("W", "h"), ("a", "t"), ("Wh", "at"), ("▁Wh", "at")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


# What the original format says of LLaVA-NeXT; its tilings are (width, height).
ORIGINAL_NEXT = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
    "image_crop_resolution": 224,
    "image_split_resolution": 224,
}


def write_original(directory, tower, *, prefix="first", seed=0, text=None, **fields):
    """A LLaVA in the original format, its vision tower in the directory `tower`."""
    tokenizer = llama_tokenizer(prefix)
    text = {"vocab_size": tokenizer.get_vocab_size(), **(text or {})}
    anyres = fields.get("image_aspect_ratio") == "anyres"
    config = tiny_next_config(text=text) if anyres else tiny_config(text=text)
    weights: dict = {directory: {}, tower: {}}
    for path, array in flatten_dict(random_params(config, seed), sep="/").items():
        rule = family_of(config).weights.rule_of_path(path)
        key = rule.key
        if key == "image_newline":
            key = "model.image_newline"
        place = tower if key.startswith("vision_tower.") else directory
        key = key.removeprefix("vision_tower.").removeprefix("language_model.")
        key = key.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        key = key.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        weights[place][key] = np.ascontiguousarray(rule.export([np.asarray(array)], config))
    hf = config.to_hf()
    original = hf["text_config"] | {
        "model_type": "llava",
        "torch_dtype": "float32",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": config.vision_config.hidden_size,
        "image_aspect_ratio": "pad",
        **fields,
    }
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for place, model in ((directory, original), (tower, hf["vision_config"])):
        place.mkdir(parents=True)
        save_file(weights[place], place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(model))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **specials})
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory, tower


def forward_logits(params, config, pixels, token_ids, images_at):
    """Logits `[B, S, V]` of whole prompts with unpruned images laid in at `images_at`.

    Args:
        pixels: `[I, H, W, 3]`.
        token_ids: `[B, S]`, placeholders included.
        images_at: bool `[B, S]`, the slots of the images' tokens, in reading order.
    """
    family = family_of(config)
    tilings = [config.tiling(VisualSize(1, 1))] * len(pixels)
    packing = pack_tilings(tilings, images=len(pixels), tiles=len(pixels), image_tiles=1,
                           slots=tilings[0].num_tokens)  # fmt: skip
    vision = family.encode(params, config, jnp.asarray(pixels))
    selection = stages.select(
        vision, packing, None, None, capacity=tilings[0].num_tokens, images=len(pixels)
    )
    visual_index = np.where(
        images_at, np.cumsum(images_at.reshape(-1)).reshape(images_at.shape) - 1, -1
    )
    B, S = token_ids.shape
    # A visual token's position is its image's first one, to which its place is added.
    places = np.broadcast_to(np.arange(S), (B, S))
    within = np.where(visual_index >= 0, visual_index % tilings[0].num_tokens, 0)
    layout = Embedded(
        jnp.asarray(token_ids), jnp.asarray(visual_index), jnp.zeros((B, S), jnp.int32),
        jnp.asarray(places - within), jnp.full(B, S),
    )  # fmt: skip
    tokens = family.embed(params, config, layout, selection)
    prefilled = family.prefill(params, config, tokens, new_slots=0)
    return family.logits(params, config, prefilled.tokens.x)


def engine_of(model, method="none", *, buckets=None, gather=True, **options):
    """The engine of a model under a method."""
    plan = plan_of(method, model.config, 0, options)
    return Engine(model, plan, buckets or jaxprune.Buckets(), gather=gather)


def start(model, image, prompt, *, method="none", buckets=None, chat=True, answers=None, **fields):
    """A request after its prefill.

    Args:
        answers: token ids that are put after each prompt.
        fields: what `generate` takes.
    """
    asked = {name: fields.pop(name) for name in ("max_new_tokens", "temperature") if name in fields}
    engine = engine_of(model, method, buckets=buckets, **fields)
    request = make_request(engine.processor, image, prompt, chat=chat)
    if answers is not None:
        rows = zip(request.rows, answers, strict=True)
        rows = [dataclasses.replace(row, answer=ids) for row, ids in rows]
        request = dataclasses.replace(request, rows=rows)
    asks = Ask(**{"max_new_tokens": 8, **asked}).of_rows(0, len(request.rows))
    session = begin(engine, request, asks, Clock())
    session.fetch()
    return session
