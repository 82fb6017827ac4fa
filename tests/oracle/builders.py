"""Tiny random PyTorch models, and the same weights as a directory."""

from typing import Any

import numpy as np
import torch
import transformers

import jaxprune
from jaxprune.checkpoints_convert.load import read_config
from tests.builders import (
    set_image_size,
    write_processor_files,
    write_published_internvl,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def torch_llava(*, vision=None, text=None, seed=0, **fields):
    """A random LLaVA in float32, biases and norms included."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**VISION, **(vision or {})}),
        text_config=transformers.LlamaConfig(**{**TEXT, **(text or {})}),
        image_token_index=4,
        **fields,
    )
    torch.manual_seed(seed)
    return perturbed(transformers.LlavaForConditionalGeneration(config).eval())


def perturbed(model):
    """The model with every parameter moved off its usual zeros and ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def torch_llava_next(*, text=None, seed=0, pinpoints=None, **fields):
    """A random LLaVA-NeXT in float32, tiles of 32 pixels and 16 patches."""
    kind = (text or {}).get("model_type", "llama")
    text_class = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind]
    own = {name: value for name, value in (text or {}).items() if name != "model_type"}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=text_class(**{**TEXT, **own}),
        image_token_index=4,
        image_grid_pinpoints=pinpoints or PINPOINTS,
        image_seq_length=16,
        **fields,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    return perturbed(model)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.5],
    "long_factor": [1.2, 1.9, 2.7, 4.0, 6.5, 9.0],
    "original_max_position_embeddings": 16,
}
INTERNVL_DECODERS: dict[str, Any] = {
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
    "internlm2": (
        transformers.LlamaConfig,
        {
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "multi-query": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "phi3": (
        transformers.Phi3Config,
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
}
INTERNVIT_6B = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}


def torch_internvl(decoder="qwen2", *, vision=None, text=None, seed=0, **fields):
    """A random InternVL in float32, tiles of 32 pixels and 4 visual tokens."""
    text_class, own = INTERNVL_DECODERS[decoder]
    tower: dict[str, Any] = {**VISION, "num_hidden_layers": 2, "attention_bias": True}
    tower |= {"image_size": [32, 32], "patch_size": [8, 8], **(vision or {})}
    config = transformers.InternVLConfig(
        vision_config=tower,
        text_config=text_class(**{**TEXT, **own, **(text or {})}),
        **{"image_token_id": 4, "image_seq_length": 4, "tie_word_embeddings": False, **fields},
    )
    torch.manual_seed(seed)
    return perturbed(transformers.InternVLForConditionalGeneration(config).eval())


def save(model, directory):
    """`model.save_pretrained`, with the shipped model's tokenizer and a processor beside it."""
    model.save_pretrained(directory)
    for path in jaxprune.SMALL_MODEL.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            (directory / path.name).write_bytes(path.read_bytes())
    if model.config.model_type != "internvl":
        set_image_size(directory, model.config.vision_config.image_size)
    if model.config.model_type != "llava":
        write_processor_files(directory, read_config(directory, dtype="float32"))
    return directory


def prompt(model, rng, images=1, words=12):
    """Random pixels `[I, 3, H, W]` and token ids `[1, S]` with the images among words."""
    size = model.config.vision_config.image_size
    patches = (size // model.config.vision_config.patch_size) ** 2
    patches += model.config.vision_feature_select_strategy == "full"
    ids = [1]
    for _ in range(images):
        ids += rng.integers(5, 512, size=3).tolist() + [4] * patches
    ids += rng.integers(5, 512, size=words).tolist()
    pixels = rng.normal(size=(images, 3, size, size)).astype(np.float32)
    return torch.from_numpy(pixels), torch.tensor([ids])


def save_published(model, decoder, directory, **fields):
    """An InternVL directory in the publisher's form."""
    vision, text = model.config.vision_config.to_dict(), model.config.text_config.to_dict()
    state = {key.removeprefix("model."): x.numpy() for key, x in model.state_dict().items()}
    tensors = {
        key.replace("language_model.", "language_model.model.").replace(
            "lm_head.", "language_model.lm_head."
        ): x
        for key, x in state.items()
    }
    return write_published_internvl(
        directory, decoder, tensors=tensors, vision=vision, text=text, **fields
    )
