"""An update of a run: micro-batches through the model, and what they sum up to applied.

    begin       a model -> the state before the first update
    accumulate  sums, a micro-batch -> sums                     a program for each shape of batch
    apply       state, sums -> the next state                   one program

As in LLaVA's training, Hugging Face's trainer at the time, the loss is the mean over the answer
tokens of a micro-batch and then the mean over micro-batches. So an update of several equals one of
a single large batch where they have equally many answer tokens, and weighs short answers up where
they have not.

On a mesh the rows of batches are spread over "data", the model lies as `load` lays it, what is
trained lies as that, and the optimiser's state as what is trained.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxprune.devices.mesh import mesh_of, on_mesh
from jaxprune.engine.forward import Batch, on_devices
from jaxprune.errors import check_whole
from jaxprune.model import Params
from jaxprune.models.family import Arrays
from jaxprune.train.objective import Scored, objective, score_trained
from jaxprune.train.optimiser import make_optimiser, peaks, share_of_peak
from jaxprune.train.settings import Settings
from jaxprune.train.trained import WHAT, Trained, check_trainable, init_trained, layout, resting


class State(NamedTuple):
    """A run between two updates.

    Attributes:
        trained: float32, see `trained`.
        optimiser: optax's.
        step: int32, updates so far.
    """

    trained: Trained
    optimiser: Any
    step: Int[Array, ""]


class Sums(NamedTuple):
    """The micro-batches of an update so far, summed up.

    Attributes:
        gradients: float32, of the micro-batches' mean losses; a tree like `State.trained`.
        loss: float32, the sum of these losses.
        scored: the sums of what they were made of.
        number: int32, micro-batches that have answer tokens.
    """

    gradients: Trained
    loss: Float[Array, ""]
    scored: Scored
    number: Int[Array, ""]


class Update(NamedTuple):
    """What an update was like.

    Attributes:
        loss: float32, the mean over micro-batches of the mean over answer tokens, in nats.
        norm: float32, of the gradients before they are clipped.
        learning_rate: float32, of the adapters or the decoder; of the projector where it alone is
            trained.
        scored: of all micro-batches.
        finite: whether loss, gradients and what came of them are numbers. Where not, the state is
            what it was.
    """

    loss: Float[Array, ""]
    norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    scored: Scored
    finite: Bool[Array, ""]


class Trainer:
    """The programs of a run, and the arrays that rest.

    Args:
        params: the model, or its shapes and shardings where programs are only compiled.
        settings: of the run.
        updates: how many it has, for the learning rate.

    Raises:
        UserError: for what cannot be trained.
    """

    def __init__(self, params: Params, settings: Settings, updates: int) -> None:
        check_whole("updates", updates)
        check_trainable(params, settings)
        self.settings, self.updates = settings, updates
        self.mesh, self.rest = mesh_of(params.arrays), resting(params, settings)
        self.optimiser = make_optimiser(settings, updates)
        shapes = jax.eval_shape(self._init, params.arrays)
        self.layout = self._layout(params.arrays, shapes)
        sums = jax.eval_shape(self._nothing, shapes.trained)
        alone = self.layout.step
        sums_layout = jax.tree.map(lambda _: alone, sums)._replace(gradients=self.layout.trained)
        self.state_shapes = jax.tree.map(_placed_shape, shapes, self.layout)
        self.sums_shapes = jax.tree.map(_placed_shape, sums, sums_layout)
        self.init = jax.jit(self._init, out_shardings=self.layout)
        self.nothing = jax.jit(self._nothing, out_shardings=sums_layout)
        self.add = jax.jit(self._add, donate_argnames="sums", out_shardings=sums_layout)
        self.change = jax.jit(
            self._change, donate_argnames="state", out_shardings=(self.layout, alone)
        )
        self.evaluate = jax.jit(self._evaluate)

    # ---- what a run calls

    def begin(self, params: Params) -> State:
        """The state before the first update, on the model's devices; the model stays whole."""
        with on_mesh(self.mesh):
            state: State = self.init(params.arrays)
        return state

    def update(self, state: State, batches: Iterable[Batch]) -> tuple[State, Update]:
        """The state after an update by some micro-batches; it takes the old one.

        Args:
            state: donated once all micro-batches are through.
            batches: what `jaxprune.batch` gives, each of any shape.
        """
        with on_mesh(self.mesh):
            sums = self.nothing(state.trained)
            for batch in batches:
                here = on_devices(batch, self.mesh)
                sums = self.add(self.rest, state.trained, state.step, sums, here)
            changed: tuple[State, Update] = self.change(state, sums)
        return changed

    def score(self, state: State, batch: Batch) -> Scored:
        """A batch's answers scored by what is trained so far, nothing dropped out."""
        with on_mesh(self.mesh):
            scored: Scored = self.evaluate(self.rest, state.trained, on_devices(batch, self.mesh))
        return scored

    def lowered(self, batch: Batch, platform: str | None = None) -> tuple[Any, Any]:
        """The programs of a micro-batch and of an update, to be compiled; nothing is allocated.

        Args:
            batch: arrays, or their shapes with where they lie.
            platform: what for; None: where the parameters are.
        """
        platforms = None if platform is None else (platform,)
        state, sums = self.state_shapes, self.sums_shapes
        with on_mesh(self.mesh):
            add = self.add.trace(self.rest, state.trained, state.step, sums, batch)
            change = self.change.trace(state, sums)
            return add.lower(lowering_platforms=platforms), change.lower(
                lowering_platforms=platforms
            )

    # ---- the programs

    def _init(self, arrays: Arrays) -> State:
        trained = init_trained(arrays, self.settings, jax.random.key(self.settings.seed))
        return State(trained, self.optimiser.init(trained), jnp.zeros((), jnp.int32))

    def _nothing(self, trained: Trained) -> Sums:
        none, number = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        scored = Scored(none, number, number, number)
        return Sums(jax.tree.map(jnp.zeros_like, trained), none, scored, number)

    def _add(self, rest: Params, trained: Trained, step: Array, sums: Sums, batch: Batch) -> Sums:
        key = functools.reduce(jax.random.fold_in, (step, sums.number), self._dropout())
        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, scored), own = gradient(trained, rest, batch, self.settings, key)
        added: Sums = jax.tree.map(
            jnp.add, sums, Sums(own, loss, scored, jnp.int32(scored.tokens > 0))
        )
        return added

    def _change(self, state: State, sums: Sums) -> tuple[State, Update]:
        number = jnp.maximum(sums.number, 1)
        loss, gradients = jax.tree.map(lambda x: x / number, (sums.loss, sums.gradients))
        norm = optax.global_norm(gradients)
        changes, optimiser = self.optimiser.update(gradients, state.optimiser, state.trained)
        moved = State(optax.apply_updates(state.trained, changes), optimiser, state.step + 1)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        finite &= jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(moved.trained)]).all()
        peak = peaks(self.settings)[WHAT[self.settings.train][0]]
        rate = peak * share_of_peak(self.settings, self.updates, state.step)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        return new, Update(loss, norm, rate, sums.scored, finite)

    def _evaluate(self, rest: Params, trained: Trained, batch: Batch) -> Scored:
        return score_trained(trained, rest, batch, self.settings)

    def _dropout(self) -> Array:
        """The key of what is dropped out.

        Of the hardware's generator: threefry's for the inputs of all matrices took a TPU's
        compiler minutes a layer, and by its estimate longer than the matrices' products.
        """
        return jax.random.key(self.settings.seed, impl="rbg")

    def _layout(self, arrays: Arrays, shapes: State) -> Any:
        """Where the arrays of a state lie."""
        alone: Any = getattr(jax.tree.leaves(arrays)[0], "sharding", None)
        if self.mesh is not None:
            alone = NamedSharding(self.mesh, PartitionSpec())
        trained = layout(arrays, self.settings)
        optimiser = optax.tree.map_params(
            self.optimiser,
            lambda _, where: where,
            shapes.optimiser,
            trained,
            transform_non_params=lambda _: alone,
        )
        return State(trained, optimiser, alone)


def _placed_shape(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
