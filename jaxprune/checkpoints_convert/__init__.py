"""PyTorch checkpoints in, PyTorch checkpoints out, tensor by tensor.

    files.py      what is in a directory: safetensors headers, or `.bin` files through torch
    keys.py       every published spelling of a key -> one spelling
    tables.py     that spelling <-> this library's parameter tree, with the transform
    plan.py       all of a checkpoint checked against the model before a byte of it is read
    load.py       stream onto the devices
    original.py   LLaVA's original format, and what it takes to make it a Hugging Face one
    write.py      stream into a new directory: export, convert, verify

A checkpoint is never in memory as a whole, and never written in part.
"""

from jaxprune.checkpoints_convert.load import load_checkpoint
from jaxprune.checkpoints_convert.plan import Plan, make_plan
from jaxprune.checkpoints_convert.write import ConvertReport, convert, export

__all__ = ["ConvertReport", "Plan", "convert", "export", "load_checkpoint", "make_plan"]
