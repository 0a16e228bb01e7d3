"""Runs whose last layer is solved for by least squares, and people who leave them by subtraction.

The sums that the layer is solved from are kept in the run's folder, sealed as the run is. What a
run without the people has is computed from them and from the images of who leaves alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import nn

from privacy.errors import UnlearningError
from privacy.unlearning import RidgeHead
from secure_cnn.checkpoint import (
    Sealing,
    Unlocking,
    check_model,
    check_sealing,
    check_unlocking,
    model_digest,
    read_state,
    write_state,
)
from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.interruption import Stopped, StopRequest, stop_on_signals
from secure_cnn.own_network import OwnNetwork
from secure_cnn.progress import count_progress
from secure_cnn.recipe import Recipe, Run, RunFolder
from secure_cnn.recipe.initial import InitialModel, initial_model
from secure_cnn.recipe.ridge import (
    bound_of,
    check_ridge,
    features_of,
    head_of,
    ridge_head,
    with_head,
)
from secure_cnn.record import RunRecord
from secure_cnn.unlearning.begun import begun, going_on, reported
from secure_cnn.unlearning.requests import Request
from secure_cnn.unlearning.source import Source, leaving
from secure_cnn.unlearning.stage_files import StageFiles

__all__ = ["Head", "has_sums", "head_carried_out", "head_task", "head_without", "run_ridge"]

_NOTE = (
    "Its last layer is solved for at once, by least squares with a penalty of {penalty:g}, on "
    "features that formulas give: no step was taken, whatever the settings of steps say. People "
    "can leave it by {sums}, which tells of the images as they do: keep and destroy it with them."
)
_CURE = "take retrain (--method retrain)"
_TOLERANCE = 1e-3


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Before:
    """A head from which people have been taken, and the network whose last layer it was."""

    model: nn.Module
    head: RidgeHead


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """A training of a last layer that may begin: all is loaded and checked, no file was touched.

    Attributes:
        recipe: What to do, on its data.
        data: The images, all of them.
        initial: How the network begins.
        files: Where it is kept.
        before: What is left of an earlier run; None goes through the images.
    """

    recipe: Recipe
    data: ImageData
    initial: InitialModel
    files: StageFiles
    before: _Before | None = None

    def solved(self, stop: StopRequest) -> tuple[nn.Module, RidgeHead]:
        """The finished network, in evaluation mode, and its last layer with its sums.

        Raises:
            Stopped: A stop was requested.
        """
        if self.before is not None:
            return with_head(self.before.model, self.before.head), self.before.head
        model = self.initial.build()
        with count_progress("images through the fixed layers", len(self.data.train)) as advance:
            try:
                head = ridge_head(self.recipe, model, self.data, stop=stop, advance=advance)
            except UnlearningError as error:
                raise RunError(str(error)) from error
        return with_head(model, head), head


def run_ridge(
    recipe: Recipe,
    *,
    data: ImageData | None = None,
    network: OwnNetwork | None = None,
    sealing: Sealing | None = None,
    unlocking: Unlocking | None = None,
    resume: bool = False,
    force: bool = False,
) -> Run:
    """Solves for a last layer and leaves a folder as `run` does, with the sums to leave it by.

    Guarantee: everything that can be refused is refused before the folder is touched, but for a
    penalty that is too small for the features. The model is a function of the images as a set, of
    the recipe and of the machine. Ctrl-C or SIGTERM ends the run as interrupted; it then begins
    anew, which takes one pass over the images.

    Args:
        recipe: What to do; of `head="ridge"`.
        data: The images, where they are not those that the recipe names; also to resume.
        network: None: features of a network of one's own may know of images.
        sealing: To whom the model and the sums are encrypted, and who signs them.
        unlocking: Of no use but to be given as to `run`.
        resume: Go on with the run in the recipe's folder.
        force: Replace a run that is in the recipe's folder.

    Raises:
        SecureCNNError: The data, the model, the folder or a setting is at fault.
    """
    check_sealing(sealing)
    check_unlocking(unlocking)
    if recipe.head != "ridge":
        raise RunError(f"head: expected ridge, got {recipe.head}; use run")
    if network is not None:
        raise RunError(
            f"network: expected none, got {network.name}: features must be those of formulas; "
            "leave it out"
        )
    if data is None:
        data = recipe.images()
    folder = RunFolder(root=Path(recipe.out), sealed=sealing is not None)
    files = StageFiles(run=folder, sealing=sealing, unlocking=unlocking, network=None)
    task = head_task(recipe, data, files)
    with folder.locked() if resume else folder.begun(force=force):
        return head_carried_out(task, going_on(task) if resume else None)


def head_task(recipe: Recipe, data: ImageData, files: StageFiles) -> Head:
    """A training of these images; touches no file.

    Raises:
        SecureCNNError: The model, the images or a setting is at fault.
    """
    recipe = recipe.on(data)
    initial = initial_model(recipe, data, None, None)
    check_ridge(recipe, data)
    check_model(initial.build(), initial.architecture, data.name, sealing=files.sealing)
    return Head(recipe=recipe, data=data, initial=initial, files=files)


def head_without(task: Head, source: Source, request: Request) -> Head:
    """The same training of those who stay, from the sums of the run; touches no file.

    Raises:
        RunError: The run's sums are not there, are not its own, or do not have who leaves.
        ArchiveError: They are sealed, and cannot be opened or believed.
    """
    head = _read_sums(source)
    features, labels = features_of(task.recipe, source.loaded.model, leaving(source.data, request))
    try:
        head.remove(features, labels)
    except UnlearningError as error:
        raise RunError(f"{source.files.run.sums}: {error}; or {_CURE}") from error
    return replace(task, before=_Before(model=source.loaded.model, head=head))


def head_carried_out(task: Head, record: RunRecord | None, *, notes: Sequence[str] = ()) -> Run:
    """Solves and reports in a folder that is begun; goes on with `record`, if one is given."""
    folder = task.files.run
    place = folder.sums.relative_to(folder.root).as_posix()
    note = _NOTE.format(penalty=task.recipe.penalty, sums=place)
    identity, journal = begun(task, record, notes=[note, *notes])
    with stop_on_signals() as stop:
        try:
            model, head = task.solved(stop)
            # First: a run that is complete has its sums.
            state = {**head.state(), "model": model_digest(model)}
            write_state(folder.sums, state, sealing=task.files.sealing)
            reported(task, model, identity, journal, stop)
        except Stopped:
            journal.interrupt()
            return Run(record=journal.record, folder=folder, model=None)
    return Run(record=journal.record, folder=folder, model=model)


def has_sums(files: StageFiles, record: RunRecord) -> bool:
    """Whether the sums of a finished run are there, and of its model."""
    if not files.run.sums.is_file():
        return False
    state = read_state(files.run.sums, unlocking=files.unlocking if files.run.sealed else None)
    return bool(state.get("model") == record.model_digest)


def _read_sums(source: Source) -> RidgeHead:
    """The head of a run with its sums, once it is sure that they are of its model."""
    files, model, recipe = source.files, source.loaded.model, source.recipe
    path = files.run.sums
    if not path.is_file():
        raise RunError(
            f"{path}: expected the sums of the training, by which people leave it, got no such "
            f"file; put the run's own back, or {_CURE}"
        )
    state = read_state(path, unlocking=files.unlocking if files.run.sealed else None)
    try:
        head = RidgeHead.from_state(state)
    except UnlearningError as error:
        raise RunError(f"{path}: {error}; put the run's own back, or {_CURE}") from error
    expected, weights = head_of(model), torch.from_numpy(head.weights)
    fits = weights.shape == (expected.in_features + 1, expected.out_features)
    # Solved on another machine they are the same to rounding alone.
    own = torch.cat([expected.weight, expected.bias[:, None]], 1).detach().double().T
    near = fits and float((own - weights).norm()) <= _TOLERANCE * float(own.norm())
    same = state.get("model") == source.record.model_digest
    asked = (recipe.penalty, bound_of(recipe.model))
    same = same and (state.get("penalty"), state.get("bound")) == asked
    if not (near and same and len(head) == len(source.data.train)):
        raise RunError(
            f"{path}: expected the sums of the run's own training, got those of another, or of "
            f"other settings; put its own back, or {_CURE}"
        )
    return head
