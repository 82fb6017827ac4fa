"""How well a model answers under each method, and how sure the difference is.

scoring       what an answer is worth, by the rules that benchmarks publish
statistics    bootstrap intervals of means and of paired differences
data          questions with right answers, from a file or drawn
methods       the methods in whatever form they came, under a name
answers_file  answers on disk, so that an interrupted evaluation goes on
results       from answers to figures
run           every method over every question
plugin        how lmms-eval finds the model that lmms has
"""

from jaxprune.evaluate.data import Item, scene_items
from jaxprune.evaluate.results import Evaluation, Row
from jaxprune.evaluate.run import Task, evaluate, prepare, run

__all__ = ["Evaluation", "Item", "Row", "Task", "evaluate", "prepare", "run", "scene_items"]
