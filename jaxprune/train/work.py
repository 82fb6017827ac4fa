"""What an update costs, and what the devices could do meanwhile."""

from jaxprune.engine.cost import executed
from jaxprune.engine.forward import Batch
from jaxprune.train.settings import Settings
from jaxprune.train.trained import DECODER, WHAT


def training_flops(batch: Batch, settings: Settings) -> int:
    """FLOPs of a micro-batch's padded shapes, 2 for a multiply-add.

    The decoder forward, as much again for the gradients of what goes through it, and once more for
    the gradients of its matrices where these are trained; the tower forward. The head, adapters and
    what is computed again for the gradients are not counted.
    """
    rows, slots = batch.layout.kind.shape
    macs = rows * executed(batch.config, slots, batch.schedule, new_slots=0)["macs"]
    passes = 3 if DECODER in WHAT[settings.train] else 2
    tiles = 0 if batch.pixel_values is None else len(batch.pixel_values)
    return 2 * (passes * macs + batch.config.tower.macs(tiles))
