"""What the standard robustness evaluation costs, and whether it says what the reference says.

`pyautoattack`, the packaged reference of AutoAttack, is no dependency: where it is not installed
its rows are missing. Batches are judged by both in turn, so that drift meets both alike.
"""

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import defenses
from defenses import ThreatModel
from defenses.attacks.autoattack import ensemble
from secure_cnn.bench.step import Workload
from secure_cnn.bench.timing import measured_row, ratios, share_row
from secure_cnn.errors import RunError
from secure_cnn.record import Row

__all__ = ["Judge", "autoattack", "judges", "measure_robustness", "pyautoattack"]

Judge = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a model, images and labels to whether each image withstands, booleans, [n]."""


def judges(threat: ThreatModel, *, seed: int = 0) -> dict[str, Judge]:
    """Our AutoAttack in `linf`, `l2` or `l1`, and the reference where it is installed, by variant.

    The reference gets the model in torch's own memory format, as its users have it, and once more
    channels-last, which is the format that ours asks in.
    """
    found: dict[str, Judge] = {"autoattack": partial(autoattack, threat=threat, seed=seed)}
    if find_spec("pyautoattack") is None:
        return found
    reference = partial(pyautoattack, threat=threat, seed=seed)
    return found | {
        "pyautoattack": partial(reference, memory_format=torch.contiguous_format),
        "pyautoattack-channels-last": partial(reference, memory_format=torch.channels_last),
    }


def autoattack(
    model: nn.Module, images: Tensor, labels: Tensor, *, threat: ThreatModel, seed: int
) -> Tensor:
    """Which images withstand the standard ensemble, each attack taking what the last one left."""
    standing = _correct(model, images, labels)
    for attack in ensemble(threat):
        rows = standing.nonzero().flatten()
        if len(rows) == 0:
            break
        found = attack(model, images[rows], labels[rows], seed=seed)
        standing[rows] = _correct(model, found, labels[rows])
    return standing


def pyautoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    seed: int,
    memory_format: torch.memory_format,
) -> Tensor:
    """The same by the reference, in one batch, with a copy of the model in a memory format.

    Its parameters need no gradients here, which spares it work, and the global random states that
    it seeds are put back. It takes for granted that pixels are in [0, 1].
    """
    try:
        from pyautoattack import autoattack as reference  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise RunError("pyautoattack is not installed; `pip install pyautoattack`") from error
    if threat.bounds != (0.0, 1.0):
        raise RunError(f"pyautoattack: expected pixels in [0, 1], got {threat.bounds}")
    model = copy.deepcopy(model).to(memory_format=memory_format)
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
    with defenses.attack_scope(model, seed=seed):
        judge = reference.AutoAttack(model, norm=norm, eps=threat.eps, seed=seed)
        found, _ = judge.run_standard_evaluation(images, labels, batch_size=len(images))
    return _correct(model, found, labels)


def measure_robustness(
    load: Workload,
    variants: Mapping[str, Judge],
    *,
    batch_size: int = 100,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Has every batch judged by each variant in turn, and compares them with the first.

    There are rows of the `time` for a batch and of the `robust_accuracy` of each variant; for each
    but the first the `time_ratio` of the first to it, and the `agreement` of their verdicts. Shares
    come with their 95 % Wilson intervals.
    """
    model = copy.deepcopy(load.model).to(memory_format=load.memory_format).eval()
    every = torch.arange(len(load.split))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    verdicts: dict[str, list[Tensor]] = {name: [] for name in variants}
    for number, indices in enumerate(torch.split(every, batch_size)):
        images, labels = load.split.batch(indices)
        # Every other batch in the reverse order: what is warm by then is warm for both.
        for name in list(variants)[:: -1 if number % 2 else 1]:
            start = clock()
            verdicts[name].append(variants[name](model, images, labels))
            seconds[name].append(clock() - start)
    return _rows(load.case, seconds, {name: torch.cat(each) for name, each in verdicts.items()})


def _rows(
    case: str, seconds: Mapping[str, list[float]], verdicts: Mapping[str, Tensor]
) -> list[Row]:
    first, rows = next(iter(seconds)), []
    count = len(verdicts[first])
    for name, own in seconds.items():
        rows.append(measured_row(case, name, "time", own, "s"))
        rows.append(share_row(case, name, "robust_accuracy", int(verdicts[name].sum()), count))
        if name != first:
            rows.append(measured_row(case, name, "time_ratio", ratios(seconds[first], own), "x"))
            alike = int((verdicts[first] == verdicts[name]).sum())
            rows.append(share_row(case, name, "agreement", alike, count))
    return rows


def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = model(images).argmax(1) == labels
    return right
