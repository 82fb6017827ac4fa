"""Tiny random models for tests."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
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
from jaxprune.models import internvl, llava, llava_hr, llava_next, video_llava
from jaxprune.models.clip import ClipTextConfig, ClipVisionConfig
from jaxprune.models.clip.modeling import text_tower_shapes
from jaxprune.models.clip.weights import CLIP_TEXT
from jaxprune.models.convnext import ConvNextConfig
from jaxprune.models.family import Embedded
from jaxprune.models.internvit import InternVitConfig
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


def tiny_internvl_config(*, vision=None, text=None, **fields):
    """An InternVL of tiles of 16 visual tokens, at most 4 and a thumbnail."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision_config = InternVitConfig(
        **sizes, num_attention_heads=4, image_size=64, patch_size=8, attention_bias=True
    )
    return internvl.InternVLConfig(
        vision_config=dataclasses.replace(vision_config, **(vision or {})),
        text_config=tiny_config(text=text).text_config,
        **{"image_token_index": 4, "max_tiles": 4, **fields},
    )


def tiny_hr_config(*, text=None, **fields):
    """A LLaVA-HR of 16 visual tokens."""
    vision_config = ClipVisionConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=1,
        image_size=252,
        patch_size=84,
    )
    return llava_hr.LlavaHrConfig(
        vision_config=vision_config,
        slow_config=ConvNextConfig(depths=(1, 1, 1, 1), widths=(8, 12, 16, 24)),
        text_config=tiny_config(text=text).text_config,
        **{"image_size": 128, "fast_name": "tiny", "slow_name": "tiny", **fields},
    )


def tiny_video_config(*, temporal=False, text=None, **fields):
    """A Video-LLaVA of 16 visual tokens an image and 8 times 17 a video."""
    plain = tiny_config(text={"max_position_embeddings": 1024, **(text or {})}, **fields)
    own = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    if temporal:  # the publisher's, whose sizes are read from tensors: 64 channels a head
        own["image_token_index"] = own["video_token_index"] = -200
        own["vision_config"] = dataclasses.replace(
            plain.vision_config, hidden_size=64, num_attention_heads=1, hidden_act="gelu"
        )
    return video_llava.VideoLlavaConfig(**own, temporal_attention=temporal)


def random_params(config, seed=0):
    """Random parameters with biases and norms off their usual zeros and ones."""
    return random_tree(family_of(config).param_shapes(config), seed)


def random_tree(shapes, seed=0):
    """Random parameters of such shapes."""
    # NumPy's: to draw them in JAX takes seconds of compilation for every file of tests.
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if len(leaf.shape) > 1:
            noise /= np.sqrt(leaf.shape[-2 if path[-1].key == "kernel" else -1])
        else:
            noise = 0.05 * noise + (path[-1].key == "scale")
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


def trained_arrays(params, rank=4, seed=0):
    """Random adapters of every matrix of the decoder's layers, and a projector that moved."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return 0.1 * rng.normal(size=shape).astype(np.float32)

    decoder = flatten_dict(params["language_model"], sep="/")
    kernels = {p: x.shape for p, x in decoder.items() if p[:7] == "layers_" and p[-6:] == "kernel"}
    factors = {
        path.removesuffix("/kernel"): {"a": draw(inputs, rank), "b": draw(rank, outputs)}
        for path, (inputs, outputs) in kernels.items()
    }
    moved = jax.tree.map(lambda x: np.asarray(x) + draw(*x.shape), params["multi_modal_projector"])
    return {"lora": factors, "multi_modal_projector": moved}


def merged_arrays(params, trained, *, alpha):
    """A model's arrays with adapters in them, by their definition: W + alpha / r * A B."""
    flat = {p: np.asarray(x) for p, x in flatten_dict(params.arrays, sep="/").items()}
    for path, x in flatten_dict(trained.get("multi_modal_projector", {}), sep="/").items():
        flat[f"multi_modal_projector/{path}"] = x
    for path, own in trained["lora"].items():
        product = own["a"].astype(np.float64) @ own["b"] * alpha / len(own["b"])
        flat[f"language_model/{path}/kernel"] = (
            flat[f"language_model/{path}/kernel"] + product
        ).astype(np.float32)
    return jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))


def write_directory(directory, config, seed=0):
    """A Hugging Face directory with random weights and the shipped model's tokenizer."""
    params = random_params(config, seed)
    checkpoints_convert.export(params, config, directory, companions=jaxprune.SMALL_MODEL)
    set_image_size(directory, config.vision_config.image_size)
    if not config.one_tile:
        write_processor_files(directory, config)
    return params


def write_processor_files(directory, config):
    """What a family says of its processor, over what there is."""
    for name, fields in family_of(config).processor_files(config).items():
        path = directory / name
        old = json.loads(path.read_text()) if name == "tokenizer_config.json" else {}
        path.write_text(json.dumps({**old, **fields}))


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


def write_clip(directory, *, tokens=258, **fields):
    """A CLIP of which the text tower is whole: random weights, and a token a byte.

    Its texts are read in parts of 8 tokens; it belongs to a vision tower of 32 channels.
    """
    config = ClipTextConfig(
        **{
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 8,
            "vocab_size": 258,
            "projection_dim": 20,
            "vision_width": 32,
            "eos_token_id": 257,
            **fields,
        }
    )
    weights = {}
    for path, array in flatten_dict(random_tree(text_tower_shapes(config)), sep="/").items():
        rule = CLIP_TEXT.rule_of_path(path)
        weights[rule.key] = np.ascontiguousarray(rule.export([np.asarray(array)], config))
    weights["logit_scale"] = np.ones((), np.float32)
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors")
    own = dataclasses.asdict(config)
    vision = {"hidden_size": own.pop("vision_width")}
    top = {"model_type": "clip", "projection_dim": own["projection_dim"]}
    (directory / "config.json").write_text(
        json.dumps({**top, "text_config": own, "vision_config": vision})
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"<more {i}>" for i in range(tokens - 258))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer.add_special_tokens(ends)
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{ends[0]} $A {ends[1]}",
        special_tokens=[(end, tokenizer.token_to_id(end)) for end in ends],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": ends[0], "eos_token": ends[1], "unk_token": ends[1]}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
    )
    return directory


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
        rule = family_of(config).weights(config).rule_of_path(path)
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


# ---- InternVL as its publisher stores it

INTERNVL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>",
                   "<|end|>", "<img>", "</img>", "<IMG_CONTEXT>"]  # fmt: skip
PUBLISHED = {  # what is particular to each decoder: the prompts' format, the class
    "qwen2": ("Hermes-2", "Qwen2ForCausalLM"),
    "internlm2": ("internlm2-chat", "InternLM2ForCausalLM"),
    "multi-query": ("internvl2_5", "InternLM2ForCausalLM"),
    "phi3": ("phi3-chat", "Phi3ForCausalLM"),
    "qwen3": ("internvl2_5", "Qwen3ForCausalLM"),
}
_PUBLISHED_NAMES = {  # transformers' names, and the publisher's
    "vision_tower.": "vision_model.",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "encoder.layer.": "encoder.layers.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.qkv": "attn.qkv",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
}
_INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.wqkv": "attention.wqkv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


def published_internvl(tensors, text, *, internlm2):
    """Tensors in transformers' spelling, by the publisher's names and fused as they are there."""
    heads, groups = text["num_attention_heads"], text["num_key_value_heads"]
    found = {}
    for key, x in tensors.items():
        fused = key.startswith("vision_tower.") or internlm2
        if fused and (".k_proj" in key or ".v_proj" in key):
            continue
        if fused and ".q_proj" in key:
            q, k, v = (tensors[key.replace("q_proj", f"{name}_proj")] for name in "qkv")
            x = np.concatenate([q, k, v])
            if not key.startswith("vision_tower."):
                blocks = [y.reshape(groups, -1, len(q) // heads, y.shape[-1]) for y in (q, k, v)]
                x = np.concatenate(blocks, axis=1).reshape(-1, q.shape[-1])
            key = key.replace("q_proj", "qkv" if key.startswith("vision_tower.") else "wqkv")
        names = dict(_PUBLISHED_NAMES)
        if key.startswith("language_model."):
            names = _INTERNLM2_NAMES if internlm2 else {}
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        found[key] = np.ascontiguousarray(x)
    return found


def write_published_internvl(
    directory, decoder="internlm2", *, tensors=None, vision=None, text=None, **fields
):
    """An InternVL directory in the publisher's form, with a tokenizer of LLaMA's making.

    Args:
        tensors: in transformers' spelling; None draws those of a tiny model.
        vision, text: the configs of transformers as dicts.
    """
    directory.mkdir(parents=True)
    template, text_class = PUBLISHED[decoder]
    internlm2 = text_class == "InternLM2ForCausalLM"
    if tensors is None:
        config = tiny_internvl_config()
        hub, table = config.to_hf(), family_of(config).weights(config)
        vision, text = hub["vision_config"], hub["text_config"]
        tensors = {}
        for path, array in flatten_dict(random_params(config), sep="/").items():
            rule = table.rule_of_path(path)
            tensors[rule.key] = rule.export([np.asarray(array)], config)
    text = {**text, "architectures": [text_class], "tie_word_embeddings": True}  # the base model's
    rope = dict(text.pop("rope_parameters", None) or {"rope_type": "default"})
    text["rope_theta"] = rope.pop("rope_theta", 1e4)
    text["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    if text["rope_scaling"]["type"] == "default":
        text["rope_scaling"] = None
    if decoder == "phi3":
        lists = {name: rope[name] for name in ("short_factor", "long_factor")}
        text["rope_scaling"] = {"type": "su", **lists}
    if internlm2:
        text |= {"model_type": "internlm2", "bias": False}
    own = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision["image_size"][0],
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "llm_config": text,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "image_size": vision["image_size"][0],
            "initializer_factor": 1.0,
            "layer_norm_eps": vision["layer_norm_eps"],
            "norm_type": vision["norm_type"],
            "patch_size": 8,
            "qk_normalization": vision["use_qk_norm"],
            "qkv_bias": vision["attention_bias"],
            "use_flash_attn": True,
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "num_attention_heads": vision["num_attention_heads"],
            "num_hidden_layers": vision["num_hidden_layers"],
        },
        **fields,
    }
    (directory / "config.json").write_text(json.dumps(own))
    save_file(
        published_internvl(tensors, text, internlm2=internlm2), directory / "model.safetensors"
    )
    tokenizer = llama_tokenizer()
    tokenizer.add_special_tokens(INTERNVL_TOKENS)
    tokenizer.save(str(directory / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = "InternLM2Tokenizer" if internlm2 else "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": named, **specials})
    )
    return directory


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
