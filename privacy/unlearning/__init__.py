"""How a model forgets: methods with a guarantee, each saying against what it is held, and others.

Certified noisy fine-tuning of anyone's model (`noisy_finetuning`); heads on fixed features whose
rows leave exactly (`ridge`), or by a Newton step within a budget (`newton`); `rows`, what callers
pass in, and who is there. A guarantee is told with its numbers and with what the caller answers
for; where it would not hold, an `UnlearningError` says so, and nothing was changed.

`heuristics` are the methods *without* a guarantee: fine-tuning, NegGrad+, SSD, SCRUB, SalUn. Each
is a frozen value that is called as `method(model, retain, forget)`, fails where the weights did
not move, and leaves the model as it was on any error. `examples` reads who stays and who leaves.

What a method reached is measured, never assumed: accuracies beside those of models really trained
without the people (`oracle`), each person's example by the Gaussian fits of U-LiRA (`lira`), what a
linear `probe` finds in the features, and how soon they are known again (`relearning`); of `models`
that are only asked.

Example:
    Ten people leave a small model; what is released is as if it had been made without them.

    >>> import torch
    >>> images, labels = torch.randn(90, 8), torch.arange(90) % 3  # of who stays
    >>> model = torch.nn.Linear(8, 3)  # was trained on them and on the ten
    >>> plan = NoisyFinetuning(
    ...     initial_norm=1.0, gradient_norm=1.0, learning_rate=0.1, weight_decay=1.0, steps=20
    ... ).calibrate(epsilon=1.0, delta=1e-5)
    >>> def loss(model, images, labels):
    ...     return torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    >>> noisy_finetune(model, [(images, labels)], loss, plan)
    >>> round(plan.mu, 3)
    0.268
"""

from privacy.unlearning.heuristics import (
    SCRUB,
    SSD,
    Change,
    FineTuning,
    Heuristic,
    NegGradPlus,
    SalUn,
)
from privacy.unlearning.lira import UnlearningLiRA, unlearning_lira
from privacy.unlearning.models import margins
from privacy.unlearning.newton import LogisticHead
from privacy.unlearning.noisy_finetuning import Loss, NoisyFinetuning, noisy_finetune
from privacy.unlearning.oracle import Difference, OracleGap, oracle_gap
from privacy.unlearning.probe import features_before_last, linear_probe, probe_gap
from privacy.unlearning.relearning import Relearning, relearning_time
from privacy.unlearning.ridge import RidgeHead

__all__ = [
    "SCRUB",
    "SSD",
    "Change",
    "Difference",
    "FineTuning",
    "Heuristic",
    "LogisticHead",
    "Loss",
    "NegGradPlus",
    "NoisyFinetuning",
    "OracleGap",
    "Relearning",
    "RidgeHead",
    "SalUn",
    "UnlearningLiRA",
    "features_before_last",
    "linear_probe",
    "margins",
    "noisy_finetune",
    "oracle_gap",
    "probe_gap",
    "relearning_time",
    "unlearning_lira",
]
