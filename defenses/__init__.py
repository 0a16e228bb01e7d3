"""Attack and defend image classifiers: adversarial examples, training on them, and evaluation.

Works alone, in anyone's training loop: any `torch.nn.Module` that takes images within bounds and
returns logits, any data set. Every attack touches the model through one door (`attack_scope`),
which puts back all that it borrowed, so an attack may stand next to a private update.

Example:
    >>> import torch
    >>> threat = ThreatModel(norm="linf", eps=0.1)
    >>> objective = AdversarialTraining(threat, method="n-fgsm")
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> images, labels = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    >>> objective(model, images, labels).mean().backward()
"""

from defenses.attacks import Attack, attack, attack_names
from defenses.errors import AttackError, DefenseError, EvaluationError, ThreatModelError
from defenses.evaluation import evaluate
from defenses.report import AdversarialExamples, RobustnessReport, wilson_interval
from defenses.scope import attack_scope
from defenses.threat import ThreatModel
from defenses.training import AdversarialTraining

__all__ = [
    "AdversarialExamples",
    "AdversarialTraining",
    "Attack",
    "AttackError",
    "DefenseError",
    "EvaluationError",
    "RobustnessReport",
    "ThreatModel",
    "ThreatModelError",
    "attack",
    "attack_names",
    "attack_scope",
    "evaluate",
    "wilson_interval",
]
