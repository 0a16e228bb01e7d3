"""The record of an audit, as the command writes it."""

from secure_cnn.record import AuditRecord


def report_of(**changes):
    """The plain values of a small report."""
    values = {
        "in_scores": [1.0, 1.5, 0.4],
        "out_scores": [0.0, -0.5, 0.2],
        "bounds": [{"method": "gdp", "epsilon": 0.5, "confidence": 0.95}],
        "checks": [
            {"name": "noise", "passed": True, "measured": 1.0, "limit": 1.0, "says": "<i>&"}
        ],
        "claimed_epsilon": 1.0,
        "delta": 1e-5,
        "verdict": "passed: nothing",
        "passed": True,
    }
    return {**values, **changes}


def record_of(**changes):
    """A record of it."""
    return AuditRecord(
        created="2025-01-01", hardware={}, versions={}, settings={}, report=report_of(**changes)
    )
