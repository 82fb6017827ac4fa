"""Sharded weights give the same answers; eight virtual devices in a process of their own."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxprune
from jaxprune.devices.mesh import check_mesh
from tests import builders
from tests.cases import picture

PROGRAM = """
import sys

import chex
import jax
import jaxprune
from jax.sharding import PartitionSpec
from jaxprune.data import scenes
from jaxprune.engine.answer import texts_of
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
    "dart": {"tokens": 48},
    "feather": {"cut_layers": (2, 4)},
    "sparsevlm": {"budget": 128, "cut_layers": (2, 4, 6)},
    "v2drop": {"budget": 192, "cut_layers": (2, 4, 6)},
    "pair": {"method": ("prumerge_plus", "fastv")},
}
ASKED = {"all": METHODS, "some": ("none", "prumerge", "fitprune"), "pair": ("pair",)}
for name in ASKED[methods]:
    options = {"method": name, "max_new_tokens": 8, **METHODS[name]}
    one, eight = (start(model, images, prompts, **options) for model in (params, sharded))
    chex.assert_trees_all_close(one.first_logits, eight.first_logits, atol=1e-4)
    cache = eight.state.caches[1].k
    spec = (*cache.sharding.spec, None, None)[:2]
    assert spec == ("data" if "data" in names else None, split), spec
    for run in (one, eight):
        run.advance(8)
    assert texts_of(one) == texts_of(eight), name
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


LAID_BY_HAND = """
import jax
import jaxprune
from jaxprune.calibrate import encode_samples, scene_samples, score
from jax.sharding import NamedSharding, PartitionSpec

params = jaxprune.load()
ask = lambda params: jaxprune.generate(
    params, [jaxprune.DEMO_IMAGE] * 2, ["Is there a red star?"] * 2, method="prumerge",
    max_new_tokens=4)
expected = ask(params)
mesh = jax.make_mesh((2,), ("data",))
assert ask(jax.device_put(params, NamedSharding(mesh, PartitionSpec()))) == expected
assert ask(jax.device_put(params, jax.devices()[1])) == expected
data, spread = (encode_samples(p, scene_samples(3), show_progress=False) for p in (
    params, jax.device_put(params, NamedSharding(mesh, PartitionSpec()))))
one, two = (score(d, "vtw", "logprob") for d in (data, spread))
assert abs(one - two) < 1e-4, (one, two)
halves = jax.make_mesh((2,), ("model",))
eighths, laid = (jaxprune.load(dtype="int8", mesh=m) for m in (None, halves))
up = laid["language_model"]["layers_0"]["mlp"]["up_proj"]
assert up["scale"].sharding.spec == PartitionSpec("model")
assert ask(laid) == ask(eighths)
try:
    ask(jax.device_put(params, NamedSharding(jax.make_mesh((2,), ("rows",)), PartitionSpec())))
except jaxprune.UserError as error:
    assert "has the axes ('rows',)" in str(error)
    print("equal")
"""


def on_cpus(number):
    """The environment of a process with so many virtual devices, that compiles as this one does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_params_laid_by_hand_answer_alike():
    done = subprocess.run(
        [sys.executable, "-c", LAID_BY_HAND],
        capture_output=True,
        text=True,
        env=on_cpus(2),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, methods", [("both", "pair"), ("both", "all"), ("model", "some"), ("data", "some")]
)
def test_eight_devices_answer_as_one(kind, methods):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, methods],
        capture_output=True,
        text=True,
        env=on_cpus(8),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


HOST = """
import sys

import jax

place, directory, port = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(place))
import jaxprune
from tests.devices.test_mesh import told

mesh = jax.make_mesh((2, 2), ("data", "model"))
assert mesh.devices.size == 2 * jax.local_device_count() == 4
for line in told(jaxprune.load(directory, mesh=mesh)):
    print("told", line)
"""


def told(params):
    """What two prompts get as answers, and what is kept of their images where."""
    answers = jaxprune.generate(
        params, [picture(0), picture(1)], ["What?", "a b"], method=("prumerge", "fastv"), layer=1,
        max_new_tokens=4, return_details=True,
    )  # fmt: skip
    return [
        f"{a.token_ids} {a.visual_tokens} {[k.tolist() for (k,) in a.kept_by_layer.values()]}"
        for a in answers
    ]


@pytest.mark.slow
def test_two_hosts_answer_as_one(tmp_path):
    directory = tmp_path / "m"
    builders.write_directory(directory, builders.tiny_config())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(place), directory, str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=on_cpus(2),
        )
        for place in range(2)
    ]
    said = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    lines = [[x[5:] for x in out.splitlines() if x.startswith("told ")] for out, _ in said]
    expected = told(jaxprune.load(directory))
    assert len(expected) == 2
    assert lines == [expected, expected]


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
        check_mesh(mesh, builders.tiny_config().mesh_splits())


def test_a_mesh_of_any_axis_types_is_taken():
    found = check_mesh(mesh_of("data", "model"), builders.tiny_config().mesh_splits())
    assert set(found.axis_types) == {AxisType.Auto}
