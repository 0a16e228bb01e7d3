"""The page of a leakage measurement: who was in the data, images from gradients, copies of a model.

What was not measured is left out, and said to be. A failed control voids the page: its figures are
shown for whoever looks for the fault, and stand in no summary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secure_cnn.pages.canvas import short
from secure_cnn.pages.controls import ControlWords
from secure_cnn.pages.extraction import (
    extraction_fact,
    extraction_figures,
    extraction_table,
    extraction_words,
)
from secure_cnn.pages.inversion import (
    InversionPicture,
    inversion_control,
    inversion_fact,
    inversion_figure,
    inversion_table,
    picture_figure,
)
from secure_cnn.pages.membership import interval, membership_figures
from secure_cnn.pages.template import Fact, fill
from secure_cnn.record import LeakageRecord, wording
from secure_cnn.record.document import write_text
from secure_cnn.record.leakage import MembershipRecord

__all__ = ["MOST_PICTURES", "render_leakage", "write_leakage"]

MOST_PICTURES = 12
"""On one page; with more, the first."""

_MEASURED = {
    "membership": "who was in the data",
    "inversion": "images from gradients",
    "extraction": "copies from answers",
}


def write_leakage(
    record: LeakageRecord, folder: str | Path, pictures: Sequence[InversionPicture] = ()
) -> None:
    """Writes `leakage.json` and the page `leakage.html` into a folder, each atomically.

    The pictures are in the page alone. What is of a private run is for its owner: no ε covers it.
    """
    mode = 0o666 if record.epsilon is None else 0o600
    record.write(Path(folder, "leakage.json"), mode=mode)
    write_text(Path(folder, "leakage.html"), render_leakage(record, pictures), mode=mode)


def render_leakage(record: LeakageRecord, pictures: Sequence[InversionPicture] = ()) -> str:
    """The page of a measurement as text; it needs no network and runs no script."""
    membership = record.membership
    shown = pictures[:MOST_PICTURES]
    values = {
        "record": record,
        "verdict": _verdict(record),
        "failed": not record.passed,
        "facts": _facts(record),
        "missing": [words for name, words in _MEASURED.items() if not getattr(record, name)],
        "controls": ControlWords.of(record),
        "membership": membership_figures(record, membership) if membership else None,
        "inversion": inversion_figure(record.inversion) if record.inversion else "",
        "inversion_control": inversion_control(record.inversion),
        "inversion_table": inversion_table(record.inversion),
        "pictures": [picture_figure(each, number) for number, each in enumerate(shown)],
        "hidden": len(pictures) - len(shown),
        "extraction": extraction_figures(record.extraction, record.accuracy),
        "extraction_table": extraction_table(record.extraction),
        "extraction_words": (
            [*extraction_words(record.extraction), *record.left_out] if record.extraction else []
        ),
        "conditions": _conditions(record),
    }
    return fill("leakage.html.jinja", values)


def _verdict(record: LeakageRecord) -> str:
    """What is to be thought of the whole, in a sentence or two."""
    failed = [each.name for each in record.controls if not each.passed]
    if failed:
        return (
            f"VOID: {len(failed)} of {len(record.controls)} controls failed ("
            f"{', '.join(failed)}), so that no figure of this page counts."
        )
    if record.broken:
        return (
            f"FAILED: attacks find more than ε = {wording.epsilon(record.epsilon)} allows, so that "
            "the training is not what it promises, or that what was attacked is another model."
        )
    if record.membership is None:
        return "Who was in the data was not measured."
    count, strongest = len(record.membership.attacks), record.membership.strongest
    who = "The attack" if count == 1 else f"The strongest of {count} attacks,"
    spread = interval(min(strongest.areas), max(strongest.areas))
    said = (
        f"{who} {strongest.name}{',' if count > 1 else ''} ranks a member of the training data "
        f"above another image with a probability of {wording.fraction(strongest.areas[0])} "
        f"({spread} over {len(strongest.areas)} models), where a guess has 0.5."
    )
    if count > 1:
        said += " It is the strongest on this very model, which flatters it."
    if record.epsilon is None:
        return said
    return f"{said} Nothing was found that ε = {wording.epsilon(record.epsilon)} rules out."


def _facts(record: LeakageRecord) -> list[Fact]:
    promised = "none" if record.epsilon is None else wording.epsilon(record.epsilon)
    detail = "nothing was promised of this training"
    if record.delta is not None:
        detail = f"promised at δ = {wording.delta(record.delta)}; not verified here"
    trained = f"on its own training images {wording.share(record.train_accuracy)}"
    return [
        *_found(record),
        Fact(name="ε", value=promised, detail=detail),
        Fact(name="Accuracy", value=wording.share(record.accuracy), detail=trained),
    ]


def _found(record: LeakageRecord) -> list[Fact]:
    """What was measured; where a control failed it is nothing that may be quoted."""
    if record.void:
        return [Fact(name="Leakage", value="void", detail="a control failed, see below")]
    private = record.epsilon is not None
    return [
        *([] if record.membership is None else _membership_facts(record.membership)),
        *([inversion_fact(record.inversion, private=private)] if record.inversion else []),
        *([extraction_fact(record.extraction)] if record.extraction else []),
    ]


def _membership_facts(membership: MembershipRecord) -> list[Fact]:
    best = membership.strongest
    told = f"by AUC, of {len(membership.attacks)}; {membership.shadows} shadow models"
    spread = f"{interval(min(best.areas), max(best.areas))} over {len(best.areas)} models"
    area = wording.fraction(best.areas[0])
    facts = [
        Fact(name="Strongest attack", value=best.name, detail=told),
        Fact(name="AUC", value=area, detail=f"{spread}; a guess: 0.5"),
    ]
    rates = [membership.most_found(fpr) for fpr in (0.01, 0.001)]
    for found in rates if any(rates) else [membership.most_found(0.1)]:
        if found is not None:
            attack, rate = found
            whose = ", all models together" if rate.of == "all" else ""
            realised = wording.fraction(rate.realised_fpr)
            detail = (
                f"realised FPR {realised}: a guess finds {realised}; 95% interval "
                f"{interval(rate.tpr_low, rate.tpr_high)}, {attack.name}{whose}"
            )
            value = wording.fraction(rate.tpr)
            facts.append(Fact(name=f"TPR at FPR {rate.fpr:g}", value=value, detail=detail))
    return facts


def _conditions(record: LeakageRecord) -> dict[str, Any]:
    given = {
        "data": record.data,
        "variant": record.variant,
        "run": record.run or "not known",
        "recipe of all models": short(record.recipe, 17),
    }
    if record.membership is not None:
        given["members of the target"] = f"{record.membership.members:,}"
        given["others"] = f"{record.membership.others:,}"
    return {**given, **record.settings}
