"""The adversarial objectives by name: for recipes, command lines and benchmarks."""

from defenses.errors import AttackError
from defenses.quantities import is_word, shown
from defenses.threat import ThreatModel
from defenses.training.adversarial import METHODS, AdversarialTraining, FreeAdversarialTraining
from defenses.training.objective import AdversarialObjective, Precision, check_precision
from defenses.training.trades import Mart, Trades

__all__ = ["OBJECTIVES", "adversarial_objective"]

OBJECTIVES: tuple[str, ...] = (*METHODS, "trades", "mart", "free")
"""Names of the objectives."""


def adversarial_objective(
    name: str,
    threat: ThreatModel,
    *,
    steps: int | None = None,
    seed: int = 0,
    label_smoothing: float = 0.0,
    precision: Precision = "float32",
) -> AdversarialObjective:
    """Makes an objective with its usual settings; nothing runs yet.

    Args:
        name: One of `OBJECTIVES`.
        threat: The ball to train for.
        steps: Gradient steps of the attack, or replays of a batch for `free`; None takes 10, or 8
            replays. Single-step methods take none.
        precision: Of the attack's convolutions. Not of `free`, whose passes are those of training,
            nor of `trades`, whose first step starts where the divergence is all rounding.

    Raises:
        AttackError: An unknown name, or a value that cannot be.

    Example:
        >>> adversarial_objective("trades", ThreatModel(norm="linf", eps=0.1)).settings["steps"]
        10
    """
    if not is_word(name, OBJECTIVES):
        raise AttackError(f"objective: expected one of {', '.join(OBJECTIVES)}; got {shown(name)}")
    if name in METHODS:
        return AdversarialTraining(
            threat,
            name,
            steps=steps,
            seed=seed,
            label_smoothing=label_smoothing,
            precision=precision,
        )
    check_precision(precision)
    if name in ("free", "trades") and precision != "float32":
        raise AttackError(f"precision: {name} takes float32 only, got {precision!r}")
    if name == "free":
        return FreeAdversarialTraining(
            threat,
            replays=8 if steps is None else steps,
            seed=seed,
            label_smoothing=label_smoothing,
        )
    steps = 10 if steps is None else steps
    if name == "trades":
        return Trades(threat, steps=steps, seed=seed, label_smoothing=label_smoothing)
    return Mart(
        threat, steps=steps, seed=seed, label_smoothing=label_smoothing, precision=precision
    )
