"""What a training gets that nobody chose, each by one rule; docs/defaults.md shows results.

The rules look at how many images there are, never at the images: in a private training that would
cost.

**A hundred steps.** Nothing learns in six, however many images each of them sees. So a step has as
many images as leave a hundred steps, within bounds: at least 16, for a mean to be one; at most
what a processor is fastest with (128), or in a private training half of the data and 2048.

**Private steps.** Noise is spread over the weights in proportion to sigma / (batch * sqrt(steps)).
At a given epsilon that falls as batches grow, since sigma grows more slowly than they do: few
steps are good for the noise and bad for the training, and a hundred is where both go. A step is as
long as its rate times the clipping norm (all gradients are longer than 1 at first), so the rate is
given for a norm of 1; and where bounds leave more steps they are shorter ones.

**Private heads.** Where nothing changes the images, a private training without a model of its own
takes `handcrafted`: its budget goes to a linear layer, whose features cost nothing. Steps are then
on as many images as leave a hundred, up to all; the rate falls with the root of the noise.

**Plain steps.** The first fully connected layer of a network has thousands of inputs, and a rate
that suits its convolutions throws it off in the first steps, after which every image is called one
class. Gradients longer than `CLIP_GRAD_NORM` are therefore shortened to it.
"""

import math
from collections.abc import Mapping
from typing import Any

from secure_cnn.errors import RunError
from secure_cnn.handcrafted import handcrafted_features
from secure_cnn.recipe.ranges import Optimizer

__all__ = ["CLIP_GRAD_NORM", "MOST_FEATURES", "PENALTIES", "RIDGE_MODEL", "batch_size"]
__all__ += ["check_same", "delta", "learning_rate", "model"]

MOST_FEATURES = 1 << 30
"""Features of all images that are kept in memory, as float32: those of 60,000 colour images of
32x32 behind the front of the model `scattering` are as many. With as much again for all else they
fit a machine of 8 GiB."""
CLIP_GRAD_NORM = 1.0
"""Largest norm of a plain step's mean gradient."""
RIDGE_MODEL = "nonexpansive"
PENALTIES: Mapping[str, float] = {"nonexpansive": 1e-3, "scattering": 1e-3, "handcrafted": 10.0}
"""Of a ridge head, by network: the best power of 10 on training images of Fashion-MNIST that were
kept back (8,000, and 48,000 to train on; of `handcrafted` 4,000 and 26,000)."""
_SMALLEST_SIDE = 8
_STEPS = 100
_SMALLEST_BATCH = 16
_PLAIN_BATCH, _PRIVATE_BATCH = 128, 2048
_PLAIN_RATES: Mapping[Optimizer, float] = {"sgd": 0.1, "adamw": 2e-3, "muon": 0.1}
"""That of Muon in a private training too: its filters' steps are as long, whatever the noise is."""
_PRIVATE_RATES: Mapping[Optimizer, tuple[float, float, float]] = {
    "sgd": (0.25, 0.5, 75.0),
    "adamw": (2e-3, 1e-2, 1.0),
}
"""The smallest, the largest, and in between what rate and number of steps multiply to."""
_HEAD, _USUAL = "handcrafted", "compact"
_HEAD_RATE = 0.15
"""What a private head's rate and the root of its noise multiply to."""
_LARGEST_DELTA = 1e-5
_SINCE = "clip_grad_norm"
"""A setting that is written down since the rules are what they are."""


def model(images: int, shape: tuple[int, int, int], *, head: bool) -> str:
    """The network for so many images; `head` where a private one would do with its last layer."""
    fits = (
        min(shape[1:]) >= _SMALLEST_SIDE and images * handcrafted_features(*shape) <= MOST_FEATURES
    )
    return _HEAD if head and fits else _USUAL


def batch_size(samples: int, epochs: int, *, private: bool, model: str = _USUAL) -> int:
    """Images a step, in a private training those expected."""
    wanted = max(_SMALLEST_BATCH, samples * epochs // _STEPS)
    if private and model == _HEAD:
        return min(wanted, samples)
    if private:
        return max(1, min(wanted, samples // 2, _PRIVATE_BATCH))
    return max(1, min(wanted, samples, _PLAIN_BATCH))


def learning_rate(
    optimizer: Optimizer,
    *,
    steps: int,
    max_grad_norm: float | None = None,
    model: str = _USUAL,
    noise: float = 0.0,
) -> float:
    """At its peak; with the clipping norm of a private training, or None without.

    `noise` is that of a step, as a share of what its images can add up to.
    """
    if max_grad_norm is None or optimizer == "muon":
        return _PLAIN_RATES[optimizer]
    if model == _HEAD and optimizer == "sgd" and noise:
        return _HEAD_RATE / math.sqrt(noise) / max_grad_norm
    low, high, way = _PRIVATE_RATES[optimizer]
    # AdamW's steps are as long as its rate, whatever the gradients are.
    norm = max_grad_norm if optimizer == "sgd" else 1.0
    return min(high, max(low, way / steps)) / norm


def delta(samples: int) -> float:
    """The smaller of 1e-5 and a tenth of 1 / samples: what is less than one example's share."""
    return min(_LARGEST_DELTA, 0.1 / samples)


def check_same(settings: Mapping[str, Any], where: str) -> None:
    """Refuses to go on with a run whose unset settings had other values than they have now."""
    if _SINCE not in settings:
        raise RunError(
            f"{where}: the run was begun by an earlier version, which chose learning rate, batch "
            "size and gradient clipping otherwise; finish it with that version, or start it anew "
            "with --force"
        )
