"""A model for methods inside the decoder."""

import pytest

import jaxprune
from tests.builders import tiny_config, write_directory
from tests.methods.comparing import L


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """64 visual tokens, 4 layers, grouped queries."""
    directory = tmp_path_factory.mktemp("model") / "m"
    config = tiny_config(vision={"image_size": 64}, text={"num_hidden_layers": L})
    write_directory(directory, config, seed=3)
    return jaxprune.load(directory)
