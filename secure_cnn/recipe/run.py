"""`run`: does what a recipe says, and leaves a folder with the record, the checkpoint and the page.

The composition root: with `secure_cnn.bench` the only place that knows models, attacks and privacy
together.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import privacy
from secure_cnn.checkpoint import Sealing, Unlocking, read_state, write_model, write_state
from secure_cnn.data import ImageData, load_data
from secure_cnn.engine import WeightAverage
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest, stop_on_signals
from secure_cnn.models import Architecture
from secure_cnn.recipe.folder import RunFolder
from secure_cnn.recipe.guard import UNGUARDED_NOTE, is_unguarded, make_guard
from secure_cnn.recipe.outcome import (
    Outcome,
    claims_of,
    judge,
    measure_cost,
    privacy_record,
    threat_record,
)
from secure_cnn.recipe.seams import make_plan, make_seams, objective_for
from secure_cnn.recipe.settings import Recipe, Variant
from secure_cnn.recipe.training import Training
from secure_cnn.report import (
    DataRecord,
    EpochRecord,
    ModelRecord,
    RunRecord,
    hardware,
    versions,
    write_page,
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
) -> Run:
    """Trains, evaluates, measures, seals and reports.

    Guarantee: everything that can be refused is refused before the first step and before the folder
    is touched. The first Ctrl-C or SIGTERM saves a checkpoint and ends the run as interrupted; a
    resumed run gives what the uninterrupted one would have given, but for the noise and the samples
    of a private training, which are fresh by design.

    Args:
        recipe: What to do.
        sealing: To whom the checkpoints are encrypted and who signs; None leaves them plain.
        unlocking: Opens the sealed checkpoint of the run that is resumed.
        resume: Go on with the run in the recipe's folder.
        force: Replace a run that is in the recipe's folder.

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
    if resume:
        bench.reopen(unlocking)
    else:
        bench.folder.create(force=force)
        bench.write()
    with stop_on_signals() as stop:
        for variant in recipe.variants:
            if bench.is_done(variant):
                continue
            if not bench.train(variant, stop):
                return bench.interrupted()
        return bench.finish()


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
    record: RunRecord
    state: Mapping[str, Any] | None = None
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
        if recipe.shift >= min(spec.height, spec.width):
            raise RunError(
                f"shift: expected less than the image's {spec.height}x{spec.width}, "
                f"got {recipe.shift}"
            )
        objective_for(recipe, recipe.variant)
        plan = make_plan(recipe, len(data.train))
        return cls(
            recipe=recipe,
            sealing=sealing,
            data=data,
            architecture=architecture,
            plan=plan,
            device=device,
            folder=RunFolder(root=Path(recipe.out), sealed=sealing is not None),
            record=_first_record(recipe, data, architecture, plan, device),
        )

    def reopen(self, unlocking: Unlocking | None) -> None:
        """Takes up the run in the folder, once it is sure that it is this recipe's."""
        record = RunRecord.read(self.folder.record)
        if record.status == "complete":
            raise RunError(f"{self.folder.root}: the run is complete; there is nothing to resume")
        changed = self.recipe.changed_from(record.settings)
        if changed:
            raise RunError(
                f"{self.folder.root}: the run has other settings: {', '.join(changed)}; "
                "resume with its own"
            )
        if record.data != self.record.data:
            raise RunError(
                f"{self.folder.root}: the data changed since the run began: {self.recipe.data}"
            )
        self._check_sealing(unlocking)
        self.state = self._saved(unlocking)
        step, variant = (self.state["step"], self.state["variant"]) if self.state else (0, None)
        finished = {result.variant for result in record.results}
        epochs = tuple(
            e
            for e in record.epochs
            if e.variant in finished or (e.variant == variant and e.step <= step)
        )
        self.record, self.before = replace(record, status="running", epochs=epochs), record.seconds

    def _check_sealing(self, unlocking: Unlocking | None) -> None:
        """A run goes on as it began: sealed, or plain."""
        sealed = self.folder.sealed
        if replace(self.folder, sealed=not sealed).training.exists():
            raise RunError(
                f"{self.folder.root}: the run's checkpoints are {'plain' if sealed else 'sealed'}, "
                "and it goes on as it began; "
                + ("name no recipient" if sealed else "name its recipients and signer again")
            )
        if sealed and unlocking is None and self.folder.training.exists():
            raise RunError(
                f"{self.folder.training}: is sealed; give the identity or the passphrase that "
                "opens it"
            )

    def _saved(self, unlocking: Unlocking | None) -> dict[str, Any] | None:
        """The state of the training under way, where there is one."""
        path = self.folder.training
        if not path.exists():
            return None
        state = read_state(path, unlocking=unlocking if self.folder.sealed else None)
        names = [variant.name for variant in self.recipe.variants]
        if type(state.get("step")) is not int or state.get("variant") not in names:
            raise RunError(
                f"{path}: expected a training of {' or '.join(names)} under way, got another file; "
                "start the run anew with --force"
            )
        return state

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
        )
        resumed = self.state is not None and self.state["variant"] == variant.name
        start_step = training.restore(self.state) if resumed and self.state is not None else 0
        if not resumed:
            # A place that cannot be written to, or keys that cannot be used, show before any work.
            self._save(training.state(0))
        complete = training.run(
            start_step=start_step, save=self._save, record=self._record_epoch, stop=stop
        )
        if not complete:
            return False
        self.model = model.eval()
        self.outcome = judge(self.recipe, variant, model, self.data, training.epsilon())
        results = tuple(r for r in self.record.results if r.variant != variant.name)
        acted = training.guard.note if training.guard is not None else ""
        # A training that is judged again after a kill has said this already.
        told = dict.fromkeys((*self.record.notes, *([acted] if acted else [])))
        self.record = replace(
            self.record, results=(*results, self.outcome.result), notes=tuple(told)
        )
        if variant == self.recipe.variant:
            claims = claims_of(self.recipe, seams, self.outcome, self.data, self.plan)
            self.record = replace(self.record, claims=claims)
        self.write()
        return True

    def interrupted(self) -> Run:
        """Writes down where the run stopped."""
        self.record = replace(self.record, status="interrupted")
        self.write()
        return Run(record=self.record, folder=self.folder, model=None)

    def finish(self) -> Run:
        """Measures what the protections cost, writes the model and closes the record."""
        assert self.model is not None, "the recipe's own variant was trained"
        cost = measure_cost(self.recipe, self.architecture.build().to(self.device), self.data)
        write_model(
            self.folder.model,
            self.model,
            self.architecture,
            claims=self.record.claims,
            sealing=self.sealing,
            overwrite=True,
        )
        self.folder.training.unlink(missing_ok=True)
        self.record = replace(
            self.record,
            status="complete",
            cost=tuple(cost),
            checkpoints=(self.folder.model.relative_to(self.folder.root).as_posix(),),
        )
        self.write()
        return Run(record=self.record, folder=self.folder, model=self.model)

    def write(self) -> None:
        """Writes the record and its page."""
        seconds = self.before + time.monotonic() - self.started
        self.record = replace(self.record, seconds=seconds)
        self.record.write(self.folder.record)
        write_page(self.record, self.outcome.examples if self.outcome else None, self.folder.page)

    def _save(self, state: Mapping[str, Any]) -> None:
        write_state(self.folder.training, state, sealing=self.sealing)

    def _record_epoch(self, epoch: EpochRecord) -> None:
        self.record = replace(self.record, epochs=(*self.record.epochs, epoch))
        self.record.write(self.folder.record)


def _first_record(
    recipe: Recipe,
    data: ImageData,
    architecture: Architecture,
    plan: privacy.DPPlan | None,
    device: torch.device,
) -> RunRecord:
    """What is known of a run before it starts."""
    parameters = sum(p.numel() for p in architecture.build().parameters())
    return RunRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        data=DataRecord(
            name=data.name,
            fingerprint=data.fingerprint,
            train=len(data.train),
            test=len(data.test),
            shape=data.spec.shape,
            classes=data.spec.classes,
        ),
        model=ModelRecord(name=recipe.model, parameters=parameters),
        settings=recipe.to_dict(),
        versions=versions(),
        hardware=hardware(device),
        privacy=privacy_record(plan),
        threat=threat_record(recipe),
        notes=_notes(recipe),
    )


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
    notes = (_BASELINE_NOTE,) if len(recipe.variants) > 1 else ()
    return (*notes, UNGUARDED_NOTE) if is_unguarded(recipe) else notes
