"""One training of a run: watched, written down after every epoch, and able to go on.

What the checkpoint holds is what makes a resumed training give what the uninterrupted one would
have given: weights, their average, optimizer, the attack's generator, the losses of the epoch under
way, and of a private training its ledger in their place. Its noise and its samples are fresh by
design.

The guard of single-step training works at the end of each epoch, where it is asked for: it costs a
share of the epoch, and what it takes for a collapse was tuned on digits. What a collapse is, and
how one goes back, is in `defenses.OverfittingGuard`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

import defenses
import privacy
from defenses import AdversarialTraining, OverfittingGuard, TrainingImages
from secure_cnn.data import ImageData
from secure_cnn.engine import WeightAverage, train
from secure_cnn.errors import RunError, SecureCNNError
from secure_cnn.evaluate import ClassificationReport, evaluate_model
from secure_cnn.interruption import StopRequest
from secure_cnn.progress import TrainingProgress, training_progress
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.persons import persons_digest
from secure_cnn.recipe.seams import Seams
from secure_cnn.recipe.settings import Recipe, Variant
from secure_cnn.record import EpochRecord

__all__ = ["UNGUARDED_NOTE", "EpochGuard", "Training", "is_unguarded", "make_guard"]

_FEWEST, _MOST, _SHARE = 64, 256, 400
"""Images of the guard: one in 400. Their attacks cost 11 plain steps on them (measured): 1.4 % of
an epoch of N-FGSM on 60 000 images, but a quarter of the short ones on the digits; twice that where
it acts."""
_TOLD = 5
UNGUARDED_NOTE = (
    "Training on single steps can overfit to them (catastrophic overfitting), and no guard watched "
    "for it. The robust accuracy shows whether it happened."
)


@runtime_checkable
class _Stateful(Protocol):
    """A part of a training whose state is saved with it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class EpochGuard:
    """Watches one training, takes it back, its average too, and remembers when it did."""

    def __init__(
        self,
        guard: OverfittingGuard,
        images: TrainingImages,
        *,
        model: nn.Module,
        objective: AdversarialTraining,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
    ) -> None:
        self._guard, self._images, self._model, self._objective = guard, images, model, objective
        # Only these go back. Whatever counts what was spent or done must not be among them.
        self._parts: list[Any] = [optimizer] if average is None else [optimizer, average]
        self._acts: list[str] = []

    def end_epoch(self, epoch: int) -> str:
        """Checks the training at the end of an epoch; returns what it did in words, or nothing."""
        before = self._objective.noise
        verdict = self._guard.rescue(self._model, self._images, self._objective, self._parts)
        after = self._objective.noise
        if after == before and not verdict.returned:
            return ""
        act = (
            f"epoch {epoch}: {100 * verdict.single_step:.0f} % of its images right under FGSM, "
            f"{100 * verdict.iterative:.0f} % under PGD; "
            + ("taken back to the last good epoch, " if verdict.returned else "")
            + f"noise {before:.3g} -> {after:.3g} eps"
        )
        self._acts.append(act)
        return act

    @property
    def note(self) -> str:
        """What it did in the whole training, as a sentence; nothing where it did nothing."""
        if not self._acts:
            return ""
        more = len(self._acts) - _TOLD
        return (
            "The guard saw the training overfit to its own attack (catastrophic overfitting): "
            + ". ".join(self._acts[:_TOLD])
            + (f". And {more} times more." if more > 0 else ".")
        )

    def state_dict(self) -> dict[str, Any]:
        """Where a resumed training could go back to, and what was done."""
        return {"guard": self._guard.state_dict(), "acts": list(self._acts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        acts = state["acts"]
        if not isinstance(acts, list) or not all(isinstance(act, str) for act in acts):
            raise RunError("guard: expected a list of what it did under 'acts'")
        self._guard.load_state_dict(state["guard"])
        self._acts = list(acts)


def make_guard(
    recipe: Recipe,
    variant: Variant,
    seams: Seams,
    model: nn.Module,
    average: WeightAverage | None,
    data: ImageData,
) -> EpochGuard | None:
    """The guard of a training on single steps, where the recipe asks for it; None for others."""
    if not (recipe.guard and variant.single_step):
        return None
    # A single-step method is adversarial training whose noise can be raised.
    objective = cast(AdversarialTraining, seams.objective)
    count = min(len(data.train), max(_FEWEST, min(_MOST, len(data.train) // _SHARE)))
    draw = torch.Generator().manual_seed(recipe.seed)
    images, labels = data.train.batch(torch.randperm(len(data.train), generator=draw)[:count])
    return EpochGuard(
        OverfittingGuard(objective.attack.threat),
        TrainingImages(images=images, labels=labels),
        model=model,
        objective=objective,
        optimizer=seams.optimizer,
        average=average,
    )


def is_unguarded(recipe: Recipe) -> bool:
    """Whether the recipe's own training takes single steps, and nothing watches over it."""
    return recipe.variant.single_step and not recipe.guard


class _EpochLoss:
    """The mean training loss of the epoch under way; a class because it adds up."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sum, self._examples = 0.0, 0

    def add(self, losses: torch.Tensor) -> None:
        self._sum += float(losses.sum())
        self._examples += len(losses)

    def mean(self) -> float:
        return self._sum / max(1, self._examples)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "examples": self._examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._examples = float(state["sum"]), int(state["examples"])


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of a recipe, ready to start or to go on.

    `weights` is the digest of the file that it started from, if it did from one.
    """

    recipe: Recipe
    variant: Variant
    data: ImageData
    model: nn.Module
    seams: Seams
    average: WeightAverage | None
    guard: EpochGuard | None
    identity: RunIdentity
    weights: str = ""
    epoch_loss: _EpochLoss = field(default_factory=_EpochLoss)

    def run(
        self,
        *,
        start_step: int,
        save: Callable[[Mapping[str, Any], int], None],
        record: Callable[[EpochRecord, int], None],
        stop: StopRequest,
    ) -> bool:
        """Trains to the end of the schedule, or until a stop is requested; whether it is complete.

        The model then holds the averaged weights. `save` takes a state and how many noised steps it
        may show, `record` an epoch and how many were released until its end.
        """
        schedule = self.seams.schedule
        with training_progress(self.variant.name, steps=schedule.steps, done=start_step) as line:
            step = train(
                self.model,
                self.seams.objective,
                self.seams.batches(start_step),
                self.seams.update,
                optimizer=self.seams.optimizer,
                schedule=schedule,
                monitor=_Monitor(self, line, save, record),
                average=self.average,
                stop=stop,
                start_step=start_step,
            )
        complete = step >= schedule.steps or self._spent
        if not complete or schedule.epoch_ended(step) is None:
            save(self.state(step), self.released)
        if complete:
            self._finish_model()
        return complete

    def state(self, step: int) -> dict[str, Any]:
        """Everything needed to go on after `step` steps, as tensors and plain values."""
        parts: dict[str, Any] = {
            "variant": self.variant.name,
            "step": step,
            "settings": self.recipe.to_dict(),
            "run": self.identity.to_dict(),
            "fingerprint": self.identity.fingerprint(self.data),
            "model": dict(self.model.state_dict()),
            "optimizer": self.seams.optimizer.state_dict(),
            "weights": self.weights,
        }
        if self.seams.private is not None:
            parts["skipped"] = self.seams.private.steps - step
        if self._persons:
            parts["persons"] = self._persons
        for name, part in self._stateful().items():
            parts[name] = part.state_dict()
        return parts

    def restore(self, state: Mapping[str, Any]) -> int:
        """Goes back to a state; returns its number of steps."""
        stateful = self._stateful()
        try:
            self._check_same(state)
            self.model.load_state_dict(state["model"])
            self.seams.optimizer.load_state_dict(state["optimizer"])
            for name, part in stateful.items():
                part.load_state_dict(state[name])
            return int(state["step"])
        except (SecureCNNError, privacy.PrivacyError, defenses.DefenseError):
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise RunError(
                f"checkpoint: it does not fit this training: {error}; "
                "start the run anew with --force"
            ) from error

    def epsilon(self) -> float | None:
        """The epsilon spent so far; None when the training is not private."""
        return None if self.seams.private is None else self.seams.private.spent()

    @property
    def released(self) -> int:
        """Noised steps that its weights may show."""
        return 0 if self.seams.private is None else self.seams.private.steps

    @property
    def _spent(self) -> bool:
        """Whether no private step is left: earlier than the schedule where some were lost."""
        private = self.seams.private
        return private is not None and private.steps >= private.plan.steps

    def _stateful(self) -> dict[str, _Stateful]:
        parts = {
            "average": self.average,
            "guard": self.guard,
            "objective": self.seams.objective,
            "private": self.seams.private,
            # Epsilon does not cover the losses of private examples: they are shown, never written.
            "epoch_loss": self.epoch_loss if self.seams.private is None else None,
        }
        return {name: part for name, part in parts.items() if isinstance(part, _Stateful)}

    def _check_same(self, state: Mapping[str, Any]) -> None:
        """Refuses the state of another variant, or of other settings; the folder may have moved."""
        if state["variant"] != self.variant.name:
            raise RunError(
                f"checkpoint: expected a training of {self.variant.name}, got {state['variant']}"
            )
        self.recipe.check_unchanged(state["settings"])
        if state.get("weights", "") != self.weights:
            raise RunError(
                "checkpoint: it started from other weights than those in the file now; put the "
                "file back that it started from"
            )
        if state.get("persons", "") != self._persons:
            raise RunError(
                f"checkpoint: it was trained with other persons than {self.recipe.data} has now; "
                "put the folders, or the file of persons, back as they were"
            )

    @property
    def _persons(self) -> str:
        """Whose the images are, where persons are protected: others would make another epsilon."""
        return persons_digest(self.data) if self.recipe.unit == "person" else ""

    def _finish_model(self) -> None:
        """Leaves the model as it will be used: with the averaged weights, and no layer replaced."""
        if self.average is not None:
            self.average.write_to(self.model)
        if self.seams.private is not None:
            self.seams.private.detach()


class _Monitor:
    """Watches one training; a class because it remembers when the epoch began."""

    def __init__(
        self,
        training: Training,
        line: TrainingProgress,
        save: Callable[[Mapping[str, Any], int], None],
        record: Callable[[EpochRecord, int], None],
    ) -> None:
        self._training, self._line, self._save, self._record = training, line, save, record
        self._started = time.monotonic()

    def batch(self, losses: torch.Tensor, *, step: int) -> None:
        """Moves the bar and adds up the losses."""
        self._training.epoch_loss.add(losses)
        self._line.advance(losses, step=step)

    def epoch(self, epoch: int, *, step: int) -> None:
        """Guards, evaluates on the test images, writes the epoch down and saves the state."""
        training = self._training
        acted = "" if training.guard is None else training.guard.end_epoch(epoch)
        seconds = time.monotonic() - self._started
        found = self._evaluated()
        epsilon = training.epsilon()
        self._record(
            EpochRecord(
                variant=training.variant.name,
                epoch=epoch,
                step=step,
                seconds=seconds,
                learning_rate=training.seams.schedule.at(step - 1),
                test_loss=found.loss if found.loss is not None else float("nan"),
                test_accuracy=found.accuracy,
                train_loss=None if epsilon is not None else training.epoch_loss.mean(),
                epsilon=epsilon,
            ),
            training.released,
        )
        told = [f"accuracy {100 * found.accuracy:.1f} %"]
        told += [] if epsilon is None else [f"ε {epsilon:.2f}"]
        told += [f"guard acted in {acted}"] if acted else []
        self._line.tell(", ".join(told))
        training.epoch_loss.reset()
        self._save(training.state(step), training.released)
        self._started = time.monotonic()

    def _evaluated(self) -> ClassificationReport:
        """The test figures of the weights that would be kept if training ended here."""
        training = self._training
        test, classes = training.data.test, training.data.spec.classes
        if training.average is None:
            return evaluate_model(training.model, test, classes)
        with training.average.applied(training.model) as model:
            return evaluate_model(model, test, classes)
