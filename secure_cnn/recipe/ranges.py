"""What each setting of a recipe must be by itself; what two contradict is in `settings`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from defenses.quantities import is_real, is_whole, is_word
from defenses.training.objective import Precision
from privacy import PlanError
from privacy.accounting import Unit
from secure_cnn.errors import ModelError
from secure_cnn.models import MODELS
from secure_cnn.own_network import are_options, is_own_name

__all__ = [
    "AUTO",
    "CLIPPINGS",
    "ERRORS",
    "RANGES",
    "WORDS",
    "ClippingKind",
    "HeadKind",
    "Norm",
    "Optimizer",
    "Unit",
]

Optimizer = Literal["sgd", "adamw", "muon"]
Norm = Literal["linf", "l2"]
HeadKind = Literal["gradient", "ridge"]
ClippingKind = Literal["flat", "automatic", "per-layer", "adaptive"]

AUTO = "auto"
"""In place of a model's name: the usual one for protections and images."""
CLIPPINGS: tuple[str, ...] = get_args(ClippingKind)
"""Names of the ways to clip, as `privacy` has them."""

_Range = tuple[Callable[[Any], bool], str]


def _among(words: tuple[str, ...]) -> _Range:
    return lambda value: is_word(value, words), " or ".join(words)


def _or_none(limits: _Range) -> _Range:
    fits, expected = limits
    return lambda value: value is None or fits(value), expected


_COUNT: _Range = (lambda n: is_whole(n, least=1), "a whole number >= 1")
_AT_LEAST_1: _Range = (lambda n: is_whole(n, least=1), "at least 1, a whole number")
_SWITCH: _Range = (lambda on: isinstance(on, bool), "True or False")
_SHARE: _Range = (lambda share: is_real(share) and 0 <= share < 1, "a share in [0, 1)")
_BELOW_1: _Range = (lambda part: is_real(part) and 0 <= part < 1, "a number in [0, 1)")
_NOT_NEGATIVE: _Range = (lambda n: is_real(n) and n >= 0, "a number >= 0")
_POSITIVE: _Range = (lambda n: is_real(n) and n > 0, "a number > 0")
_PATTERNS: _Range = (
    lambda given: isinstance(given, tuple | list) and all(isinstance(p, str) and p for p in given),
    "a list of patterns of parameter names, such as head.*",
)
_PATH: _Range = (lambda path: isinstance(path, str | Path), "a text or a Path")

RANGES: Mapping[str, _Range] = {
    "out": _PATH,
    "data": _PATH,
    "model": (
        lambda name: is_word(name, (AUTO, *MODELS)) or is_own_name(name),
        f"{AUTO}, one of {', '.join(MODELS)}, or module:function for one of your own",
    ),
    "model_options": (are_options, "a dict of names and plain values"),
    "weights": _or_none(_PATH),
    **dict.fromkeys(("train_only", "freeze"), _PATTERNS),
    "trials": _or_none(_COUNT),
    **dict.fromkeys(("copies", "shards", "slices"), _COUNT),
    "clipping": _among(CLIPPINGS),
    "head": _among(get_args(HeadKind)),
    "penalty": _or_none(_POSITIVE),
    "unit": _among(get_args(Unit)),
    "images_per_person": _or_none(_COUNT),
    "groups": (lambda of: of is None or _PATH[0](of), "folder, or a path as a text or a Path"),
    **dict.fromkeys(("float_safe", "flip", "guard", "baseline"), _SWITCH),
    "optimizer": _among(get_args(Optimizer)),
    "norm": _among(get_args(Norm)),
    "attack": (lambda name: name is None or isinstance(name, str), "the name of an attack"),
    "attack_precision": _among(get_args(Precision)),
    "attack_noise": _or_none(_NOT_NEGATIVE),
    "gaussian_sigma": (
        # The objective knows its range; a number of another library fits no record.
        lambda sigma: (
            sigma is None or (isinstance(sigma, int | float) and not isinstance(sigma, bool))
        ),
        "a number",
    ),
    "epochs": _AT_LEAST_1,
    "batch_size": _or_none(_AT_LEAST_1),
    "warmup": _SHARE,
    "eps_warmup": _SHARE,
    **dict.fromkeys(("weight_decay", "clip_grad_norm", "checkpoint_minutes"), _NOT_NEGATIVE),
    "label_smoothing": _BELOW_1,
    "average_decay": _BELOW_1,
    "shift": (is_whole, "at least 0 pixels, a whole number"),
    "epsilon": _or_none(_POSITIVE),
    # At most what two examples allow; the plan, which knows how many there are, asks for less.
    "delta": _or_none((lambda d: is_real(d) and 0 < d < 0.5, "a probability below 1 / samples")),
    "max_grad_norm": _POSITIVE,
    "seed": (is_whole, "a whole number, 0 up to 2**63"),
    "robust_samples": _or_none(_AT_LEAST_1),
    "learning_rate": _or_none(_POSITIVE),
    "device": (lambda name: isinstance(name, str), "a name, such as auto, cpu or cuda"),
}
"""What each setting must be by itself, its type first, and how that is said.

The threat model and the attack look at `eps` and `attack_steps`, whatever they are."""

WORDS = ("model", "clipping", "head", "unit", "optimizer", "norm", "attack_precision")
"""Settings that are one of some words: another word is shown without quotes."""

ERRORS: Mapping[str, type[Exception]] = {
    **dict.fromkeys(("model", "model_options"), ModelError),
    **dict.fromkeys(("epsilon", "delta", "max_grad_norm"), PlanError),
}
"""The errors of settings that belong to another room, whose fault a bad one is."""
