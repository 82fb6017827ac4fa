"""Directories with odd files: prompts, ids and answers as `transformers` makes of the same ones."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

import jaxprune
from jaxprune.inputs.prompts import as_messages, render
from tests.builders import edit
from tests.cases import FEW, picture
from tests.oracle import builders

ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it a star?"}]}]
SAID = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Look at"},
            {"type": "image"},
            {"type": "text", "text": "and say:"},
            {"type": "text", "text": "what is it?"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
    {"role": "user", "content": [{"type": "text", "text": "Which {'type': 1} of it?"}]},
]
IN_ORDER = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<image>' }}{% else %}[{{ p['text'] }}]{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
OTHER = "other {% for m in messages %}{% for p in m['content'] %}{{ p['text'] or '<image>' }} " \
    "{% endfor %}{% endfor %}"  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(**fields):
    return lambda d: edit(d, "config.json", **fields)


def generation(**fields):
    return lambda d: edit(d, "generation_config.json", **fields)


def preprocessor(**fields):
    return lambda d: edit(d, "preprocessor_config.json", **fields)


def tensors(directory):
    return load_file(directory / "model.safetensors")


def store(directory, weights, name="model.safetensors"):
    save_file(weights, directory / name, metadata={"format": "pt"})


def shards(directory, *parts, surplus=False):
    """The weights in several files with an index, the single file gone."""
    weight_map = {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        store(directory, part, name)
        weight_map |= dict.fromkeys(part, name)
    if surplus:
        weight_map = {key: name for i, (key, name) in enumerate(weight_map.items()) if i % 3 == 0}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def halves(directory):
    weights = tensors(directory)
    keys = sorted(weights)
    (directory / "model.safetensors").unlink()
    return [{k: weights[k] for k in keys[i::2]} for i in (0, 1)]


def sharded(directory):
    shards(directory, *halves(directory))


def sharded_with_more_than_the_index_says(directory):
    shards(directory, *halves(directory), surplus=True)


def a_tensor_in_two_shards(directory):
    one, two = halves(directory)
    key = next(iter(one))
    shards(directory, one | {key: -one[key]}, two | {key: one[key]})


def a_stale_index(directory):
    weights = tensors(directory)
    shards(directory, {key: -array for key, array in weights.items()})


def a_stale_pickle(directory):
    weights = {key: torch.from_numpy(-array) for key, array in tensors(directory).items()}
    torch.save(weights, directory / "pytorch_model.bin")


def a_pickle(directory):
    weights = {key: torch.from_numpy(array) for key, array in tensors(directory).items()}
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")


def head_of(weights):
    return next(key for key in weights if key.endswith("lm_head.weight"))


def embedding_of(weights):
    return next(key for key in weights if key.endswith("embed_tokens.weight"))


def tied(directory, change):
    weights = tensors(directory)
    change(weights)
    store(directory, weights)
    edit(directory, "config.json", tie_word_embeddings=True)


def tied_with_another_head(directory):
    tied(directory, lambda weights: None)


def tied_with_an_equal_head(directory):
    tied(directory, lambda w: w.update({head_of(w): w[embedding_of(w)].copy()}))


def tied_without_a_head(directory):
    tied(directory, lambda w: w.pop(head_of(w)))


def tied_without_an_embedding(directory):
    tied(directory, lambda w: w.pop(embedding_of(w)))


def old_spelling(directory):
    """The levels of releases before 4.52."""
    weights = tensors(directory)
    renamed = {}
    for key, array in weights.items():
        key = key.replace("model.language_model.", "language_model.model.")
        key = key.replace("model.vision_tower.", "vision_tower.vision_model.")
        key = key.replace("vision_model.vision_model.", "vision_model.")
        key = key.replace("model.multi_modal_projector.", "multi_modal_projector.")
        key = "language_model.lm_head.weight" if key == "lm_head.weight" else key
        renamed[key] = array
    store(directory, renamed)


def doubled_levels(directory):
    weights = tensors(directory)
    renamed = {
        key.replace("model.language_model.", "model.language_model.model."): array
        for key, array in weights.items()
    }
    store(directory, renamed)


def template(name, text=IN_ORDER, *, keep=False):
    """A chat template in one of the files, the shipped one gone unless it is to lose."""

    def change(directory):
        if not keep:
            (directory / "chat_template.jinja").unlink()
        if name.endswith(".jinja"):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text)
        else:
            edit(directory, name, chat_template=text)

    return change


def both(*changes):
    def change(directory):
        for one in changes:
            one(directory)

    return change


def nested_image_processor(directory):
    fields = json.loads((directory / "preprocessor_config.json").read_text())
    edit(directory, "processor_config.json", image_processor={**fields, "rescale_factor": 0.01})


NULLS = {
    "text_config__rope_scaling": None,
    "text_config__sliding_window": None,
    "vision_config__torchscript": None,
    "quantization_config": None,
    "projector_hidden_act": "gelu",
}
CASES = {
    "as it is": lambda d: None,
    "shards": sharded,
    "shards with more than the index says": sharded_with_more_than_the_index_says,
    "a tensor in two shards": a_tensor_in_two_shards,
    "a stale index": a_stale_index,
    "a stale pickle": a_stale_pickle,
    "a pickle": a_pickle,
    "tied, another head": tied_with_another_head,
    "tied, an equal head": tied_with_an_equal_head,
    "tied, no head": tied_without_a_head,
    "tied, no embedding": tied_without_an_embedding,
    "old spelling": old_spelling,
    "doubled levels": doubled_levels,
    "template in order": template("chat_template.jinja"),
    "chat_template.json": template("chat_template.json"),
    "processor_config's template": template("processor_config.json"),
    "additional default": template("additional_chat_templates/default.jinja"),
    "json before jinja": template("chat_template.json", keep=True),
    "processor_config before jinja": template("processor_config.json", keep=True),
    "processor_config before json": both(
        template("chat_template.json", OTHER), template("processor_config.json", keep=True)
    ),
    "eos of generation_config": generation(eos_token_id=77),
    "several eos": generation(eos_token_id=[2, 9, 77]),
    "eos of config.json": both(
        lambda d: (d / "generation_config.json").unlink(), config(eos_token_id=[5, 9])
    ),
    "eos of text_config": both(
        lambda d: (d / "generation_config.json").unlink(),
        config(eos_token_id=..., text_config__eos_token_id=9),
    ),
    "repetition penalty": generation(repetition_penalty=1.7),
    "reward of repetition": generation(repetition_penalty=0.6),
    "suppressed tokens": generation(suppress_tokens=[*range(5, 300)]),
    "suppressed at the beginning": generation(begin_suppress_tokens=[*range(5, 500)]),
    "least new tokens": generation(min_new_tokens=5, eos_token_id=[*range(5, 20)]),
    "nulls": config(**NULLS),
    "trainers' fields": config(
        unsloth_version="2025.1", use_cache=False, text_config__model_max_length=2048
    ),
    "no type of the tower": config(vision_config__model_type=...),
    "image_token_id beside image_token_index": config(image_token_id=4, image_token_index=4),
    "llama3 RoPE, original length beside it": config(
        text_config__rope_parameters=...,
        text_config__rope_scaling={"rope_type": "llama3", **LLAMA3},
        text_config__original_max_position_embeddings=64,
    ),
    "llama3 RoPE without its original length": config(
        text_config__rope_parameters=...,
        text_config__rope_scaling={"rope_type": "llama3", **LLAMA3},
        text_config__max_position_embeddings=64,
    ),
    "linear RoPE and a field more": config(
        text_config__rope_parameters=...,
        text_config__rope_scaling={"type": "linear", "factor": 3.0, "colour": "red"},
    ),
    "rope_scaling beside rope_parameters": config(
        text_config__rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        text_config__rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "swish": config(text_config__hidden_act="swish"),
    "gelu_python projector": config(projector_hidden_act="gelu_python"),
    "gelu_fast tower": config(vision_config__hidden_act="gelu_fast"),
    "gelu_accurate tower": config(vision_config__hidden_act="gelu_accurate"),
    "gelu_10 tower": config(vision_config__hidden_act="gelu_10"),
    "nested image processor first": nested_image_processor,
    "a size as a number": preprocessor(size=32),
    "no crop": preprocessor(do_center_crop=False, size={"height": 32, "width": 32}),
    "another scale and means": preprocessor(
        rescale_factor=0.02, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    ),
    "nothing normalised": preprocessor(do_normalize=False),
    "bilinear": preprocessor(resample=2),
    "a null of the preprocessor": preprocessor(do_convert_rgb=None),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "m"
    return builders.save(builders.torch_llava(seed=5), directory)


def of_transformers(directory, messages, image):
    """The prompt, and the answer's ids without the one that ends it."""
    processor = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory).eval().float()
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    ids = found[0, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return text, [token for i, token in enumerate(ids) if token not in ends or i < len(ids) - 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_as_transformers(name, base, tmp_path):
    directory = tmp_path / "m"
    shutil.copytree(base, directory)
    CASES[name](directory)
    messages = SAID if "template" in name or "json" in name else ASK
    image = picture(3, (32, 32) if name == "no crop" else (40, 50))
    text, expected = of_transformers(directory, messages, image)
    params = jaxprune.load(directory)
    assert render(params.processor, as_messages(messages, [image])[0]) == text
    found = jaxprune.generate(
        params, [image], [messages], max_new_tokens=8, return_details=True, buckets=FEW
    )[0]
    assert found.token_ids == expected


def test_a_conversion_keeps_a_head_of_its_own(base, tmp_path):
    directory, made = tmp_path / "m", tmp_path / "made"
    shutil.copytree(base, directory)
    tied_with_another_head(directory)
    jaxprune.checkpoints_convert.convert(directory, made)
    assert (tensors(made)[head_of(tensors(made))] == tensors(base)[head_of(tensors(base))]).all()
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False
    image = picture(3)
    assert of_transformers(made, ASK, image) == of_transformers(base, ASK, image)


def test_images_in_messages_are_those_of_transformers(base, tmp_path):
    """A part may bring its image, in any of the ways that transformers takes."""
    import base64

    params = jaxprune.load(base)
    path = tmp_path / "a.png"
    Image.fromarray(np.asarray(picture(3))).save(path)
    written = base64.b64encode(path.read_bytes()).decode()
    ways = [
        {"type": "image", "image": picture(3)},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path)},
        {"type": "image", "base64": written},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{written}"}},
    ]
    expected = of_transformers(base, ASK, picture(3))[1]
    for part in ways:
        turn = [{"role": "user", "content": [part, {"type": "text", "text": "Is it a star?"}]}]
        found = jaxprune.generate(
            params, None, turn, max_new_tokens=8, return_details=True, buckets=FEW
        )
        assert found.token_ids == expected
