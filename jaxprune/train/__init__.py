"""Fine-tuning a model with its visual tokens pruned.

settings     what decides a run
recipes      the settings of papers
data, turns  conversations out of files, and as rows with labels
order, rows  rows as micro-batches, in an order that can be taken up again
prefetch     micro-batches ahead of their turn
lora         adapters around a decoder's matrices
trained      what is trained of a model, and what rests
objective    the loss
optimiser    AdamW, its rates, and clipping
step         an update, compiled
checkpoints  the state on disk
log, work    what is told of a run, and what it costs
stopping     Ctrl-C
run          all of it, from the beginning to the end
"""

from jaxprune.train.data import Conversation, Turn, read_data
from jaxprune.train.recipes import TrainingRecipe, published_recipes, read_recipe
from jaxprune.train.run import Finished, Stopped, train
from jaxprune.train.settings import Settings

__all__ = [
    "Conversation",
    "Finished",
    "Settings",
    "Stopped",
    "TrainingRecipe",
    "Turn",
    "published_recipes",
    "read_data",
    "read_recipe",
    "train",
]
