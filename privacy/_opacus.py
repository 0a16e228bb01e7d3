"""The adapter to Opacus' accountants; with `privacy/opacus/` the only importer of Opacus."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis import rdp as _rdp

Event = tuple[float, float, int]
"""noise multiplier, sampling rate, number of steps"""
_PRV_ERROR, _PRV_SHARE = 0.01, 1 / 1000
"""Of epsilon, and of delta as a share of it: what the PRV accountant allows itself by default."""


def prv_epsilon(events: list[Event], delta: float) -> float:
    """Epsilon by the PRV accountant (Gopi et al. 2021, arXiv 2106.02848): an upper bound."""
    return _epsilon(PRVAccountant(), events, delta)


def rdp_epsilon(events: list[Event], delta: float) -> float:
    """Epsilon by Rényi DP (Mironov 2017, arXiv 1702.07476): looser than PRV, and never fails."""
    return _epsilon(RDPAccountant(), events, delta)


def prv_epsilons(events: list[Event], deltas: Sequence[float]) -> list[float]:
    """As `prv_epsilon` at each of several deltas, of steps that are composed once.

    They are composed for the smallest delta, whose error is below what each other one allows, so
    that all are upper bounds; that one's is the same number as alone.
    """
    accountant = PRVAccountant()
    accountant.history = list(events)
    with _quiet():
        composed = accountant._get_dprv(eps_error=_PRV_ERROR, delta_error=min(deltas) * _PRV_SHARE)
        return [
            float(composed.compute_epsilon(delta, delta * _PRV_SHARE, _PRV_ERROR)[2])
            for delta in deltas
        ]


def rdp_epsilons(events: list[Event], deltas: Sequence[float]) -> list[float]:
    """As `rdp_epsilon` at each of several deltas, of divergences that are computed once."""
    orders = RDPAccountant.DEFAULT_ALPHAS
    with _quiet():
        divergences = sum(
            _rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
            for noise, rate, steps in events
        )
        return [
            float(_rdp.get_privacy_spent(orders=orders, rdp=divergences, delta=delta)[0])
            for delta in deltas
        ]


def _epsilon(accountant: PRVAccountant | RDPAccountant, events: list[Event], delta: float) -> float:
    accountant.history = list(events)
    with _quiet():
        return float(accountant.get_epsilon(delta=delta))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # RDP (which PRV calls too) warns when its best order is the largest one tried; the bound
        # stays valid.
        warnings.simplefilter("ignore", UserWarning)
        yield
