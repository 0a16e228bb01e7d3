"""The adapter to Opacus' accountants; with `privacy/opacus/` the only importer of Opacus."""

import warnings

from opacus.accountants import PRVAccountant, RDPAccountant

Event = tuple[float, float, int]
"""noise multiplier, sampling rate, number of steps"""


def prv_epsilon(events: list[Event], delta: float) -> float:
    """Epsilon by the PRV accountant (Gopi et al. 2021, arXiv 2106.02848): an upper bound."""
    return _epsilon(PRVAccountant(), events, delta)


def rdp_epsilon(events: list[Event], delta: float) -> float:
    """Epsilon by Rényi DP (Mironov 2017, arXiv 1702.07476): looser than PRV, and never fails."""
    return _epsilon(RDPAccountant(), events, delta)


def _epsilon(accountant: PRVAccountant | RDPAccountant, events: list[Event], delta: float) -> float:
    accountant.history = list(events)
    with warnings.catch_warnings():
        # RDP (which PRV calls too) warns when its best order is the largest one tried; the bound
        # stays valid.
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta=delta))
