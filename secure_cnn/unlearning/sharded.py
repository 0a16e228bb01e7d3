"""Training in shards and slices, so that a person's leaving concerns a small part of it.

SISA (Bourtoule et al. 2021, arXiv 1912.03817): each shard is a network of its own, trained in
stages, each on one slice more than the one before and with an optimizer, a schedule and an average
of its own. The model is all of them together. What a stage was is in its file: a stage that would
be trained the same today is taken from there, and no other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import final

from torch import nn

from secure_cnn.checkpoint import (
    Sealing,
    Unlocking,
    check_model,
    check_sealing,
    check_unlocking,
    model_digest,
)
from secure_cnn.data import ImageData
from secure_cnn.ensemble import Ensemble
from secure_cnn.errors import RunError
from secure_cnn.interruption import Stopped, StopRequest, stop_here, stop_on_signals
from secure_cnn.own_network import OwnNetwork
from secure_cnn.progress import part_progress, tell_share
from secure_cnn.recipe import Recipe, Run, RunFolder
from secure_cnn.recipe.initial import InitialModel, initial_model
from secure_cnn.recipe.once import train_once
from secure_cnn.recipe.seams import make_device
from secure_cnn.record import RunRecord
from secure_cnn.unlearning.begun import begun, going_on, reported
from secure_cnn.unlearning.inventory import Inventory
from secure_cnn.unlearning.shards import Stage, epochs_of_a_stage, stages_of
from secure_cnn.unlearning.stage_files import StageFiles, StageKind, stage_recipe
from secure_cnn.weights import Weights

__all__ = ["Shards", "Work", "carried_out", "run_sharded", "sharded_task"]

_NOTE = (
    "It was trained in {shards} shards of {slices} slices, {epochs} a stage: each image is "
    "in one network of the {networks}, whose mean answers."
)
_ONE = "It was trained in {slices} slices, {epochs} a stage, and its state before each is kept."
_THIN = (
    "Of {shards} shards {empty} without images, and so without a network, and {single} of one "
    "{unit} alone, whose leaving takes that network away; fewer shards are fuller ones."
)


@final
@dataclass(frozen=True, kw_only=True)
class Work:
    """What a training in shards did: stages trained, stages that there are, images gone through.

    `images` and `all_images` count each image once an epoch: their ratio is the share of a full
    training.
    """

    trained: int
    stages: int
    images: int
    all_images: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kept:
    """How many of a shard's stages are there, how many of them in a source, and the last model."""

    stages: int = 0
    sources: int = 0
    model: nn.Module | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """A training in shards that may begin: everything is loaded and checked, no file was touched.

    Attributes:
        recipe: What to do.
        data: The images, all of them.
        initial: How each shard begins.
        inventory: Who is in the data.
        files: Where the stages go.
        sources: Runs whose stages are taken where they would be trained the same.
    """

    recipe: Recipe
    data: ImageData
    initial: InitialModel
    inventory: Inventory
    files: StageFiles
    sources: tuple[StageFiles, ...] = ()

    @cached_property
    def stages(self) -> tuple[tuple[Stage, ...], ...]:
        """The stages of each shard that has images; one without has no network."""
        return tuple(each for each in stages_of(self.recipe, self.data) if len(each[-1].rows))

    def work(self) -> Work:
        """What is to be trained of it that no source has, whatever of that is done already."""
        return self._work([self._found(each, self.sources).sources for each in self.stages])

    def train(self, stop: StopRequest) -> tuple[nn.Module, Work]:
        """Trains the stages that are not there yet; the finished model, in evaluation mode.

        Raises:
            Stopped: A stop was requested; the stages that were finished are kept.
        """
        self.files.write_inventory(self.inventory)
        kept = [self._found(each, (*self.sources, self.files)) for each in self.stages]
        done = sum(each.stages for each in kept)
        members = []
        with part_progress("stage", sum(map(len, self.stages)), kept=done) as tell:
            for of_shard, before in zip(self.stages, kept, strict=True):
                model = before.model
                for stage in of_shard[before.stages :]:
                    model = self._trained(stage, model, stop, partial(tell_share, tell, done))
                    done += 1
                    tell(done)
                members.append(model)
        finished = [member for member in members if member is not None]
        model = finished[0] if len(finished) == 1 else Ensemble(finished)
        return model.eval(), self._work([each.sources for each in kept])

    def _work(self, kept: Sequence[int]) -> Work:
        """What is left where so many of each shard's stages are in a source."""
        missing = [s for each, number in zip(self.stages, kept, strict=True) for s in each[number:]]
        epochs = epochs_of_a_stage(self.recipe)
        return Work(
            trained=len(missing),
            stages=sum(map(len, self.stages)),
            images=epochs * sum(len(stage.rows) for stage in missing),
            all_images=epochs * sum(len(stage.rows) for each in self.stages for stage in each),
        )

    def _found(self, stages: Sequence[Stage], places: Sequence[StageFiles]) -> "_Kept":
        """What of a shard is in these places, which are looked through in their order."""
        kept, start = _Kept(), ""
        for number, stage in enumerate(stages, start=1):
            kind = self._kind(stage, start)
            files, model = next(
                ((files, m) for files in places if (m := files.read(stage, kind))), (None, None)
            )
            if files is None or model is None:
                break
            if self.files in places and not self.files.path(stage).exists():
                self.files.write(stage, kind, model, self.initial.architecture)
            whole = files is not self.files and kept.sources == kept.stages
            sources = number if whole else kept.sources
            kept, start = _Kept(stages=number, sources=sources, model=model), model_digest(model)
        return kept

    def _trained(
        self,
        stage: Stage,
        before: nn.Module | None,
        stop: StopRequest,
        advance: Callable[[float], None],
    ) -> nn.Module:
        """Trains a stage from where the one before ended, and writes what it leaves."""
        stop_here(stop)
        recipe = stage_recipe(self.recipe, stage)
        initial = replace(self.initial, recipe=recipe)
        if before is not None:
            tensors = dict(before.state_dict())
            initial = replace(initial, weights=Weights(file="", digest="", tensors=tensors))
        if len(stage.rows):
            model = train_once(
                recipe, initial, stage.data(self.data), stop=stop, advance=advance
            ).cpu()
        else:
            # Whoever was in it has left: the stage is the one before, or what was drawn.
            model = initial.build().eval()
        start = "" if before is None else model_digest(before)
        self.files.write(stage, self._kind(stage, start), model, self.initial.architecture)
        return model

    def _kind(self, stage: Stage, start: str) -> StageKind:
        return StageKind.of(
            self.recipe, stage, self.inventory, start=start, begun=self.initial.record
        )


def sharded_task(
    recipe: Recipe,
    data: ImageData,
    *,
    inventory: Inventory,
    folder: RunFolder,
    network: OwnNetwork | None,
    sealing: Sealing | None,
    unlocking: Unlocking | None,
    sources: Sequence[StageFiles] = (),
) -> Shards:
    """A training in shards of these images; touches no file.

    Raises:
        SecureCNNError: The model or a setting is at fault.
    """
    recipe = recipe.on(data)
    make_device(recipe)
    signer = None if sealing is None else sealing.signer
    own = unlocking
    if own is not None and own.trusted is None and signer is not None:
        # Anybody can seal to a public key: stages to go on from are those that the signer signed.
        own = replace(own, trusted=(signer.verifier,))
    files = StageFiles(run=folder, sealing=sealing, unlocking=own, network=network)
    initial = initial_model(recipe, data, network, unlocking)
    task = Shards(
        recipe=recipe,
        data=data,
        initial=initial,
        inventory=inventory,
        files=files,
        sources=tuple(sources),
    )
    whole = replace(initial.architecture, members=len(task.stages))
    check_model(whole.blank(network=network), whole, data.name, sealing=sealing)
    return task


def run_sharded(
    recipe: Recipe,
    *,
    data: ImageData | None = None,
    network: OwnNetwork | None = None,
    sealing: Sealing | None = None,
    unlocking: Unlocking | None = None,
    resume: bool = False,
    force: bool = False,
) -> Run:
    """Trains in shards and slices, evaluates and reports; leaves a folder as `run` does.

    Guarantee: everything that can be refused is refused before the first step. Every stage is a
    function of its images, of the stage before and of the seed alone, so that a training without
    some of the images has the very stages that need not know. Interrupted, it ends with its
    finished stages kept; a resumed one trains those that are left.

    Args:
        recipe: What to do; of more than one shard or slice. No baseline is trained.
        data: The images, where they are not those that the recipe names; also to resume.
        network: As of `run`.
        sealing: To whom the model and the stages are encrypted, and who signs them.
        unlocking: Opens the stages of the run that is resumed, or sealed weights of the recipe.
        resume: Go on with the run in the recipe's folder.
        force: Replace a run that is in the recipe's folder.

    Raises:
        SecureCNNError: The data, the model, the folder or a setting is at fault.
        DefenseError: The robustness asked for cannot be had.
    """
    check_sealing(sealing)
    check_unlocking(unlocking)
    if not recipe.is_sharded:
        raise RunError("shards, slices: expected more than one of either, got 1 and 1; use run")
    if data is None:
        data = recipe.images()
    folder = RunFolder(root=Path(recipe.out), sealed=sealing is not None)
    task = sharded_task(
        recipe,
        data,
        inventory=Inventory.of(data),
        folder=folder,
        network=network,
        sealing=sealing,
        unlocking=unlocking,
    )
    with folder.locked() if resume else folder.begun(force=force):
        done, _ = carried_out(task, going_on(task) if resume else None)
        return done


def carried_out(
    task: Shards, record: RunRecord | None, *, notes: Sequence[str] = ()
) -> tuple[Run, Work | None]:
    """Trains and reports in a folder that is begun; goes on with `record`, if one is given."""
    if record is not None and task.files.inventory_path.exists():
        task = replace(task, inventory=_same(task, task.files.read_inventory()))
    recipe, epochs = task.recipe, epochs_of_a_stage(task.recipe)
    note = (_NOTE if recipe.shards > 1 else _ONE).format(
        shards=recipe.shards,
        slices=recipe.slices,
        epochs="one epoch" if epochs == 1 else f"{epochs} epochs",
        networks=len(task.stages),
    )
    notes = [note, *_thin(task), *notes]
    identity, journal = begun(task, record, notes=notes, stage_epochs=epochs)
    with stop_on_signals() as stop:
        try:
            model, work = task.train(stop)
            reported(task, model, identity, journal, stop, members=len(task.stages))
        except Stopped:
            journal.interrupt()
            return Run(record=journal.record, folder=journal.folder, model=None), None
    return Run(record=journal.record, folder=journal.folder, model=model), work


def _thin(task: Shards) -> list[str]:
    """What to say of shards of nobody, or of one alone: persons, where it is known whose."""
    shards, groups = task.recipe.shards, task.data.groups
    empty, single = shards - len(task.stages), 0
    for of_shard in task.stages:
        rows = of_shard[-1].rows.tolist()
        single += len(rows if groups is None else {groups[row] for row in rows}) == 1
    if shards == 1 or not (empty or single):
        return []
    unit = "image" if groups is None else "person"
    return [_THIN.format(shards=shards, empty=_are(empty), single=_are(single), unit=unit)]


def _are(count: int) -> str:
    return {0: "none is", 1: "one is"}.get(count, f"{count} are")


def _same(task: Shards, known: Inventory) -> Inventory:
    """The inventory that the run began with, under whose key its stages are known."""
    if Inventory.of(task.data, key=known.key) != known:
        raise RunError(
            f"{task.files.run.root}: the data changed since the run began: {task.recipe.data}"
        )
    return known
