"""--method and --option."""

import pytest

import jaxprune
from jaxprune.cli.options import method_options
from jaxprune.engine.cost import estimate
from jaxprune.methods.written import one_by_one, parse_method
from jaxprune.reports.kept_patches import kept_over_depth


def test_methods_are_names_paths_and_pairs():
    assert parse_method("prumerge") == "prumerge"
    assert parse_method(" my/recipe.json") == "my/recipe.json"
    assert parse_method("uniform, fastv") == ("uniform", "fastv")


def test_values_are_json_where_they_are():
    texts = ["c=4.0", "order=raster", "prune-text=false", "deletions=[3, 2]", "k=", "x=a=b"]
    assert method_options(texts, keep=None, save=0.5) == {
        "keep": None,
        "save": 0.5,
        "c": 4.0,
        "order": "raster",
        "prune_text": False,
        "deletions": (3, 2),
        "k": "",
        "x": "a=b",
    }


def test_an_option_wins_over_the_commands_own():
    assert method_options(["keep=3"], keep=4) == {"keep": 3}


@pytest.mark.parametrize(
    "function, names",
    [
        (None, ["params", "image", "prompt", "method", "max_new_tokens", "return_details"]),
        (jaxprune.generate, ["seed", "config", "top-k", "buckets", "chat"]),
        (kept_over_depth, ["layers", "side", "temperature", "stop"]),
        (estimate, ["text_tokens", "visual-tokens", "image_size", "prompt"]),
    ],
)
def test_parameters_of_the_functions_behind_are_none(function, names):
    for name in names:
        plain = name.replace("-", "_")
        message = f"sets options of a method, and {plain} is none; see `jaxprune methods`"
        with pytest.raises(jaxprune.UserError, match=message):
            method_options([f"{name}=1"], function)


@pytest.mark.parametrize("function", [None, kept_over_depth, estimate])
def test_every_option_of_a_method_can_be_set(function):
    for method in jaxprune.METHODS.values():
        for name in jaxprune.methods.describe(method)["options"]:
            assert method_options([f"{name}=1"], function) == {name: 1}


def test_a_name_alone_is_refused():
    with pytest.raises(jaxprune.UserError, match="--option is 'c'; expected name=value"):
        method_options(["c"])


def test_several_values_are_several_methods():
    texts = ["none", "uniform,fastv:keep=9,8;keep_rate=0.5,0.25", "gsearch:keep_rates=[1.0,0.5]"]
    assert one_by_one(texts) == [
        "none",
        "uniform,fastv:keep=9;keep_rate=0.5",
        "uniform,fastv:keep=9;keep_rate=0.25",
        "uniform,fastv:keep=8;keep_rate=0.5",
        "uniform,fastv:keep=8;keep_rate=0.25",
        "gsearch:keep_rates=[1.0,0.5]",
    ]
    assert one_by_one(["vtw:", "vtw:layer"]) == ["vtw:", "vtw:layer"]
