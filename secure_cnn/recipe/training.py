"""One training of a run: watched, written down after every epoch, and able to go on.

What the checkpoint holds is what makes a resumed training give what the uninterrupted one would
have given: weights, their average, optimizer, the attack's generator, the losses of the epoch under
way, and of a private training its ledger in their place. Its noise and its samples are fresh by
design.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

import defenses
import privacy
from secure_cnn.data import ImageData
from secure_cnn.engine import WeightAverage, train
from secure_cnn.errors import RunError, SecureCNNError
from secure_cnn.evaluate import evaluate_model
from secure_cnn.interruption import StopRequest
from secure_cnn.progress import TrainingProgress, training_progress
from secure_cnn.recipe.guard import EpochGuard
from secure_cnn.recipe.identity import RunIdentity
from secure_cnn.recipe.seams import Seams, batches_for
from secure_cnn.recipe.settings import Recipe, Variant
from secure_cnn.record import EpochRecord

__all__ = ["Training"]


@runtime_checkable
class _Stateful(Protocol):
    """What has a state to be saved."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class _EpochLoss:
    """The mean training loss of the epoch under way; a class because it adds up."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins an epoch."""
        self._sum, self._examples = 0.0, 0

    def add(self, losses: torch.Tensor) -> None:
        """Takes a batch's losses [n] in."""
        self._sum += float(losses.sum())
        self._examples += len(losses)

    def mean(self) -> float:
        """Of what was taken in since the last reset."""
        return self._sum / max(1, self._examples)

    def state_dict(self) -> dict[str, Any]:
        """The sum so far, so that a resumed epoch reports the whole epoch's mean."""
        return {"sum": self._sum, "examples": self._examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self._sum, self._examples = float(state["sum"]), int(state["examples"])


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, ready to start or to go on.

    Attributes:
        recipe: The recipe.
        variant: Which of its trainings.
        data: The images.
        model: The network, on its device.
        seams: Objective, batches, update.
        average: The moving average of the weights, where the recipe wants one.
        guard: Against catastrophic overfitting, where it was asked for.
        memory_format: Layout of the network and the images.
        identity: Of the run, for the states.
        epoch_loss: The losses of the epoch under way.
    """

    recipe: Recipe
    variant: Variant
    data: ImageData
    model: nn.Module
    seams: Seams
    average: WeightAverage | None
    guard: EpochGuard | None
    memory_format: torch.memory_format
    identity: RunIdentity
    epoch_loss: _EpochLoss = field(default_factory=_EpochLoss)

    def run(
        self,
        *,
        start_step: int,
        save: Callable[[Mapping[str, Any]], None],
        record: Callable[[EpochRecord], None],
        stop: StopRequest,
    ) -> bool:
        """Trains to the end of the schedule, or until a stop is requested.

        Returns:
            Whether the training is complete; then the model holds the averaged weights.

        Raises:
            RunError: The training diverged.
        """
        schedule, device = self.seams.schedule, next(self.model.parameters()).device
        with training_progress(self.variant.name, steps=schedule.steps, done=start_step) as line:
            monitor = _Monitor(self, line, save, record)
            step = train(
                self.model,
                self.seams.objective,
                batches_for(
                    self.recipe,
                    self.variant,
                    self.seams,
                    self.data,
                    device=device,
                    memory_format=self.memory_format,
                    start_step=start_step,
                ),
                self.seams.update,
                optimizer=self.seams.optimizer,
                schedule=schedule,
                monitor=monitor,
                average=self.average,
                stop=stop,
                start_step=start_step,
            )
        complete = step >= schedule.steps or self._spent
        if not complete or schedule.epoch_ended(step) is None:
            save(self.state(step))
        if complete:
            self._settle()
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
        }
        if self.seams.private is not None:
            parts["skipped"] = self.seams.private.steps - step
        for name, part in self._stateful().items():
            parts[name] = part.state_dict()
        return parts

    def restore(self, state: Mapping[str, Any]) -> int:
        """Goes back to a state; returns its number of steps.

        Raises:
            RunError: The state is of another training.
            PlanError: The state's privacy plan is another one.
        """
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
        """What the training has spent so far; None when it is not private."""
        return None if self.seams.private is None else self.seams.private.spent()

    @property
    def _spent(self) -> bool:
        """Whether no private step is left: earlier than the schedule where some were lost."""
        private = self.seams.private
        return private is not None and private.steps >= private.plan.steps

    def _stateful(self) -> dict[str, _Stateful]:
        """The parts that have a state, by name."""
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
        changed = self.recipe.changed_from(state["settings"])
        if changed:
            raise RunError(
                f"checkpoint: it was trained with another {', '.join(changed)}; resume with the "
                "settings it was trained with"
            )

    def _settle(self) -> None:
        """Leaves the model as it will be used: with the averaged weights, and no layer replaced."""
        if self.average is not None:
            self.average.settle(self.model)
        if self.seams.private is not None:
            self.seams.private.detach()


class _Monitor:
    """Watches one training; a class because it remembers when the epoch began."""

    def __init__(
        self,
        training: Training,
        line: TrainingProgress,
        save: Callable[[Mapping[str, Any]], None],
        record: Callable[[EpochRecord], None],
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
        acted = "" if training.guard is None else training.guard.settle(epoch)
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
            )
        )
        told = [f"accuracy {100 * found.accuracy:.1f} %"]
        told += [] if epsilon is None else [f"ε {epsilon:.2f}"]
        told += [f"guard acted in {acted}"] if acted else []
        self._line.tell(", ".join(told))
        training.epoch_loss.reset()
        self._save(training.state(step))
        self._started = time.monotonic()

    def _evaluated(self) -> Any:
        """The test figures of the weights that would be kept if training ended here."""
        training = self._training
        test, classes = training.data.test, training.data.spec.classes
        if training.average is None:
            return evaluate_model(training.model, test, classes)
        with training.average.applied(training.model) as model:
            return evaluate_model(model, test, classes)
