"""Checkpoints come back bit for bit, and whatever happens while one is written costs no other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxprune
from jaxprune.files import PARTIAL
from jaxprune.train.checkpoints import Checkpoints
from jaxprune.train.settings import Settings

DATA = {"epoch": 1, "next": 320, "seed": 0}
IDENTITY = {"data": "0123456789ab", "model": "ba9876543210"}


class State(NamedTuple):
    trained: dict
    optimiser: optax.OptState
    step: jax.Array


def opened(directory, settings=None, identity=IDENTITY, **options):
    return Checkpoints(directory, settings or Settings(), identity=identity, **options)


def a_state(seed=0):
    """Adapters and a projector under two rates, accumulation and clipping; after an update."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    trained = {
        "lora": {"layers_0/self_attn/q_proj": {"a": draw(6, 2), "b": draw(2, 6)}},
        "multi_modal_projector": {"linear_1": {"kernel": draw(4, 6), "bias": draw(6)}},
    }
    rate = optax.warmup_cosine_decay_schedule(0, 2e-4, 3, 10)
    each = {"lora": optax.adamw(rate), "multi_modal_projector": optax.adamw(2e-5)}
    update = optax.chain(
        optax.clip_by_global_norm(1.0), optax.partition(each, {name: name for name in each})
    )
    optimiser = optax.MultiSteps(update, 2)
    found = optimiser.init(trained)
    gradients = jax.tree.map(lambda x: 3 * x, trained)
    for _ in range(3):  # the third is half of an update
        _, found = optimiser.update(gradients, found, trained)
    return State(trained, found, jnp.int32(1))


def small(value):
    return {"x": jnp.full(3, value, jnp.bfloat16)}


def test_a_whole_state_comes_back(tmp_path, capfd):
    state = a_state()
    opened(tmp_path / "run").save(1, state, data=DATA, metrics={"loss": 0.5})
    found = opened(tmp_path / "run").restore(jax.tree.map(jnp.zeros_like, state))
    assert (found.step, found.data, found.metrics) == (1, DATA, {"loss": 0.5})
    chex.assert_trees_all_equal(found.state, state, strict=True)
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert capfd.readouterr() == ("", "")


def test_nothing_yet(tmp_path):
    empty = opened(tmp_path / "run")
    assert (empty.restore(small(0)), empty.best(), empty.steps()) == (None, None, [])


@pytest.mark.parametrize(
    "options, losses, stay, best",
    [
        ({"keep": 2}, [3, 1, 2, 4], [2, 3], None),
        ({"keep": 1, "best": "loss", "lower": True}, [3, 1, 2, 1], [1, 3], 1),
        ({"keep": 1, "best": "loss"}, [3, 1, 4, 2], [2, 3], 2),
        ({"keep": 1, "best": "loss"}, [None, 1, float("nan"), None], [1, 3], 1),
        ({"keep": 1, "best": "other"}, [3, 1], [1], None),
    ],
)
def test_the_last_and_the_best_stay(options, losses, stay, best, tmp_path):
    there = opened(tmp_path, **options)
    for step, loss in enumerate(losses):
        metrics = {} if loss is None else {"loss": loss}
        there.save(step, small(step), data=DATA, metrics=metrics)
    again = opened(tmp_path, **options)
    assert (again.steps(), again.best()) == (stay, best)
    assert again.restore(small(0)).step == stay[-1]
    if best is not None:
        chex.assert_trees_all_equal(again.restore(small(0), step=best).state, small(best))
    assert not list(tmp_path.glob(f"{PARTIAL}*"))


def test_a_step_is_saved_once(tmp_path):
    there = opened(tmp_path)
    there.save(7, small(1), data=DATA)
    there.save(7, small(2), data=DATA)
    chex.assert_trees_all_equal(there.restore(small(0)).state, small(1))


@pytest.mark.parametrize(
    "settings, identity, message",
    [
        ({"rank": 64}, {}, r"of a run with rank \(there 128, here 64\)\. Go on"),
        ({"micro_batch": 8}, {}, r"micro_batch \(there 16, here 8\)"),
        ({"gather": False}, {}, r"gather \(there null, here false\)"),
        ({"seed": 1, "clip": 0}, {}, r"clip \(there 1\.0, here 0\), seed"),
        ({}, {"data": "x"}, r"of a run with other data\."),
        ({"rank": 64}, {"model": "x"}, r"here 64\), other model\."),
    ],
)
def test_another_run_is_refused(settings, identity, message, tmp_path):
    opened(tmp_path).save(1, small(1), data=DATA)
    with pytest.raises(jaxprune.UserError, match=message):
        opened(tmp_path, Settings(**settings), {**IDENTITY, **identity})
    assert opened(tmp_path).steps() == [1]


def test_what_may_differ(tmp_path):
    opened(tmp_path).save(1, small(1), data=DATA)
    run = json.loads((tmp_path / "run.json").read_text())
    del run["settings"]["clip"]  # as of a release that had no such setting
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert opened(tmp_path, Settings(remat="full")).steps() == [1]


def test_what_is_no_directory_of_checkpoints(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(jaxprune.UserError, match=r"no checkpoints but thesis\.tex"):
        opened(tmp_path / "full")
    with pytest.raises(jaxprune.UserError, match="cannot hold checkpoints"):
        opened(tmp_path / "full" / "thesis.tex")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(jaxprune.UserError, match="The directory of checkpoints is a int"):
        opened(3)
    with pytest.raises(jaxprune.UserError, match="keep is 0"):
        opened(tmp_path / "new", keep=0)
    (tmp_path / "other").mkdir()
    for text, message in [("{", "not readable JSON"), ("{}", "not of this program")]:
        (tmp_path / "other" / "run.json").write_text(text)
        with pytest.raises(jaxprune.UserError, match=message):
            opened(tmp_path / "other")


def test_a_damaged_checkpoint_and_another_tree(tmp_path):
    there = opened(tmp_path)
    for step in (1, 2):
        there.save(step, small(step), data=DATA)
    for like in ({"y": jnp.zeros(3)}, {"x": jnp.zeros(4)}, {**small(0), "y": jnp.zeros(3)}):
        with pytest.raises(jaxprune.UserError, match="00000002 cannot be read"):
            there.restore(like)
    shutil.rmtree(tmp_path / "00000002" / "state" / "d")
    with pytest.raises(jaxprune.UserError, match=r"002 cannot be read .* the checkpoint before"):
        there.restore(small(0))
    shutil.rmtree(tmp_path / "00000002")
    assert opened(tmp_path).restore(small(0)).step == 1


def test_a_full_disk_is_told_beforehand(tmp_path, monkeypatch):
    there = opened(tmp_path)
    there.save(1, small(1), data=DATA)
    usage = shutil.disk_usage(tmp_path)._replace(free=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(jaxprune.UserError, match=r"has 0\.000 GiB left; the last one is kept"):
        there.save(2, small(2), data=DATA)
    assert there.steps() == [1]


@pytest.mark.parametrize(
    "error, expected, message",
    [
        (OSError(28, "No space left on device"), jaxprune.UserError, "Cannot write"),
        (
            ValueError("OUT_OF_RANGE: 423933 bytes"),
            jaxprune.UserError,
            "Cannot write",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_save_that_fails_leaves_nothing(error, expected, message, tmp_path, monkeypatch):
    there = opened(tmp_path)
    there.save(1, small(1), data=DATA)

    def fail(_, path, **__):
        path.mkdir()
        (path / "half").write_text("written")
        raise error

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(expected, match=message):
        there.save(2, small(2), data=DATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "run.json"]
    chex.assert_trees_all_equal(there.restore(small(0)).state, small(1))


LIMITED = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jaxprune
assert not {"orbax", "optax", "tensorstore"} & set(sys.modules), "the library alone needs none"
from tests.train.test_checkpoints import DATA, opened

mesh = jax.make_mesh((2, 4), ("data", "model"))
placed = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
noise = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
state = {"a": placed(noise, None, "model"), "step": placed(np.int32(3))}
there = opened(sys.argv[1])
there.save(1, state, data=DATA)
back = there.restore(jax.tree.map(jnp.zeros_like, state)).state
assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, state)
np.testing.assert_array_equal(back["a"], noise)

for size in (20_000, 10):  # of any file, instead of a disk's
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        there.save(2, state, data=DATA)
    except jaxprune.UserError as error:
        assert "Cannot write" in str(error) and "File too large" in str(error), error
    else:
        raise AssertionError
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
np.testing.assert_array_equal(opened(sys.argv[1]).restore(state).state["a"], noise)
"""


def run(program, directory, **environment):
    return subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_mesh_and_a_write_that_fails(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    ended = run(LIMITED, tmp_path / "run", XLA_FLAGS=flags)
    assert ended.returncode == 0, ended.stderr
    # A write that is given up while others go on may still say so, of Python's own accord.
    assert not ended.stderr or "Event loop is closed" in ended.stderr
    assert "absl" not in ended.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"00000001", "run.json"}


# Each child takes up what the one before it left, and saves until it is killed.
CHILD = """
import os, sys, time
import jax, jax.numpy as jnp, numpy as np
import jaxprune
from tests.train.test_checkpoints import DATA, opened

directory, rounds = sys.argv[1], 3
for number in range(rounds + 1):
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == (9 if number < rounds else 0), number
        continue
    there = opened(directory)
    like = {"x": jnp.zeros((64, 1024), jnp.int32), "step": jnp.int32(0)}
    assert not [name for name in os.listdir(directory) if "partial" in name]
    found = there.restore(like)
    first = 0 if found is None else found.step
    assert found is None or (found.state["x"] == first).all() and found.state["step"] == first
    if number == rounds:
        os._exit(0 if first else 1)
    print(os.getpid(), flush=True)
    for step in range(first + 1, first + 1000):
        state = {"x": jnp.full((64, 1024), step, jnp.int32), "step": jnp.int32(step)}
        there.save(step, state, data=DATA)
    os._exit(1)
"""


def test_kill_9(tmp_path):
    """In the middle of writing or removing: the last whole checkpoint is there, the rest goes."""
    rng = np.random.default_rng(0)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "run")],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            time.sleep(rng.uniform(0.1, 0.3))  # a save takes about 0.04 s
            deadline = time.monotonic() + 60
            while not list((tmp_path / "run").glob(f"{PARTIAL}*")):
                assert time.monotonic() < deadline
            time.sleep(rng.uniform(0, 0.03))
            os.kill(int(line), signal.SIGKILL)
    assert process.returncode == 0
