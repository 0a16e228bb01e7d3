"""The adapter of torchattacks: nothing else imports it.

What torchattacks 3.5.1 does that a caller must not meet, and where it is kept in:

* one step where the standard runs a hundred (SPSA): `_Entry.standard`;
* one training flag saved, none restored after an exception; prints; gradients left on parameters;
  global re-seeding: `attack_scope` outside, `Victim` inside (a stand-in with nothing to switch);
* step sizes tied to eps = 8/255: `_settled` scales them;
* pixels clamped to [0, 1] whatever they are, float32 assumed, `view` on channels-last gradients,
  logits overwritten: `Victim`;
* balls that are not kept (Pixle, SparseFool, noise): `_Entry.minimal` shortens;
* three channels assumed (TI-FGSM, PI-FGSM): the adapter adds some that the model does not see;
* two axes of pixels assumed: recordings and volumes are handed over as images of the same pixels
  (`in_lines`), and refused by what looks at neighbours;
* UPGD's DLR needs 3 or 4 classes, JSMA a target and a table of all pairs of pixels, resizing
  square images: refused below, or the target chosen;
* settings that do nothing (PI-FGSM's momentum) or go wrong (UPGD's margin divides by zero once an
  image is fooled, Pixle's similarity maps are transposed): `_Entry.fixed`, or not a choice.

Not here, but written anew: what training needs fast (PGD and the single steps), what AutoAttack is
made of, CW, whose pixels on a bound never move, EAD, which overwrites the images that it measures
from, DeepFool, which overshoots at each step and not at the end. Of the others
`defenses.attacks.by_name` says why they are refused.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final, get_args

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from defenses.attacks.attack import Attack, Setting, check_setting
from defenses.attacks.oracle import Victim, mean_of, pixels_of, unit_images
from defenses.errors import AttackError
from defenses.shape import in_lines
from defenses.threat import Norm, ThreatModel

__all__ = ["TorchAttack", "names", "setting_names"]

# torchattacks' word -> ours; everything else keeps its name.
_OURS = {"alpha": "step_size", "nb_iter": "steps", "num_iter_set": "steps"}
# Filled in by the adapter, so never a setting.
_FILLED = ("model", "eps", "max_epsilon", "pixels", "gamma", "x_dimensions", "y_dimensions")
# JSMA's table of all pairs: 64 MB at this size.
_MOST_VALUES = 4096


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One attack under one norm."""

    attack: Callable[..., Any]
    standard: Mapping[str, Setting] = field(default_factory=dict)
    fitted: Callable[[ThreatModel], Mapping[str, Setting]] = lambda _: {}  # defaults of a ball
    fixed: Mapping[str, Setting] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lengths: tuple[str, ...] = ()  # beside the step size, in the units of the pixels
    targeted: bool = True
    needs_labels: bool = False  # beside the targets, where there are some
    needs_targets: bool = False
    minimal: bool = False  # changes as much as it likes: shortened into the ball
    three_channels: bool = False
    square: bool = False
    neighbours: bool = False  # it resizes or filters images, or moves pixels in them


class _PIFGSMPP(torchattacks.PIFGSMPP):  # type: ignore[misc]  # the library is untyped
    """PI-FGSM++ with a Gaussian filter for each channel, where it has one row of it repeated."""

    def gaussian_kern(self, kernlen: int = 21, nsig: int = 3) -> Tensor:
        """The Gaussian that was meant, [3, 1, kernlen, kernlen]."""
        rows: Tensor = super().gaussian_kern(kernlen, nsig)
        return rows[:, 0, :, 0].T.expand(3, 1, -1, -1)


def _noise(threat: ThreatModel) -> Mapping[str, Setting]:
    """So much Gaussian noise that it fills the ball; what is longer is shortened."""
    return {"std": threat.eps if threat.norm == "linf" else threat.width}


_GN = _Entry(attack=torchattacks.GN, fitted=_noise, targeted=False, minimal=True)
_PGDRS = _Entry(
    attack=torchattacks.PGDRS,
    standard={"noise_type": "gaussian"},
    fixed={"batch_max": 2**31},
    choices={"noise_type": ("gaussian", "uniform")},
    lengths=("noise_sd",),
)
_ENTRIES: Mapping[Norm, Mapping[str, _Entry]] = {
    "linf": {
        "gn": _GN,
        "bim": _Entry(attack=torchattacks.BIM),
        "difgsm": _Entry(attack=torchattacks.DIFGSM, square=True, neighbours=True),
        "eotpgd": _Entry(attack=torchattacks.EOTPGD),
        "jitter": _Entry(attack=torchattacks.Jitter, standard={"scale": 10.0}, needs_labels=True),
        "mifgsm": _Entry(attack=torchattacks.MIFGSM),
        "nifgsm": _Entry(attack=torchattacks.NIFGSM),
        "pgdrs": _PGDRS,
        "pifgsm": _Entry(
            attack=torchattacks.PIFGSM,
            fixed={"momentum": 1.0, "prob": 0.7},
            three_channels=True,
            neighbours=True,
            targeted=False,
        ),
        "pifgsmpp": _Entry(
            attack=_PIFGSMPP,
            fixed={"momentum": 1.0, "prob": 0.7},
            three_channels=True,
            neighbours=True,
        ),
        "rfgsm": _Entry(attack=torchattacks.RFGSM),
        "sinifgsm": _Entry(attack=torchattacks.SINIFGSM),
        "spsa": _Entry(attack=torchattacks.SPSA, standard={"steps": 100}, lengths=("delta", "lr")),
        "tifgsm": _Entry(
            attack=torchattacks.TIFGSM,
            choices={"kernel_name": ("gaussian", "linear", "uniform")},
            three_channels=True,
            square=True,
            neighbours=True,
        ),
        "tpgd": _Entry(attack=torchattacks.TPGD, targeted=False),
        "upgd": _Entry(
            attack=torchattacks.UPGD, choices={"loss": ("ce", "dlr")}, needs_labels=True
        ),
        "vmifgsm": _Entry(attack=torchattacks.VMIFGSM),
        "vnifgsm": _Entry(attack=torchattacks.VNIFGSM),
    },
    "l2": {"gn": _GN, "pgdrs": replace(_PGDRS, attack=torchattacks.PGDRSL2)},
    "l1": {"gn": _GN},
    "l0": {
        "gn": _GN,
        "jsma": _Entry(
            attack=torchattacks.JSMA, lengths=("theta",), needs_targets=True, minimal=True
        ),
        "onepixel": _Entry(attack=torchattacks.OnePixel, minimal=True),
        "pixle": _Entry(
            attack=torchattacks.Pixle,
            fixed={"pixel_mapping": "random", "update_each_iteration": False},
            fitted=lambda threat: {"restarts": min(20, int(threat.eps))},
            square=True,
            neighbours=True,
            minimal=True,
        ),
        "sparsefool": _Entry(
            attack=torchattacks.SparseFool, standard={"lam": 3.0}, targeted=False, minimal=True
        ),
    },
}


def names(norm: Norm, *, targeted: bool = False) -> tuple[str, ...]:
    """The attacks that search a ball of this norm, sorted; with `targeted`, for a given class."""
    entries = _ENTRIES[norm].items()
    return tuple(sorted(name for name, entry in entries if entry.targeted or not targeted))


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class TorchAttack(Attack):
    """An attack of torchattacks, by its name in this norm.

    Attributes:
        called: The name.
        options: Its settings, given as a mapping and kept as pairs with every default filled in.
    """

    norms: ClassVar[tuple[Norm, ...]] = get_args(Norm)

    called: str = field(repr=False)
    options: Mapping[str, Setting] | tuple[tuple[str, Setting], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        # Constants of the class in an attack of ours.
        object.__setattr__(self, "name", self.called)
        object.__setattr__(self, "targeted", self._entry.targeted)
        super().__post_init__()
        settled = _settled(self.called, self._entry, self.threat, dict(self.options))
        object.__setattr__(self, "options", tuple(settled.items()))

    @property
    def _entry(self) -> _Entry:
        """How this attack is corrected."""
        return _ENTRIES[self.threat.norm][self.called]

    @property
    def settings(self) -> dict[str, Setting]:
        """Every setting by our name, given or by default."""
        return dict(self.options) | ({} if self.draws == 1 else {"draws": self.draws})

    def _shortened(self, factor: float) -> dict[str, Any]:
        held, lengths = dict(self.options), ("step_size", *self._entry.lengths)
        return {"options": held | {k: float(held[k]) * factor for k in lengths if k in held}}

    def check_shape(self, images: Tensor) -> None:
        """Refuses images of a shape that the library's code cannot search."""
        _check_shape(self.called, self._entry, dict(self.options), images, self.threat)

    def _search(
        self, model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> Tensor:
        """Float32 images, whatever the model computes in."""
        threat, entry, settings = self.threat, self._entry, dict(self.options)
        clean = images.float()
        unit = in_lines(unit_images(clean, threat))
        victim = Victim(
            mean_of(model, self.draws),
            threat,
            images=images,
            largest_class=int(torch.stack([labels, labels if targets is None else targets]).max()),
            # DLR compares the third logit, towards a target the fourth.
            fewest_classes=2 if settings.get("loss") != "dlr" else 3 if targets is None else 4,
        )
        if entry.needs_targets and targets is None:
            with torch.no_grad():
                logits = victim(unit)
            targets = logits.scatter(1, labels.unsqueeze(1), -math.inf).argmax(dim=1)
        attack = entry.attack(victim, **_options(entry, threat, settings, unit[0].numel()))
        if targets is not None:
            attack.set_mode_targeted_by_function(lambda *_: targets, quiet=True)
        classes = labels if targets is None or entry.needs_labels else targets
        found = _called(attack, unit, classes, three_channels=entry.three_channels)
        adversarial = pixels_of(found, threat).clamp(*threat.bounds).reshape(clean.shape)
        return threat.project(clean, adversarial) if entry.minimal else adversarial


def setting_names(name: str, threat: ThreatModel) -> tuple[str, ...]:
    """Every setting that an attack takes, in the order of `settings`."""
    return (*_defaults(_ENTRIES[threat.norm][name], threat), "draws")


def _settled(
    name: str, entry: _Entry, threat: ThreatModel, given: Mapping[str, Setting]
) -> dict[str, Setting]:
    """All settings of an attack: those given, checked, over the standard's and the defaults."""
    defaults = _defaults(entry, threat)
    for key, value in given.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise AttackError(f"{name} takes no setting {key!r}; its settings: {known}")
        like = defaults[key]
        kind = entry.choices.get(key, ()) if isinstance(like, str) else type(like)
        check_setting(f"{name}: {key}", value, kind)
    settled = defaults | dict(given)
    if "step_size" in defaults and "step_size" not in given:
        # 2.5 eps / steps is Madry et al.'s rule; one step after a random start takes 1.25 eps.
        settled["step_size"] = 2.5 * threat.eps / int(settled.get("steps", 2))
    return settled


def _called(attack: Any, unit: Tensor, classes: Tensor, *, three_channels: bool) -> Tensor:
    """What an attack of torchattacks finds, in [0, 1]."""
    # Channels that the model does not see: filters of one channel each leave the others alone.
    hidden = 3 - unit.shape[1] if three_channels else 0
    with warnings.catch_warnings():
        # SparseFool hands a tensor to numpy, in a way that numpy 2 only tolerates.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        found: Tensor = attack(F.pad(unit, (0, 0, 0, 0, 0, hidden)), classes)
    return found.detach()[:, : unit.shape[1]]


def _parameters(entry: _Entry) -> Mapping[str, inspect.Parameter]:
    """The attack's constructor, by torchattacks' own words."""
    return inspect.signature(entry.attack).parameters


def _defaults(entry: _Entry, threat: ThreatModel) -> dict[str, Setting]:
    """Every setting of an attack by our word, with the standard's value or torchattacks'."""
    found: dict[str, Setting] = {
        _OURS.get(key, key): parameter.default
        for key, parameter in _parameters(entry).items()
        if key not in _FILLED and key not in entry.fixed
    }
    found |= {key: float(found[key]) * threat.width for key in entry.lengths}
    return found | dict(entry.standard) | dict(entry.fitted(threat))


def _options(
    entry: _Entry, threat: ThreatModel, settings: Mapping[str, Setting], pixels: int
) -> dict[str, Any]:
    """The constructor's arguments in torchattacks' words, lengths in widths of the bounds."""
    options: dict[str, Any] = dict(entry.fixed)
    for ours, value in settings.items():
        length = ours == "step_size" or ours in entry.lengths
        theirs = next(key for key in _parameters(entry) if _OURS.get(key, key) == ours)
        options[theirs] = float(value) / threat.width if length else value
    if options.get("noise_type") == "gaussian":
        options["noise_type"] = "guassian"  # the library's spelling
    pairs, radius = int(threat.eps) // 2, threat.eps / threat.width
    side = (1, max(1, math.isqrt(int(threat.eps) // int(settings.get("restarts", 1)))))
    filled = {
        "eps": radius,
        "max_epsilon": radius,
        "pixels": int(threat.eps),
        "gamma": (2 * pairs - 0.5) / pixels,  # JSMA rounds the number of pairs up
        "x_dimensions": side,
        "y_dimensions": side,
    }
    parameters = _parameters(entry)
    return options | {key: value for key, value in filled.items() if key in parameters}


def _check_shape(
    name: str, entry: _Entry, settings: Mapping[str, Setting], images: Tensor, threat: ThreatModel
) -> None:
    if images.ndim != 4 and entry.neighbours:
        raise AttackError(
            f"{name} needs images [n, channels, height, width], for it resizes or filters them or "
            f"moves their pixels, got {list(images.shape)}; use another {threat.norm} attack"
        )
    channels, height, width = in_lines(images).shape[1:]
    resized = int(width * float(settings.get("resize_rate", 0.5)))
    reasons = {
        f"at most 3 channels, got {channels}": entry.three_channels and channels > 3,
        f"images as high as wide, got {height}x{width}": entry.square and height != width,
        f"resize_rate to give a side of 1 to {width - 1}, got {resized}": (
            "resize_rate" in settings and not 1 <= resized < width
        ),
        f"at most {_MOST_VALUES} values an image, all pairs of which it compares": (
            name == "jsma" and images[0].numel() > _MOST_VALUES
        ),
        "eps of at least 2, since it changes values in pairs": name == "jsma" and threat.eps < 2,
    }
    for expected, wrong in reasons.items():
        if wrong:
            raise AttackError(f"{name} needs {expected}; use another {threat.norm} attack")
