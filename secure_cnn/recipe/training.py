"""One training of a run: watched, written down after every epoch, and able to go on.

What the checkpoint holds is what makes a resumed training give what the uninterrupted one would
have given: weights, their average, optimizer, the attack's generator, the losses of the epoch under
way, and of a private training its ledger in their place. Its noise and its samples are fresh by
design.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

import defenses
import privacy
from secure_cnn.data import ImageData
from secure_cnn.engine import WeightAverage, train
from secure_cnn.errors import RunError, SecureCNNError
from secure_cnn.evaluate import ClassificationReport, batch_for, evaluate_model
from secure_cnn.interruption import StopRequest
from secure_cnn.progress import TrainingProgress, training_progress
from secure_cnn.recipe.front import FrozenFront
from secure_cnn.recipe.guard import EpochGuard
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.persons import persons_digest
from secure_cnn.recipe.seams import Seams
from secure_cnn.recipe.settings import Recipe
from secure_cnn.recipe.variant import Variant
from secure_cnn.record import ChosenRecord, EpochRecord

__all__ = ["Training"]


@runtime_checkable
class _Stateful(Protocol):
    """A part of a training whose state is saved with it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


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

    What is trained is `trained`: the `model`, or what of it stands behind its frozen `front`, with
    which it shares its layers. `twin` is the same network as a file is read into: it gets the
    weights that are judged. `weights` is the digest of the file that it started from, if any.
    """

    recipe: Recipe
    variant: Variant
    data: ImageData
    model: nn.Module
    trained: nn.Module
    twin: nn.Module
    front: FrozenFront | None
    seams: Seams
    average: WeightAverage | None
    guard: EpochGuard | None
    identity: RunIdentity
    weights: str = ""
    clock: Callable[[], float] = time.monotonic
    epoch_loss: _EpochLoss = field(default_factory=_EpochLoss)

    def run(
        self,
        *,
        start_step: int,
        save: Callable[[Mapping[str, Any], int], None],
        record: Callable[[EpochRecord, int], None],
        tell: Callable[[EpochRecord], None],
        stop: StopRequest,
    ) -> bool:
        """Trains to the end of the schedule, or until a stop is requested; whether it is complete.

        The model then holds the averaged weights. `save` takes a state and how many noised steps it
        may show, `record` an epoch and how many were released until its end; `tell` gets the epoch
        too, once its state is saved. A state is saved at the end of each epoch, and within one
        whenever the recipe's `checkpoint_minutes` are over.

        Raises:
            Stopped: A stop was requested before the first step, while images went through `front`.
        """
        if self.front is not None:
            self.front.fill(stop)
        schedule, private = self.seams.schedule, self.seams.private
        told = "" if private is None else _plan_words(private.plan)
        with training_progress(
            self.variant.name, steps=schedule.steps, done=start_step, told=told
        ) as line:
            step = train(
                self.trained,
                self.seams.objective,
                self.seams.batches(start_step),
                self.seams.update,
                optimizer=self.seams.optimizer,
                schedule=schedule,
                monitor=_Monitor(self, line, save, record, tell, step=start_step),
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
            "chosen": self._chosen,
            "run": self.identity.to_dict(),
            "fingerprint": self.identity.fingerprint(self.data),
            **self.identity.heap_fingerprints(self.data),
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
            self._check_finite()
            return int(state["step"])
        except (SecureCNNError, privacy.PrivacyError, defenses.DefenseError):
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise RunError(
                f"checkpoint: it does not fit this training: {error}; "
                "start the run anew with --force"
            ) from error

    def judged(self) -> nn.Module:
        """The model as its file gives it back, in evaluation mode; the next call changes it too.

        In another memory layout GroupNorm rounds otherwise, and where its groups hold few values
        what follows makes whole predictions of that: one model would have two figures.
        """
        self.twin.load_state_dict(self.model.state_dict())
        return self.twin.eval()

    def epsilon(self) -> float | None:
        """The epsilon spent so far; None when the training is not private."""
        return None if self.seams.private is None else self.seams.private.spent()

    @property
    def released(self) -> int:
        """Noised steps that its weights may show."""
        return 0 if self.seams.private is None else self.seams.private.steps

    @property
    def _chosen(self) -> dict[str, Any]:
        """What the recipe's settings came to, whoever chose it: another version may do so anew."""
        schedule = self.seams.schedule
        return {"learning_rate": schedule.peak, "steps": schedule.steps}

    @property
    def chosen(self) -> ChosenRecord:
        """The same for the record, with what else the variant came to."""
        recipe, private = self.recipe, self.seams.private
        size = recipe.batch_size_for(self.variant, len(self.data.train))
        if private is not None:
            size = round(private.plan.sampling_rate * private.plan.samples)
        return ChosenRecord(
            variant=self.variant.name,
            batch_size=size,
            **self._chosen,
            delta=None if private is None else private.plan.delta,
            attack=self.variant.method,
        )

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
            "epoch_loss": self.epoch_loss if self.recipe.epsilon is None else None,
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
        if state["chosen"] != self._chosen:
            raise RunError(
                f"checkpoint: it was trained with {state['chosen']}, which another version chose, "
                f"and this one chooses {self._chosen}; resume with that version, or start the run "
                "anew with --force"
            )
        if state.get("persons", "") != self._persons:
            raise RunError(
                f"checkpoint: it was trained with other persons than {self.recipe.data} has now; "
                "put the folders, or the file of persons, back as they were"
            )

    def _check_finite(self) -> None:
        """Refuses weights, and their average, that no training goes on from."""
        weights = dict(self.model.named_parameters())
        averages = {} if self.average is None else self.average.state_dict()["averages"]
        parts = {
            "model": weights,
            "average": {name: each for name, each in averages.items() if name in weights},
        }
        broken = [
            f"{part}.{name}"
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
            if not bool(tensor.isfinite().all())
        ]
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise RunError(
                f"checkpoint: the state holds values that are not finite, in {broken[0]}{more}: "
                "that training had diverged, or the file was changed; start the run anew with "
                "--force, with a lower learning rate if it had diverged"
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


def _plan_words(plan: privacy.DPPlan) -> str:
    """What batch size and epochs come to in a private training, before its first step."""
    return (
        f"private training: {plan.sampling_rate * plan.samples:.0f} of {plan.samples} "
        f"{plan.unit}s a step expected, {plan.steps} steps, noise multiplier "
        f"{plan.noise_multiplier:.3g}; at the same epsilon more epochs are more steps with more "
        "noise in each, and a smaller batch size is more steps, in which the noise weighs more"
    )


class _Monitor:
    """Watches one training; a class because it remembers when epoch and last checkpoint were."""

    def __init__(
        self,
        training: Training,
        line: TrainingProgress,
        save: Callable[[Mapping[str, Any], int], None],
        record: Callable[[EpochRecord, int], None],
        tell: Callable[[EpochRecord], None],
        *,
        step: int,
    ) -> None:
        self._training, self._line = training, line
        self._save, self._record, self._tell = save, record, tell
        self._started = self._saved = training.clock()
        self._step = step

    def batch(self, losses: torch.Tensor, *, step: int) -> None:
        """Moves the bar, adds up the losses, and saves the state where its time has come."""
        training = self._training
        training.epoch_loss.add(losses)
        self._line.advance(losses, step=step)
        stepped, self._step = step != self._step, step
        # Between the physical batches of a private sample there is no state to go on from, and at
        # the end of an epoch it is saved anyway.
        if stepped and training.seams.schedule.epoch_ended(step) is None and self._due():
            self._save_state(step)

    def _due(self) -> bool:
        minutes = self._training.recipe.checkpoint_minutes
        return 0 < minutes <= (self._training.clock() - self._saved) / 60

    def _save_state(self, step: int) -> None:
        self._save(self._training.state(step), self._training.released)
        self._saved = self._training.clock()

    def epoch(self, epoch: int, *, step: int) -> None:
        """Guards, evaluates on the test images, writes the epoch down and saves the state."""
        training = self._training
        acted = "" if training.guard is None else training.guard.end_epoch(epoch)
        seconds = training.clock() - self._started
        found = self._evaluated()
        epsilon = training.epsilon()
        written = EpochRecord(
            variant=training.variant.name,
            epoch=epoch,
            step=step,
            seconds=seconds,
            learning_rate=training.seams.schedule.at(step - 1),
            test_loss=found.loss if found.loss is not None else float("nan"),
            test_accuracy=found.accuracy,
            # Of the baseline neither: it is of the same private images.
            train_loss=training.epoch_loss.mean() if training.recipe.epsilon is None else None,
            epsilon=epsilon,
        )
        self._record(written, training.released)
        told = [f"accuracy {100 * found.accuracy:.1f} %"]
        told += [] if epsilon is None else [f"ε {epsilon:.2f}"]
        told += [f"guard acted in {acted}"] if acted else []
        self._line.tell(", ".join(told))
        training.epoch_loss.reset()
        self._save_state(step)
        self._tell(written)
        self._started = training.clock()

    def _evaluated(self) -> ClassificationReport:
        """The test figures of the weights that would be kept if training ended here."""
        training = self._training
        average, front = training.average, training.front
        test, classes = training.data.test, training.data.spec.classes
        with nullcontext() if average is None else average.applied(training.trained):
            if front is not None:
                # Their features are there; the finished model is judged on the images.
                return evaluate_model(training.trained, front.test, classes)
            model = training.judged()
        return evaluate_model(model, test, classes, batch_size=batch_for(model, test))
