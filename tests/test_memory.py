"""What a request takes is estimated before it is tried."""

import functools

import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.engine import footprint as memory
from jaxprune.engine import stages
from jaxprune.engine.footprint import check_memory, check_tower_memory, request_bytes, tower_bytes
from jaxprune.engine.sampling import make_sampling
from jaxprune.inputs.request import Row, lay_out
from jaxprune.models.clip import ClipVisionConfig
from jaxprune.models.llama import LlamaConfig
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import family
from jaxprune.ops.cuts import NO_CUTS
from tests.test_generate import picture


@pytest.mark.parametrize("batch, slots", [(1, 640), (4, 640), (1, 2400)])
def test_the_estimate_is_near_what_xla_allocates(batch, slots):
    text = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, head_dim=32, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(text_config=text)
    params = family(config).param_shapes(config)
    layout = lay_out([Row([[1] * slots], [])] * batch, np.zeros(0, int), 0, batch=batch,
                     sequence=slots)  # fmt: skip
    fields = (layout.token_ids, layout.visual_index, layout.kind, layout.lengths)
    tokens = jax.eval_shape(functools.partial(stages.embed, config=config), params, *fields, None)
    sampling = make_sampling(temperature=0, top_k=None, top_p=None, seeds=[0] * batch, vocab_size=9)
    compiled = stages.prefill.lower(
        params, tokens, None, layout.lengths, np.int32(batch), sampling, np.array([2], np.int32),
        config=config, schedule=NO_CUTS, new_slots=16, greedy=True,
    ).compile()  # fmt: skip
    sizes = compiled.memory_analysis()
    found = sum(request_bytes(config, batch=batch, slots=slots, schedule=NO_CUTS, new_slots=16))
    allocated = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    assert 0.6 < found / allocated < 1.7


@pytest.mark.parametrize("tiles", [1, 6])
def test_the_towers_estimate_is_near_what_xla_allocates(tiles):
    vision = ClipVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4
    )
    config = LlavaConfig(vision_config=vision)
    params = family(config).param_shapes(config)
    pixels = jax.ShapeDtypeStruct((tiles, 336, 336, 3), np.float32)
    signals = jaxprune.PruMergePlus.signals
    sizes = stages.encode.lower(params, pixels, config=config, signals=signals).compile()
    sizes = sizes.memory_analysis()
    allocated = pixels.size * 4 + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    assert 0.6 < sum(tower_bytes(config, tiles)) / allocated < 1.7


def test_what_does_not_fit_is_refused_with_what_would():
    config = LlavaConfig.llava_1_5_7b(dtype="bfloat16")
    sizes = {"slots": 640, "schedule": NO_CUTS, "new_slots": 128}
    check_memory(config, batch=8, **sizes, free=16 << 30)
    with pytest.raises(jaxprune.UserError, match=r"64 rows of 640 .* fit: 16 prompts at once"):
        check_memory(config, batch=64, **sizes, batches=(1, 8, 16, 32, 64), free=8 << 30)
    with pytest.raises(jaxprune.UserError, match="What may fit: fewer new tokens"):
        check_memory(config, batch=1, **sizes, free=1 << 20)
    check_memory(config, batch=64, **sizes, free=8 << 30, devices=8)
    check_tower_memory(config, tiles=8, free=1 << 30)
    with pytest.raises(jaxprune.UserError, match=r"320 tiles .* fit: 8 images at once"):
        check_tower_memory(config, tiles=320, images=(1, 8, 64), image_tiles=5, free=1 << 30)


def test_a_request_over_the_memory_leaves_the_next_alone(tiny_model, monkeypatch):
    with monkeypatch.context() as low:
        low.setattr("jaxprune.engine.session.free_bytes", lambda devices: 1000)
        with pytest.raises(jaxprune.UserError, match="are free"):
            jaxprune.generate(tiny_model, picture(0), "What?")
    assert isinstance(jaxprune.generate(tiny_model, picture(0), "What?", max_new_tokens=2), str)


def test_a_device_out_of_memory_is_told():
    with (
        pytest.raises(jaxprune.UserError, match=r"out of memory \(RESOURCE_EXHAUSTED: 5 GiB\)"),
        memory.told_if_exhausted(),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GiB\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError), memory.told_if_exhausted():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_containers_limit_counts(tmp_path):
    groups = tmp_path / "sys/fs/cgroup"
    assert memory._left_by_container(tmp_path) is None
    write(tmp_path / "proc/self", cgroup="0::/user/job\n")
    write(groups / "user/job", memory__max="max", memory__current="900", memory__stat="anon 1\n")
    assert memory._left_by_container(tmp_path) is None
    stat = "anon 100\nactive_file 300\ninactive_file 200\n"
    for name, text in {"memory.max": "5000", "memory.current": "4000", "memory.stat": stat}.items():
        (groups / "user" / name).write_text(text)
    assert memory._left_by_container(tmp_path) == 1500
    # Version 1, as older hosts have it.
    write(groups / "memory", memory__stat=stat, **{"memory.limit_in_bytes": "2000"},
          **{"memory.usage_in_bytes": "1600"})  # fmt: skip
    assert memory._left_by_container(tmp_path) == 900


def test_a_full_container_has_nothing_left(monkeypatch):
    monkeypatch.setattr(memory, "_left_by_container", lambda root: 0)
    assert memory.free_bytes() == 0


def test_memory_is_known_here():
    assert memory.peak_bytes() > 1 << 20
    assert memory.free_bytes() is None or memory.free_bytes() > 1 << 20
