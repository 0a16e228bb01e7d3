"""`run`: does what a recipe says, and leaves a folder with the record, the checkpoint and the page.

The composition root. What the protections cost is measured by whoever asks for it: the command
gives `run` a function of `secure_cnn.bench`, on which this room does not stand.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import privacy
from secure_cnn.checkpoint import (
    Sealing,
    Unlocking,
    check_model,
    check_sealing,
    check_unlocking,
    model_digest,
    write_model,
)
from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.interruption import Stopped, StopRequest, stop_here, stop_on_signals
from secure_cnn.own_network import OwnNetwork
from secure_cnn.printable import Terminal
from secure_cnn.recipe.assembly import assembled, frozen_front
from secure_cnn.recipe.folder import Journal, RunFolder
from secure_cnn.recipe.front import Features, FrozenFront
from secure_cnn.recipe.guard import make_guard
from secure_cnn.recipe.identity import RunIdentity, Start
from secure_cnn.recipe.identity import resume as resume_run
from secure_cnn.recipe.initial import InitialModel, initial_model
from secure_cnn.recipe.new_record import new_record
from secure_cnn.recipe.notes import COPIES_NOTE, notes_on
from secure_cnn.recipe.outcome import MeasureCost, claims_of, cost_of, judge
from secure_cnn.recipe.persons import GROUPED_NOTE, group_cost_of, samples_of
from secure_cnn.recipe.seams import make_device, make_plan
from secure_cnn.recipe.settings import Recipe, images_stay
from secure_cnn.recipe.training import Training
from secure_cnn.recipe.variant import Variant
from secure_cnn.record import EpochRecord, Row, RunRecord

__all__ = ["Run", "run"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has ended.

    Attributes:
        record: What was done and found.
        folder: Where it is.
        model: The trained network in evaluation mode; None when the run was interrupted.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     done = run(Recipe(out=f"{parent}/1", epochs=1))
        >>> done.record.status, done.model(torch.zeros(3, 1, 8, 8)).shape
        ('complete', torch.Size([3, 10]))
    """

    record: RunRecord
    folder: RunFolder
    model: nn.Module | None


def run(
    recipe: Recipe,
    *,
    data: ImageData | None = None,
    network: OwnNetwork | None = None,
    sealing: Sealing | None = None,
    unlocking: Unlocking | None = None,
    resume: bool = False,
    force: bool = False,
    measure_cost: MeasureCost | None = None,
    on_epoch: Callable[[EpochRecord], object] | None = None,
) -> Run:
    """Trains, evaluates, measures, seals and reports.

    Guarantee: everything that can be refused is refused before the first step and before the folder
    is touched. The first Ctrl-C or SIGTERM ends the run as interrupted, with the training saved,
    also while it evaluates and measures; a resumed run gives what the uninterrupted one would have
    given, but for the noise and the samples of a private training, which are fresh by design.
    Noised steps are on record before anything of them can be seen: a run that is resumed from an
    older state has spent what was released, and is refused where that is more than a checkpoint's
    distance. A signed run goes on from states that its signer signed, and no others.

    Args:
        recipe: What to do.
        data: The images, where they are not those that the recipe names; also to resume.
        network: Makes the model where the recipe's is not one of `MODELS`; also to resume. If it
            draws random numbers in training (dropout), a resumed run is another draw.
        sealing: To whom the checkpoints are encrypted and who signs; None leaves them plain.
        unlocking: Opens the sealed checkpoint of the run that is resumed; its `trusted` are the
            signers whose states count, by default the one of `sealing`. And the sealed weights of
            the recipe, which these must have signed where the run is not resumed.
        resume: Go on with the run in the recipe's folder.
        force: Replace a run that is in the recipe's folder.
        measure_cost: Times the protections' steps once the training is done, for the record:
            `secure_cnn.bench.step_costs`; None measures nothing.
        on_epoch: Called with each epoch's record, once it is written down and the training is
            saved; a resumed run calls it for the epochs that are left. What it raises ends the run
            as interrupted, to be resumed, and is raised again.

    Returns:
        The run; look at its record's status.

    Raises:
        SecureCNNError: The data, the model, the folder or a setting is at fault.
        PrivacyError: The privacy asked for cannot be had.
        DefenseError: The robustness asked for cannot be had.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     done = run(Recipe(out=f"{parent}/1", epochs=1))
        ...     done.record.status, done.folder.page.is_file(), done.folder.model.is_file()
        ('complete', True, True)
    """
    _check_call(recipe, data, measure_cost, on_epoch, resume=resume, force=force)
    check_sealing(sealing)
    check_unlocking(unlocking)
    # A resumed run starts from the very file that it began with, whoever signed that.
    opening = unlocking and replace(unlocking, trusted=None if resume else unlocking.trusted)
    task = _prepared(recipe, data, network, sealing, opening)
    fresh, folder = _beginning(task), task.folder
    with folder.locked() if resume else folder.begun(force=force):
        start = fresh
        if resume:
            start = resume_run(
                task.recipe, folder, fresh.record, task.data, sealing=sealing, unlocking=unlocking
            )
        journal = Journal(folder, start.record, sealing, on_epoch)
        journal.begin()
        if not resume:
            journal.write()
        with stop_on_signals() as stop:
            try:
                return _carried_out(task, start, journal, stop, measure_cost)
            except Stopped:
                return _interrupted(journal)


def _check_call(
    recipe: object,
    data: object,
    measure_cost: object,
    on_epoch: object,
    *,
    resume: object,
    force: object,
) -> None:
    """Refuses arguments of another kind at once: some would fail after the training only."""
    if not isinstance(recipe, Recipe):
        raise RunError(
            f"recipe: expected a Recipe, got {type(recipe).__name__}; make one by Recipe(...), or "
            "by Recipe.from_dict(settings)"
        )
    if recipe.is_sharded or recipe.head == "ridge":
        other = "run_sharded" if recipe.is_sharded else "run_ridge"
        raise RunError(
            f"shards={recipe.shards}, slices={recipe.slices}, head={recipe.head}: expected one "
            f"training by steps; use secure_cnn.unlearning.{other}, or leave them out"
        )
    if not isinstance(data, ImageData | None):
        raise RunError(
            f"data: expected ImageData or None, got {type(data).__name__}; read them by "
            "secure_cnn.load_data"
        )
    if not (measure_cost is None or callable(measure_cost)):
        raise RunError(
            f"measure_cost: expected a function or None, got {type(measure_cost).__name__}; give "
            "secure_cnn.bench.step_costs"
        )
    if not (on_epoch is None or callable(on_epoch)):
        raise RunError(
            f"on_epoch: expected a function or None, got {type(on_epoch).__name__}; give one that "
            "takes an epoch's record"
        )
    for name, value in (("resume", resume), ("force", force)):
        if not isinstance(value, bool):
            raise RunError(f"{name}: expected True or False, got {type(value).__name__}")


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A run that may begin: everything is loaded, built and checked, and no file was touched."""

    recipe: Recipe
    sealing: Sealing | None
    data: ImageData
    initial: InitialModel
    plan: privacy.DPPlan | None
    device: torch.device
    folder: RunFolder

    def training(self, variant: Variant, identity: RunIdentity) -> Training:
        """The training of one variant, at its first step."""
        recipe = self.recipe
        parts = assembled(
            recipe,
            variant,
            self.initial,
            self.data,
            plan=self.plan,
            device=self.device,
            find_front=lambda: self.front,
        )
        return Training(
            recipe=recipe,
            variant=variant,
            data=self.data,
            model=parts.model,
            trained=parts.trained,
            front=parts.front,
            twin=self.initial.build().to(self.device),
            seams=parts.seams,
            average=parts.average,
            guard=make_guard(recipe, variant, parts.seams, parts.model, parts.average, self.data),
            identity=identity,
            weights=self.initial.digest,
        )

    def timed(self) -> tuple[nn.Module, Split | Features]:
        """What a step of the run trains, new, and what on: features where the front is frozen."""
        model = self.initial.build().to(self.device)
        if not images_stay(self.recipe, self.recipe.variant) or self.front is None:
            return model, self.data.train
        return self.front.put_before(model), self.front.train

    @cached_property
    def front(self) -> FrozenFront | None:
        """The same for all trainings of the run, so that the images go through it once."""
        return frozen_front(self.recipe, self.initial, self.data, self.device)


def _prepared(
    recipe: Recipe,
    data: ImageData | None,
    network: OwnNetwork | None,
    sealing: Sealing | None,
    unlocking: Unlocking | None,
) -> _Task:
    """Loads and checks everything; touches no file."""
    device = make_device(recipe)
    if data is None:
        data = recipe.images()
    recipe = recipe.on(data)
    initial = initial_model(recipe, data, network, unlocking)
    height, width = data.spec.height, data.spec.width
    if recipe.shift >= min(height, width):
        raise RunError(
            f"shift: expected less than the image's {height}x{width}, got {recipe.shift}"
        )
    task = _Task(
        recipe=recipe,
        sealing=sealing,
        data=data,
        initial=initial,
        plan=make_plan(recipe, samples_of(recipe, data)),
        device=device,
        folder=RunFolder(root=Path(recipe.out), sealed=sealing is not None),
    )
    check_model(initial.build(), initial.architecture, data.name, sealing=sealing)
    if initial.architecture.is_own:
        _check_trainable(task)
    return task


def _check_trainable(task: _Task) -> None:
    """Puts every training of the run together; of our own models it is known that one can."""
    identity = RunIdentity.draw(private=task.plan is not None)
    try:
        for variant in task.recipe.variants:
            task.training(variant, identity)
    except privacy.UnsupportedLayer as error:
        mixing = privacy.mixing_layers(task.initial.build())
        if not mixing:
            raise
        name, what = next(iter(mixing.items()))
        others = f", and {len(mixing) - 1} more" if len(mixing) > 1 else ""
        raise privacy.UnsupportedLayer(
            f"{name}: {what.partition(';')[0]}{others}; +group-norm behind --model puts GroupNorm "
            "in the place of BatchNorm, as privacy.fix(model) does in the function that makes it"
        ) from error


def _carried_out(
    task: _Task, start: Start, journal: Journal, stop: StopRequest, measure_cost: MeasureCost | None
) -> Run:
    """All trainings that are left, then what the run leaves: model, costs, record and page."""
    for variant in task.recipe.variants:
        own = variant == task.recipe.variant
        # What was finished before a resume is; but the recipe's own is always judged.
        if not own and variant.name in {result.variant for result in journal.record.results}:
            continue
        training = task.training(variant, start.identity)
        journal.begin_variant(training.chosen)
        if not _trained(training, start, journal, stop):
            return _interrupted(journal)
        model, epsilon = training.judged(), training.epsilon()
        outcome = judge(task.recipe, variant, model, task.data, epsilon, stop)
        notes = notes_on(training, outcome, journal.record.results)
        journal.add_result(outcome.result, outcome.examples, notes=notes)
        if own:
            claims = claims_of(
                task.recipe, training.seams.private, outcome, task.data, start.identity
            )
            claims |= task.initial.claims
            journal.record = replace(journal.record, claims=claims)
        journal.write()
    return _finished(task, model, start.identity, journal, stop, measure_cost)


def _trained(training: Training, start: Start, journal: Journal, stop: StopRequest) -> bool:
    """Trains from the start that is given for this variant; False when it was interrupted."""
    state = start.state
    resumed = state is not None and state["variant"] == training.variant.name
    start_step = training.restore(state) if resumed and state is not None else 0
    private = training.seams.private
    if private is not None and start.uncounted:
        private.ledger.record(private.plan.event(start.uncounted))
    if not resumed or start.uncounted:
        # A place that cannot be written to, or keys that cannot be used, show before any work.
        journal.save(training.state(start_step), training.released)
    complete = training.run(
        start_step=start_step,
        save=journal.save,
        record=journal.add_epoch,
        tell=journal.tell,
        stop=stop,
    )
    training.model.eval()
    return complete


def _finished(
    task: _Task,
    model: nn.Module,
    identity: RunIdentity,
    journal: Journal,
    stop: StopRequest,
    measure_cost: MeasureCost | None,
) -> Run:
    """Has the cost measured where asked for, writes the model and closes the record."""
    cost: tuple[Row, ...] = ()
    if measure_cost is not None:
        new, examples = task.timed()
        cost = cost_of(task.recipe, new, examples, measure_cost, stop)
    write_model(
        task.folder.model,
        model,
        task.initial.architecture,
        claims=journal.record.claims,
        private_claims={"data_fingerprint_key": identity.key} if identity.key else None,
        sealing=task.sealing,
        overwrite=True,
    )
    place = task.folder.model.relative_to(task.folder.root).as_posix()
    digest = model_digest(model)
    journal.record = replace(journal.record, cost=cost, checkpoints=(place,), model_digest=digest)
    if cost and task.recipe.copies > 1:
        journal.note(COPIES_NOTE.format(copies=task.recipe.copies))
    journal.write()
    stop_here(stop)
    journal.complete()
    return Run(record=journal.record, folder=journal.folder, model=model)


def _interrupted(journal: Journal) -> Run:
    journal.interrupt()
    return Run(record=journal.record, folder=journal.folder, model=None)


def _beginning(task: _Task) -> Start:
    """A new run of the task: its number, and what is known of it before it starts."""
    identity = RunIdentity.draw(private=task.plan is not None)
    if grouped := group_cost_of(task.plan, task.data):
        Terminal(stderr=True).print(f"note: {grouped}")
    record = new_record(
        task.recipe,
        task.data,
        task.initial,
        identity,
        plan=task.plan,
        device=task.device,
        sealing=task.sealing,
        notes=[GROUPED_NOTE] if grouped else [],
    )
    return Start(record=record, identity=identity)
