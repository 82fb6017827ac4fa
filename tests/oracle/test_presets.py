"""The published sizes, without memory: every PyTorch tensor has one parameter, of its shape."""

import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from jaxprune.checkpoints_convert.keys import canonical_key  # noqa: E402
from jaxprune.checkpoints_convert.plan import flat_shapes, stored_shape  # noqa: E402
from jaxprune.checkpoints_convert.tables import key_of, path_of  # noqa: E402
from jaxprune.models.llava import LlavaConfig  # noqa: E402

PRESETS = {"7b": LlavaConfig.llava_1_5_7b, "13b": LlavaConfig.llava_1_5_13b}


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_of_the_pytorch_model(name):
    config = PRESETS[name]()
    fields = config.to_hf()
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**fields))
    expected = flat_shapes(config)
    mapped = {}
    for key, tensor in model.state_dict().items():
        found = path_of("llava", canonical_key(key))
        assert found is not None, key
        path, transform = found
        assert path not in mapped, f"{key} and {mapped[path]}"
        mapped[path] = key
        assert stored_shape(transform, expected[path].shape) == tuple(tensor.shape), key
        assert key_of("llava", path)[0] == canonical_key(key)
    assert set(mapped) == set(expected)
