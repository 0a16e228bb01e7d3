"""Can a robust accuracy be believed? Checks that gradient masking and broken attacks do not pass.

Most of them are from the list of Carlini et al. (2019, arXiv 1902.06705): what must hold where an
attack does its work. A failed check does not say what the robust accuracy is; it says that the
attacks have not measured it. A passed one is no proof.

Counting noise decides: two attacks are compared on the same images by the exact one-sided McNemar
test at 1 % (so an honest model fails one such check in a hundred by chance), a share against a
limit by its 95 % Wilson interval. The limits themselves are choices, beside each check.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from defenses.attacks.autoattack import ensemble
from defenses.checks import consistency, masking, soundness
from defenses.checks.subject import CheckSettings, Subject
from defenses.errors import EvaluationError
from defenses.measuring.images import ImageTensors, MapDataset
from defenses.measuring.measurement import check_question, measured
from defenses.measuring.verdict import Finding, Verdict
from defenses.quantities import described, shown
from defenses.scope import attack_scope
from defenses.threat import ThreatModel

__all__ = ["CheckSettings", "check", "in_order", "judge", "judged_before"]

_CHECKS: Mapping[str, Callable[[Subject], Finding]] = {
    "the outputs are logits": soundness.outputs_are_logits,
    "the model is deterministic": consistency.is_deterministic,
    "the rest of the batch changes nothing": consistency.neighbours_change_nothing,
    "asking for gradients changes nothing": consistency.asking_for_gradients_changes_nothing,
    "what was asked before changes nothing": consistency.earlier_questions_change_nothing,
    "gradients are not zero": soundness.gradients_are_not_zero,
    "a planted vulnerability is found": soundness.planted_is_found,
    "iterative beats single-step": masking.iterative_beats_single_step,
    "a single step is a fair guide": masking.single_step_is_a_fair_guide,
    "twice the steps change little": masking.twice_the_steps_change_little,
    "accuracy falls to zero as eps grows": masking.accuracy_falls,
    "random noise is weaker": masking.noise_is_weaker,
    "black-box does not beat white-box": masking.black_box_does_not_beat_white_box,
    "transfer does not beat white-box": masking.transfer_does_not_beat_white_box,
    "rescaled logits change nothing": masking.rescaled_logits_change_nothing,
    "the standard finds little more": masking.standard_finds_little_more,
}


def check(
    model: nn.Module,
    data: MapDataset | ImageTensors,
    threat: ThreatModel,
    *,
    settings: CheckSettings | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Verdict, ...]:
    """Checks whether what gradient attacks find on this model can be believed.

    Where a check is of attacks, it is of those that `evaluate` runs by default. The model and the
    global random states are left as they were.

    Args:
        model: Takes images in the threat model's bounds, returns logits [n, classes].
        data: As in `evaluate`.
        threat: The ball in which the model is said to be robust.
        settings: How thoroughly; None takes `CheckSettings()`.
        batch_size: Images a forward pass, at least 1.
        seed: Chooses the images and every random start, 0 <= seed < 2**63.
        progress: Show a bar on stderr when that is a terminal.

    Returns:
        A verdict for each check, always the same ones in the same order. One that could not be
        run is `"not checked"` and says why, whatever the model or an attack raised: no check costs
        what the others found. Answers that cannot be used are a failed verdict too.

    Raises:
        ThreatModelError: The images are not in the bounds.
        EvaluationError: The data is empty or not of images and labels.

    Example:
        >>> import torch
        >>> images, labels = torch.rand(32, 1, 2, 2), torch.zeros(32, dtype=torch.int64)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> verdicts = check(model, list(zip(images, labels)), ThreatModel(norm="linf", eps=0.1))
        >>> verdicts[0].name
        'the outputs are logits'
    """
    chosen = CheckSettings() if settings is None else settings
    if not isinstance(chosen, CheckSettings):
        raise EvaluationError(f"settings: expected CheckSettings, got {shown(settings)}")
    check_question(model, threat, batch_size=batch_size, seed=seed)
    about = measured(
        model, data, threat, samples=None, batch_size=batch_size, seed=seed, progress=progress
    )
    with about as measurement:
        attacks, unasked = ensemble(threat, "quick"), consistency.copied(model)
        return tuple(judge(Subject(measurement, chosen, attacks, unasked=unasked)))


def judged_before(values: Sequence[Any]) -> dict[str, Verdict]:
    """The verdicts that an interrupted evaluation had reached, by name, whatever their order."""
    try:
        found = [Verdict.from_dict(each) for each in values]
    except EvaluationError as error:
        raise EvaluationError(f"state: {error}; give another path") from error
    by_name = {verdict.name: verdict for verdict in found}
    if not by_name.keys() <= _CHECKS.keys() or len(by_name) < len(found):
        raise EvaluationError(
            "state: it has other verdicts than these checks give; give another path"
        )
    return by_name


def in_order(verdicts: Mapping[str, Verdict]) -> tuple[Verdict, ...]:
    """Verdicts by name in the order of the checks."""
    return tuple(verdicts[name] for name in _CHECKS if name in verdicts)


def judge(subject: Subject, done: Collection[str] = ()) -> Iterator[Verdict]:
    """Runs the checks in order but for those that are done; what cannot be run says why."""
    missing = {name: run for name, run in _CHECKS.items() if name not in done}
    with attack_scope(subject.model, seed=subject.seed):
        for name, run in missing.items():
            try:
                found = run(subject)
            except Exception as error:  # no check may cost what the others found
                found = Finding.not_checked(f"Could not be run ({described(error)})")
            yield found.named(name)
