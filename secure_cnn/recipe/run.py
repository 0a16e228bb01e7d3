"""`run`: does what a recipe says, and leaves a folder with the record, the checkpoint and the page.

The composition root. What the protections cost is measured by whoever asks for it: the command
gives `run` a function of `secure_cnn.bench`, on which this room does not stand.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import privacy
from secure_cnn import archive
from secure_cnn.checkpoint import Sealing, Unlocking, check_model, write_model, write_state
from secure_cnn.data import ImageData, load_data
from secure_cnn.engine import WeightAverage
from secure_cnn.errors import RunError
from secure_cnn.interruption import Stopped, StopRequest, stop_here, stop_on_signals
from secure_cnn.models import Architecture
from secure_cnn.pages import write_page
from secure_cnn.recipe.folder import RunFolder
from secure_cnn.recipe.guard import UNGUARDED_NOTE, is_unguarded, make_guard
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.outcome import (
    MeasureCost,
    Outcome,
    claims_of,
    judge,
    privacy_record,
    threat_record,
    trials_note,
)
from secure_cnn.recipe.resuming import resume as resume_run
from secure_cnn.recipe.seams import make_plan, make_seams, objective_for
from secure_cnn.recipe.settings import Recipe, Variant
from secure_cnn.recipe.training import Training
from secure_cnn.record import (
    DataRecord,
    EpochRecord,
    ModelRecord,
    Row,
    RunRecord,
    hardware,
    versions,
)

__all__ = ["Run", "run"]

_LAYOUT = torch.channels_last
"""The layout in which training is fastest, plain and private."""
_BASELINE_NOTE = (
    "The plain model was trained on the same images without protections, to show what they cost. "
    "Its figures are not covered by epsilon, and its weights were not kept."
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has ended.

    Attributes:
        record: What was done and found.
        folder: Where it is.
        model: The trained network in evaluation mode; None when the run was interrupted.

    Example:
        >>> sorted(Run.__dataclass_fields__)
        ['folder', 'model', 'record']
    """

    record: RunRecord
    folder: RunFolder
    model: nn.Module | None


def run(
    recipe: Recipe,
    *,
    sealing: Sealing | None = None,
    unlocking: Unlocking | None = None,
    resume: bool = False,
    force: bool = False,
    measure_cost: MeasureCost | None = None,
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
        sealing: To whom the checkpoints are encrypted and who signs; None leaves them plain.
        unlocking: Opens the sealed checkpoint of the run that is resumed; its `trusted` are the
            signers whose states count, by default the one of `sealing`.
        resume: Go on with the run in the recipe's folder.
        force: Replace a run that is in the recipe's folder.
        measure_cost: Times the protections' steps once the training is done, for the record:
            `secure_cnn.bench.step_costs`; None measures nothing.

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
    bench = _Workbench.prepare(recipe, sealing=sealing)
    with bench.folder.locked() if resume else bench.folder.begun(force=force):
        if resume:
            bench.reopen(unlocking)
        else:
            bench.write()
        with stop_on_signals() as stop:
            try:
                for variant in recipe.variants:
                    if bench.is_done(variant):
                        continue
                    if not bench.train(variant, stop):
                        return bench.interrupted()
                return bench.finish(stop, measure_cost)
            except Stopped:
                return bench.interrupted()


@dataclass(kw_only=True)
class _Workbench:
    """What `run` works on; changes as the run goes on."""

    recipe: Recipe
    sealing: Sealing | None
    data: ImageData
    architecture: Architecture
    plan: privacy.DPPlan | None
    device: torch.device
    folder: RunFolder
    identity: RunIdentity
    record: RunRecord
    state: Mapping[str, Any] | None = None
    uncounted: int = 0
    private: privacy.PrivateTraining | None = None
    model: nn.Module | None = None
    outcome: Outcome | None = None
    started: float = field(default_factory=time.monotonic)
    before: float = 0.0

    @classmethod
    def prepare(cls, recipe: Recipe, *, sealing: Sealing | None) -> "_Workbench":
        """Loads and checks everything; touches no file."""
        device = _device(recipe.device)
        data = load_data(recipe.data, seed=recipe.seed)
        spec = data.spec
        architecture = Architecture(
            model=recipe.model,
            channels=spec.channels,
            height=spec.height,
            width=spec.width,
            classes=spec.classes,
        )
        check_model(architecture, data.name, sealing=sealing)
        if recipe.shift >= min(spec.height, spec.width):
            raise RunError(
                f"shift: expected less than the image's {spec.height}x{spec.width}, "
                f"got {recipe.shift}"
            )
        objective_for(recipe, recipe.variant)
        plan = make_plan(recipe, len(data.train))
        identity = RunIdentity.draw(private=plan is not None)
        signer = "" if sealing is None or sealing.signer is None else _public(sealing.signer)
        record = _first_record(recipe, data, architecture, plan, device, identity)
        return cls(
            recipe=recipe,
            sealing=sealing,
            data=data,
            architecture=architecture,
            plan=plan,
            device=device,
            folder=RunFolder(root=Path(recipe.out), sealed=sealing is not None),
            identity=identity,
            record=replace(record, signer=signer),
        )

    def reopen(self, unlocking: Unlocking | None) -> None:
        """Takes up the run in the folder, once it is sure that it is this recipe's."""
        found = resume_run(
            self.recipe,
            self.folder,
            self.record,
            self.data,
            sealing=self.sealing,
            unlocking=unlocking,
        )
        self.record, self.identity = found.record, found.identity
        self.state, self.uncounted = found.state, found.uncounted
        self.before = found.record.seconds

    def is_done(self, variant: Variant) -> bool:
        """Whether the variant was finished before a resume; the recipe's own is always judged."""
        done = variant.name in {result.variant for result in self.record.results}
        return done and variant != self.recipe.variant

    def train(self, variant: Variant, stop: StopRequest) -> bool:
        """One training with its evaluation; False when it was interrupted."""
        model = self.architecture.build(generator_seed=self.recipe.seed)
        model = model.to(self.device).to(memory_format=_LAYOUT)
        seams = make_seams(self.recipe, variant, model, self.data, self.plan)
        decay = self.recipe.average_decay
        average = WeightAverage(model, decay=decay) if decay else None
        training = Training(
            recipe=self.recipe,
            variant=variant,
            data=self.data,
            model=model,
            seams=seams,
            average=average,
            guard=make_guard(self.recipe, seams, model, average, self.data),
            memory_format=_LAYOUT,
            identity=self.identity,
        )
        self.private = seams.private
        resumed = self.state is not None and self.state["variant"] == variant.name
        start_step = training.restore(self.state) if resumed and self.state is not None else 0
        if self.private is not None and self.uncounted:
            self.private.ledger.record(self.private.plan.event(self.uncounted))
        if not resumed or self.uncounted:
            # A place that cannot be written to, or keys that cannot be used, show before any work.
            self._save(training.state(start_step))
        complete = training.run(
            start_step=start_step, save=self._save, record=self._record_epoch, stop=stop
        )
        if not complete:
            return False
        self.model = model.eval()
        self.outcome = judge(self.recipe, variant, model, self.data, training.epsilon(), stop)
        self._record_outcome(self.outcome, "" if training.guard is None else training.guard.note)
        if variant == self.recipe.variant:
            claims = claims_of(self.recipe, seams, self.outcome, self.data, self.identity)
            self.record = replace(self.record, claims=claims)
        self.write()
        return True

    def interrupted(self) -> Run:
        """Writes down where the run stopped."""
        self.record = replace(self.record, status="interrupted")
        self.write()
        return Run(record=self.record, folder=self.folder, model=None)

    def finish(self, stop: StopRequest, measure_cost: MeasureCost | None) -> Run:
        """Has measured what the protections cost, writes the model and closes the record."""
        assert self.model is not None, "the recipe's own variant was trained"
        cost = () if measure_cost is None else self._cost(measure_cost, stop)
        key = self.identity.key
        write_model(
            self.folder.model,
            self.model,
            self.architecture,
            claims=self.record.claims,
            private_claims={"data_fingerprint_key": key} if key else None,
            sealing=self.sealing,
            overwrite=True,
        )
        self.record = replace(
            self.record,
            cost=tuple(cost),
            checkpoints=(self.folder.model.relative_to(self.folder.root).as_posix(),),
        )
        self.write()
        stop_here(stop)
        # Only a complete run can do without the state: until then there is a way on from it.
        self.record = replace(self.record, status="complete")
        self.record.write(self.folder.record)
        self.folder.training.unlink(missing_ok=True)
        return Run(record=self.record, folder=self.folder, model=self.model)

    def write(self) -> None:
        """Writes the record and its page."""
        seconds = self.before + time.monotonic() - self.started
        self.record = replace(self.record, seconds=seconds)
        self.record.write(self.folder.record)
        write_page(self.record, self.outcome.examples if self.outcome else None, self.folder.page)

    def _cost(self, measure_cost: MeasureCost, stop: StopRequest) -> Sequence[Row]:
        """Times the recipe's protections on a new network."""
        variant = self.recipe.variant
        own = (
            {} if variant.method is None else {variant.method: objective_for(self.recipe, variant)}
        )
        return measure_cost(
            self.recipe.model,
            self.architecture.build().to(self.device),
            self.data.train,
            own,
            private=variant.private,
            before_step=partial(stop_here, stop),
        )

    def _record_outcome(self, outcome: Outcome, acted: str) -> None:
        found = outcome.result
        results = tuple(r for r in self.record.results if r.variant != found.variant)
        # A training that is judged again after a kill has said this already.
        told = dict.fromkeys((*self.record.notes, *([acted] if acted else [])))
        self.record = replace(self.record, results=(*results, found), notes=tuple(told))

    def _save(self, state: Mapping[str, Any]) -> None:
        # A checkpoint shows its weights: they are on record as released before it is there.
        if self._released() != self.record.released:
            self.record = replace(self.record, released=self._released())
            self.record.write(self.folder.record)
        write_state(self.folder.training, state, sealing=self.sealing)

    def _record_epoch(self, epoch: EpochRecord) -> None:
        self.record = replace(
            self.record, epochs=(*self.record.epochs, epoch), released=self._released()
        )
        self.record.write(self.folder.record)

    def _released(self) -> int:
        """Noised steps released so far; what is on record never falls."""
        return max(self.record.released, 0 if self.private is None else self.private.steps)


def _first_record(
    recipe: Recipe,
    data: ImageData,
    architecture: Architecture,
    plan: privacy.DPPlan | None,
    device: torch.device,
    identity: RunIdentity,
) -> RunRecord:
    """What is known of a run before it starts."""
    parameters = sum(p.numel() for p in architecture.build().parameters())
    return RunRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        data=DataRecord(
            name=data.name,
            fingerprint=identity.fingerprint(data),
            train=len(data.train),
            test=len(data.test),
            shape=data.spec.shape,
            classes=data.spec.classes,
        ),
        model=ModelRecord(name=recipe.model, parameters=parameters),
        settings=recipe.to_dict(),
        versions=versions(),
        hardware=hardware(device),
        privacy=privacy_record(recipe, plan),
        threat=threat_record(recipe),
        notes=_notes(recipe),
        run_id=identity.id,
    )


def _public(signer: archive.Signer) -> str:
    return signer.verifier.to_text()


def _device(name: str) -> torch.device:
    """The device by name; `auto` takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"device: expected one that this machine has, got {name}: {error}"
        ) from error
    return device


def _notes(recipe: Recipe) -> tuple[str, ...]:
    """What a reader of the record must know."""
    notes: tuple[str, ...] = (_BASELINE_NOTE,) if len(recipe.variants) > 1 else ()
    notes += (trials_note(recipe),) if recipe.epsilon is not None else ()
    return (*notes, UNGUARDED_NOTE) if is_unguarded(recipe) else notes
