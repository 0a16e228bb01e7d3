"""Methods WITHOUT a guarantee: they change a model, and nothing bounds what it still tells.

Each is a frozen value that is called as `method(model, retain, forget)`: `finetuning`, `neggrad`
(up the loss of who leaves), `ssd` (weights made smaller by their per-example `fisher`
information), `scrub` (away from a teacher), `salun` (random labels on some weights). `heuristic` is
what they have in common, `learner` the model under change, which on any error is what it was. What
one of them reached is measured by `privacy.unlearning.oracle_gap`, never assumed.
"""

from privacy.unlearning.heuristics.finetuning import FineTuning
from privacy.unlearning.heuristics.heuristic import Descent, Heuristic
from privacy.unlearning.heuristics.learner import Change
from privacy.unlearning.heuristics.neggrad import NegGradPlus
from privacy.unlearning.heuristics.salun import SalUn
from privacy.unlearning.heuristics.scrub import SCRUB
from privacy.unlearning.heuristics.ssd import SSD

__all__ = [
    "SCRUB",
    "SSD",
    "Change",
    "Descent",
    "FineTuning",
    "Heuristic",
    "NegGradPlus",
    "SalUn",
]
