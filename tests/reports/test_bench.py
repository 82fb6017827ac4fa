"""Timings: on the tiny model, and the arithmetic on times that are given."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.engine.answer import Answer
from jaxprune.engine.cost import estimate
from jaxprune.reports import bench as module
from jaxprune.reports.bench import bench, decoder_bytes
from tests.cases import picture


def test_rows_and_ceilings(tiny_model):
    methods = [("none", {"method": "none"}), ("few", {"method": "uniform", "keep": 4})]
    rows, ceilings = bench(tiny_model, [picture(0)] * 2, "What?", methods, new_tokens=4, rounds=2)
    assert [row.method for row in rows] == ["none", "few"]
    assert [row.visual_tokens for row in rows] == [16, 4]
    assert rows[0].speedup == {"first": 1, "decode": 1, "all": 1}
    for row in rows:
        first = sum(row.seconds[stage] for stage in ("encode", "select", "prefill"))
        assert first > 0
        assert 0 < row.seconds["decode"] < row.seconds["all"]
        assert 0 < row.prefill_of_ceiling < 1
        assert row.decode_of_ceiling > 0
        assert row.peak_bytes > 0
    assert rows[0].compile_seconds > 0
    assert set(ceilings) == {"float32_macs", "bfloat16_macs", "bytes"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"new_tokens": "x"}, "new_tokens is 'x'"),
        ({"rounds": 0}, "rounds is 0"),
        ({"methods": []}, "needs a method"),
    ],
)
def test_mistakes(change, message, tiny_model):
    fields = {"methods": [("none", {})], **change}
    with pytest.raises(jaxprune.UserError, match=message):
        bench(tiny_model, [picture(0)], "What?", **fields)


LIMITS = {"float32_macs": 1e9, "bfloat16_macs": 2e9, "bytes": 1e8}


def answer_of(config, *, prefill, decode, executed, visual):
    return Answer(
        text="",
        token_ids=[7] * 5,
        finish_reason="length",
        prompt_tokens=20,
        visual_tokens=[visual],
        unpruned_visual_tokens=[16],
        kept_indices=[],
        kept_by_layer={},
        cost=dataclasses.replace(estimate(config, visual_tokens=visual), executed=executed),
        seconds={"encode": 0.25, "select": 0.25, "prefill": prefill, "decode": decode},
    )


def test_figures_of_given_times(tiny_model, monkeypatch):
    """Two rows, five tokens each; round 0 compiles and counts for nothing else."""
    config, calls = tiny_model.config, []
    prefill = {"none": (9.0, 1.5, 0.5, 1.0), "few": (9.0, 0.5, 0.25, 0.0)}
    executed = {"none": {"macs": 1000, "cache_bytes": 300}, "few": {"macs": 10, "cache_bytes": 3}}
    rounds = {name: itertools.count() for name in prefill}

    def generate(params, images, prompts, *, method, **options):
        assert params.processor.eos_token_ids == ()
        calls.append(method)
        seconds = {"prefill": prefill[method][next(rounds[method])], "decode": 2.0}
        visual = {"none": 16, "few": 4}[method]
        fields = {**seconds, "executed": executed[method], "visual": visual}
        return [answer_of(config, **fields)] * len(images)

    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(module, "ceilings", lambda: LIMITS)
    methods = [(name, {"method": name}) for name in prefill]
    image = picture(0)
    (none, few), limits = bench(tiny_model, [image] * 2, "What?", methods, new_tokens=5, rounds=3)

    assert calls == ["none", "few"] * 4
    assert limits == LIMITS
    assert none.seconds["prefill"] == 1.0 and few.seconds["prefill"] == 0.25
    assert none.seconds["first"] == 1.5 and few.seconds["first"] == 0.75
    assert none.seconds["decode"] == 2.0 / 4  # the prefill gives the first token
    assert none.seconds["preprocess"] == 0
    assert none.spread["prefill"] == (1.5 - 0.5) / 1.0
    assert few.speedup["first"] == 2 and few.speedup["decode"] == 1
    assert (none.visual_tokens, few.visual_tokens) == (16, 4)
    tower = config.tower.macs(1)  # the rows share one image
    assert none.prefill_of_ceiling == pytest.approx((tower + 2 * 1000) / 1.5 / 1e9)
    assert few.prefill_of_ceiling == pytest.approx((tower + 2 * 10) / 0.75 / 1e9)
    weights = decoder_bytes(tiny_model)
    assert none.decode_of_ceiling == pytest.approx((weights + 2 * 300) / 0.5 / 1e8)


def test_decoding_reads_no_embeddings_but_those_looked_up(tiny_model):
    arrays = tiny_model.arrays["language_model"]
    embedding = np.prod(arrays["embed_tokens"]["embedding"].shape) * 4
    whole = sum(x.nbytes for x in jax.tree.leaves(arrays))
    assert decoder_bytes(tiny_model) == whole - embedding
