"""What a TPU's compiler makes of an update of fine-tuning: memory, collectives, cycles; no TPU.

    pip install 'jaxprune[tpu-compile]'
    python benchmarks/compiled_training.py --target v5e:2x4 --rows 8

One micro-batch forward and back, and the optimiser's step, of LLaVA-1.5-7B in bfloat16 from shapes
alone. Bytes are a chip's, as the compiler lays them out; seconds are its estimate of all fusions.
"""

import argparse
import dataclasses
import itertools
import json
import time
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import SingleDeviceSharding

import jaxprune
from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.devices.hlo import read_program
from jaxprune.devices.mesh import check_mesh, row_sharding, sharding_of
from jaxprune.devices.targets import Target, parse_target, target_mesh, topology_devices
from jaxprune.engine.programs import Sizes, padded
from jaxprune.engine.schedules import candidates_left
from jaxprune.inputs.layout import ImageRoom, lay_out
from jaxprune.inputs.request import NO_LABEL, Row
from jaxprune.methods import resolve
from jaxprune.methods.written import with_options
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import depth_of, family_of
from jaxprune.ops.tiles import VisualSize, pack_tilings
from jaxprune.train.settings import REMAT, Settings
from jaxprune.train.step import Trainer

TEXT, ANSWER = 256, 64  # tokens of a row, and those of them that are learned
GIB = 2**30


class Shapes:
    """Where the arrays of a run lie on a target, as shapes."""

    def __init__(self, config: ModelConfig, target: Target, data: int) -> None:
        self.config = config
        mesh = target_mesh(target, data)
        self.mesh = None if mesh is None else check_mesh(mesh, config.mesh_splits())
        self.alone = SingleDeviceSharding(topology_devices(target)[0])

    def params(self) -> jaxprune.Params:
        rules = family_of(self.config).weights(self.config).partition
        placed = {}
        for path, x in flat_shapes(self.config).items():
            where = sharding_of(path, x.shape, self.mesh, rules) if self.mesh else self.alone
            placed[path] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return jaxprune.Params(unflatten_dict(placed, sep="/"), self.config)

    def of_rows(self, tree: Any, axis: int = 0) -> Any:
        def one(x: Any) -> jax.ShapeDtypeStruct:
            where = row_sharding(np.shape(x), self.mesh, axis) if self.mesh else self.alone
            return jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=where)

        return jax.tree.map(one, tree)

    def batch(self, method: str, rows: int) -> jaxprune.Batch:
        config, asked = self.config, with_options(method)
        plan = resolve(asked.pop("method"), depth_of(config), **asked)
        whole = padded(config, plan, Sizes(batch=rows, text_tokens=TEXT))
        side = config.tower.tile_size
        tiling = config.tiling(VisualSize(side, side))
        packing = pack_tilings(
            [tiling] * rows, images=rows, tiles=rows, image_tiles=1, slots=tiling.num_tokens
        )
        one = np.full(rows, whole.capacity)
        room = ImageRoom(one, one, np.zeros(rows, int), whole.capacity)
        asked_rows = [Row([[1], [1] * (TEXT - ANSWER - 1)], [i], [1] * ANSWER) for i in range(rows)]
        layout = lay_out(asked_rows, room, batch=rows, sequence=whole.room.slots)
        counts = None
        if plan.decoder is not None:
            counts = self.of_rows(candidates_left(plan.decoder, depth_of(config), layout), 1)
        pixels = np.broadcast_to(np.float32(0), (rows, side, side, 3))
        return jaxprune.Batch(
            layout=self.of_rows(layout.embedded),
            labels=self.of_rows(np.full(layout.embedded.kind.shape, NO_LABEL, np.int32)),
            pixel_values=self.of_rows(pixels),
            packing=self.of_rows(packing),
            questions=None,
            question_parts=None,
            counts=counts,
            method=plan.vision,
            config=config,
            schedule=whole.schedule,
            capacity=whole.capacity,
            images=rows,
            answer_slots=ANSWER,
        )


def told(lowered: Any, target: Target) -> dict[str, Any]:
    began = time.perf_counter()
    made = lowered.compile()
    seconds = time.perf_counter() - began
    sizes = made.memory_analysis()
    program = read_program(made.as_text(), least=2**20)
    output = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    found = {
        "arguments": sizes.argument_size_in_bytes,
        "temporary": sizes.temp_size_in_bytes,
        "needed": sizes.argument_size_in_bytes + output + sizes.temp_size_in_bytes,
        "collectives": dict(program.collectives),
        "compile_seconds": seconds,
    }
    if target.chip.hertz:
        found["estimated_seconds"] = program.cycles / target.chip.hertz
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="of the decoder, for a quick look")
    parser.add_argument("--target", default="v5e:2x4")
    parser.add_argument("--data", type=int, default=1, help="chips along rows")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--train", default="lora")
    parser.add_argument("--method", action="append", help="none and prumerge_plus:keep=144")
    parser.add_argument("--remat", action="append", choices=REMAT)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    target, config = parse_target(options.target), jaxprune.read_config(options.model, "bfloat16")
    if options.layers:
        text = dataclasses.replace(config.text_config, num_hidden_layers=options.layers)
        config = dataclasses.replace(config, text_config=text)
    shapes = Shapes(config, target, options.data)
    methods = options.method or ["none", "prumerge_plus:keep=144"]
    print("| method | remat | program | arguments, GiB | temporary | needed of "
          f"{target.usable / GIB:.1f} | collectives | estimate, s | compiled in, s |")  # fmt: skip
    print("|---|---|---|---:|---:|---:|---|---:|---:|")
    for method, remat in itertools.product(methods, options.remat or REMAT):
        settings = Settings(
            method=method, train=options.train, remat=remat, batch_size=options.rows,
            micro_batch=options.rows,
        )  # fmt: skip
        trainer = Trainer(shapes.params(), settings, updates=1000)
        batch = shapes.batch(method, options.rows)
        for name, lowered in zip(
            ("micro-batch", "update"), trainer.lowered(batch, target.chip.platform), strict=True
        ):
            try:
                found = told(lowered, target)
            except jax.errors.JaxRuntimeError as error:
                print(f"| {method} | {remat} | {name} | {' '.join(str(error).split())[:160]} |")
                continue
            if options.json:
                print(json.dumps({"method": method, "remat": remat, "program": name, **found}))
                continue
            spread = ", ".join(
                f"{number} {kind} ({size / 1e6:.0f} MB)"
                for kind, (number, size) in found["collectives"].items()
            )
            print(
                f"| {method} | {remat} | {name} | {found['arguments'] / GIB:.2f} "
                f"| {found['temporary'] / GIB:.2f} | {found['needed'] / GIB:.2f} | {spread} "
                f"| {found.get('estimated_seconds', 0):.3f} | {found['compile_seconds']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
