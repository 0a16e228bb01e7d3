"""A training under way, every part of it timed.

The loop is the engine's own, shortened to what costs time; the seams are wrapped from outside, so
what is timed is the code that trains. Of a private step the weight gradients are formed in
`clipping`; `backward` is what leads to them. Free adversarial training crafts in `backward`.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

import privacy
from privacy.clipping.watch import admitted
from secure_cnn.bench.protection import Protection, Saver
from secure_cnn.bench.step import ENDLESS, Workload, attached
from secure_cnn.bench.timing import Marks, Stopwatch
from secure_cnn.data import ShuffledBatches
from secure_cnn.engine import CrossEntropy, MeanUpdate, Update, WeightAverage, on_device

__all__ = ["TimedTraining"]


@final
@admitted
class TimedTraining:
    """Trains `model`, a copy of the workload's, under a protection; `stopwatch` times the parts.

    A private training (`private`, else None) gets GroupNorm in the place of BatchNorm, by
    `privacy.fix`, and a `batch_size` that holds on average.
    """

    def __init__(
        self,
        load: Workload,
        protection: Protection,
        folder: Path,
        marks: Marks,
        *,
        batch_size: int,
        epochs: int = ENDLESS,
        learning_rate: float = 1e-3,
    ) -> None:
        self.stopwatch = Stopwatch(marks)
        self._objective = copy.deepcopy(protection.objective)
        copied = copy.deepcopy(load.model)
        self.model = (privacy.fix(copied) if protection.private else copied).train()
        self.model.to(memory_format=load.memory_format)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate, momentum=0.9)
        self.private: privacy.PrivateTraining | None = None
        self._update: Update = MeanUpdate(self._optimizer)
        source: Any = ShuffledBatches(load.split, batch_size=batch_size, epochs=epochs, seed=0)
        if protection.private:
            self.private = attached(
                load, self.model, self._optimizer, batch_size=batch_size, epochs=epochs
            )
            self.private.check_objective(self._objective)
            self._update, source = self.private.step, self.private.batches
        device = next(self.model.parameters()).device
        self._batches = on_device(source, device, load.memory_format)
        self._average: WeightAverage | None = None
        if protection.average_decay is not None:
            self._average = WeightAverage(self.model, decay=protection.average_decay)
        self._saver: Saver | None = None
        if protection.saver is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._saver = protection.saver(folder)
            # A training that is dropped must not leave its folder locked.
            self._release = weakref.finalize(self, self._saver.close)
        self._wrap_seams()

    def stretch(self, steps: int) -> dict[str, float]:
        """Saves, if it saves at all, takes so many steps, and waits for what is still saved.

        Ends in a StopIteration where the data or the plan end before.
        """
        with self.stopwatch.part("other"):
            self._save()
            self._train(steps)
            self._wait()
        return self.stopwatch.take()

    def advance(self, *, save: bool) -> float:
        """Takes one step, after it began a save if asked to, which may go on beside later steps."""
        with self.stopwatch.part("other"):
            if save:
                self._save()
            self._train(1)
        return sum(self.stopwatch.take().values())

    @contextmanager
    def as_kept(self) -> Iterator[nn.Module]:
        """Gives the model as it would be kept if training ended now: with the averaged weights."""
        if self._average is None:
            yield self.model
        else:
            with self._average.applied(self.model) as averaged:
                yield averaged

    def close(self) -> None:
        """Ends the saves; the training cannot go on."""
        if self._saver is not None:
            self._release()

    def _train(self, steps: int) -> None:
        """So many optimizer steps; several batches may make one."""
        done = 0
        while done < steps:
            done += self._step()

    def _step(self) -> bool:
        watch = self.stopwatch
        crafts = not isinstance(self._objective, CrossEntropy)
        with watch.part("data"):
            images, labels = next(self._batches)
        with watch.part("attack" if crafts else "forward"):
            losses = self._objective(self.model, images, labels)
        with watch.part("other" if self.private else "backward"):
            stepped = self._update(losses)
        if stepped and self._average is not None:
            with watch.part("averaging"):
                self._average.update(self.model)
        return stepped

    def _wrap_seams(self) -> None:
        """Puts the stopwatch where a part begins and ends inside of a seam."""
        watch = self.stopwatch
        self.model.register_forward_pre_hook(self._enter_forward)
        self.model.register_forward_hook(self._leave_forward)
        watch.wrap(self._optimizer, "step", "optimizer")
        if self.private is not None:
            clipped = self.private._clipped
            watch.wrap(clipped, "gradients_of", "backward")
            watch.wrap(clipped, "_add_clipped", "clipping")
            watch.wrap(clipped, "noised_mean", "noise")

    def _enter_forward(self, model: nn.Module, _: object) -> None:
        """An attack runs the model in evaluation mode: that is no forward pass of the training."""
        if model.training:
            self.stopwatch.enter("forward")

    def _leave_forward(self, model: nn.Module, _: object, __: object) -> None:
        if model.training:
            self.stopwatch.leave()

    def _save(self) -> None:
        if self._saver is None:
            return
        with self.stopwatch.part("saving"):
            state: dict[str, Any] = {
                "model": dict(self.model.state_dict()),
                "optimizer": self._optimizer.state_dict(),
            }
            for name, part in (("private", self.private), ("average", self._average)):
                if part is not None:
                    state[name] = part.state_dict()
            self._saver.save(state)

    def _wait(self) -> None:
        if self._saver is not None:
            with self.stopwatch.part("saving"):
                self._saver.wait()
