"""The trainings that an audit watches: with the plan's noise, with hardly any, for its samples."""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from privacy.audit.canaries import Canaries, CanaryDataset, Diverged, PlainGradients
from privacy.audit.contributions import MISMATCH, mismatch
from privacy.audit.noise import kept_coordinates
from privacy.audit.observer import Objective, Observation, Observer
from privacy.audit.release import Release, Settings
from privacy.audit.report import AuditSettings
from privacy.audit.sampling import Samples
from privacy.errors import PlanError, StepError
from privacy.objectives import ExamplesMix, keeps_apart
from privacy.persons import Persons
from privacy.plan import DPPlan
from privacy.sampling import MapStyle
from privacy.validate import check_module

__all__ = ["AuditedTraining", "MakeTraining", "Watched", "half", "watch", "watch_quietly"]
__all__ += ["watch_samples"]

_QUIET = 1e-4
"""Noise multiplier of the steps in which the sum itself is looked at."""
_OVERSIZE = (10.0,)
_QUIET_OVERSIZE = (10.0, 1.5, 100.0, 1000.0, 3.0)
"""Norms of the canaries' own gradients, in clipping norms, taken in turn. In quiet steps they are
up to 1000: a contribution that escapes clipping is seen at once there, and that step is the last
one, so that the training cannot diverge."""
_SMALLEST_BATCH = 16
"""Expected rows of a sample, at least: with this many an empty sample practically never comes. It
would look like one with the first example in it."""
_MOST_ROWS = 2048
"""Most rows of which every two are compared."""
_ASKED = (5, 12)
"""Numbers of examples on which the objective is tried: few, so that each weighs much in a mean, and
more, so that the hardest tenth is not just one."""


class AuditedTraining(Protocol):
    """What can be audited: ours, or anybody's that has these four."""

    @property
    def model(self) -> nn.Module:
        """The model under training."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Steps on the released gradients: their noised sum divided by the plan's batch size."""

    @property
    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Physical batches of Poisson samples, examples first and filling after them."""

    def step(self, losses: Tensor, /) -> bool:
        """Takes the losses of the last batch; True once the optimizer has stepped."""


MakeTraining = Callable[[DPPlan, MapStyle], tuple[AuditedTraining, Objective]]
"""Puts together the training of a plan on a data set, and what it minimises: one loss a row."""


@dataclass(frozen=True)
class Watched:
    """What was seen of one training, at each step; of a residual what is kept.

    Of each parameter tensor its size, its columns (`tensors`) in a residual and the length of its
    rows. Of the release: the largest change that it does not explain, whether the optimizer's steps
    could be `replayed`, and its settings before each. `foreign` counts images in the batches of
    rows that were not read for them, `changed` those that the data set did not give as they are,
    and `mismatches` is, of quiet steps, what is not the definition's sum.
    """

    steps: tuple[Observation, ...]
    samples: Samples
    sizes: tuple[int, ...]
    tensors: tuple[slice, ...]
    rows: tuple[int, ...]
    unexplained: float
    replayed: bool
    settings: tuple[Settings, ...]
    foreign: int
    changed: int
    mismatches: tuple[float, ...] = ()


def half(
    plan: DPPlan, dataset: MapStyle, persons: Persons | None, settings: AuditSettings
) -> tuple[CanaryDataset, DPPlan]:
    """The audited data, and the plan on it: a fair coin for each unit, the plan's noise and C."""
    canaries, units = settings.canaries, len(dataset if persons is None else persons)
    batch_size = min(plan.batch_size, settings.largest_batch, units // 2)
    batch_size = max(batch_size, canaries, _SMALLEST_BATCH)
    if 2 * batch_size > units:
        raise PlanError(
            f"dataset: expected at least {2 * batch_size} {plan.unit}s for {canaries} canaries, "
            f"got {units}; ask for fewer canaries"
        )
    data = _chosen(dataset, persons, 2 * batch_size, settings, canaries=canaries)
    return data, _planned(plan, 2 * batch_size, batch_size, settings)


def watch(
    make_training: MakeTraining, plan: DPPlan, data: CanaryDataset, settings: AuditSettings
) -> Watched:
    """Trains with the plan's noise until its steps are taken or numbers are no longer finite."""
    watching = _Watching(make_training, plan, data, settings, oversize=_OVERSIZE)
    found = []
    with closing(watching.steps()) as steps:
        for step in steps:
            if not bool(step.residual.isfinite().all()):
                break
            kept = step.residual[watching.kept].cpu()
            found.append(replace(step, residual=kept, total=kept[:0]))
    return watching.seen(found)


def watch_quietly(
    make_training: MakeTraining, plan: DPPlan, data: CanaryDataset, settings: AuditSettings
) -> Watched:
    """Trains with hardly any noise, until a step is not what the definition says."""
    quiet = replace(plan, noise_multiplier=_QUIET)
    watching = _Watching(make_training, quiet, data, settings, oversize=_QUIET_OVERSIZE)
    found: list[float] = []
    with closing(watching.steps()) as steps:
        for step in steps:
            residual, total, examples = step.residual, step.total, step.examples
            found.append(mismatch(residual, total, examples=examples, noise_multiplier=_QUIET))
            if not found[-1] <= MISMATCH:
                break
    return replace(watching.seen([]), mismatches=tuple(found))


def watch_samples(
    make_training: MakeTraining,
    plan: DPPlan,
    dataset: MapStyle,
    persons: Persons | None,
    settings: AuditSettings,
) -> tuple[Samples, bool | None]:
    """Trains at about the plan's own sampling rate, and looks at the samples alone.

    Before that the objective is asked whether it keeps examples apart; None where it could not be.
    """
    units = len(dataset if persons is None else persons)
    batch_size = min(_SMALLEST_BATCH, units)
    samples = min(max(round(batch_size / plan.sampling_rate), batch_size), units, _MOST_ROWS)
    data = _chosen(dataset, persons, samples, settings, canaries=0)
    audited = _planned(plan, samples, batch_size, settings)
    training, objective = _made(make_training(audited, data))
    apart = _apart(objective, training.model, data)
    data.read()
    table = []
    read = torch.zeros(samples)
    for images, labels in training.batches:
        read = read + data.counted(data.read())
        if training.step(objective(training.model, images, labels)):
            table.append(read)
            read = torch.zeros(samples)
        if len(table) > audited.steps:
            break
    return _samples(table, audited), apart


def _apart(objective: Objective, model: nn.Module, data: CanaryDataset) -> bool | None:
    """Whether no loss knows other examples; None where the objective could not be asked."""
    asked = []
    for count in _ASKED:
        rows = torch.arange(min(count, len(data)))
        try:
            asked.append(keeps_apart(objective, model, data.batch(rows)))
        except ExamplesMix:
            return False
        except Exception:  # Whatever somebody's objective needs that so few examples have not.
            asked.append(False)
    return True if any(asked) else None


class _Watching:
    """One training under watch; a class because its samples are put together batch by batch."""

    def __init__(
        self,
        make_training: MakeTraining,
        plan: DPPlan,
        data: CanaryDataset,
        settings: AuditSettings,
        *,
        oversize: tuple[float, ...],
    ) -> None:
        self._plan, self._data = plan, data
        self._training, self._objective = _made(make_training(plan, data))
        model = self._training.model
        gradients = PlainGradients(model)
        self.sizes = tuple(shape.numel() for shape in gradients.shapes)
        self.kept, self._tensors = kept_coordinates(list(self.sizes))
        self._rows = tuple(shape[1:].numel() for shape in gradients.shapes)
        self._observer = Observer(
            model,
            self._training.optimizer,
            _canaries(model, data, settings, oversize),
            gradients,
            max_grad_norm=plan.max_grad_norm,
            batch_size=plan.batch_size,
        )
        self._table: list[Tensor] = []
        self._foreign = self._changed = 0
        data.read()

    def steps(self) -> Generator[Observation, None, None]:
        """Trains, and gives what was seen of each step; one more than planned, if it comes.

        A training that diverges ends there, if at least one step was seen.
        """
        read = torch.zeros(self._data.units)
        try:
            for images, labels in self._training.batches:
                rows = self._data.read()
                read = read + self._data.counted(rows)
                foreign, changed = self._data.strangers(images[: len(rows)], rows)
                self._foreign, self._changed = self._foreign + foreign, self._changed + changed
                losses = self._observer.losses(
                    self._objective,
                    images,
                    labels,
                    self._data.numbers(rows),
                    _means(rows, self._data.owners(rows)),
                )
                if self._training.step(losses):
                    self._table.append(read)
                    read = torch.zeros(self._data.units)
                    yield self._observer.observation()
                if len(self._table) > self._plan.steps:
                    return
        except Diverged:
            if not self._table:
                raise
        finally:
            self._observer.close()

    def seen(self, steps: list[Observation]) -> Watched:
        """Everything together."""
        release: Release = self._observer.release
        return Watched(
            steps=tuple(steps),
            samples=_samples(self._table, self._plan),
            sizes=self.sizes,
            tensors=self._tensors,
            rows=self._rows,
            unexplained=release.unexplained,
            replayed=release.replayed,
            settings=tuple(release.settings),
            foreign=self._foreign,
            changed=self._changed,
        )


def _made(made: object) -> tuple[AuditedTraining, Objective]:
    """What was put together, given that it is a training and what it minimises."""
    training: Any
    training, objective = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    # Not its batches: to ask for them may draw some.
    lacks = [name for name in ("model", "optimizer", "step") if not hasattr(training, name)]
    if lacks or not callable(objective):
        raise StepError(
            "make_training: expected a pair of a training with model, optimizer, batches and step, "
            f"and an objective (model, images, labels) -> losses, got {type(made).__name__}"
        )
    check_module(training.model)
    if not isinstance(training.optimizer, torch.optim.Optimizer):
        raise StepError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(training.optimizer).__name__}"
        )
    return training, objective


def _planned(plan: DPPlan, samples: int, batch_size: int, settings: AuditSettings) -> DPPlan:
    return replace(
        plan,
        samples=samples,
        batch_size=batch_size,
        epochs=settings.steps * batch_size / samples,
        delta=None,
        target_epsilon=None,
    )


def _chosen(
    dataset: MapStyle,
    persons: Persons | None,
    samples: int,
    settings: AuditSettings,
    *,
    canaries: int,
) -> CanaryDataset:
    """So many examples, or persons with all of theirs; the canaries have most of them."""
    generator = torch.Generator().manual_seed(settings.seed)
    units = len(dataset if persons is None else persons)
    chosen = torch.randperm(units, generator=generator)
    if persons is None:
        return CanaryDataset(dataset, chosen[:samples], canaries=canaries)
    largest = persons.sizes.argsort(descending=True, stable=True)[:canaries]
    others = chosen[~torch.isin(chosen, largest)][: samples - canaries]
    chosen = torch.cat([others, largest])
    lists = torch.split(persons.rows, persons.sizes.tolist())
    rows = torch.cat([lists[number] for number in chosen.tolist()])
    return CanaryDataset(dataset, rows, canaries=canaries, sizes=persons.sizes[chosen])


def _means(rows: Tensor, owners: Tensor) -> Tensor:
    """What a unit's mean is of: of each row its unit, or -1 where it is in the batch once more."""
    seen: set[int] = set()
    again = torch.zeros(len(rows), dtype=torch.bool)
    for place, row in enumerate(rows.tolist()):
        again[place] = row in seen
        seen.add(row)
    return torch.where(again, -1, owners)


def _samples(table: list[Tensor], plan: DPPlan) -> Samples:
    read = torch.stack(table) if table else torch.zeros(0, plan.samples)
    return Samples(read.double().numpy(), plan.sampling_rate)


def _canaries(
    model: nn.Module, data: CanaryDataset, settings: AuditSettings, oversize: tuple[float, ...]
) -> Canaries:
    device = next(model.parameters()).device
    images = data.canary_images().to(device)
    with torch.no_grad():
        outputs = model(images)
    generator = torch.Generator().manual_seed(settings.seed)
    sizes = torch.tensor(oversize).repeat(-(-len(images) // len(oversize)))[: len(images)]
    return Canaries(images, outputs=outputs[0].numel(), oversize=sizes, generator=generator)
