"""The errors of `defenses`: one per noun that can be at fault.

All are `ValueError`s too, since each reports a value that cannot be used. What a model's own
forward raises is not wrapped: it passes through unchanged, with the model restored.
"""

__all__ = [
    "AttackError",
    "DefenseError",
    "EvaluationError",
    "ObjectiveError",
    "ThreatModelError",
]


class DefenseError(Exception):
    """Every error this package raises on purpose; never raised itself.

    Example:
        >>> issubclass(AttackError, DefenseError)
        True
    """


class ThreatModelError(DefenseError, ValueError):
    """A threat model is not well defined, or images do not lie in its bounds.

    Example:
        >>> issubclass(ThreatModelError, ValueError)
        True
    """


class AttackError(DefenseError, ValueError):
    """An attack is unknown, has a setting it does not take, or cannot work on this model and batch.

    Example:
        >>> issubclass(AttackError, ValueError)
        True
    """


class EvaluationError(DefenseError, ValueError):
    """An evaluation cannot give a figure that means something: model, data or attacks are at fault.

    Example:
        >>> issubclass(EvaluationError, ValueError)
        True
    """


class ObjectiveError(DefenseError, ValueError):
    """A training objective is not what it declares: its losses depend on other examples.

    Example:
        >>> issubclass(ObjectiveError, ValueError)
        True
    """
