"""Key tables: one rule a key and a path, spellings of a part alone, parts put together."""

import pytest

from jaxprune.models.clip.weights import CLIP
from jaxprune.models.llava.weights import llava_table
from jaxprune.models.llava_next.weights import llava_next_table
from jaxprune.models.weights import KEEP, KeyTable, Rule

TOWERS = CLIP.under("image_tower.", "image/") + CLIP.under("video_tower.", "video/")


@pytest.mark.parametrize("name", ["image", "video"])
def test_a_part_in_two_places(name):
    key = TOWERS.canonical_key(f"{name}_tower.encoder.layers.3.mlp.fc1.weight")
    assert key == f"{name}_tower.vision_model.encoder.layers.3.mlp.fc1.weight"
    rule = TOWERS.rule_of_key(key)
    assert rule is not None and rule.paths == (f"{name}/layers_3/mlp/fc1/kernel",)
    assert TOWERS.rule_of_path(*rule.paths) == rule
    assert TOWERS.canonical_key(f"{name}_tower.embeddings.position_ids") is None
    assert TOWERS.canonical_key("other.embeddings.position_ids") == "other.embeddings.position_ids"


def test_a_spelling_is_a_family_s_own():
    assert TOWERS.canonical_key("model.layers.0.norm") == "model.layers.0.norm"
    assert (
        llava_table("llama").canonical_key("model.norm.weight")
        == "language_model.model.norm.weight"
    )
    assert llava_next_table("llama").canonical_key("model.image_newline") == "image_newline"
    assert llava_table("llama").rule_of_key("image_newline") is None


def test_mistakes_in_a_table():
    with pytest.raises(AssertionError, match="differ in their fields"):
        Rule("layers.{l}.weight", "kernel", KEEP)
    twice = KeyTable(rules=(Rule("{a}.weight", "x/{a}", KEEP), Rule("3.weight", "x", KEEP)))
    with pytest.raises(AssertionError, match="matches 2 rules"):
        twice.rule_of_key("3.weight")
    with pytest.raises(AssertionError, match="no rule of the key table fits"):
        twice.rule_of_path("x/y")
