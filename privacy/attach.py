"""`attach`: three lines that make somebody's own training loop private.

What is refused, and how a step is released, is in `privacy.step`.
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from privacy.accounting import epsilon_of
from privacy.batch import Forward, call_model
from privacy.clipping.tuner import Tuner
from privacy.collation import check_collate
from privacy.errors import PlanError, PrivacyError
from privacy.group_privacy import group_epsilon
from privacy.ledger import Ledger
from privacy.loading import Reading, reading_of
from privacy.noise import SecureGenerator
from privacy.padding import check_padding
from privacy.persons import Persons, groups_of, persons_of
from privacy.plan import DPPlan
from privacy.sampling import Collate, MapStyle, PhysicalBatch, PhysicalBatches, read
from privacy.step import prepare
from privacy.training import PrivateTraining

__all__ = ["attach", "cost_of_groups", "group_cost"]

_PROBED_EXAMPLES = 3


def attach(
    plan: DPPlan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: MapStyle | DataLoader[Any],
    *,
    physical_batches: PhysicalBatches | None = None,
    tuner: Tuner | None = None,
    ledger: Ledger | None = None,
    groups: object = None,
    workers: int | None = None,
    prefetch: int | None = None,
    collate_fn: Collate | None = None,
    forward: Forward | None = None,
) -> PrivateTraining:
    """Makes the training of `model` on `dataset` follow `plan`.

    Guarantee: what `private.step` writes to the parameters is (`private.spent(delta)`,
    delta)-differentially private in `dataset` under adding or removing one example (or one person,
    as the plan's `unit` says), given that the losses of a row depend on that row's example only,
    which `PrivateTraining.check_objective` tests, that `groups` are right, and that nothing else of
    the data reaches the model or its user (choosing settings by looking at private losses does).

    Args:
        plan: A plan with its noise, for exactly `len(dataset)` samples; for as many as there are
            persons, where its unit is a person.
        model: Any module with the batch in dimension 0, on one device; its layers' forward is
            replaced until `detach`.
        optimizer: Any optimizer that holds exactly the model's trainable parameters and steps on
            one gradient: not LBFGS, nor another one that calls a closure.
        dataset: A map-style data set of (image, label), or of other examples: tuples, named tuples
            or dictionaries of tensors; see `privacy.sampling.read`. Or a
            `DataLoader` of the plan's batch size, of which data set, `collate_fn`, workers and
            their settings are taken; Poisson sampling chooses in the place of its shuffling, and
            another way of choosing is refused.
        physical_batches: How samples are cut; speed and memory only.
        tuner: Chooses the layers' kernels, or holds a choice made before; speed and memory only.
        ledger: What was spent before, and where it is written down before each release: see
            `Ledger.open`. By default an empty one in memory.
        groups: Whose each example is: one id an example, in the order of the data set, of any type
            that can be hashed. By default the data set's own attribute `groups`, of a `Subset`
            or `ConcatDataset` those of its examples. Equal ids are one person, whom a plan of the
            unit `person` protects; a plan of the unit `example` warns of them, and says what the
            person with the most examples has.
        workers: Processes that read and decode the next physical batches while this one computes,
            at most 1,024; 0, the default, reads in this process, when asked. Which examples they
            read is drawn here, and what nobody steps on costs nothing.
        prefetch: Physical batches that each worker reads ahead, at most 1,024; 2 by default.
        collate_fn: Stacks a list of examples into a batch, in each of whose tensors dimension 0 is
            the example, in their order; torch's `default_collate` by default. It is tried on a few
            examples, and refused where one of them shows in another's row, as mixup's do.
            Where it pads to the longest of a batch, the model is tried on examples of several
            lengths, and refused unless the filling shows neither in outputs nor in gradients (see
            `privacy.padding`). Where the examples tried have one length, all must have it.
        forward: How the loop runs the model on a batch, `(model, batch) -> outputs`, so that it is
            tried as it will be used. By default the last part of an example is its target, and the
            model is given the others: `model(images)` for (image, label), `model(images, table)`
            for (image, table, label) and ((image, table), label), `model(**words)` for (words,
            label) with a dictionary of words. A dictionary that holds the target too needs it.

    Returns:
        The private training.

    Raises:
        PlanError: The plan has no noise, is for another number of samples, costs more than its own
            target, or clips other layers than these; or the data set is none, or cannot be
            read.
        UnsupportedLayer: A layer mixes examples or cannot be recorded; its name and the cure are in
            the message.
        StepError: The optimizer does not hold exactly the trainable parameters or needs more than
            their gradients, they lie on several devices, or the model is attached already, compiled
            or wrapped.
        LedgerError: The ledger's file cannot be made, or was closed.

    Example:
        >>> data = [(torch.rand(4), i % 2) for i in range(64)]
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> plan = DPPlan(samples=64, batch_size=16, epochs=1, noise_multiplier=2.0, delta=1e-3)
        >>> private = attach(plan, model, optimizer, data)
        >>> for images, labels in private.batches:
        ...     logits = private.model(images)
        ...     _ = private.step(nn.functional.cross_entropy(logits, labels, reduction="none"))
        >>> private.steps, private.spent() == plan.epsilon()
        (4, True)
    """
    if not isinstance(plan, DPPlan):
        raise PlanError(f"plan: expected a privacy.DPPlan, got {type(plan).__name__}")
    reading = reading_of(
        dataset,
        batch_size=plan.batch_size,
        workers=workers,
        prefetch=prefetch,
        collate_fn=collate_fn,
    )
    examples = len(reading.dataset)
    _check_settings(physical_batches, tuner, ledger, forward)
    cut = physical_batches or PhysicalBatches()
    persons = _persons(plan, reading.dataset, groups, cut, examples=examples)
    samples = examples if persons is None else len(persons)
    few = partial(_first_examples, reading, examples)
    forward = call_model if forward is None else forward
    prepared = prepare(
        plan, model, optimizer, samples=samples, examples=few, forward=forward, tuner=tuner
    )
    ledger = Ledger() if ledger is None else ledger
    locked = ledger.locked
    try:
        shapes = check_padding(model, reading.dataset, reading.collate, forward=forward)
        reading = replace(reading, shapes=shapes)
        return PrivateTraining(plan, prepared, reading, cut, SecureGenerator(), ledger, persons)
    except BaseException:
        prepared.undo()
        # Who opened a file that was there goes on with it; what was made here is nobody's.
        if not locked:
            ledger.close()
        raise


def _persons(
    plan: DPPlan, dataset: object, groups: object, cut: PhysicalBatches, *, examples: int
) -> Persons | None:
    """The persons whom a plan protects; None where its unit is an example."""
    if plan.unit == "example":
        if cost := cost_of_groups(plan, dataset, groups, examples=examples):
            cure = '; protect persons instead, with DPPlan(unit="person"), whose samples they are'
            warnings.warn(cost + cure, stacklevel=3)
        return None
    most = plan.images_per_person
    if most is not None and cut.size < most:
        raise PlanError(
            f"physical_batches: expected a size of at least {most} rows, the plan's "
            f"images_per_person, got {cut.size}: a person's examples are averaged in one batch"
        )
    return persons_of(dataset, groups, examples=examples)


def cost_of_groups(plan: DPPlan, dataset: object, groups: object, *, examples: int) -> str:
    """`group_cost` by the ids given, else by those of the data set; nothing where ids repeat not.

    An attribute `groups` of a data set that means something else is passed over.

    Raises:
        PlanError: `groups` were given, and are not one id for each example.
    """
    try:
        ids = groups_of(dataset) if groups is None else groups
        return "" if ids is None else group_cost(plan, Persons.of(ids, examples=examples))
    except PlanError:
        if groups is not None:
            raise
        return ""


def group_cost(plan: DPPlan, persons: Persons) -> str:
    """What a plan that protects examples gives to whom several belong, in words; else nothing."""
    if len(persons) == int(persons.sizes.sum()):
        return ""
    several, size = int((persons.sizes > 1).sum()), persons.largest
    delta = 0.1 / plan.samples if plan.delta is None else plan.delta
    event = plan.event()
    return (
        f"groups: {several} of {len(persons)} persons have more than one example, the largest "
        f"group {size}. ε = {epsilon_of([event], delta):.3g} at δ = {delta:.3g} is about one "
        f"example; for a person with {size} it is {group_epsilon([event], delta, size=size):.3g}, "
        "by group privacy"
    )


def _first_examples(reading: Reading, samples: int) -> Any:
    """A few examples to try the model on; a data set that cannot be read is told from the model."""
    indices = torch.arange(min(_PROBED_EXAMPLES, samples))
    try:
        batch = PhysicalBatch(indices, rows=len(indices), last=True)
        examples = read(reading.dataset, batch, reading.collate)
        check_collate(reading.dataset, reading.collate)
        return examples
    except PrivacyError:
        raise
    except Exception as error:
        raise PlanError(
            f"dataset: its examples 0 to {len(indices) - 1} could not be read: "
            f"{type(error).__name__}: {error}; expected examples, (image, label) say, by index"
        ) from error


def _check_settings(
    physical_batches: object, tuner: object, ledger: object, forward: object
) -> None:
    """Refuses what is no setting, before it is used in the middle of a training."""
    if not isinstance(physical_batches, PhysicalBatches | None):
        raise PlanError(
            "physical_batches: expected privacy.PhysicalBatches(size=...), got "
            f"{type(physical_batches).__name__}"
        )
    if not isinstance(tuner, Tuner | None):
        raise PlanError(f"tuner: expected privacy.Tuner(), got {type(tuner).__name__}")
    # A subclass may record less than was spent.
    if ledger is not None and type(ledger) is not Ledger:
        raise PlanError(f"ledger: expected privacy.Ledger(), got {type(ledger).__name__}")
    if forward is not None and not callable(forward):
        raise PlanError(
            f"forward: expected a function (model, batch) -> outputs, got {type(forward).__name__}"
        )
