"""LLaVA-HR in PyTorch, written from its paper's and code's description: there is none to install.

CLIP's and ConvNeXt's own parts are transformers'; what mixes them is here.
"""

import json
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional as F

from tests.builders import llama_tokenizer
from tests.oracle.builders import TEXT, perturbed

FAST = {"hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 2, "image_size": 252, "patch_size": 84}  # fmt: skip
SLOW = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1]}


class Adapter(nn.Module):
    def __init__(self, fast, slow):
        super().__init__()
        self.slow_conv, self.slow_proj = nn.Conv2d(slow, slow, 1), nn.Conv2d(slow, fast, 1)
        self.fast_conv = nn.Conv2d(fast, fast, 7, padding=3, groups=fast)
        self.fast_proj = nn.Conv2d(fast, fast, 1)
        self.gate = nn.Sequential(
            nn.Linear(2 * fast, fast // 2), nn.GELU(), nn.Linear(fast // 2, 1)
        )

    def forward(self, y, slow):
        side = round(y.shape[1] ** 0.5)
        s = as_tokens(fitted(self.slow_proj(F.gelu(self.slow_conv(slow))), side))
        grid = y.transpose(1, 2).reshape(len(y), -1, side, side)
        y = y + as_tokens(self.fast_proj(F.gelu(self.fast_conv(grid))))
        gate = self.gate(torch.cat([y, s], -1).mean(1)).tanh()
        return y + gate[:, None] * s


def as_tokens(grid):
    return grid.flatten(2).transpose(1, 2)


def fitted(grid, side):
    before = grid.shape[-1]
    if before < side:
        return F.interpolate(grid, (side, side), mode="bilinear", align_corners=True)
    return F.avg_pool2d(grid, before // side) if before > side else grid


class LlavaHr(nn.Module):
    """The whole model."""

    def __init__(self, *, image_size=128, fast=None, slow=None, text=None, eps=1e-6):
        super().__init__()
        self.size = max(int(image_size / 32 * 14), 336)
        self.fast_config = transformers.CLIPVisionConfig(**{**FAST, **(fast or {})})
        self.slow_config = transformers.ConvNextConfig(
            **{**SLOW, **(slow or {})}, layer_scale_init_value=1.0
        )
        self.text_config = transformers.LlamaConfig(**{**TEXT, **(text or {})})
        self.fast = transformers.CLIPVisionModel(self.fast_config)
        self.slow = transformers.ConvNextModel(self.slow_config)
        for module in self.slow.modules():
            if hasattr(module, "eps"):
                module.eps = eps
        width, deep = self.fast_config.hidden_size, self.slow_config.hidden_sizes[-1]
        self.adapters = nn.ModuleList(Adapter(width, deep) for _ in range(3))
        self.fast_proj, self.slow_proj = nn.Linear(width, width), nn.Linear(deep, width)
        hidden = self.text_config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.decoder = transformers.LlamaForCausalLM(self.text_config)

    def states(self, pixels):
        """The inputs of CLIP's layers, and the features."""
        slow = self.slow(pixels).last_hidden_state
        reduced = F.interpolate(pixels, (self.size, self.size), mode="bilinear", align_corners=True)
        vision = getattr(self.fast, "vision_model", self.fast)
        x = as_tokens(vision.embeddings.patch_embedding(reduced))
        side = round(x.shape[1] ** 0.5)
        table = vision.embeddings.position_embedding.weight[1:]
        before = round(len(table) ** 0.5)
        grid = table.reshape(1, before, before, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        x = vision.pre_layrnorm(x + as_tokens(grid))
        layers, inputs = vision.encoder.layers, []
        for l, layer in enumerate(layers):
            inputs.append(x)
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
            if (l + 1) % (len(layers) // 4) == 0 and l + 1 < len(layers):
                x = self.adapters[l // (len(layers) // 4)](x, slow)
        features = self.fast_proj(x) + as_tokens(
            fitted(self.slow_proj(slow.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), side)
        )
        return inputs, features

    def embeddings(self, pieces, pixels):
        """A prompt's input, an image between each two pieces of text."""
        embed = self.decoder.get_input_embeddings()
        visual = self.projector(self.states(pixels)[1])
        parts = [embed(torch.tensor([pieces[0]], dtype=torch.long))]
        for one, piece in zip(visual, pieces[1:], strict=True):
            parts += [one[None], embed(torch.tensor([piece], dtype=torch.long))]
        return torch.cat(parts, dim=1)


def made(seed=0, **fields):
    torch.manual_seed(seed)
    return perturbed(LlavaHr(**fields).eval())


NAMES = {  # of this module, and of the publisher
    "fast.": "model.vision_tower.fast_vision_tower.vision_tower.vision_model.",
    "slow.embeddings.patch_embeddings.": "SLOW.stem.0.",
    "slow.embeddings.layernorm.": "SLOW.stem.1.",
    "slow.encoder.stages.": "SLOW.stages.",
    ".downsampling_layer.": ".downsample.",
    ".layers.": ".blocks.",
    ".dwconv.": ".conv_dw.",
    ".layernorm.": ".norm.",
    ".pwconv1.": ".mlp.fc1.",
    ".pwconv2.": ".mlp.fc2.",
    ".layer_scale_parameter": ".weight",
    "adapters.": "model.vision_tower.align_stages_latent.",
    "fast_proj.": "model.vision_tower.align_stages.0.fast_proj.",
    "slow_proj.": "model.vision_tower.align_stages.0.slow_proj.",
    "projector.": "model.mm_projector.",
    "decoder.": "",
}


def published(model):
    """The tensors by the publisher's names."""
    found = {}
    for key, x in model.state_dict().items():
        if key.startswith("slow.layernorm."):  # of the pooled output
            continue
        start = next(name for name in NAMES if key.startswith(name))
        new = key.replace(start, NAMES[start], 1).replace(
            "vision_model.vision_model", "vision_model"
        )
        if new.startswith("SLOW."):
            for ours, theirs in NAMES.items():
                if ours.startswith("."):
                    new = new.replace(ours, theirs)
            new = new.replace("SLOW.", "model.vision_tower.slow_vision_tower.vision_tower.")
        found[new] = np.ascontiguousarray(x.numpy())
    head = "model.vision_tower.slow_vision_tower.vision_tower.head.fc.weight"
    found[head] = np.zeros((3, 5), np.float32)  # of its pretraining, whatever its width
    return found


def save(model, directory, *, image_size=128, **fields):
    """A directory in the publisher's form."""
    directory.mkdir(parents=True)
    save_file(published(model), directory / "model.safetensors")
    config: dict[str, Any] = {
        **model.text_config.to_dict(),
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "tiny/clip",
        "vision_tower_slow": "tiny_convnext",
        "is_multipath_encoder": True,
        "freeze_vision": False,
        "input_image_size": image_size,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": model.fast_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        **fields,
    }
    (directory / "config.json").write_text(json.dumps(config))
    llama_tokenizer().save(str(directory / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **specials})
    )
    return directory
