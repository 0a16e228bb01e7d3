"""Settings of a recipe that contradict each other, or mean nothing alone.

The functions are of a `Recipe`, which asks them itself.
"""

from collections.abc import Callable
from typing import Any

from defenses import FreeAdversarialTraining
from secure_cnn.models import MODELS
from secure_cnn.recipe import defaults
from secure_cnn.recipe.ranges import AUTO
from secure_cnn.recipe.variant import SINGLE_STEPS

__all__ = ["CLASHES"]

_OF_STEPS = (
    *("weights", "train_only", "freeze", "epochs", "batch_size", "optimizer", "learning_rate"),
    *("clip_grad_norm", "weight_decay", "warmup", "label_smoothing", "average_decay", "shift"),
    *("flip", "epsilon", "max_grad_norm", "copies", "eps", "gaussian_sigma", "guard"),
    *("shards", "slices", "checkpoint_minutes"),
)
"""Settings that mean nothing where the last layer is solved for at once."""


def _alone(name: str, needed: str, cure: str = "give both or neither") -> str:
    return f"{name}: expected {needed} with it, got none; {cure}"


def _unused(name: str) -> tuple[Callable[[Any], bool], str]:
    """A setting of gradient steps, where there are none."""

    def given(recipe: Any) -> bool:
        value, usual = getattr(recipe, name), type(recipe).__dataclass_fields__[name].default
        return recipe.head == "ridge" and value != usual and bool(value or usual)

    return given, (
        f"{name}: expected a last layer that is trained by steps with it, got head=ridge, which "
        "takes none and would ignore it; leave one of the two out"
    )


CLASHES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda r: r.is_sharded and r.epsilon is not None,
        "shards={r.shards}, slices={r.slices}: expected a training without epsilon, got "
        "{r.epsilon:g}: what people can have left in a private model is bounded as it is; leave "
        "one of the two out",
    ),
    (
        lambda r: r.is_sharded and r.guard,
        "guard: expected a training that is not cut into shards or slices, got {r.shards} x "
        "{r.slices}; leave it off",
    ),
    (
        lambda r: bool(r.model_options) and r.model in MODELS,
        "model_options: expected a network of your own, got {r.model}, which takes none",
    ),
    (
        lambda r: r.attack is not None and r.eps is None,
        "attack={r.attack}: expected eps, the size of the perturbation, got none",
    ),
    (lambda r: r.attack_steps is not None and r.eps is None, _alone("attack_steps", "eps")),
    (
        lambda r: r.attack_precision != "float32" and r.eps is None,
        _alone("attack_precision={r.attack_precision}", "eps", "leave it out"),
    ),
    (
        lambda r: r.attack == "free" and r.epsilon is not None,
        f"attack=free: not in a private training: {FreeAdversarialTraining.reason}",
    ),
    (lambda r: bool(r.eps_warmup) and r.eps is None, _alone("eps_warmup", "eps")),
    (
        lambda r: r.attack_noise is not None and r.variant.method != "n-fgsm",
        "attack_noise: expected training with n-fgsm, got {r.variant.name}; leave it out",
    ),
    (
        lambda r: r.gaussian_sigma is not None and r.eps is not None,
        "gaussian_sigma: expected it without eps, got both; noise on top of an attack is neither "
        "N-FGSM nor what is certified, choose one",
    ),
    (
        lambda r: r.guard and r.epsilon is not None,
        "guard: not in a private training: it would decide by private images, which epsilon would "
        "not cover",
    ),
    (
        lambda r: r.guard and not r.variant.single_step,
        f"guard: expected training on single steps ({', '.join(SINGLE_STEPS)}), got "
        "{r.variant.name}; leave it off",
    ),
    (lambda r: r.delta is not None and r.epsilon is None, _alone("delta", "epsilon")),
    (lambda r: r.trials is not None and r.epsilon is None, _alone("trials", "epsilon")),
    (
        lambda r: (
            r.clip_grad_norm != defaults.CLIP_GRAD_NORM and all(each.private for each in r.variants)
        ),
        "clip_grad_norm: expected a training that is not private, got {r.variant.name} alone, of "
        "which max_grad_norm clips each example; leave it out",
    ),
    (
        lambda r: r.clipping != "flat" and r.epsilon is None,
        _alone("clipping={r.clipping}", "epsilon", "leave it out"),
    ),
    (lambda r: r.float_safe and r.epsilon is None, _alone("float_safe", "epsilon", "leave it off")),
    (lambda r: r.unit != "example" and r.epsilon is None, _alone("unit={r.unit}", "epsilon")),
    (
        lambda r: r.images_per_person is not None and r.unit != "person",
        _alone("images_per_person", "unit=person", "protect persons by it, or leave this out"),
    ),
    (
        lambda r: r.copies != 1 and r.epsilon is None,
        _alone("copies={r.copies}", "epsilon", "leave it out"),
    ),
    (
        lambda r: r.copies != 1 and not (r.shift or r.flip or r.variant.method),
        "copies={r.copies}: expected shift, flip, eps or gaussian_sigma with it, got none: copies "
        "that are all alike only take time",
    ),
    (
        lambda r: r.penalty is not None and r.head != "ridge",
        _alone("penalty", "head=ridge", "leave it out"),
    ),
    (
        lambda r: r.head == "ridge" and r.model not in (AUTO, *defaults.PENALTIES),
        f"head=ridge: expected auto, {' or '.join(defaults.PENALTIES)}, whose other layers are "
        "formulas, got {r.model}; choose one of them",
    ),
    *map(_unused, _OF_STEPS),
)
"""Settings that mean nothing without another, or contradict it, and what is then said."""
