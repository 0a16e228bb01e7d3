"""A certification report whose numbers are known."""

from defenses.smoothing.smoothing import CertificationReport, Smoothing


def report():
    """A report of four images."""
    return CertificationReport(
        smoothing=Smoothing(sigma=0.25, samples=1000),
        classes=2,
        indices=(0, 1, 2, 3),
        labels=(0, 0, 1, 1),
        selected=(0, 0, 1, 0),
        hits=(1000, 900, 700, 1000),
        seed=0,
        images="",
        versions={},
    )
