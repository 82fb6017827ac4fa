import pytest

import jaxprune
from jaxprune.methods import METHODS, describe, resolve


def test_names_and_instances():
    assert resolve("none") is None
    assert resolve(None) is None
    assert resolve("prumerge", keep=9) == jaxprune.PruMerge(keep=9)
    assert resolve(jaxprune.UniformPlaces(keep=4)) == jaxprune.UniformPlaces(keep=4)


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("prumerg", {}, "Did you mean 'prumerge'"),
        ("zzz", {}, "known: none, prumerge, prumerge_plus, random, uniform"),
        ("prumerge", {"kepe": 3}, "has no option kepe; it has: keep, merge, order"),
        ("uniform", {}, "needs the option keep"),
        ("none", {"keep": 3}, "need a method"),
        (jaxprune.PruMerge(), {"keep": 3}, "set them on the instance"),
        (3, {}, "expected a name or an instance"),
    ],
)
def test_mistakes(method, options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        resolve(method, **options)


def test_every_method_describes_itself():
    for cls in METHODS.values():
        row = describe(cls)
        assert row["summary"] and row["paper"] and row["options"]
