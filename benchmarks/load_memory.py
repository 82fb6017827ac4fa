"""Load time and peak host memory of a random checkpoint, against its size.

    python benchmarks/load_memory.py --gigabytes 1

The checkpoint is written to a temporary directory and loaded in a process of its own;
the peak is that process's largest resident set. The share of the runtime (JAX, transformers,
and torch where it is installed) is what the process held after loading the small model.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import ml_dtypes
import numpy as np

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.models.clip import ClipVisionConfig
from jaxprune.models.llama import LlamaConfig
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import family_of

LOAD = """
import json, re, sys, time
import jax, jaxprune
jaxprune.load()  # the runtime's own share: JAX, transformers and, where installed, torch
# The kernel's own high-water mark: getrusage's would count the parent's, from before exec.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, began = peak(), time.perf_counter()
params = jaxprune.load(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(params)
print(json.dumps({"seconds": time.perf_counter() - began, "before": before, "peak": peak(),
                  "bytes": sum(x.nbytes for x in jax.tree.leaves(params))}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()

    width = 1024
    layer = 4 * width**2 + 3 * width * 2816
    itemsize = 4 if args.dtype == "float32" else 2
    layers = max(1, round((args.gigabytes * 1e9 / itemsize - 100e6) / layer))
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        dtype=args.dtype,
    )
    vision = ClipVisionConfig(hidden_size=512, num_hidden_layers=6, intermediate_size=2048)
    vision = dataclasses.replace(vision, num_attention_heads=8, dtype=args.dtype)
    config = LlavaConfig(text_config=text, vision_config=vision)
    rng = np.random.default_rng(0)
    dtype = ml_dtypes.bfloat16 if args.dtype == "bfloat16" else np.float32
    shapes = family_of(config).param_shapes(config)
    params = jax.tree.map(lambda s: rng.random(s.shape, np.float32).astype(dtype), shapes)
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name) / "model"
        checkpoints_convert.export(params, config, directory, companions=jaxprune.SMALL_MODEL)
        del params
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(directory), args.dtype],
            capture_output=True,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout)
    print(f"checkpoint            {size / 1e9:.3f} GB in {args.dtype}")
    print(f"load                  {found['seconds']:.2f} s")
    print(f"process before load   {found['before'] / 1e9:.3f} GB")
    peak = found["peak"]
    print(f"peak                  {peak / 1e9:.3f} GB, {peak / size:.3f} x the checkpoint")
    grown = found["peak"] - found["before"]
    print(f"peak over before      {grown / 1e9:.3f} GB, {grown / size:.3f} x the checkpoint")


if __name__ == "__main__":
    main()
