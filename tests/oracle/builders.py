"""Tiny random PyTorch models, and the same weights as a directory."""

import json

import numpy as np
import torch
import transformers

import jaxprune
from jaxprune.checkpoints_convert.load import read_config
from jaxprune.models.registry import family_of
from tests.builders import set_image_size

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


def save(model, directory):
    """`model.save_pretrained`, with the shipped model's tokenizer and a processor beside it."""
    model.save_pretrained(directory)
    for path in jaxprune.SMALL_MODEL.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            (directory / path.name).write_bytes(path.read_bytes())
    set_image_size(directory, model.config.vision_config.image_size)
    if model.config.model_type != "llava":
        config = read_config(directory, dtype="float32")
        for name, fields in family_of(config).processor_files(config).items():
            (directory / name).write_text(json.dumps(fields))
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
