"""`jaxprune compile`: what an accelerator's own compiler makes of a request's programs.

Nothing is allocated and no accelerator is needed: the stages are compiled from shapes. What
stands beside the compiler's figures is a bound, of the chip's published peaks: no program is
faster than its FLOPs, nor than reading and writing once what goes in and out.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.devices.hlo import Program, Written, read_program
from jaxprune.devices.mesh import check_mesh, on_mesh, row_sharding, sharding_of
from jaxprune.devices.targets import Target, parse_target, target_mesh, topology_devices
from jaxprune.engine.cost import executed, layer_macs
from jaxprune.engine.footprint import request_bytes
from jaxprune.engine.programs import Padded, Sizes, padded, through_stages
from jaxprune.errors import UserError, check_whole
from jaxprune.methods import Plan, resolve
from jaxprune.models.family import Arrays, ModelConfig
from jaxprune.models.registry import depth_of, family_of
from jaxprune.progress import track

ONE_ROW = Sizes()
STAGES = ("encode", "embed_questions", "count", "select", "embed", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class StageReport:
    """A program. Bytes and seconds are a chip's; of a loop one round is counted.

    Attributes:
        stage: see `engine.stages`.
        compile_seconds: of tracing, lowering and compiling, on this machine.
        argument_bytes, output_bytes, temporary_bytes: as the compiler lays them out; outputs
            that take the place of arguments are not counted.
        bound_seconds: by the chip's peaks; 0 for stages that do little.
        bound_by: "FLOPs" or "bytes".
        estimated_seconds: the compiler's estimate of all fusions, waiting for memory left out;
            None where it makes none.
        copied: arrays as large as a weight or a layer's cache that are only moved.
        written: the largest arrays that are written to memory.
        collectives: of each kind, how many, and of how many bytes.
    """

    stage: str
    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    bound_seconds: float
    bound_by: str
    estimated_seconds: float | None
    copied: tuple[Written, ...]
    written: tuple[Written, ...]
    collectives: Mapping[str, tuple[int, int]]

    @property
    def copied_bytes(self) -> int:
        return sum(one.bytes * one.times for one in self.copied)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A request's programs on a target.

    Attributes:
        target: its name.
        mesh: chips along "data" and "model".
        batch, slots, new_tokens: the padded sizes of the decoder.
        stages: what was compiled.
        weight_bytes: of a chip.
        needed_bytes: of a chip, at the stage that takes the most.
        usable_bytes: of a chip.
        failed: the stage that does not fit, as its compiler says it, or None.
    """

    target: str
    mesh: tuple[int, int]
    batch: int
    slots: int
    new_tokens: int
    stages: tuple[StageReport, ...]
    weight_bytes: int
    needed_bytes: int
    usable_bytes: int
    failed: str | None = None

    @property
    def fits(self) -> bool:
        return self.failed is None and self.needed_bytes <= self.usable_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "fits": self.fits}


def compiled(
    config: ModelConfig,
    target: str | Target,
    method: Any = "none",
    *,
    sizes: Sizes = ONE_ROW,
    data: int = 1,
    only: tuple[str, ...] = STAGES,
    show_progress: bool | None = None,
    **method_options: Any,
) -> Compiled:
    """Compile a request's programs for a target.

    Args:
        config: of the model; `jaxprune.read_config` finds one by a preset's or directory's name.
        target: a chip and a slice of it, see `devices.targets`.
        method, method_options: as for `generate`.
        sizes: of the request.
        data: chips over which rows are spread; weights are spread over the others.
        only: the stages to be compiled. On a mesh, leave none out in front of one that is: what
            it would give is taken to be spread by rows alone.
        show_progress: a bar on stderr; None shows it in a terminal.

    Raises:
        jaxprune.UserError: for an unknown target, a missing compiler, a mesh that the model
            cannot be laid over, or a method that does not fit.
    """
    target = target if isinstance(target, Target) else parse_target(target)
    check_whole("data", data)
    unknown = [name for name in only if name not in STAGES]
    if unknown:
        raise UserError(f"There is no stage {unknown[0]!r}; expected some of {', '.join(STAGES)}.")
    family_of(config)  # refuses what is no config
    plan = resolve(method, depth_of(config), **method_options)
    whole = padded(config, plan, sizes)
    mesh = target_mesh(target, data)
    mesh = None if mesh is None else check_mesh(mesh, config.mesh_splits())
    compiler = _Compiler(config, target, mesh, whole, only, show_progress)
    failed = compiler.run_all(plan, sizes)
    return Compiled(
        target=str(target),
        mesh=(data, target.chips // data),
        batch=whole.batch,
        slots=whole.room.slots,
        new_tokens=whole.new_slots,
        stages=tuple(compiler.reports),
        weight_bytes=compiler.weight_bytes,
        needed_bytes=compiler.weight_bytes + compiler.most_beside,
        usable_bytes=target.usable,
        failed=failed,
    )


def largest_batch(config: ModelConfig, target: str | Target, **options: Any) -> Compiled:
    """The most rows, of the buckets, that fit: found by an estimate, proved by the compiler.

    Args:
        config, target, options: as for `compiled`.

    Raises:
        UserError: as `compiled`; where not even one row fits.
    """
    target = target if isinstance(target, Target) else parse_target(target)
    sizes = options.pop("sizes", ONE_ROW)
    check_whole("data", options.get("data", 1))
    batches = [n for n in sizes.buckets.batch if n % options.get("data", 1) == 0]
    if not batches:
        raise UserError(f"No batch of the buckets can be spread over {options['data']} chips.")
    place = max(sum(_estimated(config, target, sizes, n, options) for n in batches) - 1, 0)
    tried: dict[int, Compiled] = {}

    def fits(place: int) -> bool:
        if place not in tried:
            own = dataclasses.replace(sizes, batch=batches[place])
            tried[place] = compiled(config, target, sizes=own, **options)
        return tried[place].fits

    while place > 0 and not fits(place):
        place -= 1
    while fits(place) and place + 1 < len(batches) and fits(place + 1):
        place += 1
    found = tried[place]
    if not found.fits:
        raise UserError(
            f"Not even {batches[0]} row(s) fit on {target}, whose chips have "
            f"{_gib(target.usable)}: {found.failed or _gib(found.needed_bytes) + ' are needed'}."
        )
    return found


def smallest_slice(config: ModelConfig, target: str | Target, **options: Any) -> Compiled:
    """The fewest chips of a kind, of the slices that are offered, on which a request fits.

    Raises:
        UserError: as `compiled`; where it fits on none.
    """
    target = target if isinstance(target, Target) else parse_target(target)
    sizes, data = options.get("sizes", ONE_ROW), options.get("data", 1)
    tried = []
    for slice_ in target.bigger():
        parts = slice_.chips // data
        splits = {name: n for name, n in config.mesh_splits().items() if n % parts}
        if slice_.chips % data or splits:
            tried.append(f"{slice_} (does not divide the model)")
            continue
        if not _estimated(config, slice_, sizes, sizes.batch, options, spare=1.3):
            tried.append(f"{slice_} (too small)")
            continue
        found = compiled(config, slice_, **options)
        if found.fits:
            return found
        tried.append(f"{slice_} (too small)")
    raise UserError(
        f"The request fits on no slice of {target.name}; tried {', '.join(tried)}. Use fewer rows, "
        "another chip, or bfloat16."
    )


def _estimated(
    config: ModelConfig,
    target: Target,
    sizes: Sizes,
    batch: int,
    options: Mapping[str, Any],
    spare: float = 1.0,
) -> bool:
    """Whether a request may fit, by what is known without a compiler."""
    known = ("data", "only", "show_progress", "sizes", "method")
    given = {name: value for name, value in options.items() if name not in known}
    plan = resolve(options.get("method", "none"), depth_of(config), **given)
    whole = padded(config, plan, dataclasses.replace(sizes, batch=batch))
    weights = sum(_bytes(x.shape, x.dtype) for x in flat_shapes(config).values())
    stays, works = request_bytes(
        config,
        batch=whole.batch,
        slots=whole.room.slots,
        schedule=whole.schedule,
        new_slots=whole.new_slots,
    )
    return weights + stays + works <= spare * target.usable * target.chips


class _Compiler:
    """Compiles one stage after the other.

    Args:
        config: of the model.
        target: what for.
        mesh: of its devices, None for one.
        whole: the padded sizes.
        only: stages that are compiled; of the others only the shapes are found out.
        show_progress: of the bar.
    """

    def __init__(
        self,
        config: ModelConfig,
        target: Target,
        mesh: Mesh | None,
        whole: Padded,
        only: tuple[str, ...],
        show_progress: bool | None,
    ) -> None:
        self.config, self.target, self.mesh, self.whole = config, target, mesh, whole
        self.only, self.show_progress = only, show_progress
        self.reports: list[StageReport] = []
        self.most_beside = 0
        self.alone = SingleDeviceSharding(topology_devices(target)[0])
        self.params = self._params()
        self.weight_bytes = sum(map(_shard_bytes, jax.tree.leaves(self.params)))

    def run_all(self, plan: Plan, sizes: Sizes) -> str | None:
        """Every stage; what a compiler says that runs out of memory, or None."""
        bar = iter(track(range(len(self.only)), "Compiling", len(self.only),
                         show=self.show_progress))  # fmt: skip

        def run(name: str, stage: Any, /, *arguments: Any, **static: Any) -> Any:
            found = self._stage(name, stage, arguments, static)
            if name in self.only:
                next(bar, None)
            return found

        try:
            with on_mesh(self.mesh):
                through_stages(self.params, self.config, plan, sizes, self.place, run)
        except jax.errors.JaxRuntimeError as error:
            said = " ".join(str(error).split())
            if "RESOURCE_EXHAUSTED" not in said and "out of memory" not in said:
                raise
            return said[:300]
        finally:
            for _ in bar:  # stages that a method has not
                pass
        return None

    def place(self, tree: Any, axis: int) -> Any:
        """Shapes of a request's arrays, with where they lie."""

        def one(x: Any) -> jax.ShapeDtypeStruct:
            shape, dtype = np.shape(x), x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
            where = row_sharding(shape, self.mesh, axis) if self.mesh else self.alone
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        return jax.tree.map(one, tree)

    def _params(self) -> Arrays:
        rules = family_of(self.config).weights(self.config).partition
        placed = {}
        for path, x in flat_shapes(self.config).items():
            where = sharding_of(path, x.shape, self.mesh, rules) if self.mesh else self.alone
            placed[path] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        params: Arrays = unflatten_dict(placed, sep="/")
        return params

    def _stage(self, name: str, stage: Any, arguments: Any, static: Any) -> Any:
        began = time.perf_counter()
        traced = stage.trace(*arguments, **static)
        if name not in self.only:
            return self.place(traced.out_info, 0)
        lowered = traced.lower(lowering_platforms=(self.target.chip.platform,))
        made = lowered.compile()
        seconds = time.perf_counter() - began
        out = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            traced.out_info,
            made.output_shardings,
        )
        sizes = made.memory_analysis()
        output = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        used = self._used_weights(traced) if arguments and arguments[0] is self.params else 0
        self.most_beside = max(
            self.most_beside,
            sizes.argument_size_in_bytes - used + output + sizes.temp_size_in_bytes,
        )
        program = read_program(made.as_text(), least=2**20)
        bound, bound_by = self._bound(name, sizes.argument_size_in_bytes + output)
        hertz = self.target.chip.hertz
        self.reports.append(
            StageReport(
                stage=name,
                compile_seconds=seconds,
                argument_bytes=sizes.argument_size_in_bytes,
                output_bytes=output,
                temporary_bytes=sizes.temp_size_in_bytes,
                bound_seconds=bound,
                bound_by=bound_by,
                estimated_seconds=program.cycles / hertz if hertz else None,
                copied=self._copied(name, program, arguments),
                written=program.written,
                collectives=program.collectives,
            )
        )
        return out

    def _used_weights(self, traced: Any) -> int:
        """Bytes of the weights that a program takes: those that it does not use are left out."""
        jaxpr = traced.jaxpr.jaxpr
        used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
        used |= {id(v) for v in jaxpr.outvars}
        leaves = jax.tree.leaves(self.params)
        pairs = zip(leaves, jaxpr.invars[: len(leaves)], strict=True)
        return sum(_shard_bytes(leaf) for leaf, variable in pairs if id(variable) in used)

    def _copied(self, name: str, program: Program, arguments: Any) -> tuple[Written, ...]:
        """What is moved that has as many bytes as a weight or, while decoding, as a cache."""
        weights = jax.tree.leaves(self.params)
        sizes = {_shard_bytes(x) for x in weights if len(x.shape) > 1}
        if name == "decode":
            caches = jax.tree.leaves(arguments[1].caches)
            sizes |= {_shard_bytes(x) for x in caches if len(x.shape) > 2}
        return tuple(one for one in program.moved if one.bytes in sizes)

    def _bound(self, name: str, through: int) -> tuple[float, str]:
        """Seconds below which no program of a stage is, and which peak says so."""
        c, chip, whole = self.config.text_config, self.target.chip, self.whole
        head = c.hidden_size * c.vocab_size
        if name == "encode":
            macs = self.config.tower.macs(whole.tiles)
        elif name == "prefill":
            cost = executed(self.config, whole.room.slots, whole.schedule, new_slots=0)
            macs = whole.batch * (cost["macs"] + head)
        elif name == "decode":
            macs = whole.batch * (c.num_hidden_layers * layer_macs(c, 1, 1) + head)
            if not c.tie_word_embeddings:  # of the table a row is read, not all
                table = self.params["language_model"]["embed_tokens"]["embedding"]
                through -= _shard_bytes(table)
        else:
            return 0.0, ""
        by_flops = 2 * macs / chip.flops / self.target.chips
        by_bytes = through / chip.bandwidth
        return max(by_flops, by_bytes), "FLOPs" if by_flops > by_bytes else "bytes"


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * int(np.dtype(dtype).itemsize)


def _shard_bytes(x: Any) -> int:
    """What one chip holds of an array."""
    return _bytes(x.sharding.shard_shape(x.shape), x.dtype)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
