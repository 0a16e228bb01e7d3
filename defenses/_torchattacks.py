"""The adapter of torchattacks: nothing else imports it.

What torchattacks 3.5.1 does that a caller must not meet, and where it is kept in:

* ten steps where the standard runs a hundred (APGD, APGD-T, FAB), and Square's rescaled schedule:
  `_Entry.standard`;
* one training flag saved, none restored after an exception; prints; gradients left on parameters;
  global re-seeding: `attack_scope` outside, `_Victim` inside (a stand-in with nothing to switch);
* step sizes tied to eps = 8/255: `settle` scales them;
* pixels clamped to [0, 1] whatever they are, float32 assumed, `view` on channels-last gradients:
  `_Victim` maps the bounds onto [0, 1] and the dtypes onto float32;
* CW's margin is wrong for negative logits (`_Victim` shifts them), CW cannot move a pixel that
  lies on a bound (refused), DLR needs 3 or 4 classes (refused below).

Not here: the transfer attacks that need three channels or leave the ball, and l1 and l0 attacks.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torchattacks
from torch import Tensor, nn

from defenses.errors import AttackError
from defenses.scope import check_logits, home_of
from defenses.threat import Norm, ThreatModel

__all__ = ["Setting", "check_settings", "names", "run", "settle"]

Setting = bool | int | float | str

# torchattacks' word -> ours, wherever it occurs; everything else keeps its name.
_OURS = {"alpha": "step_size", "n_restarts": "restarts"}
# Filled in by the adapter, so never a setting.
_FILLED = frozenset({"model", "eps", "norm", "seed", "verbose", "n_classes"})
_NORMS: Mapping[Norm, str] = {"linf": "Linf", "l2": "L2"}
# The standard targets the nine likeliest wrong classes, or all there are.
_STANDARD_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One attack under one norm."""

    attack: Callable[..., Any]
    standard: Mapping[str, Setting] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fewest_classes: int = 2
    minimal: bool = False  # searches the shortest change, in whatever ball that is
    shifted: bool = False  # needs logits that are not negative
    inner_pixels: bool = False  # cannot move a pixel that lies on a bound


_APGD = _Entry(attack=torchattacks.APGD, standard={"steps": 100}, choices={"loss": ("ce", "dlr")})
_APGDT = _Entry(attack=torchattacks.APGDT, standard={"steps": 100}, fewest_classes=4)
_FAB = _Entry(attack=torchattacks.FAB, standard={"steps": 100})
_SQUARE = _Entry(
    attack=torchattacks.Square,
    standard={"resc_schedule": False},
    choices={"loss": ("margin", "ce")},
)
_BOTH = {"apgd": _APGD, "apgdt": _APGDT, "fab": _FAB, "square": _SQUARE}
_ENTRIES: Mapping[Norm, Mapping[str, _Entry]] = {
    "linf": _BOTH
    | {
        "bim": _Entry(attack=torchattacks.BIM),
        "eotpgd": _Entry(attack=torchattacks.EOTPGD),
        "ffgsm": _Entry(attack=torchattacks.FFGSM),
        "fgsm": _Entry(attack=torchattacks.FGSM),
        "jitter": _Entry(attack=torchattacks.Jitter, standard={"scale": 10.0}),
        "mifgsm": _Entry(attack=torchattacks.MIFGSM),
        "nifgsm": _Entry(attack=torchattacks.NIFGSM),
        "pgd": _Entry(attack=torchattacks.PGD, standard={"steps": 100}),
        "rfgsm": _Entry(attack=torchattacks.RFGSM),
        "sinifgsm": _Entry(attack=torchattacks.SINIFGSM),
        "spsa": _Entry(attack=torchattacks.SPSA),
        "tpgd": _Entry(attack=torchattacks.TPGD),
        "upgd": _Entry(attack=torchattacks.UPGD, choices={"loss": ("ce", "dlr", "margin")}),
        "vmifgsm": _Entry(attack=torchattacks.VMIFGSM),
        "vnifgsm": _Entry(attack=torchattacks.VNIFGSM),
    },
    "l2": _BOTH
    | {
        "cw": _Entry(
            attack=torchattacks.CW,
            standard={"c": 1.0, "kappa": 0.0},
            minimal=True,
            shifted=True,
            inner_pixels=True,
        ),
        "deepfool": _Entry(attack=torchattacks.DeepFool, minimal=True),
        "pgd": _Entry(attack=torchattacks.PGDL2, standard={"steps": 100}),
    },
}


def names(norm: Norm) -> tuple[str, ...]:
    """The attacks that search a ball of this norm, sorted.

    Example:
        >>> names("l2")
        ('apgd', 'apgdt', 'cw', 'deepfool', 'fab', 'pgd', 'square')
    """
    return tuple(sorted(_ENTRIES[norm]))


def settle(name: str, threat: ThreatModel, given: Mapping[str, Setting]) -> dict[str, Setting]:
    """All settings of an attack: those given, checked, over the standard's and the defaults.

    Raises:
        AttackError: A setting that the attack does not take, or a value of the wrong kind.

    Example:
        >>> settle("pgd", ThreatModel(norm="linf", eps=0.1), {"steps": 10})
        {'step_size': 0.025, 'steps': 10, 'random_start': True}
    """
    entry = _ENTRIES[threat.norm][name]
    defaults = _defaults(entry)
    check_settings(name, given, defaults, entry.choices)
    settled = defaults | dict(given)
    if "step_size" in defaults and "step_size" not in given:
        # 2.5 eps / steps is Madry et al.'s rule; one step after a random start takes 1.25 eps.
        steps = int(settled.get("steps", 2))
        settled["step_size"] = 2.5 * threat.eps / steps
    return settled


def check_settings(
    name: str,
    given: Mapping[str, Setting],
    defaults: Mapping[str, Setting],
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """Refuses settings that are unknown, or of another kind than their default.

    Raises:
        AttackError: Naming the setting.

    Example:
        >>> check_settings("n-fgsm", {"noise": 1.0}, {"noise": 2.0})
    """
    for key, value in given.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise AttackError(f"{name} takes no setting {key!r}; its settings: {known}")
        _check_setting(f"{name}: {key}", value, defaults[key], (choices or {}).get(key, ()))


def run(
    name: str,
    threat: ThreatModel,
    settings: Mapping[str, Setting],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    seed: int,
) -> Tensor:
    """Runs an attack on images in the threat model's bounds, inside an `attack_scope`.

    Returns float32 images, whatever the model computes in.

    Raises:
        AttackError: The model or the images are such that this attack cannot work.

    Example:
        >>> threat = ThreatModel(norm="linf", eps=0.1)
        >>> image, label = torch.tensor([[[[0.5, 0.4]]]]), torch.tensor([0])
        >>> run("fgsm", threat, settle("fgsm", threat, {}), nn.Flatten(), image, label, 0).flatten()
        tensor([0.4000, 0.5000])
    """
    entry = _ENTRIES[threat.norm][name]
    clean = images.float()
    unit = ((clean - threat.bounds[0]) / threat.width).contiguous()
    if entry.inner_pixels:
        _check_inner_pixels(name, unit)
    fewest = 3 if settings.get("loss") == "dlr" else entry.fewest_classes
    victim = _Victim(model, threat, labels, fewest_classes=fewest, shifted=entry.shifted)
    options = _options(entry, threat, settings)
    if "seed" in options:
        options["seed"] = seed
    if "n_classes" in options:
        with torch.no_grad():
            options["n_classes"] = min(victim(unit).shape[1], _STANDARD_CLASSES)
    found: Tensor = entry.attack(victim, **options)(unit, labels)
    adversarial = (threat.bounds[0] + threat.width * found.detach()).clamp(*threat.bounds)
    return threat.project(clean, adversarial) if entry.minimal else adversarial


class _Victim:
    """The model as torchattacks sees it: images in [0, 1], float32, and no modes to switch."""

    training = False

    def __init__(
        self,
        model: nn.Module,
        threat: ThreatModel,
        labels: Tensor,
        *,
        fewest_classes: int,
        shifted: bool,
    ) -> None:
        self._model, self._threat, self._shifted = model, threat, shifted
        self._fewest_classes, self._largest_label = fewest_classes, int(labels.max())
        self._anchor = torch.empty(0, device=labels.device)
        self._checked: set[bool] = set()

    def parameters(self) -> Iterator[Tensor]:
        """One empty tensor, from which torchattacks reads the device."""
        yield self._anchor

    def train(self) -> None:
        """Nothing: the scope keeps the modes."""

    def eval(self) -> None:
        """Nothing: the scope keeps the modes."""

    def __call__(self, unit: Tensor) -> Tensor:
        # Through a flat view, so that the gradient comes back contiguous from a channels-last
        # model: torchattacks calls `view` on it.
        pixels = unit.flatten().view_as(unit)
        if self._threat.bounds != (0.0, 1.0):
            pixels = self._threat.bounds[0] + self._threat.width * pixels
        logits: Tensor = self._model(pixels.to(home_of(self._model, pixels)[1]))
        if pixels.requires_grad not in self._checked:
            self._check(pixels, logits)
            self._checked.add(pixels.requires_grad)
        logits = logits.to(unit.dtype)
        if self._shifted:
            logits = logits - logits.detach().amin(dim=1, keepdim=True)
        return logits

    def _check(self, pixels: Tensor, logits: object) -> None:
        """Refuses, at its first answer, a model that this attack cannot work on."""
        logits = check_logits(
            logits, count=len(pixels), largest_label=self._largest_label, error=AttackError
        )
        if logits.shape[1] < self._fewest_classes:
            raise AttackError(
                f"this attack's loss compares {self._fewest_classes} logits, but the model has "
                f"{logits.shape[1]} classes; use apgd with its cross-entropy loss"
            )
        if pixels.requires_grad and not logits.requires_grad:
            raise AttackError(
                "model: no gradient reaches the images (is part of it detached or under "
                "no_grad?); use an attack that needs none, such as square"
            )


def _parameters(entry: _Entry) -> Mapping[str, inspect.Parameter]:
    """The attack's constructor, by torchattacks' own words."""
    return inspect.signature(entry.attack).parameters


def _defaults(entry: _Entry) -> dict[str, Setting]:
    """Every setting of an attack by our word, with the standard's value or torchattacks'."""
    found: dict[str, Setting] = {
        _OURS.get(key, key): parameter.default
        for key, parameter in _parameters(entry).items()
        if key not in _FILLED
    }
    return found | dict(entry.standard)


def _check_setting(where: str, value: object, like: Setting, choices: tuple[str, ...]) -> None:
    """Refuses a value of another kind than the default, or out of its range."""
    if isinstance(like, bool):
        fits, expected = isinstance(value, bool), "True or False"
    elif isinstance(like, int):
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        expected = "a whole number, at least 1"
    elif isinstance(like, str):
        fits, expected = value in choices, " or ".join(map(repr, choices))
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and 0 <= cast(float, value) < math.inf
        expected = "a finite number, at least 0"
    if not fits:
        raise AttackError(f"{where}: expected {expected}, got {value!r}")


def _options(entry: _Entry, threat: ThreatModel, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The constructor's arguments in torchattacks' words, lengths in widths of the bounds."""
    options: dict[str, Any] = {
        key: settings[_OURS.get(key, key)] if key not in _FILLED else parameter.default
        for key, parameter in _parameters(entry).items()
        if key != "model"
    }
    filled = {"eps": threat.eps / threat.width, "norm": _NORMS[threat.norm], "verbose": False}
    options |= {key: value for key, value in filled.items() if key in options}
    if "alpha" in options:
        options["alpha"] /= threat.width
    return options


def _check_inner_pixels(name: str, unit: Tensor) -> None:
    """Refuses pixels on a bound for an attack whose change of variables cannot move them."""
    stuck = float(((unit < 1e-6) | (unit > 1 - 1e-6)).float().mean())
    if stuck > 0:
        raise AttackError(
            f"{name} cannot move pixels that lie on a bound, and {stuck:.1%} of these do, so it "
            "would report robustness that is not there; use apgd or fab"
        )
