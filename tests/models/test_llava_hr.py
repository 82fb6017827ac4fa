"""LLaVA-HR without PyTorch: sizes of published models and of others, what recipes save."""

import dataclasses
import math

import pytest

import jaxprune
from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.engine.cost import estimate
from jaxprune.models.llava_hr.config import PRESETS
from jaxprune.ops.tiles import VisualSize


@pytest.mark.parametrize(
    "image_size, fast, grid, slow",
    [(384, 336, 24, 12), (768, 336, 24, 24), (1024, 448, 32, 32), (1536, 672, 48, 48)],
)
def test_an_image_at_two_sizes(image_size, fast, grid, slow):
    config = dataclasses.replace(PRESETS["llava-hr-7b"](), image_size=image_size)
    assert (config.fast_size, config.grid, config.slow_grid) == (fast, grid, slow)
    assert config.tiling(VisualSize(30, 900)).num_tokens == grid**2


@pytest.mark.parametrize("save, expected", [(0.4, 38.8), (0.6, 59.6)])
def test_the_published_recipes_save(save, expected):
    found = estimate(jaxprune.read_config("llava-hr-7b"), "fitprune", save=save, text_tokens=64)
    assert round(100 * found.saved["visual_macs"], 1) == expected


def test_a_sum_of_attention_that_no_token_pays():
    tower = PRESETS["llava-hr-7b"]().tower
    tower.check(jaxprune.Scope(keep=5).signals)
    with pytest.raises(jaxprune.UserError, match="towers of LLaVA-HR have no CLS token"):
        tower.check(jaxprune.Scope(keep=5, combine="sum").signals)


@pytest.mark.slow
def test_parameters_of_the_published_sizes():
    """CLIP-L and Vicuna as LLaVA-1.5 has them; ConvNeXt as published, its head apart."""
    seven, thirteen = (flat_shapes(make()) for make in PRESETS.values())

    def number(shapes, start):
        return sum(math.prod(x.shape) for path, x in shapes.items() if path.startswith(start))

    assert number(seven, "vision_tower/fast/") == 303_507_456
    # ConvNeXt-L's 197,767,336 parameters without its head of 1,000 classes and the norm before it.
    assert number(seven, "vision_tower/slow/") == 197_767_336 - 1536 * 1000 - 1000 - 2 * 1536
    assert number(seven, "language_model/") == 6_738_415_616
    # ConvNeXt-XXL is said to have 846.47 million in the same way.
    whole = number(thirteen, "vision_tower/slow/") + 3072 * 1000 + 1000 + 2 * 3072
    assert round(whole / 1e6, 2) == 846.47
