"""Attacks: each a frozen value that is called as `(model, images, labels) -> images`.

Example:
    >>> import torch
    >>> from defenses import ThreatModel
    >>> attack = PGD(ThreatModel(norm="linf", eps=0.1), steps=10)
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> attack(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])).shape
    torch.Size([3, 1, 2, 2])
"""

from defenses.attacks.apgd import APGD, APGDT
from defenses.attacks.boundary import FAB, DeepFool, UntargetedFAB
from defenses.attacks.pgd import FFGSM, FGSM, NFGSM, PGD
from defenses.attacks.shortest import CW, EADEN, EADL1
from defenses.attacks.square import Square

__all__ = [
    "APGD",
    "APGDT",
    "CW",
    "EADEN",
    "EADL1",
    "FAB",
    "FFGSM",
    "FGSM",
    "NFGSM",
    "PGD",
    "DeepFool",
    "Square",
    "UntargetedFAB",
]
