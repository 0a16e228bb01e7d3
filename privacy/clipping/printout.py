"""What a private training does at each layer, as text: the way taken, its time, the slow path."""

from typing import Protocol, runtime_checkable

from privacy.clipping.fallback import FallbackRule
from privacy.clipping.layers import Installation, LayerRule
from privacy.clipping.tuner import Choice, Tuner

__all__ = ["describe"]


@runtime_checkable
class _Tuned(Protocol):
    """A rule whose kernels a tuner chooses."""

    tuner: Tuner


def describe(installation: Installation) -> str:
    """One line a layer and input shape: name, type, kernel, and its milliseconds where timed.

    Complete after a backward pass at the real size; before one, no layer has seen a shape. Numbers
    of examples are left out: a Poisson sample's size is not covered by epsilon.
    """
    table = [("layer", "type", "input", "kernel", "ms")]
    for name, rule in installation.rules.items():
        kind = type(installation.layers[name]).__name__
        table += [(name, kind, *cells) for cells in _ways(name, rule)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for *cells, milliseconds in table:
        left = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
        lines.append("  ".join([*left, milliseconds.rjust(widths[-1])]))
    return "\n".join(lines)


def _ways(name: str, rule: LayerRule) -> list[tuple[str, str, str]]:
    """Input, kernel and milliseconds of every shape that a layer has seen."""
    if isinstance(rule, FallbackRule):
        return [("-", "SLOW PATH: torch.func runs it again for each example", "-")]
    seen = rule.tuner.choices if isinstance(rule, _Tuned) else ()
    largest: dict[tuple[int, ...], Choice] = {}
    for choice in (choice for choice in seen if choice.layer == name):
        shape, examples = choice.inputs[1:], choice.inputs[0]
        if shape not in largest or examples > largest[shape].inputs[0]:
            largest[shape] = choice
    if not largest:
        return [("-", "the layer's own", "-")]
    return [_way(choice) for choice in largest.values()]


def _way(choice: Choice) -> tuple[str, str, str]:
    """One choice's input without its examples, kernel and milliseconds."""
    seconds = choice.seconds.get(choice.kernel)
    milliseconds = "not timed" if seconds is None else f"{1e3 * seconds:.2f}"
    return "x".join(map(str, choice.inputs[1:])), choice.kernel, milliseconds
