"""Sharded weights give the same answers; eight virtual devices in a process of their own."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxprune
from jaxprune.partition import check_mesh
from tests import builders

PROGRAM = """
import sys

import chex
import jax
import jaxprune
from jax.sharding import PartitionSpec
from jaxprune import scenes
from tests.builders import start

kind, methods = sys.argv[1:]
sizes, names = {
    "both": ((2, 4), ("data", "model")),
    "model": ((4,), ("model",)),
    "data": ((8,), ("data",)),
}[kind]
mesh = jax.make_mesh(sizes, names)
sharded = jaxprune.load(mesh=mesh)
attention = sharded["language_model"]["layers_0"]["self_attn"]
split = "model" if "model" in names else None
assert attention["q_proj"]["kernel"].sharding.spec == (
    PartitionSpec(None, "model") if split else PartitionSpec()
)
assert sharded["language_model"]["norm"]["scale"].sharding.spec == PartitionSpec()

params = jaxprune.load()
pairs = [scenes.sample("held-out", 0, index) for index in range(8)]
images = [scenes.draw(scene) for scene, _ in pairs]
prompts = [question.question for _, question in pairs]
METHODS = {
    "none": {},
    "prumerge": {},
    "prumerge_plus": {"keep": 30},
    "random": {"keep": 30},
    "uniform": {"keep": 30},
    "iti": {},
    "fitprune": {"deletions": (10, 20, 20, 20, 10, 10, 5, 0), "num_tokens": 144},
    "gsearch": {"keep_rates": (1.0, 0.9, 0.6, 0.4, 0.3, 0.2, 0.1, 0.1)},
    "psigmoid": {"keep_rate": 0.5, "k": 0.5},
    "fastv": {},
    "pyramiddrop": {},
    "vtw": {},
    "pair": {"method": ("prumerge_plus", "fastv")},
}
for name in METHODS if methods == "all" else ("none", "prumerge", "fitprune"):
    options = {"method": name, "max_new_tokens": 8, **METHODS[name]}
    one, eight = (start(model, images, prompts, **options) for model in (params, sharded))
    chex.assert_trees_all_close(one.first_logits, eight.first_logits, atol=1e-4)
    cache = eight.state.caches[1].k
    spec = (*cache.sharding.spec, None, None)[:2]
    assert spec == ("data" if "data" in names else None, split), spec
    for run in (one, eight):
        run.advance(8)
    assert one.texts() == eight.texts(), name
    assert (one.tokens == eight.tokens).all(), name
jaxprune.warmup(
    sharded, method="vtw",
    buckets=jaxprune.Buckets(batch=(8,), images=(8,), row_images=(1,), text=(64,), new_tokens=(8,)),
)
with jaxprune.no_compilation():
    jaxprune.generate(sharded, images, prompts, method="vtw", max_new_tokens=8, buckets=
        jaxprune.Buckets(batch=(8,), text=(64,), new_tokens=(8,)))
print("equal")
"""


@pytest.mark.parametrize(
    "kind, methods",
    [
        ("both", "some"),
        pytest.param("both", "all", marks=pytest.mark.slow),
        pytest.param("model", "some", marks=pytest.mark.slow),
        pytest.param("data", "some", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_answer_as_one(kind, methods):
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, methods],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


def mesh_of(*names, sizes=None):
    """A mesh without devices enough for it: only its shape is looked at."""
    sizes = sizes or (1,) * len(names)
    devices = np.array(jax.devices()[:1] * int(np.prod(sizes))).reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Explicit,) * len(names))


@pytest.mark.parametrize(
    "mesh, message",
    [
        (3, "mesh is a int"),
        (mesh_of("rows"), "has the axes"),
        (mesh_of("model", sizes=(4,)), "2 key/value heads"),
        (mesh_of("data", "model", sizes=(1, 3)), "4 attention heads"),
    ],
)
def test_meshes_are_checked(mesh, message):
    with pytest.raises(jaxprune.UserError, match=message):
        check_mesh(mesh, builders.tiny_config())


def test_a_mesh_of_any_axis_types_is_taken():
    found = check_mesh(mesh_of("data", "model"), builders.tiny_config())
    assert set(found.axis_types) == {AxisType.Auto}
