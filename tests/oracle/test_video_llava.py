"""Video-LLaVA against PyTorch, float32, in both forms: images, videos, and both in one prompt."""

import functools
import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.request import make_request
from jaxprune.inputs.videos import Clip
from jaxprune.models.registry import family_of
from jaxprune.ops.tiles import Frames
from jaxprune.ops.visual import Signal
from tests.builders import llama_tokenizer, start
from tests.cases import FEW, picture
from tests.oracle import builders

FRAMES = [picture(i, (40, 50)) for i in range(8)]
ASKED = "<video>What <image> is it?"


def torch_model(seed=0, vision=None):
    """A random Video-LLaVA in float32, as transformers has it."""
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**builders.VISION, **(vision or {})}),
        text_config=transformers.LlamaConfig(**builders.TEXT),
        image_token_index=4,
        video_token_index=5,
        image_seq_length=16,
        video_seq_length=8 * 17,
    )
    torch.manual_seed(seed)
    return builders.perturbed(transformers.VideoLlavaForConditionalGeneration(config).eval())


class Published(nn.Module):
    """The publisher's: each layer of the video tower looks over the frames first."""

    def __init__(self, seed=0):
        super().__init__()
        vision = {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu"}
        self.hub = torch_model(seed, vision)
        config = self.hub.config.vision_config
        layers, width = config.num_hidden_layers, config.hidden_size
        config._attn_implementation = "eager"
        self.attention = nn.ModuleList(CLIPAttention(config) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for _ in range(layers))
        self.embedding = nn.Parameter(torch.randn(layers, 8, width))
        for part in (self.attention, self.norms):
            builders.perturbed(part)

    def over_frames(self, l, x):
        """Frames of one video, `[8, S, C]`."""
        y = x.transpose(0, 1) + self.embedding[l]  # [S, 8, C]
        attended = self.attention[l](self.norms[l](y))[0]
        return (y + attended).transpose(0, 1)

    def states(self, frames):
        """The inputs of the video tower's layers before they look over the frames, and after."""
        tower = self.hub.model.video_tower
        tower = getattr(tower, "vision_model", tower)
        x = tower.pre_layrnorm(tower.embeddings(frames))
        states, inside = [x], []
        for l, layer in enumerate(tower.encoder.layers):
            inside.append(self.over_frames(l, states[-1]))
            x = layer(inside[-1], None)
            states.append(x[0] if isinstance(x, tuple) else x)
        return states, inside

    def embeddings(self, pieces, visual):
        """A prompt's input; `visual` are images `[3, H, W]` and videos `[8, 3, H, W]`."""
        embed = self.hub.get_input_embeddings()
        parts = [embed(torch.tensor([pieces[0]], dtype=torch.long))]
        for pixels, piece in zip(visual, pieces[1:], strict=True):
            if pixels.ndim == 4:
                features = self.states(pixels)[0][-2].flatten(0, 1)
            else:
                tower = self.hub.model.image_tower
                out = tower(pixels[None], output_hidden_states=True)
                features = out.hidden_states[-2][0, 1:]
            projected = self.hub.model.multi_modal_projector(features[None])
            parts += [projected, embed(torch.tensor([piece], dtype=torch.long))]
        return torch.cat(parts, dim=1)


def save_published(model, directory):
    """A directory in the publisher's form."""
    directory.mkdir(parents=True)
    tensors = {}
    for key, x in model.hub.state_dict().items():
        name = key.removeprefix("model.")
        for tower in ("image_tower", "video_tower"):
            if name.startswith(f"{tower}."):
                rest = name.removeprefix(f"{tower}.").removeprefix("vision_model.")
                name = f"model.{tower}.{tower}.{rest}"
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        name = name.replace("language_model.", "model.")
        tensors[name] = x.numpy()
    for l in range(len(model.norms)):
        layer = f"model.video_tower.video_tower.encoder.layers.{l}"
        tensors[f"{layer}.temporal_embedding"] = model.embedding[l][None].detach().numpy()
        for part, name in (
            (model.attention, "temporal_attn"),
            (model.norms, "temporal_layer_norm1"),
        ):
            for key, x in part[l].state_dict().items():
                tensors[f"{layer}.{name}.{key}"] = x.numpy()
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()}, directory / "model.safetensors"
    )
    fields = {
        **model.hub.config.text_config.to_dict(),
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "X": ["Image", "Video"],
        "mm_image_tower": "LanguageBind/LanguageBind_Image",
        "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
        "mm_hidden_size": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
    }
    (directory / "config.json").write_text(json.dumps(fields))
    llama_tokenizer().save(str(directory / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **specials})
    )
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By form, made once: a PyTorch model, and the same weights here."""

    @functools.cache
    def make(form):
        directory = tmp_path_factory.mktemp("video") / "m"
        if form == "published":
            model = Published()
            return model, jaxprune.load(save_published(model, directory), dtype="float32")
        model = torch_model()
        builders.save(model, directory)
        return model, jaxprune.load(directory, dtype="float32")

    return make


def torch_pixels(params, item):
    pixels = pixel_values(params.processor, [item], params.config)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def ids_of(params, row, sizes):
    ids = list(row.pieces[0])
    for (token, number), piece in zip(sizes, row.pieces[1:], strict=True):
        ids += [token] * number + piece
    return torch.tensor([ids])


@pytest.mark.parametrize("what", ["image", "video", "both"])
@pytest.mark.parametrize("form", ["hub", "published"])
def test_logits_and_answers(form, what, pairs):
    model, params = pairs(form)
    items = {"image": [picture(9)], "video": [jaxprune.Video(FRAMES)]}
    items["both"] = [*items["video"], *items["image"]]
    images, question = [items[what]], ASKED if what == "both" else "What is it?"
    row = make_request(params.processor, images, question, chat=True).rows[0]
    clip, still = torch_pixels(params, Clip(tuple(FRAMES))), torch_pixels(params, picture(9))
    with torch.no_grad():
        if form == "published":
            visual = {"image": [still[0]], "video": [clip], "both": [clip, still[0]]}[what]
            inputs = {"inputs_embeds": model.embeddings(row.pieces, visual)}
            theirs = model.hub
        else:
            sizes = {"image": [(4, 16)], "video": [(5, 136)], "both": [(5, 136), (4, 16)]}[what]
            inputs = {"input_ids": ids_of(params, row, sizes)}
            if what != "video":
                inputs["pixel_values_images"] = still
            if what != "image":
                inputs["pixel_values_videos"] = clip[None]
            theirs = model
        first = next(iter(inputs.values()))
        mask = torch.ones(first.shape[:2], dtype=torch.long)
        logits = theirs(**inputs, attention_mask=mask).logits[0, -1].numpy()
        ids = theirs.generate(
            **inputs, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False,
            eos_token_id=None,
        )[0].tolist()  # fmt: skip
    run = start(params, images, question, buckets=FEW)
    chex.assert_trees_all_close(np.asarray(run.first_logits[0]), logits, atol=1e-4)
    (answer,) = jaxprune.generate(
        params, images, [question], max_new_tokens=12, eos_token_id=[], buckets=FEW,
        return_details=True,
    )  # fmt: skip
    assert answer.token_ids == (ids if form == "published" else ids[first.shape[1] :])
    assert answer.visual_tokens == {"image": [16], "video": [136], "both": [136, 16]}[what]


def test_signals_of_frames(pairs):
    """Of the attention within a frame, behind that over the frames."""
    model, params = pairs("published")
    clip = torch_pixels(params, Clip(tuple(FRAMES)))
    with torch.no_grad():
        states, inside = model.states(clip)
        tower = model.hub.model.video_tower
        layer = getattr(tower, "vision_model", tower).encoder.layers[-1]
        x = layer.layer_norm1(inside[-1])
        q, k = layer.self_attn.q_proj(x)[:, :1], layer.self_attn.k_proj(x)
        single = torch.softmax(q @ k.transpose(1, 2) / 128**0.5, -1)[:, 0, 1:]
    expected = {
        Signal("cls_attention", heads="joined"): single,
        Signal("keys", heads="joined"): k[:, 1:],
        Signal("features"): states[-2][:, 1:],
    }
    number = np.arange(8, dtype=np.int32)
    found = family_of(params.config).encode(
        params.arrays, params.config, jnp.asarray(clip.numpy().transpose(0, 2, 3, 1)),
        frozenset(expected), Frames(0 * number, number),
    )  # fmt: skip
    wanted = {signal: x.numpy() for signal, x in expected.items()}
    chex.assert_trees_all_close(found.signals, wanted, atol=1e-4)
    assert found.cls is not None
    chex.assert_trees_all_close(found.cls, states[-2][:, 0].numpy(), atol=1e-4)


def test_the_order_of_frames(pairs):
    """It matters to the publisher's model; on the Hub frames only change places."""
    turned = [FRAMES[i] for i in (3, 0, 7, 1, 2, 6, 5, 4)]
    for form, matters in (("hub", False), ("published", True)):
        _, params = pairs(form)
        plain, other = (
            family_of(params.config).encode(
                params.arrays, params.config,
                jnp.asarray(pixel_values(params.processor, [Clip(tuple(frames))], params.config)),
                frozenset(), Frames(*np.stack([np.zeros(8, int), np.arange(8)]).astype(np.int32)),
            ).features
            for frames in (FRAMES, turned)
        )  # fmt: skip
        same = np.allclose(plain[jnp.array([3, 0, 7, 1, 2, 6, 5, 4])], other, atol=1e-4)
        assert same != matters


def test_temporal_weights_that_are_missing_are_named(tmp_path):
    directory = save_published(Published(), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    left = {key: x for key, x in tensors.items() if "temporal" not in key}
    save_file(left, directory / "model.safetensors")
    with pytest.raises(jaxprune.UserError, match=r"33 missing .*temporal_"):
        jaxprune.load(directory)


def test_there_and_back(pairs, tmp_path):
    model, params = pairs("published")
    jaxprune.export(params, tmp_path / "published")
    expected = load_file(params.processor.directory / "model.safetensors")
    chex.assert_trees_all_equal(load_file(tmp_path / "published" / "model.safetensors"), expected)
    again = jaxprune.load(tmp_path / "published", dtype="float32")
    assert again.config == params.config
    model, params = pairs("hub")
    jaxprune.export(params, tmp_path / "hub")
    checkpoints_convert.convert(params.processor.directory, tmp_path / "converted")
    state = {key: x.numpy() for key, x in model.state_dict().items()}
    for place in (tmp_path / "hub", tmp_path / "converted"):
        back = transformers.VideoLlavaForConditionalGeneration.from_pretrained(place)
        chex.assert_trees_all_equal({k: x.numpy() for k, x in back.state_dict().items()}, state)


def test_temporal_weights_under_the_hubs_config(pairs, tmp_path):
    """Never dropped without a word, as by the conversion to the Hub's form."""
    _, params = pairs("hub")
    jaxprune.export(params, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    key = "video_tower.vision_model.encoder.layers.0.temporal_embedding"
    save_file({**load_file(path), key: np.zeros((1, 8, 32), np.float32)}, path)
    with pytest.raises(jaxprune.UserError, match=r"1 unknown \(.*temporal_embedding\)"):
        jaxprune.load(tmp_path / "m")
