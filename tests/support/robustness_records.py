"""The record of an evaluation, as the command writes it."""

from secure_cnn.record import RobustnessRecord


def record_of(**changes):
    """A record with made-up figures and names that must be escaped."""
    interval = [0.2, 0.8]
    summary = {
        "samples": 4,
        "clean_accuracy": 0.75,
        "clean_interval": interval,
        "attack_accuracy": {"<pgd>": 0.5},
        "attack_intervals": {"<pgd>": interval},
        "individual_accuracy": {"<pgd>": None},
        "tried": {"<pgd>": 3},
        "fooled": {"<pgd>": 1},
        "worst_case_accuracy": 0.5,
        "worst_case_interval": interval,
        "clean_macro_recall": 0.75,
        "worst_case_macro_recall": 0.5,
        "clean_recall": [1.0, 0.5, None],
        "worst_case_recall": [0.5, 0.5, None],
    }
    curve = [
        {"eps": eps, "accuracy": share, "interval": interval, "correct": 1, "samples": 4}
        for eps, share in ((0.0, 0.75), (0.1, 0.5), (1.0, 0.0))
    ]
    verdict = {"name": "x", "outcome": "fail", "figure": None, "sentence": "<i>", "curve": curve}
    report = {
        "threat": {"norm": "linf", "eps": 0.1, "bounds": [0.0, 1.0]},
        "outcomes": {"<pgd>": "10-1"},
        "settings": {"<pgd>": {"steps": 3}},
        "seed": 0,
        "images": "0123456789abcdef0",
        "versions": {"torch": "2"},
        "verdicts": [verdict],
        "summary": summary,
    }
    return RobustnessRecord(
        created="2025-01-01",
        hardware={},
        versions={},
        model="<b>",
        data="digits",
        classes=("a", "b", "<c>"),
        report={**report, **changes},
    )
