"""LoRA adapters, against PEFT: those that it writes are read here, and those from here there."""

import dataclasses
import json
import warnings

import chex
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from torch import nn

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.checkpoints_convert import write_adapter
from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.models.registry import table_of
from tests import builders as tiny
from tests.builders import edit, forward_logits
from tests.cases import mostly_slow, picture
from tests.oracle import builders, hr

MODELS = {
    "llava": builders.torch_llava,
    "llava_next": builders.torch_llava_next,
    "internvl": lambda: builders.torch_internvl("phi3"),  # whose matrices are stored as one
}
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 5},
    },
    "words": {"modules_to_save": ["lm_head"], "target_modules": ["o_proj", "embed_tokens"]},
}


def trained(model, directory, base, *, target_modules=None, **settings):
    """An adapter with random factors, saved; and the model with it merged, by PEFT."""
    if target_modules is None:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        wanted = {"q_proj", "o_proj", "qkv_proj", "down_proj", "fc1", "linear_1"}
        target_modules = sorted(names & wanted)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=target_modules, **settings)
    with warnings.catch_warnings():  # of what transformers is about to rename, of embeddings
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        wrapped.peft_config["default"].base_model_name_or_path = str(base)
        wrapped.save_pretrained(directory)
        return wrapped.merge_and_unload()


def assert_same_model(found, expected):
    assert found.config == expected.config
    chex.assert_trees_all_close(found.arrays, expected.arrays, atol=1e-5)


# Settings do not depend on the family.
CASES = [*((family, "plain") for family in MODELS), *(("llava", name) for name in SETTINGS)][1:]


@pytest.mark.parametrize("family, settings", CASES)
def test_pefts_merge(family, settings, tmp_path):
    model = MODELS[family]()
    base = builders.save(model, tmp_path / "base")
    before = jaxprune.load(base, dtype="float32")
    merged = trained(model, tmp_path / "adapter", base, **SETTINGS[settings])
    builders.save(merged, tmp_path / "merged")
    expected = jaxprune.load(tmp_path / "merged", dtype="float32")
    found = jaxprune.load(base, adapter=tmp_path / "adapter", dtype="float32")
    assert_same_model(found, expected)
    assert_same_model(jaxprune.load(tmp_path / "adapter", dtype="float32"), expected)
    with pytest.raises(AssertionError):
        assert_same_model(before, expected)
    checkpoints_convert.convert(base, tmp_path / "converted", adapter=tmp_path / "adapter")
    assert_same_model(jaxprune.load(tmp_path / "converted", dtype="float32"), expected)


def test_an_adapter_of_another_spelling(tmp_path):
    """Trained on the model of transformers, over a base in the publisher's form, fused there."""
    model = builders.torch_internvl("internlm2")
    base = builders.save_published(model, "internlm2", tmp_path / "base")
    merged = trained(model, tmp_path / "adapter", base)
    expected = builders.save_published(merged, "internlm2", tmp_path / "merged")
    found = jaxprune.load(base, adapter=tmp_path / "adapter", dtype="float32")
    assert_same_model(found, jaxprune.load(expected, dtype="float32"))


def test_llavas_own_output(tmp_path):
    """Over a decoder alone; the projector beside the adapter, the tower in a third place."""
    whole, tower = tiny.write_original(tmp_path / "whole", tmp_path / "tower")
    tensors = load_file(whole / "model.safetensors")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    decoder = {key: x for key, x in tensors.items() if "mm_projector" not in key}
    save_file(decoder, base / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((whole / name).read_bytes())
    fields = json.loads((whole / "config.json").read_text())
    plain = {name: value for name, value in fields.items() if "mm_" not in name}
    (base / "config.json").write_text(json.dumps({**plain, "model_type": "llama"}))
    (adapter / "config.json").write_bytes((whole / "config.json").read_bytes())
    rng = np.random.default_rng(0)
    others = {key: x.shape for key, x in tensors.items() if key not in decoder}
    projector = {key: rng.normal(size=shape).astype(np.float32) for key, shape in others.items()}
    torch.save({f"base_model.model.{k}": torch.from_numpy(x) for k, x in projector.items()},
               adapter / "non_lora_trainables.bin")  # fmt: skip
    key = "model.layers.1.mlp.down_proj"
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 64), (48, 2)))
    torch.save(
        {f"base_model.model.{key}.lora_A.weight": torch.from_numpy(down),
         f"base_model.model.{key}.lora_B.weight": torch.from_numpy(up)},
        adapter / "adapter_model.bin",
    )  # fmt: skip
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    new = {**tensors, **projector, f"{key}.weight": tensors[f"{key}.weight"] + 2 * up @ down}
    save_file(new, whole / "model.safetensors")
    expected = jaxprune.load(whole, vision_tower=tower, dtype="float32")
    found = jaxprune.load(adapter, vision_tower=tower, dtype="float32")
    assert_same_model(found, expected)
    options = {"max_new_tokens": 3, "return_details": True}
    answers = [jaxprune.generate(p, picture(0), "What?", **options) for p in (found, expected)]
    assert answers[0].token_ids == answers[1].token_ids
    checkpoints_convert.convert(adapter, tmp_path / "hub", vision_tower=tower)
    hub = jaxprune.load(tmp_path / "hub", dtype="float32")
    again = jaxprune.generate(hub, picture(0), "What?", **options)
    assert again.token_ids == answers[0].token_ids


@pytest.fixture
def adapter(tmp_path):
    """A plain one, its base beside it."""
    model = builders.torch_llava()
    base = builders.save(model, tmp_path / "base")
    trained(model, tmp_path / "adapter", base)
    return tmp_path / "adapter"


def test_an_adapter_of_another_base(adapter, tmp_path):
    other = builders.save(builders.torch_llava(text={"intermediate_size": 80}), tmp_path / "wide")
    with pytest.raises(jaxprune.UserError, match=r"is of another base .*the base's \[48, 80\]"):
        jaxprune.load(other, adapter=adapter)
    shallow = builders.save(builders.torch_llava(text={"num_hidden_layers": 2}), tmp_path / "two")
    with pytest.raises(jaxprune.UserError, match=r"another base .*layers\.2.* is unknown"):
        jaxprune.load(shallow, adapter=adapter)
    whole = hr.save(hr.made(), tmp_path / "hr")
    with pytest.raises(jaxprune.UserError, match="another base"):
        jaxprune.load(whole, adapter=adapter)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; supported: 'LORA'"),
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"r": 5}, "but its rank is 5"),
        ({"r": "x"}, "r='x'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"base_model_name_or_path": "nobody/nothing"}, "whose base is not here"),
        ({"rank_pattern": {"(": 3}}, "no expression"),
    ],
)
def test_what_is_refused(fields, message, adapter):
    edit(adapter, "adapter_config.json", **fields)
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.load(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter(name, adapter, tmp_path):
    (adapter / name).unlink()
    with pytest.raises(jaxprune.UserError, match="expected"):
        jaxprune.load(tmp_path / "base", adapter=adapter)


def test_factors_without_their_others(adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, path)
    with pytest.raises(jaxprune.UserError, match="one of two factors"):
        jaxprune.load(tmp_path / "base", adapter=adapter)
    assert flat_shapes(jaxprune.load(tmp_path / "base").config)


# ---- Written here


def adapted(model, directory):
    """A model with an adapter by PEFT, which warns of keys that are missing: an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # between the two releases
        return peft.PeftModel.from_pretrained(model, directory)


WRITTEN = {**MODELS, "internvl, qwen": builders.torch_internvl}


@pytest.mark.parametrize("family", mostly_slow(WRITTEN, ["llava", "internvl"]))
def test_peft_takes_what_is_written(family, tmp_path):
    """Merged by PEFT: all weights of the merged model, as transformers reads its export."""
    model = WRITTEN[family]()
    base = builders.save(model, tmp_path / "base")
    params = jaxprune.load(base, dtype="float32")
    trained = tiny.trained_arrays(params)
    write_adapter(trained, params.config, tmp_path / "adapter", alpha=6, dropout=0.05, base=base)
    arrays = tiny.merged_arrays(params, trained, alpha=6)
    chex.assert_trees_all_close(jaxprune.load(tmp_path / "adapter").arrays, arrays, atol=1e-6)

    jaxprune.export(dataclasses.replace(params, arrays=arrays), tmp_path / "merged")
    expected = type(model).from_pretrained(tmp_path / "merged").state_dict()
    wrapped = adapted(model, tmp_path / "adapter")
    names = [name for name, _ in wrapped.named_parameters() if "lora_" in name]
    assert names and not [name for name in names if "vision" in name or "lm_head" in name]
    found = wrapped.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=1e-5, rtol=0)
    words = [transformers.AutoTokenizer.from_pretrained(x) for x in (base, tmp_path / "merged")]
    assert words[0].get_vocab() == words[1].get_vocab()
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged")
    assert images.size


@pytest.mark.parametrize("by", mostly_slow(["peft", "transformers"], ["peft"]))
def test_the_logits_of_an_adapted_model(by, rng, tmp_path):
    model = builders.torch_llava()
    base = builders.save(model, tmp_path / "base")
    params = jaxprune.load(base, dtype="float32")
    trained = tiny.trained_arrays(params)
    write_adapter(trained, params.config, tmp_path / "adapter", alpha=6, base=base)
    pixels, ids = builders.prompt(model, rng)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    with torch.no_grad():
        before = model(**inputs).logits.numpy()
        if by == "peft":
            model = adapted(model, tmp_path / "adapter")
        else:
            model.load_adapter(str(tmp_path / "adapter"))
        found = model(**inputs).logits.numpy()
    arrays = tiny.merged_arrays(params, trained, alpha=6)
    pixels = pixels.numpy().transpose(0, 2, 3, 1)
    expected = forward_logits(arrays, params.config, pixels, ids.numpy(), ids.numpy() == 4)
    chex.assert_trees_all_close(found, np.asarray(expected), atol=1e-4)
    assert np.abs(found - before).max() > 0.1


class LlavaLlama(transformers.LlamaForCausalLM):
    """LLaVA's own class, as far as its loader sees it: where the projector is, under which name."""

    def __init__(self, fields):
        super().__init__(transformers.LlamaConfig(**fields))
        width, size = fields["mm_hidden_size"], fields["hidden_size"]
        layers = nn.Linear(width, size), nn.GELU(), nn.Linear(size, size)
        self.model.mm_projector = nn.Sequential(*layers)


def load_as_llava(base, adapter):
    """The steps of `load_pretrained_model` in LLaVA's builder for an adapter over a base.

    That passes over keys that it does not know; here they are an error.
    """
    model = LlavaLlama(json.loads((adapter / "config.json").read_text()))
    tensors = {key: torch.from_numpy(x) for key, x in load_file(base / "model.safetensors").items()}
    model.load_state_dict(tensors)
    others = torch.load(adapter / "non_lora_trainables.bin", map_location="cpu")
    others = {key.removeprefix("base_model."): x for key, x in others.items()}
    if any(key.startswith("model.model.") for key in others):
        others = {key.removeprefix("model."): x for key, x in others.items()}
    left = model.load_state_dict(others, strict=False)
    assert others and not left.unexpected_keys
    return adapted(model, adapter).merge_and_unload()


def test_llavas_own_form(tmp_path):
    base, tower = tiny.write_original(tmp_path / "base", tmp_path / "tower")
    params = jaxprune.load(base, vision_tower=tower, dtype="float32")
    trained = tiny.trained_arrays(params)
    target = tmp_path / "My-LLaVA-LoRA"
    write_adapter(trained, params.config, target, alpha=6, base=base, form="llava")
    arrays = tiny.merged_arrays(params, trained, alpha=6)
    for found in (
        jaxprune.load(target, vision_tower=tower),
        jaxprune.load(base, adapter=target, vision_tower=tower),
    ):
        assert found.config == params.config
        chex.assert_trees_all_close(found.arrays, arrays, atol=1e-6)

    found = load_as_llava(base, target).state_dict()
    table, seen = table_of(params.config), set()
    for path, array in flatten_dict(arrays, sep="/").items():
        name = table.rule_of_path(path).key.removeprefix("language_model.")
        for number, place in (("linear_1", "0"), ("linear_2", "2")):
            name = name.replace(f"multi_modal_projector.{number}", f"model.mm_projector.{place}")
        if not name.startswith("vision_tower."):
            turned = array.T if path.endswith("kernel") else array
            np.testing.assert_allclose(found[name].numpy(), turned, atol=1e-5)
            seen.add(name)
    assert seen == found.keys()
