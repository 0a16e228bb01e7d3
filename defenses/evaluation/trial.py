"""An evaluation under way: which images still stand, attack by attack and batch by batch."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from rich.progress import Progress
from torch import Tensor, nn

from defenses.attacks.attack import Attack
from defenses.errors import EvaluationError
from defenses.evaluation.examples import AdversarialExamples
from defenses.evaluation.images import ImageSource
from defenses.evaluation.journal import digest_of
from defenses.evaluation.progress import counted
from defenses.evaluation.remembered import FOOLED, SURVIVED, UNTRIED, Remembered
from defenses.evaluation.repeated import REPEATS, Answers, check_repeats, moved
from defenses.quantities import shown
from defenses.scope import answer_to, attack_scope, check_logits, home_of
from defenses.threat import ThreatModel

__all__ = ["Trial", "derived_seed"]

_EXAMPLES = 8
_OUTCOMES: Mapping[int, bool | None] = {FOOLED: False, SURVIVED: True, UNTRIED: None}


@final
class Trial:
    """Predictions on the clean images, then the attacks' outcomes, one batch after the other.

    What happens to a batch follows from the seed, the attack and the batch's number alone, so a
    trial that starts from the `content` of an interrupted one ends as that would have.

    Attributes:
        indices: Which images of the data set, [n].
        labels: True classes of the chosen images, [n].
        predictions: What the model sees in them, [n].
        classes: How many it tells apart.
        images: SHA-256 of the images, as float32, and their labels.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ImageSource,
        indices: Tensor,
        threat: ThreatModel,
        *,
        batch_size: int,
        seed: int,
        examples: int | None = _EXAMPLES,
        bar: Progress,
        draws: int = REPEATS,
    ) -> None:
        if examples is not None and (type(examples) is not int or examples < 0):
            raise EvaluationError(f"examples: expected a number of images, got {shown(examples)}")
        self._kept = len(indices) if examples is None else examples
        self._model, self._source, self._indices = model, source, indices
        self.indices = indices
        self._threat, self._batch_size = threat, batch_size
        self._seed, self._bar, self._draws = seed, bar, 1
        self.labels = source.labels(indices)
        self.classes = 0
        self._rows: dict[str, list[str]] = {"clean": [""] * len(indices)}
        digests, predictions = [], []
        for number, part in self._batches("clean", torch.arange(len(indices))):
            images = source.images(indices[part])
            digests.append(digest_of(images.float()))
            # Once more, about every image: a model may answer at random for some alone.
            usual, other = self._answers(self._at_home(images), f"clean/{number}", 2)
            predictions.append(usual.argmax(1).cpu())
            self._draws = draws if bool(moved(usual, other).any()) else self._draws
        self.images = digest_of(*digests, self.labels)
        self.predictions = torch.cat(predictions)
        if self.random:
            self.predictions = torch.cat(list(self._clean()))
        self._correct = self.predictions == self.labels
        if self.random:  # while any draw is right there is something to find
            self._correct = torch.tensor(["1" in row for row in self._rows["clean"]])
        self._first = set(self._correct.nonzero().flatten()[: self._kept].tolist())
        self._outcomes: dict[str, Tensor] = {}
        self._shown: dict[int, tuple[Tensor, int]] = {}

    @property
    def random(self) -> bool:
        """Whether the model answers otherwise when it is asked about the images once more."""
        return self._draws > 1

    def resume(self, content: Mapping[str, Any], *, names: Sequence[str], exhaustive: bool) -> None:
        """Takes over what `content` of an interrupted trial with these attacks holds.

        Raises:
            EvaluationError: The model no longer answers as it did, or no trial leaves this.
        """
        if content.get("predictions") != self.predictions.tolist():
            raise EvaluationError(
                "state: the model sees other classes in the clean images than when it was written; "
                "give another path"
            )
        found = Remembered.read(content, names=names, correct=self._correct, exhaustive=exhaustive)
        if found.shown:
            clean = self._source.images(self._indices[list(found.shown)])
            clean = self._at_home(clean).cpu()
            found.check_shown(clean, classes=self.classes, threat=self._threat)
        self._outcomes, self._shown = dict(found.outcomes), dict(found.shown)
        asked = self._rows["clean"]
        try:
            self._rows = {name: list(rows) for name, rows in dict(content["draws"]).items()}
            check_repeats(self.repeats(list(self._outcomes)), self.outcomes(), len(self.labels))
        except (KeyError, TypeError, ValueError, EvaluationError) as error:
            raise EvaluationError(
                "state: it has no draws that fit the outcomes; give another path"
            ) from error
        if self.random and self._rows["clean"] != asked:
            raise EvaluationError(
                "state: the model is right in other draws of the clean images than when it was "
                "written; give another path"
            )

    def content(self) -> dict[str, Any]:
        """What `resume` needs, as JSON-able values."""
        return {
            "predictions": self.predictions.tolist(),
            "draws": self.repeats(list(self._outcomes)),
            "outcomes": {name: row.tolist() for name, row in self._outcomes.items()},
            "shown": {
                str(position): (
                    list(image.shape),
                    base64.b64encode(image.numpy().tobytes()).decode(),
                    prediction,
                )
                for position, (image, prediction) in self._shown.items()
            },
        }

    def attack(self, name: str, search: Attack, *, exhaustive: bool) -> Iterator[None]:
        """Runs one attack on the images that still stand, or on all that were right at first.

        Args:
            exhaustive: Whether to try those too that another attack has fooled.

        Yields:
            After each batch, when `content` has it.
        """
        standing = self._correct if exhaustive else self._standing(before=name)
        row = self._outcomes.setdefault(
            name, torch.full_like(self.labels, UNTRIED, dtype=torch.int8)
        )
        for number, part in self._batches(name, standing.nonzero().flatten()):
            if int(row[part[0]]) != UNTRIED:
                continue
            seed = derived_seed(self._seed, f"{name}/{number}")
            images = self._at_home(self._source.images(self._indices[part]))
            labels = self.labels[part].to(images.device)
            adversarial = search(self._model, images, labels, seed=seed)
            predictions = self._predict(adversarial, f"{name}/{number}/found", part, name)
            right = predictions == self.labels[part]
            if self.random:
                right = torch.tensor(["1" in self._rows[name][each] for each in part.tolist()])
            row[part] = right.to(torch.int8)
            self._show(part, adversarial, predictions)
            yield

    def repeats(self, names: Sequence[str]) -> dict[str, Answers]:
        """Of a model that answers at random, by `"clean"` and attack: which draws were right."""
        if not self.random:
            return {}
        none = [""] * len(self.labels)
        return {name: tuple(self._rows.get(name, none)) for name in ("clean", *names)}

    def outcomes(self) -> dict[str, tuple[bool | None, ...]]:
        """By attack: did each image survive it; None where it was not tried."""
        return {
            name: tuple(_OUTCOMES[value] for value in row.tolist())
            for name, row in self._outcomes.items()
        }

    def examples(self) -> AdversarialExamples | None:
        """Some images that were fooled and some that were not; None when none was attacked."""
        if not self._shown:
            return None
        fooled = [position for position in self._shown if self._is_fooled(position)]
        others = [position for position in self._shown if position not in fooled]
        enough = max(self._kept // 2, self._kept - len(others))
        positions = sorted((fooled[:enough] + others)[: self._kept])
        shown = [self._shown[position] for position in positions]
        return AdversarialExamples(
            indices=self._indices[positions],
            clean=self._source.images(self._indices[positions]).cpu().float(),
            adversarial=torch.stack([image for image, _ in shown]),
            labels=self.labels[positions],
            predictions=torch.tensor([prediction for _, prediction in shown]),
        )

    def _show(self, part: Tensor, adversarial: Tensor, predictions: Tensor) -> None:
        """Keeps the first images as the last attack left them, and enough that were fooled."""
        for row, position in enumerate(part.tolist()):
            fooled = int(predictions[row]) != int(self.labels[position])
            if position in self._shown and self._is_fooled(position):
                continue
            wanted = fooled and sum(map(self._is_fooled, self._shown)) < self._kept
            if wanted or position in self._first:
                image = adversarial[row].detach().cpu().float()
                self._shown[position] = (image, int(predictions[row]))

    def _is_fooled(self, position: int) -> bool:
        """Whether the image that is kept for this position fooled the model."""
        return self._shown[position][1] != int(self.labels[position])

    def _standing(self, *, before: str) -> Tensor:
        """The images that no attack has fooled, of those that come before this one, [n]."""
        standing = self._correct.clone()
        for name, row in self._outcomes.items():
            if name == before:
                break
            standing &= row != FOOLED
        return standing

    def _at_home(self, images: Tensor) -> Tensor:
        """The images where the model is, and in its dtype."""
        device, dtype = home_of(self._model, images)
        return images.to(device=device, dtype=dtype)

    def _predict(self, images: Tensor, where: str, part: Tensor, name: str) -> Tensor:
        """The classes that the model sees most often, on the CPU, [k]; which draws were right."""
        seen = [answer.argmax(1).cpu() for answer in self._answers(images, where, self._draws)]
        if not self.random:
            return seen[0]
        right = torch.stack(seen, dim=1) == self.labels[part][:, None]
        rows = self._rows.setdefault(name, [""] * len(self.labels))
        for position, draws in zip(part.tolist(), right.tolist(), strict=True):
            rows[position] = "".join("01"[each] for each in draws)
        return torch.stack(seen).mode(0).values

    def _clean(self) -> Iterator[Tensor]:
        """What is seen most often in the clean images, batch by batch."""
        for number, part in self._batches("clean, drawn", torch.arange(len(self._indices))):
            images = self._at_home(self._source.images(self._indices[part]))
            yield self._predict(images, f"clean/{number}", part, "clean")

    def _answers(self, images: Tensor, where: str, draws: int) -> list[Tensor]:
        """The model's logits, draw by draw, [k, classes]."""
        with attack_scope(self._model, seed=derived_seed(self._seed, where)), torch.no_grad():
            found = [
                check_logits(
                    answer_to(self._model, images, EvaluationError),
                    count=len(images),
                    largest_label=int(self.labels.max()),
                    error=EvaluationError,
                )
                for _ in range(draws)
            ]
        self.classes = found[0].shape[1]
        return found

    def _batches(self, title: str, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The positions in numbered batches, counted off on the bar as they are done."""
        parts = torch.split(positions, self._batch_size)
        yield from enumerate(counted(self._bar, title, parts))


def derived_seed(seed: int, where: str) -> int:
    """The seed of one place of an evaluation: another for every name, in [0, 2**63)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{where}".encode()).digest()[:8], "big") >> 1
