import dataclasses

import pytest

import jaxprune
from jaxprune.methods import METHODS, Plan, describe, resolve
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import depth_of
from tests.builders import tiny_config

TINY, REAL = tiny_config(), LlavaConfig.llava_1_5_7b()


def test_names_and_instances():
    merge, places = jaxprune.PruMerge(keep=9), jaxprune.UniformPlaces(keep=4)
    fitted = jaxprune.FitPrune(save=0.6)
    assert resolve("none", depth_of(TINY)) == resolve(None, depth_of(TINY)) == Plan()
    assert resolve("prumerge", depth_of(TINY), keep=9) == Plan(vision=merge)
    assert resolve(places, depth_of(TINY)) == Plan(vision=places)
    assert resolve("fitprune", depth_of(REAL), save=0.6) == Plan(decoder=fitted)


def test_pairs():
    pair = Plan(jaxprune.PruMergePlus(keep=9), jaxprune.FitPrune(save=0.6))
    assert resolve(("prumerge_plus", "fitprune"), depth_of(REAL), keep=9, save=0.6) == pair
    assert resolve((pair.decoder, pair.vision), depth_of(REAL)) == pair
    assert resolve(("prumerge_plus", None), depth_of(REAL), keep=9) == Plan(pair.vision)
    both = resolve("iti", depth_of(REAL), c=2.0, layer=3)
    assert (both.vision.c, both.decoder.layer) == (2.0, 3)


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("prumerg", {}, "Did you mean 'prumerge'"),
        ("zzz", {}, "known: none, prumerge, prumerge_plus, fastervlm"),
        ("prumerge", {"kepe": 3}, "no option kepe; prumerge has: keep, merge, order"),
        ("uniform", {}, "needs the option keep"),
        ("none", {"keep": 3}, "need a method"),
        (jaxprune.PruMerge(), {"keep": 3}, "set them on the instance"),
        (3, {}, "expected a name or an instance"),
        (("prumerge", "uniform"), {"keep": 3}, "are vision-side, prumerge and uniform"),
        (("iti", "fastv"), {}, "are decoder-side, iti_stage2 and fastv"),
        (("prumerge", "iti"), {}, "are vision-side"),
        (("a", "b", "c"), {}, "expected one method or a pair"),
        ((), {}, "expected one method or a pair"),
        ("fitprune", {}, "either save, e.g. save=0.6, or deletions"),
        ("fitprune", {"save": 1.0}, "save is 1.0; expected a share above 0 to below 1"),
        ("fitprune", {"save": 0.65}, "there are 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6"),
        ("fitprune", {"deletions": (5,), "num_tokens": 4}, "together at most num_tokens"),
        ("fitprune", {"deletions": (5,), "num_tokens": 9}, "for 1 layers, but the decoder has 32"),
        ("gsearch", {"keep_rates": (1.0, 0.5, 0.7)}, "none larger than the one before"),
        ("gsearch", {"keep_rates": (1.0, 0.5)}, "for 2 layers, but the decoder has 32"),
        ("psigmoid", {}, "needs the option keep_rate"),
        ("psigmoid", {"keep_rate": 0.05}, "more than 0.0625 and less than 1"),
        ("psigmoid", {"keep_rate": 0.5, "k": 0}, "k is 0; expected a number above 0"),
        ("fastv", {"layer": 40}, "layer is 40, but the decoder has 32 layers"),
        ("iti", {"c": -1}, "c is -1"),
        ("iti", {"rows": "some"}, "rows is 'some'; expected one of: text, all"),
        ("missing.json", {}, "recipe missing.json does not exist"),
    ],
)
def test_mistakes(method, options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        resolve(method, depth_of(REAL), **options)


@pytest.mark.parametrize("method", ["fitprune", "gsearch", "psigmoid"])
def test_another_depth_says_to_calibrate(method):
    options = {"fitprune": {"save": 0.6}, "psigmoid": {"keep_rate": 0.5}}.get(method, {})
    with pytest.raises(jaxprune.UserError, match=r"3 decoder layers.*jaxprune calibrate"):
        resolve(method, depth_of(TINY), **options)


def test_every_method_describes_itself():
    for cls in METHODS.values():
        row = describe(cls)
        assert row["name"] == cls.name and row["summary"] == cls.summary
        assert "arXiv" in row["paper"] or row["paper"] == "baseline"
        own = [field.name for field in dataclasses.fields(cls) if field.name != "positions"]
        assert list(row["options"]) == [*own, "positions"]
        required = [name for name, default in row["options"].items() if default == "required"]
        counted = {"keep"} & set(own) if "budget" in own else set()
        assert required == (["keep_rate"] if cls.name in ("psigmoid", "evs") else list(counted))
