"""How people leave a run: trainings that prepare for it, and the forgetting itself."""

from secure_cnn.unlearning.certificate import Case, certify
from secure_cnn.unlearning.forgetting import Forgetting, Forgotten, forget
from secure_cnn.unlearning.heads import run_ridge
from secure_cnn.unlearning.methods import HEURISTICS, METHODS
from secure_cnn.unlearning.sharded import Work, run_sharded

__all__ = [
    "HEURISTICS",
    "METHODS",
    "Case",
    "Forgetting",
    "Forgotten",
    "Work",
    "certify",
    "forget",
    "run_ridge",
    "run_sharded",
]
