"""An evaluation under way: its attacks by name, and which images still stand after each batch.

A state file that names the right model, images and attacks may still hold outcomes that no
evaluation gives: images broken that were never attacked, or shown ones that are outside of the
ball. Those are refused. What is consistent is believed: who can write the file can write that every
image survived.
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from defenses.attacks.adaptive import custom_attack
from defenses.attacks.attack import Attack
from defenses.attacks.autoattack import Preset, ensemble
from defenses.attacks.by_name import attack, bears_our_name
from defenses.errors import EvaluationError
from defenses.evaluation.report import AdversarialExamples
from defenses.measuring.counting import Answers, check_repeats
from defenses.measuring.journal import digest_of
from defenses.measuring.measurement import Measurement, checked_logits, moved
from defenses.quantities import described, shown
from defenses.scope import attack_scope
from defenses.shape import SHAPES
from defenses.threat import ThreatModel

__all__ = ["Crafter", "Trial", "named_attacks"]

Crafter = Callable[[nn.Module, Tensor, Tensor], Tensor]

_ENSEMBLES: Mapping[str, Preset] = {
    "autoattack": "standard",
    "autoattack-plus": "plus",
    "autoattack-rand": "rand",
}
_NO_SEQUENCE = (str, bytes, Tensor, np.ndarray)
_FOOLED, _SURVIVED, _UNTRIED = 0, 1, -1  # as state files hold them
_OUTCOMES: Mapping[int, bool | None] = {_FOOLED: False, _SURVIVED: True, _UNTRIED: None}


def named_attacks(
    attacks: Sequence[str | Attack | Crafter] | None, threat: ThreatModel, *, draws: int = 1
) -> dict[str, Attack]:
    """The attacks in order by the name in a report; the second of one name is numbered.

    The name `"autoattack"` becomes the members of the ensemble, None those of the quick one.
    """
    if attacks is None:
        attacks = [
            attack(each.name, threat, draws=draws, **each.settings)  # type: ignore[arg-type]
            for each in ensemble(threat, "quick")
        ]
    alone = isinstance(attacks, _NO_SEQUENCE) or not isinstance(attacks, Iterable)
    given = [] if alone else list(attacks)
    if not given:
        raise EvaluationError(f"attacks: expected a sequence of at least one, got {shown(attacks)}")
    named: dict[str, Attack] = {}
    for found in [member for each in given for member in _members(each, threat)]:
        if found.threat != threat or found.radius > threat.eps:
            raise EvaluationError(
                f"{found!r} reaches {found.radius:g}; expected an attack on {threat}"
                + ("; n-fgsm is for training" if found.name == "n-fgsm" else "")
            )
        if found.name == "clean":
            raise EvaluationError("attacks: clean is what the images are called; name it otherwise")
        # A state file or a report would be taken for one of the attack that has the name.
        if bears_our_name(found):
            raise EvaluationError(
                f"attacks: {found.name} is an attack of this package, got another of that name; "
                "name yours otherwise, by its class attribute `name` or by "
                "custom_attack(..., name=...)"
            )
        taken = sum(name.partition(" #")[0] == found.name for name in named)
        named[f"{found.name} #{taken + 1}" if taken else found.name] = found
    return named


@final
class Trial:
    """Predictions on the clean images, then the attacks' outcomes, one batch after the other.

    What happens to a batch follows from the seed, the attack and the batch's number alone, so a
    trial that starts from the `content` of an interrupted one ends as that would have. Its `images`
    are the SHA-256 of the images, as float32, and their labels.
    """

    def __init__(self, measurement: Measurement, *, examples: int | None, draws: int) -> None:
        if examples is not None and (type(examples) is not int or examples < 0):
            raise EvaluationError(f"examples: expected a number of images, got {shown(examples)}")
        self._measurement, self._draws = measurement, 1
        self.indices = measurement.indices
        self._kept = len(self.indices) if examples is None else examples
        self.labels = measurement.source.labels(self.indices)
        self.classes = 0
        self._rows: dict[str, list[str]] = {"clean": [""] * len(self.indices)}
        self.images, self.predictions = self._look(draws)
        if self.random:
            self.predictions = torch.cat(list(self._clean()))
        self._correct = self.predictions == self.labels
        if self.random:  # while any draw is right there is something to find
            self._correct = torch.tensor(["1" in row for row in self._rows["clean"]])
        self._first = set(self._correct.nonzero().flatten()[: self._kept].tolist())
        self._outcomes: dict[str, Tensor] = {}
        self._shown: dict[int, tuple[Tensor, int]] = {}

    def _look(self, draws: int) -> tuple[str, Tensor]:
        """The digest of images and labels, and what the model sees; whether it answers at random.

        It is asked twice about every image, for a model may answer at random for some alone.
        """
        digests, predictions = [], []
        for number, part in self._batches("clean", torch.arange(len(self.indices))):
            images = self._measurement.source.images(self.indices[part])
            digests.append(digest_of(images.float()))
            with _grey_images_told(images):
                usual, other = self._answers(
                    self._measurement.at_home(images), f"clean/{number}", 2
                )
            predictions.append(usual.argmax(1).cpu())
            self._draws = draws if bool(moved(usual, other).any()) else self._draws
        return digest_of(*digests, self.labels), torch.cat(predictions)

    @property
    def random(self) -> bool:
        """Whether the model answers otherwise when it is asked about the images once more."""
        return self._draws > 1

    def resume(self, content: Mapping[str, Any], *, names: Sequence[str], exhaustive: bool) -> None:
        """Takes over what `content` of an interrupted trial with these attacks holds.

        Refused where the model no longer answers as it did, and where no trial leaves this.
        """
        if content.get("predictions") != self.predictions.tolist():
            raise EvaluationError(
                "state: the model sees other classes in the clean images than when it was written; "
                "give another path"
            )
        found = _Remembered.read(content, names=names, correct=self._correct, exhaustive=exhaustive)
        if found.shown:
            clean = self._images(list(found.shown)).cpu()
            found.check_shown(clean, classes=self.classes, threat=self._measurement.threat)
        self._outcomes, self._shown = dict(found.outcomes), dict(found.shown)
        drawn = self._rows["clean"]
        try:
            self._rows = {name: list(rows) for name, rows in dict(content["draws"]).items()}
            check_repeats(self.repeats(list(self._outcomes)), self.outcomes(), len(self.labels))
        except (KeyError, TypeError, ValueError, EvaluationError) as error:
            raise EvaluationError(
                "state: it has no draws that fit the outcomes; give another path"
            ) from error
        if self.random and self._rows["clean"] != drawn:
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
        """Runs one attack on the images that still stand; if exhaustive, on all right at first.

        Yields after each batch, when `content` has it.
        """
        standing = self._correct if exhaustive else self._standing(before=name)
        untried = torch.full_like(self.labels, _UNTRIED, dtype=torch.int8)
        row = self._outcomes.setdefault(name, untried)
        for number, part in self._batches(name, standing.nonzero().flatten()):
            if int(row[part[0]]) != _UNTRIED:
                continue
            images, seed = self._images(part), self._measurement.seed_of(f"{name}/{number}")
            labels = self.labels[part].to(images.device)
            adversarial = search(self._measurement.model, images, labels, seed=seed)
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
            indices=self.indices[positions],
            clean=self._measurement.source.images(self.indices[positions]).cpu().float(),
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
        return self._shown[position][1] != int(self.labels[position])

    def _standing(self, *, before: str) -> Tensor:
        """The images that no attack has fooled, of those that come before this one, [n]."""
        standing = self._correct.clone()
        for name, row in self._outcomes.items():
            if name == before:
                break
            standing &= row != _FOOLED
        return standing

    def _images(self, positions: Tensor | list[int]) -> Tensor:
        return self._measurement.at_home(self._measurement.source.images(self.indices[positions]))

    def _predict(self, images: Tensor, where: str, part: Tensor, name: str) -> Tensor:
        """The classes seen most often, on the CPU, [k]; notes which draws were right."""
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
        for number, part in self._batches("clean, drawn", torch.arange(len(self.indices))):
            images = self._images(part)
            yield self._predict(images, f"clean/{number}", part, "clean")

    def _answers(self, images: Tensor, where: str, draws: int) -> list[Tensor]:
        model, largest = self._measurement.model, int(self.labels.max())
        with attack_scope(model, seed=self._measurement.seed_of(where)), torch.no_grad():
            found = [checked_logits(model, images, largest_label=largest) for _ in range(draws)]
        self.classes = found[0].shape[1]
        return found

    def _batches(self, title: str, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from enumerate(self._measurement.batches(title, positions))


@final
@dataclass(frozen=True, kw_only=True)
class _Remembered:
    outcomes: Mapping[str, Tensor]  # by attack, int8, [n] each
    shown: Mapping[int, tuple[Tensor, int]]  # by position, an image and the class seen in it

    @classmethod
    def read(
        cls, content: Mapping[str, Any], *, names: Sequence[str], correct: Tensor, exhaustive: bool
    ) -> "_Remembered":
        """What a state file holds, refused where no evaluation with these attacks leaves it."""
        try:
            rows = dict(content["outcomes"])
            shown = {int(key): _image(each) for key, each in dict(content["shown"]).items()}
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise _forged(f"it cannot be read ({error!r})") from error
        if not all(0 <= position < len(correct) for position in shown):
            raise _forged(f"it shows images that are none of the {len(correct)}")
        if list(rows) != list(names)[: len(rows)]:
            raise _forged(f"it has outcomes of {list(rows)}, the attacks are {list(names)}")
        outcomes = {name: _row(name, row, len(correct)) for name, row in rows.items()}
        standing = correct.clone()
        for number, (name, row) in enumerate(outcomes.items()):
            if bool(((row != _UNTRIED) & ~standing).any()):
                raise _forged(f"{name} is said to have attacked images that it is not tried on")
            if number < len(outcomes) - 1 and bool(((row == _UNTRIED) & standing).any()):
                raise _forged(f"{name} is unfinished, and yet others came after it")
            standing = standing if exhaustive else standing & (row != _FOOLED)
        return cls(outcomes=outcomes, shown=shown)

    def check_shown(self, clean: Tensor, *, classes: int, threat: ThreatModel) -> None:
        """Refuses what no attack on these clean images, in the order of `shown`, gives."""
        for image, (position, (found, prediction)) in zip(clean, self.shown.items(), strict=True):
            if found.shape != image.shape or not 0 <= prediction < classes:
                raise _forged(f"image {position} is shown in another shape, or as no class")
            if not bool(threat.contains(image[None], found[None].to(image.dtype)).all()):
                raise _forged(f"image {position} is shown outside of the ball")


def _row(name: str, row: object, count: int) -> Tensor:
    known = {_FOOLED, _SURVIVED, _UNTRIED}
    if not isinstance(row, list) or len(row) != count:
        raise _forged(f"{name} has no outcome for each of {count} images")
    if not all(type(value) is int and value in known for value in row):
        raise _forged(f"{name} has outcomes that are none of {sorted(known)}")
    return torch.tensor(row, dtype=torch.int8)


def _image(entry: Sequence[Any]) -> tuple[Tensor, int]:
    """An image as it is written down, and the class seen in it."""
    shape, pixels, prediction = entry
    if type(prediction) is not int:
        raise TypeError(f"expected a class, got {prediction!r}")
    values = np.frombuffer(base64.b64decode(pixels, validate=True), np.float32).copy()
    return torch.from_numpy(values).reshape([int(size) for size in shape]), prediction


def _forged(reason: str) -> EvaluationError:
    return EvaluationError(
        f"state: no evaluation with these attacks leaves it: {reason}; give another path"
    )


def _members(given: str | Attack | Crafter, threat: ThreatModel) -> tuple[Attack, ...]:
    if isinstance(given, str):
        preset = _ENSEMBLES.get(given)
        return ensemble(threat, preset) if preset else (attack(given, threat),)
    if not callable(given):
        raise EvaluationError(f"attacks: expected a name or a callable, got {shown(given)}")
    return (given if isinstance(given, Attack) else custom_attack(given, threat),)


@contextmanager
def _grey_images_told(images: Tensor) -> Iterator[None]:
    """Names the shape where a model fails on [n, h, w]: recordings, or images without a channel."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if images.ndim != 3:
            raise
        raise EvaluationError(
            f"data: expected {SHAPES}, as the model takes them; got {list(images.shape)}, on which "
            f"it failed ({described(error)}); give grey images their channel: images.unsqueeze(1)"
        ) from error
