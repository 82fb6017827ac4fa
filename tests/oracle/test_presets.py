"""The published sizes, without memory: every PyTorch tensor has one parameter, of its shape."""

import pytest
import torch
import transformers

from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.models.llava import FAMILY, LlavaConfig

PRESETS = {"7b": LlavaConfig.llava_1_5_7b, "13b": LlavaConfig.llava_1_5_13b}


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_of_the_pytorch_model(name):
    config = PRESETS[name]()
    fields = config.to_hf()
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**fields))
    expected, table = flat_shapes(config), FAMILY.weights(config)
    mapped = {}
    for key, tensor in model.state_dict().items():
        rule = table.rule_of_key(table.canonical_key(key))
        assert rule is not None, key
        (path,) = rule.paths
        assert path not in mapped, f"{key} and {mapped[path]}"
        mapped[path] = key
        assert rule.stored_shape([expected[path].shape]) == tuple(tensor.shape), key
        assert table.rule_of_path(path) == rule
    assert set(mapped) == set(expected)
