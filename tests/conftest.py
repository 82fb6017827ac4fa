"""Fixtures; and what has to be set before JAX and the package are imported."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

import jaxtyping

from tests import typecheck

# The shapes in annotations are checked while the tests run.
CHECKED = [f"jaxprune.{name}" for name in ("ops", "methods", "models", "engine.stages")]
CHECKED += ["jaxprune.engine.sampling"]
jaxtyping.install_import_hook(CHECKED, f"{typecheck.__name__}.functions")

# Most of the suite's time is XLA's. Unless full optimisation is asked for, programs are compiled
# quickly, and those that several files need are shared on disk.
if "JAXPRUNE_TEST_OPTIMISED" not in os.environ:
    flags = "--xla_backend_optimization_level=0"
    flags += " --xla_cpu_parallel_codegen_split_count=1"  # programs too small to be split
    if importlib.metadata.version("jaxlib") < "0.11":  # later ones do not know it
        flags += " --xla_cpu_use_fusion_emitters=false"  # a fifth of the time to compile
    os.environ.setdefault("XLA_FLAGS", flags)
    shared = pathlib.Path(tempfile.gettempdir()) / f"jaxprune-tests-{os.getuid()}"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(shared))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.data import scenes
from tests import builders

# What the imports made stays: to look through it at every collection took a fifteenth of the time.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 50)

# The same examples in every run: what fails once fails again.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def small_model():
    return jaxprune.load()


@pytest.fixture(scope="session")
def held_out():
    """Twenty drawn scenes with a question each: (image, question)."""
    pairs = [scenes.sample("held-out", 0, index) for index in range(20)]
    return [(scenes.draw(scene), question) for scene, question in pairs]


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory):
    """A random tiny LLaVA as a Hugging Face directory, made without torch."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    builders.write_directory(directory, builders.tiny_config())
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_directory):
    return jaxprune.load(tiny_directory)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drop a file's compiled programs: thousands of them exhaust the memory maps of a process."""
    yield
    jax.clear_caches()


@pytest.fixture
def compilations():
    """A list that grows by one with every XLA compilation while the test runs."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
