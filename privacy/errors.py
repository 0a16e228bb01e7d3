"""The errors of `privacy`: every one says which promise could not be kept and what restores it."""

__all__ = [
    "AccountingError",
    "BudgetExceeded",
    "LeakageError",
    "LedgerError",
    "NotFollowed",
    "PlanError",
    "PrivacyError",
    "StepError",
    "UnlearningError",
    "UnsupportedLayer",
]


class PrivacyError(Exception):
    """Every error `privacy` raises on purpose; never raised itself.

    Example:
        >>> issubclass(UnsupportedLayer, PrivacyError)
        True
    """


class PlanError(PrivacyError, ValueError):
    """A plan's values contradict each other, or ask for what cannot be reached.

    Example:
        >>> issubclass(PlanError, ValueError)
        True
    """


class AccountingError(PrivacyError):
    """No accountant can give a bound for these events; there is no epsilon to report.

    Example:
        >>> issubclass(AccountingError, PrivacyError)
        True
    """


class UnsupportedLayer(PrivacyError, ValueError):
    """A layer mixes examples or cannot be recorded; the message gives its dotted name and the cure.

    Example:
        >>> issubclass(UnsupportedLayer, ValueError)
        True
    """


class NotFollowed(UnsupportedLayer):
    """A parameter went where its uses cannot be told apart by example; `layers` own it.

    Example:
        >>> NotFollowed("net: ...", layers=("net",)).layers
        ('net',)
    """

    def __init__(self, message: str, *, layers: tuple[str, ...]) -> None:
        super().__init__(message)
        self.layers = layers


class StepError(PrivacyError, RuntimeError, ValueError):
    """A private step was asked for in a state in which its guarantee would not hold.

    A ValueError too, as Opacus' errors about the same misuse are.

    Example:
        >>> issubclass(StepError, RuntimeError)
        True
    """


class BudgetExceeded(PrivacyError, RuntimeError):
    """The next step would spend more than the plan allows; it was not taken.

    Example:
        >>> issubclass(BudgetExceeded, PrivacyError)
        True
    """


class LedgerError(PrivacyError, RuntimeError):
    """A ledger's file cannot be read or written, or is in use; nothing was spent or released.

    Example:
        >>> issubclass(LedgerError, PrivacyError)
        True
    """


class LeakageError(PrivacyError, ValueError):
    """What a model gives away cannot be told from this; the message says what is missing.

    Example:
        >>> issubclass(LeakageError, ValueError)
        True
    """


class UnlearningError(PrivacyError, ValueError):
    """These people cannot be taken out of this model in this way; nothing was changed.

    Example:
        >>> issubclass(UnlearningError, ValueError)
        True
    """
