"""An attack is a configured value that turns images into adversarial ones.

`attack(name, threat, ...)` makes one. Most come from torchattacks, through its adapter; N-FGSM,
which torchattacks lacks, is written here. Every call goes through `attack_scope`, and what comes
back is checked against the ball that was promised.

Deliberately not here: targeted attacks, and attacks in other norms than `Norm`'s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses import _torchattacks
from defenses._torchattacks import Setting
from defenses.errors import AttackError
from defenses.scope import attack_scope, check_logits, home_of
from defenses.threat import Norm, ThreatModel

__all__ = ["Attack", "Setting", "attack", "attack_names"]


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Attack:
    """A configured attack; make one with `attack`.

    It holds no model and no state: calling it twice with the same seed, model and batch gives the
    same images.

    Attributes:
        name: As in `attack_names`.
        threat: The ball it searches.
        radius: How far its images may be from the clean ones, in the threat model's norm. This is
            `threat.eps`, but larger for `n-fgsm`, which deliberately leaves the ball in training.
        configuration: Every setting with its value, as pairs.

    Example:
        >>> attack("pgd", ThreatModel(norm="linf", eps=0.1), steps=10)
        Attack('pgd', linf eps=0.1 in [0, 1]; step_size=0.025, steps=10, random_start=True)
    """

    name: str
    threat: ThreatModel
    radius: float
    configuration: tuple[tuple[str, Setting], ...]

    @property
    def settings(self) -> dict[str, Setting]:
        """Every setting of the attack by name: those given and those by default.

        Example:
            >>> attack("apgd", ThreatModel(norm="linf", eps=0.1)).settings["steps"]
            100
        """
        return dict(self.configuration)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, seed: int | None = None
    ) -> Tensor:
        """Searches an adversarial image for each image, leaving the model as it was.

        Args:
            model: Takes images in the threat model's bounds, returns logits [n, classes].
            images: Clean images, floating point, [n, channels, height, width]; n may be 0.
            labels: True classes, int64, [n].
            seed: Repeats the attack's random choices; None draws fresh ones.

        Returns:
            Images on the model's device and in its dtype, [n, channels, height, width], each
            within `radius` of the clean one and inside the bounds, to the float tolerance that
            `ThreatModel.contains` states. An empty batch stays empty.

        Raises:
            ThreatModelError: The images are not in the bounds.
            AttackError: The labels do not fit, the model's logits are unusable, or the attack
                broke its promise.

        Example:
            >>> model = nn.Flatten()  # two pixels, two logits
            >>> images, labels = torch.tensor([[[[0.6, 0.5]]]]), torch.tensor([0])
            >>> attack("fgsm", ThreatModel(norm="linf", eps=0.1))(model, images, labels)
            tensor([[[[0.5000, 0.6000]]]])
        """
        self.threat.check_images(images)
        _check_batch(images, labels)
        device, dtype = home_of(model, images)
        clean, labels = images.detach().to(device=device, dtype=dtype), labels.to(device)
        if len(images) == 0:
            return clean
        with attack_scope(model, seed=seed) as used:
            found = self._search(model, clean, labels, used).detach()
            self._check_promise(clean, found)
        # Another precision rounds differently: what was inside to float32 is moved back inside.
        return found if found.dtype == dtype else self.threat.project(clean, found.to(dtype))

    def __repr__(self) -> str:
        low, high = self.threat.bounds
        threat = f"{self.threat.norm} eps={self.threat.eps:g} in [{low:g}, {high:g}]"
        settings = ", ".join(f"{key}={value!r}" for key, value in self.configuration)
        return f"Attack({self.name!r}, {threat}{'; ' if settings else ''}{settings})"

    def _search(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Runs our own attack of this name, or torchattacks'."""
        if self.name in _OWN:
            return _OWN[self.name].search(self, model, images, labels)
        return _torchattacks.run(self.name, self.threat, self.settings, model, images, labels, seed)

    def _check_promise(self, clean: Tensor, found: Tensor) -> None:
        """Refuses a result outside the ball: a figure made with it would be wrong."""
        radius = min(self.radius, self.threat.width) if self.threat.norm == "linf" else self.radius
        outside = int((~replace(self.threat, eps=radius).contains(clean, found)).sum())
        if outside == 0:
            return
        broken = int((~torch.isfinite(found).flatten(1).all(dim=1)).sum())
        if broken:
            raise AttackError(
                f"{self.name} gave pixels that are not finite for {broken} of {len(clean)} images: "
                "it divided by a gradient that is zero or not finite; pgd and apgd do not"
            )
        raise AttackError(
            f"{self.name} left the ball of radius {radius:g} or the bounds for {outside} of "
            f"{len(clean)} images; this is a fault of the attack, do not use its figures"
        )


def attack(
    name: str,
    threat: ThreatModel,
    *,
    steps: int | None = None,
    step_size: float | None = None,
    restarts: int | None = None,
    **settings: Setting,
) -> Attack:
    """Configures an attack; nothing runs yet.

    What is not given takes the standard's value (PGD, APGD, APGD-T and FAB 100 steps, Square
    5000 queries) or torchattacks' default; step sizes scale with eps (2.5 eps / steps). `cw`
    and `deepfool` look for the shortest change: theirs is shortened to eps where it is longer.

    Args:
        name: One of `attack_names(threat.norm)`: `pgd` (Madry et al. 2018, arXiv 1706.06083),
            `apgd`, `apgdt` (Croce & Hein 2020, arXiv 2003.01690), `ffgsm` (FGSM-RS, Wong et al.
            2020, arXiv 2001.03994), `n-fgsm` (de Jorge et al. 2022, arXiv 2202.01181; settings
            `noise`, in multiples of eps, and `step_size`), ...
        threat: The ball to search.
        steps: Gradient steps, at least 1.
        step_size: Length of a step, in the units of the pixels.
        restarts: Random restarts, for the attacks that have them.
        **settings: Further settings by torchattacks' names, such as `random_start`; each is
            checked against what the attack takes.

    Raises:
        AttackError: No such attack in this norm, no such setting, or a value that cannot be.

    Example:
        >>> attack("pgd", ThreatModel(norm="linf", eps=0.1), momentum=0.9)
        Traceback (most recent call last):
        ...
        defenses.errors.AttackError: pgd takes no setting 'momentum'; its settings: ...
    """
    if name not in attack_names(threat.norm):
        known = ", ".join(attack_names(threat.norm))
        raise AttackError(f"no {threat.norm} attack is called {name!r}; there are: {known}")
    named = {"steps": steps, "step_size": step_size, "restarts": restarts}
    given = {key: value for key, value in named.items() if value is not None} | settings
    if name in _OWN:
        settled, radius = _OWN[name].settle(threat, given)
    else:
        settled, radius = _torchattacks.settle(name, threat, given), threat.eps
    return Attack(name=name, threat=threat, radius=radius, configuration=tuple(settled.items()))


def attack_names(norm: Norm) -> tuple[str, ...]:
    """The attacks there are for a norm, sorted.

    Example:
        >>> "n-fgsm" in attack_names("linf"), "n-fgsm" in attack_names("l2")
        (True, False)
    """
    own = [name for name, entry in _OWN.items() if entry.norm == norm]
    return tuple(sorted([*_torchattacks.names(norm), *own]))


def _check_batch(images: Tensor, labels: Tensor) -> None:
    """Refuses images that are not [n, c, h, w], and labels that are not n classes."""
    if images.ndim != 4:
        raise AttackError(
            f"images: expected [n, channels, height, width], got {list(images.shape)}"
        )
    if not isinstance(labels, Tensor):
        raise AttackError(f"labels: expected an int64 tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise AttackError(
            f"labels: expected int64 of shape [{len(images)}], "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    if len(labels) and int(labels.min()) < 0:
        raise AttackError(f"labels: expected 0 or more, got {int(labels.min())}")


@dataclass(frozen=True, kw_only=True)
class _Own:
    """An attack written here."""

    norm: Norm
    settle: Callable[[ThreatModel, Mapping[str, Setting]], tuple[dict[str, Setting], float]]
    search: Callable[[Attack, nn.Module, Tensor, Tensor], Tensor]


def _settle_n_fgsm(
    threat: ThreatModel, given: Mapping[str, Setting]
) -> tuple[dict[str, Setting], float]:
    """N-FGSM's settings and how far it reaches: noise and step are never clipped to the ball."""
    settled: dict[str, Setting] = {"noise": 2.0, "step_size": threat.eps}
    _torchattacks.check_settings("n-fgsm", given, settled)
    settled |= given
    return settled, float(settled["noise"]) * threat.eps + float(settled["step_size"])


def _search_n_fgsm(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """One signed step from a point with strong uniform noise, clipped to the bounds only."""
    settings, bounds = attack.settings, attack.threat.bounds
    reach = float(settings["noise"]) * attack.threat.eps
    start = (images + torch.empty_like(images).uniform_(-reach, reach)).clamp(*bounds)
    logits = check_logits(
        model(start.requires_grad_()),
        count=len(images),
        largest_label=int(labels.max()),
        error=AttackError,
    )
    if not logits.requires_grad:
        raise AttackError("model: no gradient reaches the images; is part of it detached?")
    loss = F.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, start)
    return (start.detach() + float(settings["step_size"]) * gradient.sign()).clamp(*bounds)


_OWN: Mapping[str, _Own] = {
    "n-fgsm": _Own(norm="linf", settle=_settle_n_fgsm, search=_search_n_fgsm)
}
