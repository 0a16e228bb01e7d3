"""`PrivateTraining`: a private training under way, from its first sample to the plan's last step.

It is made by `attach`, which refuses what would void the guarantee.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from privacy.batch import images_of, mapped
from privacy.clipping.factors import LARGEST_NORM, SMALLEST_NORM, AdaptiveClipping
from privacy.clipping.registry import describe
from privacy.errors import BudgetExceeded, PlanError, StepError
from privacy.ledger import Ledger
from privacy.loading import Loader, Reading, worker_ended
from privacy.noise import SecureGenerator
from privacy.objectives import check_declared, few_examples, keeps_apart
from privacy.persons import Persons
from privacy.plan import DPPlan
from privacy.sampling import PhysicalBatch, PhysicalBatches, cut, sample_indices
from privacy.step import LockedIterator, Prepared, RefusingLock, release
from privacy.validate import shown

__all__ = ["PrivateTraining"]

_KEPT = ("plan", "model", "optimizer")


class PrivateTraining:
    """A private training under way; made by `attach`.

    A class because it owns the secret generator and the ledger.

    Attributes:
        plan: The plan it follows.
        model: The model itself, not a wrapper: it trains, evaluates and is attacked as before.
        optimizer: The optimizer given.
        non_finite: Examples (persons, where they are the unit) so far whose gradient was not finite
            and counted as zero. Not covered by epsilon: do not publish.

    Example:
        >>> import torch
        >>> from privacy import attach
        >>> model = torch.nn.Linear(4, 2)
        >>> plan = DPPlan(samples=8, batch_size=4, epochs=1, noise_multiplier=1.0, delta=0.01)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> attach(plan, model, optimizer, [(torch.rand(4), 0)] * 8)
        PrivateTraining(step 0 of 2, noise_multiplier=1, max_grad_norm=1)
    """

    def __init__(
        self,
        plan: DPPlan,
        prepared: Prepared,
        reading: Reading,
        physical_batches: PhysicalBatches,
        generator: SecureGenerator,
        ledger: Ledger,
        persons: Persons | None = None,
    ) -> None:
        self.plan, self.model, self.optimizer = plan, prepared.model, prepared.reserved.optimizer
        self.non_finite = 0
        self._prepared, self._clipped = prepared, prepared.clipped
        self._reading, self._physical_batches = reading, physical_batches
        self._persons = persons
        self._generator, self._ledger = generator, ledger
        self._device = next(iter(prepared.parameters.values())).device
        self._pending: PhysicalBatch | None = None
        self._images: Tensor | None = None
        self._stepping = False
        self._iteration: _Iteration | None = None
        self._lock = RefusingLock()
        # Last: what fails before it leaves no file behind that is locked.
        ledger.bind(plan)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _KEPT and name in vars(self):
            raise StepError(f"{name}: a private training keeps the one it has; attach another anew")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"PrivateTraining(step {self.steps} of {plan.steps}, "
            f"noise_multiplier={plan.noise_multiplier:g}, "
            f"max_grad_norm={self.max_grad_norm:g})"
        )

    def __reduce_ex__(self, protocol: object) -> Any:
        raise StepError("a private training cannot be copied: its sample would be released twice")

    @property
    def max_grad_norm(self) -> float:
        """The clipping norm of the present step: the plan's, unless the clipping is adaptive."""
        return self._clipped.max_grad_norm

    @property
    def steps(self) -> int:
        """Noised steps taken so far."""
        return self._ledger.steps

    @property
    def ledger(self) -> Ledger:
        """Everything spent so far."""
        return self._ledger

    @property
    def batches(self) -> Iterator[Any]:
        """The physical batches of all remaining steps; give each one's losses to `step`.

        Each has the structure of the data set's examples, `(images, labels)` or another one, on the
        model's device. A sample that an earlier iteration left unfinished is dropped: it was never
        released, so it costs nothing. One iteration at a time goes on; one that an error broke off
        while it read says so, and does not end as if all were done.
        """
        return LockedIterator(_Iteration(self), self._lock)

    def step(self, losses: Tensor) -> bool:
        """Clips each example of the last batch; steps the optimizer when the sample is complete.

        With K augmented copies of each example the copies' gradients are averaged before clipping
        (De et al. 2022, arXiv 2204.13650), which costs no privacy: an example is clipped once.
        Column k of the losses is copy k, so row i may hold losses of example i only. The copies of
        an example are adjacent rows of what the layers see, as `repeat_interleave` puts them; or
        the model is called K times on `rows` rows, and the losses are stacked in dimension 1.

        Where the plan's unit is a person, rows are examples all the same, and one loss a row is
        given: the gradients of a person's rows are averaged here, before that mean is clipped.

        Args:
            losses: One loss for each row of the batch that `batches` gave last, float [rows], or
                one for each of K copies of each row, float [rows, K].

        Returns:
            Whether the optimizer stepped.

        Raises:
            StepError: The training was detached, there is no batch to step on, the losses do not
                fit it, another thread is in a step, other parameters are trainable than when the
                model was attached, or a worker that reads the data set ended meanwhile.
            UnsupportedLayer: A layer went back to mixing examples, or cannot be recorded.
            BudgetExceeded: The plan's steps are spent.
        """
        try:
            grad_mode = torch.is_grad_enabled()
            try:
                with self._lock:
                    return self._step(losses)
            finally:
                # What a signal raises may come while torch.no_grad() ends.
                torch.set_grad_enabled(grad_mode)
        except Exception as error:
            if ended := worker_ended(error):
                raise ended from error
            raise

    def spent(self, delta: float | None = None) -> float:
        """Epsilon of everything spent so far, at `delta` or at the plan's own."""
        return self._ledger.epsilon(self.plan.delta_or_own(delta))

    def describe(self) -> str:
        """One line for each layer: its kernel and milliseconds, or that it is on the slow path."""
        return describe(self._prepared.installation)

    def check_objective(self, objective: object, *, examples: Any = None) -> bool:
        """Refuses an objective `(model, images, labels) -> losses` whose examples depend on others.

        It is given the model and the parts of a batch, or a batch that is no tuple as it is.

        It must say that they do not, by `per_example = True`, and is put to the proof on
        `examples`, five of the data set by default (`privacy.objectives`), at no cost in epsilon;
        what shows only for other weights or in rare batches can pass. False where it could not be
        tested, so that only its declaration speaks for it. A loss that is written into the loop is
        seen by nobody: put it into a function, and have that checked.
        """
        check_declared(objective)
        examples = (
            few_examples(self._reading.dataset, self._reading.collate)
            if examples is None
            else examples
        )
        return keeps_apart(objective, self.model, examples)

    def state_dict(self) -> dict[str, Any]:
        """The plan, the ledger and the clipping norm as plain values; no key or generator state.

        Where the plan's unit is a person, also a digest of whose each example is. It is not covered
        by epsilon: do not publish it.
        """
        persons = {} if self._persons is None else {"persons": self._persons.digest()}
        return {
            "plan": self.plan.to_dict(),
            "ledger": self._ledger.to_list(),
            "max_grad_norm": self.max_grad_norm,
            **persons,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken: epsilon never falls, noise and sampling are fresh.

        What was spent afterwards is the state's or what was spent here, whichever is more, and both
        where neither came from the other: see `Ledger.resume`. Refused is a state of another plan,
        of other persons, or of steps that the plan does not take or more than it has. Where this
        raises, nothing changed.
        """
        norm = _clipping_norm(state, self.plan)
        if self._persons is not None and state.get("persons") != self._persons.digest():
            raise PlanError(
                "groups: the checkpoint was trained with examples divided among persons in another "
                "way than here, or does not say how, so that its steps were about other persons; "
                "attach with the groups and the data set, in its order, of then"
            )
        with self._lock:
            self._prepared.check_attached()
            self._ledger.resume(state.get("ledger"), most=self.plan.steps)
            self._clipped.max_grad_norm = norm
            self._drop_sample()

    def detach(self) -> None:
        """Gives every layer its own forward back, and the ledger's file; no step can follow.

        Workers that read ahead are ended.
        """
        self._prepared.undo()
        self._end_workers()
        self._ledger.close()

    def _step(self, losses: Tensor) -> bool:
        self._prepared.check_attached()
        batch = self._pending
        self._refuse_interrupted()
        if batch is None:
            raise StepError(
                "there is no batch to step on: take one from private.batches and call step once "
                "for it"
            )
        if self.steps >= self.plan.steps:
            raise BudgetExceeded(
                f"the plan's {self.plan.steps} steps are spent; the next one was not taken"
            )
        self._prepared.check()
        mask = batch.mask()
        parts = self._clipped.gradients_of(losses, mask, self._images, batch.shares())
        # From here to the end the sample is lost if anything interrupts: what was added, or
        # released, must not be added again.
        self._stepping = True
        self.non_finite += self._clipped.keep(parts, mask)
        self._pending, self._images = None, None
        if batch.last:
            release(
                self._prepared,
                self._generator,
                self.plan.event(steps=1),
                record=self._ledger.record,
                batch_size=self.plan.batch_size,
            )
            self.optimizer.zero_grad()
        self._stepping = False
        return batch.last

    def _draw(self) -> Iterator[PhysicalBatch]:
        """Draws the samples of the plan's remaining steps, each cut into physical batches."""
        for _ in range(self.plan.steps - self.steps):
            sample = sample_indices(
                self._generator, samples=self.plan.samples, sampling_rate=self.plan.sampling_rate
            )
            yield from self._cut(sample)

    def _begin(self, iteration: "_Iteration") -> Loader:
        """Makes an iteration the one that goes on, and gives it what loads its batches."""
        self._prepared.check_attached()
        self._drop_sample()
        self._iteration = iteration
        return Loader(self._reading, self._draw(), pin=self._device.type == "cuda")

    def _check_next(self, iteration: "_Iteration") -> None:
        """Refuses the next batch where the last one was not stepped on, or samples would mix."""
        # A loop that detaches after the plan's last step has nothing left to be refused.
        if self.steps < self.plan.steps:
            self._prepared.check_attached()
        if self._iteration is not iteration:
            raise StepError(
                "another iteration of private.batches was begun, or a state loaded: the "
                "samples of two iterations must not mix; go on with the newer one"
            )
        self._refuse_interrupted()
        if self._pending is not None:
            raise StepError(
                "the last batch was not given to private.step: a sample counts whole or not at all"
            )

    def _give(self, batch: PhysicalBatch, examples: Any) -> Any:
        """A physical batch on the model's device, of which the next step will be."""
        # Without waiting: only what `Loader` pinned is copied beside the computation.
        given = mapped(lambda t: t.to(self._device, non_blocking=True), examples)
        self._pending, self._images = batch, images_of(given)
        return given

    def _cut(self, sample: Tensor) -> list[PhysicalBatch]:
        """The physical batches of a sample, of examples or of persons."""
        most = self.plan.images_per_person
        if self._persons is None or most is None:
            return cut(sample, self._physical_batches)
        return self._persons.cut(sample, self._physical_batches, self._generator, most=most)

    def _refuse_interrupted(self) -> None:
        """Refuses to go on with a sample of which a part may have been added, or all released."""
        if self._stepping:
            raise StepError(
                "the last step was interrupted, so its sample is lost: an example must not be "
                "added twice; begin the next one with a new iteration of private.batches"
            )

    def _end_workers(self) -> None:
        if self._iteration is not None and self._iteration.loader is not None:
            self._iteration.loader.close()

    def _drop_sample(self) -> None:
        """Forgets a sample that was begun; the iteration that drew it cannot go on."""
        with self._lock:
            self._pending, self._images = None, None
            self._end_workers()
            self._iteration = None
            self._clipped.reset()
            self._stepping = False


class _Iteration:
    """One iteration of `PrivateTraining.batches`.

    A class because a generator in which an error is raised ends, as if the plan were done.
    """

    def __init__(self, training: PrivateTraining) -> None:
        self._training = training
        self.loader: Loader | None = None
        self._broken = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        training = self._training
        if self.loader is None:
            self.loader = training._begin(self)
        else:
            training._check_next(self)
        if self._broken:
            raise StepError(
                "an error broke this iteration of private.batches off while it read a batch: the "
                "sample is dropped and costs nothing; go on with a new iteration of "
                "private.batches, once what caused it is mended"
            )
        # Not an except clause: a second Ctrl-C would interrupt that too.
        self._broken = True
        try:
            loaded = next(self.loader, None)
            given = None if loaded is None else training._give(*loaded)
        except Exception as error:
            if ended := worker_ended(error):
                raise ended from error
            raise
        self._broken = False
        if loaded is None:
            raise StopIteration
        return given


def _clipping_norm(state: Mapping[str, Any], plan: DPPlan) -> float:
    """The clipping norm of a state of `plan`; one that never changes may be missing in old ones."""
    if not isinstance(state, Mapping):
        raise PlanError(f"expected what state_dict gave, got {type(state).__name__}")
    own = DPPlan.from_dict(state.get("plan"))
    if own != plan:
        raise PlanError(
            f"plan: the checkpoint was trained under {own.to_dict()}, this training plans "
            f"{plan.to_dict()}; resume with the checkpoint's own settings"
        )
    adaptive = isinstance(plan.clipping, AdaptiveClipping)
    norm = state.get("max_grad_norm", None if adaptive else plan.max_grad_norm)
    # An exact type, as in JSON: True is no norm. A NaN fails every comparison.
    valid = type(norm) in (int, float) and (
        SMALLEST_NORM <= norm <= LARGEST_NORM
        if adaptive and state.get("ledger")
        else norm == plan.max_grad_norm
    )
    if not valid:
        raise PlanError(
            "max_grad_norm: expected the clipping norm that the plan had come to, got "
            f"{shown(norm)}"
        )
    return float(norm)
