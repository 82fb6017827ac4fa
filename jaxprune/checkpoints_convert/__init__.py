"""PyTorch checkpoints in, PyTorch checkpoints out, tensor by tensor.

    files.py      what is in a directory: safetensors headers, or `.bin` files through torch
    plan.py       all of a checkpoint checked against the model before a byte of it is read
    load.py       stream onto the devices
    hub_form.py   a model in its publisher's form, as one that transformers knows
    write.py      stream into a new directory: export, convert, verify
    adapters.py   low-rank adapters, merged into their base while it is read
    adapters_write.py  what was trained here, as such adapters

Which stored tensor is which parameter stands in the `weights.py` of each model's folder. A
checkpoint is never in memory as a whole, and never written in part.
"""

from jaxprune.checkpoints_convert.adapters_write import write_adapter
from jaxprune.checkpoints_convert.load import load_checkpoint
from jaxprune.checkpoints_convert.plan import PlannedTensor, make_plan
from jaxprune.checkpoints_convert.write import ConvertReport, convert, export

__all__ = [
    "ConvertReport",
    "PlannedTensor",
    "convert",
    "export",
    "load_checkpoint",
    "make_plan",
    "write_adapter",
]
