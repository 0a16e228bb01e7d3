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

from defenses.attacks.adaptive import custom_attack
from defenses.attacks.attack import Attack
from defenses.attacks.by_name import attack, attack_names
from defenses.checks.checks import CheckSettings, check
from defenses.errors import (
    AttackError,
    DefenseError,
    EvaluationError,
    ObjectiveError,
    ThreatModelError,
)
from defenses.evaluation.comparison import PairedComparison, compare
from defenses.evaluation.evaluation import evaluate, rerun
from defenses.evaluation.report import AdversarialExamples, RobustnessReport
from defenses.lipschitz import LipschitzReport, certify_lipschitz
from defenses.measuring.counting import wilson_interval
from defenses.measuring.verdict import CurvePoint, Verdict
from defenses.poisoning.backdoor import BackdoorReport, ClassFinding, backdoor_scan
from defenses.poisoning.obedience import PoisoningAttack, PoisoningReport, attack_success_rate
from defenses.poisoning.poisoning import (
    Blend,
    LabelFlip,
    PoisonedImages,
    Trigger,
    flip_labels,
    plant_clean_label,
    plant_trigger,
)
from defenses.poisoning.spectral import SpectralReport, spectral_scan
from defenses.scope import attack_scope
from defenses.smoothing.certification import certify
from defenses.smoothing.smoothing import CertificationReport, CertifiedPoint, Smoothing
from defenses.threat import ThreatModel
from defenses.training.adversarial import OBJECTIVES, AdversarialTraining, adversarial_objective
from defenses.training.free import FreeAdversarialTraining, replayed
from defenses.training.objective import AdversarialObjective, GaussianAugmentation
from defenses.training.overfitting import (
    HeldOut,
    OverfittingGuard,
    OverfittingVerdict,
    TrainingImages,
)
from defenses.training.probe import check_per_example
from defenses.training.trades import Mart, Trades

__all__ = [
    "OBJECTIVES",
    "AdversarialExamples",
    "AdversarialObjective",
    "AdversarialTraining",
    "Attack",
    "AttackError",
    "BackdoorReport",
    "Blend",
    "CertificationReport",
    "CertifiedPoint",
    "CheckSettings",
    "ClassFinding",
    "CurvePoint",
    "DefenseError",
    "EvaluationError",
    "FreeAdversarialTraining",
    "GaussianAugmentation",
    "HeldOut",
    "LabelFlip",
    "LipschitzReport",
    "Mart",
    "ObjectiveError",
    "OverfittingGuard",
    "OverfittingVerdict",
    "PairedComparison",
    "PoisonedImages",
    "PoisoningAttack",
    "PoisoningReport",
    "RobustnessReport",
    "Smoothing",
    "SpectralReport",
    "ThreatModel",
    "ThreatModelError",
    "Trades",
    "TrainingImages",
    "Trigger",
    "Verdict",
    "adversarial_objective",
    "attack",
    "attack_names",
    "attack_scope",
    "attack_success_rate",
    "backdoor_scan",
    "certify",
    "certify_lipschitz",
    "check",
    "check_per_example",
    "compare",
    "custom_attack",
    "evaluate",
    "flip_labels",
    "plant_clean_label",
    "plant_trigger",
    "replayed",
    "rerun",
    "spectral_scan",
    "wilson_interval",
]
