import dataclasses
import json
from typing import Any

import numpy as np
import pytest

import jaxprune
from jaxprune.methods import METHODS, Depth, resolve
from jaxprune.methods.recipes import PUBLISHED, Recipe, load_recipe, save_recipe
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import depth_of, fingerprint
from tests.builders import tiny_config

REAL = LlavaConfig.llava_1_5_7b()
SEVEN_B = Depth(32, frozenset({"llava-1.5-7b"}))


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.json")), ids=lambda path: path.stem)
def test_published_recipes_are_sound(path):
    recipe = load_recipe(path)
    method: Any = METHODS[recipe.method](
        **{k: tuple(v) if isinstance(v, list) else v for k, v in recipe.options.items()}
    )
    depth = Depth(recipe.model["num_hidden_layers"], frozenset(recipe.model["made_for"]))
    number = recipe.model["num_image_tokens"]
    removed = method.removed(number, depth)
    assert (np.diff(removed) >= 0).all() and removed[0] >= 0 and removed[-1] <= number
    assert recipe.cut == method.cut and recipe.score["queries"] == list(method.score.queries)
    if "keep_rate" in recipe.reached:
        assert np.mean(method.rates(depth)) == pytest.approx(recipe.reached["keep_rate"], abs=1e-4)


def test_published_means():
    """Mean visual tokens per layer input of FitPrune's recipes, mean rate of G-Search's curve."""
    depth = SEVEN_B
    for save, mean in ((0.4, 362), (0.6, 245), (0.8, 131), (0.9, 73)):
        removed = jaxprune.FitPrune(save=save).removed(576, depth)
        assert round(np.mean(576 - np.concatenate([[0], removed[:-1]]))) == mean
    assert np.mean(jaxprune.GSearch().rates(depth)) == pytest.approx(0.337, abs=5e-4)


def test_every_published_save_is_found_by_name():
    for save in (0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9):
        assert resolve("fitprune", depth_of(REAL), save=save).decoder.save == save


def test_the_small_model_has_recipes_by_name(small_model):
    depth = depth_of(small_model.config)
    for save in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        assert resolve("fitprune", depth, save=save).decoder.save == save
    assert resolve("gsearch", depth).decoder.rates(depth)[-1] == 0
    rates = resolve("psigmoid", depth, keep_rate=0.36).decoder.rates(depth)
    assert np.mean(rates) == pytest.approx(0.36, abs=1e-6)
    with pytest.raises(jaxprune.UserError, match=r"saves 0.95; there are 0.1, 0.2, .*, 0.9. Make"):
        resolve("fitprune", depth, save=0.95)


def recipe_for(config, **changes):
    fields = {
        "method": "gsearch",
        "model": {
            "made_for": [fingerprint(config)],
            "num_hidden_layers": 3,
            "num_image_tokens": 16,
        },
        "options": {"keep_rates": [1.0, 0.5, 0.25], "queries": "text"},
        "cut": "between_layers",
        "score": {"queries": ["text"], "heads": "mean", "later": False},
    }
    return Recipe(**{**fields, **changes})


def test_a_recipe_of_another_model_needs_fractions():
    config = tiny_config()
    other = tiny_config(text={"hidden_size": 96})
    recipe = recipe_for(config)
    assert fingerprint(config) == fingerprint(tiny_config(text={"dtype": "bfloat16"}))
    expected = jaxprune.GSearch(keep_rates=(1.0, 0.5, 0.25))
    assert resolve(recipe, depth_of(config)).decoder == expected
    with pytest.raises(jaxprune.UserError, match=r"made for another model.*fractions=True"):
        resolve(recipe, depth_of(other))
    assert resolve(recipe, depth_of(other), fractions=True).decoder == expected
    with pytest.raises(jaxprune.UserError, match=r"for 3 decoder layers, but the model has 32"):
        resolve(recipe, depth_of(REAL), fractions=True)


def test_published_recipes_are_for_the_models_that_they_were_made_for():
    """By the decoder's sizes: vocabulary, ids and the number of visual tokens may differ."""
    assert "llava-1.5-7b" in depth_of(REAL).made_for
    text = dataclasses.replace(REAL.text_config, vocab_size=32000)
    assert "llava-1.5-7b" in depth_of(dataclasses.replace(REAL, text_config=text)).made_for
    text = dataclasses.replace(REAL.text_config, num_key_value_heads=8)
    other = depth_of(dataclasses.replace(REAL, text_config=text))
    with pytest.raises(jaxprune.UserError, match=r"only for: llava-1.5-7b.*jaxprune calibrate"):
        resolve("fitprune", other, save=0.6)


def test_recipes_of_the_schema_before_are_read(tmp_path):
    config, path = tiny_config(), tmp_path / "r.json"
    save_recipe(recipe_for(config), path)
    fields = json.loads(path.read_text())
    old = {"family": "llava", "num_hidden_layers": 3, "num_image_tokens": 16}
    model = {**old, "fingerprint": fingerprint(config)}
    path.write_text(json.dumps({**fields, "schema": 1, "model": model}))
    assert load_recipe(path) == recipe_for(config)


def test_files(tmp_path):
    recipe = recipe_for(tiny_config())
    path = tmp_path / "r.json"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe
    good = json.loads(path.read_text())
    changes: list[tuple[dict, str]] = [
        ({"schema": 3}, "no recipe of schema 2"),
        ({"options": 3}, "options=3, of the wrong type"),
        ({"extra": 3}, "unknown .'extra'."),
        ({"model": {"made_for": []}}, "model lacks"),
    ]
    for change, message in changes:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(jaxprune.UserError, match=message):
            load_recipe(path)
    path.write_text("{")
    with pytest.raises(jaxprune.UserError, match="not readable JSON"):
        load_recipe(path)
    with pytest.raises(jaxprune.UserError, match="Cannot write"):
        save_recipe(recipe, tmp_path / "no" / "r.json")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "magic"}, "does not know"),
        ({"options": {"keep_rates": [1.0, 0.5, 0.25], "speed": 3}}, "does not know"),
        ({"cut": "after_attention"}, "cuts 'after_attention'"),
        ({"options": {"keep_rates": [1.0, 0.5, 0.75]}}, "none larger than the one before"),
        ({"options": {"keep_rates": "x"}}, "keep_rates"),
    ],
)
def test_unsound_recipes_are_refused(change, message):
    with pytest.raises(jaxprune.UserError, match=message):
        resolve(recipe_for(tiny_config(), **change), depth_of(tiny_config()))
