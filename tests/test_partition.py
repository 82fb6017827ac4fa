"""Sharded weights give the same answers; eight virtual devices in a process of their own."""

import os
import subprocess
import sys

PROGRAM = """
import sys
import jax
import numpy as np
import jaxprune
from jax.sharding import AxisType, PartitionSpec
from jaxprune import scenes

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
sharded = jaxprune.load(mesh=mesh)
attention = sharded["language_model"]["layers_0"]["self_attn"]
assert attention["q_proj"]["kernel"].sharding.spec == PartitionSpec(None, "model")
assert attention["o_proj"]["kernel"].sharding.spec == PartitionSpec("model", None)
assert sharded["language_model"]["norm"]["scale"].sharding.spec == PartitionSpec()

params = jaxprune.load()
pairs = [scenes.sample("held-out", 0, index) for index in range(6)]
images = [scenes.draw(scene) for scene, _ in pairs]
prompts = [question.question for _, question in pairs]
for method in ("none", "prumerge", "prumerge_plus"):
    one = jaxprune.generate(params, images, prompts, method=method, max_new_tokens=8)
    eight = jaxprune.generate(sharded, images, prompts, method=method, max_new_tokens=8)
    assert one == eight, (one, eight)
print("equal")
"""


def test_eight_devices_answer_as_one():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"
