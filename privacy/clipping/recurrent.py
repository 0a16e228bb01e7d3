"""Recurrent layers: RNN, LSTM and GRU (Hochreiter and Schmidhuber 1997; Cho et al. 2014), unrolled.

A weight that is used at every step has the gradient of all steps together: that of a linear layer
whose positions are the steps. So a step adds zeros whose gradient is that of the gates, and what
the weight had multiplied is kept for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from privacy.clipping.gradients import Parts, Saved
from privacy.clipping.linear import Affine, LinearRule
from privacy.clipping.rules import Record
from privacy.clipping.tuner import Tuner
from privacy.errors import UnsupportedLayer

__all__ = ["RecurrentRule"]

Recurrent = nn.RNN | nn.LSTM | nn.GRU
State = tuple[Tensor, ...]
"""What one direction of one layer keeps: the hidden state [n, width], and an LSTM's cell."""


class RecurrentRule:
    """The rule of one RNN, LSTM or GRU, of any depth and both directions, dropout between layers.

    The values are those of torch's own layer up to rounding. Refused are packed sequences, whose
    rows are not examples, and a sequence without a batch.
    """

    def __init__(self, layer: Recurrent, name: str, tuner: Tuner) -> None:
        self.layer, self.name, self.tuner = layer, name, tuner
        self.parameters = tuple(layer.parameters())
        self._cell = _CELLS[type(layer)]

    def compose(self, record: Record, inputs: Any, states: Any = None) -> tuple[Tensor, Any]:
        """What the layer's `forward` gives: outputs, and the last state of every layer."""
        layer = self.layer
        self._check(inputs)
        sequence = inputs if layer.batch_first else inputs.transpose(0, 1)
        given = self._states(states, sequence)
        last: list[State] = []
        directions = 2 if layer.bidirectional else 1
        for depth in range(layer.num_layers):
            if depth and layer.dropout and layer.training:
                sequence = F.dropout(sequence, layer.dropout)
            outputs = []
            for backward in range(directions):
                suffix = f"l{depth}{'_reverse' * backward}"
                start = given[depth * directions + backward]
                ordered = sequence.flip(1) if backward else sequence
                hidden, state = self._unrolled(record, ordered, start, suffix)
                outputs.append(hidden.flip(1) if backward else hidden)
                last.append(state)
            sequence = torch.cat(outputs, 2)
        kept = tuple(torch.stack(each) for each in zip(*last, strict=True))
        sequence = sequence if layer.batch_first else sequence.transpose(0, 1)
        return sequence, kept if isinstance(layer, nn.LSTM) else kept[0]

    def _check(self, inputs: object) -> None:
        if isinstance(inputs, PackedSequence):
            raise UnsupportedLayer(
                f"{self.name}: rows of a PackedSequence are steps of several examples, and cannot "
                "be clipped example by example; give the padded batch (pad_sequence), and take "
                "each example's output at its own last step: outputs[range(n), lengths - 1]"
            )
        if not isinstance(inputs, Tensor) or inputs.dim() != 3:
            got = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise UnsupportedLayer(
                f"{self.name}: expected a batch of sequences, 3 dimensions, got {got}; give one "
                "example as a batch of one"
            )

    def _states(self, given: Any, sequence: Tensor) -> list[State]:
        """The first state of every layer and direction: zeros, or what was given."""
        layer, rows = self.layer, len(sequence)
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        widths = [layer.proj_size or layer.hidden_size, layer.hidden_size]
        widths = widths if isinstance(layer, nn.LSTM) else widths[:1]
        if given is None:
            return [tuple(sequence.new_zeros(rows, width) for width in widths)] * count
        each = given if isinstance(layer, nn.LSTM) else (given,)
        wanted, got = [(count, rows, width) for width in widths], [tuple(s.shape) for s in each]
        if got != wanted:
            raise UnsupportedLayer(f"{self.name}: expected states of shapes {wanted}, got {got}")
        return list(zip(*(state.unbind(0) for state in each), strict=True))

    def _unrolled(
        self, record: Record, sequence: Tensor, state: State, suffix: str
    ) -> tuple[Tensor, State]:
        """Outputs [n, steps, width] of one direction of one layer, and its last state."""
        of_inputs = record(self._linear("ih", suffix), sequence)
        of_hidden = self._repeated(record, sequence, "hh", suffix)
        shorten: Callable[[Tensor], Tensor] = lambda hidden: hidden  # noqa: E731
        if self.layer.proj_size:
            shorten = self._repeated(record, sequence, "hr", suffix)
        outputs = []
        for gates in of_inputs.unbind(1):
            state = self._cell(self.layer, gates, of_hidden(state[0]), state)
            state = (shorten(state[0]), *state[1:])
            outputs.append(state[0])
        return torch.stack(outputs, 1), state

    def _linear(self, kind: str, suffix: str) -> LinearRule:
        weight = cast(nn.Parameter, getattr(self.layer, f"weight_{kind}_{suffix}"))
        bias = getattr(self.layer, f"bias_{kind}_{suffix}", None) if self.layer.bias else None
        return LinearRule(Affine(weight, bias), self.name, self.tuner)

    def _repeated(
        self, record: Record, sequence: Tensor, kind: str, suffix: str
    ) -> Callable[[Tensor], Tensor]:
        """A linear map that is used once at each step, one step after the other."""
        rule = _AtEachStep(self._linear(kind, suffix), [])
        shifts = iter(record(rule, sequence.detach()).unbind(1))

        def use(hidden: Tensor) -> Tensor:
            rule.seen.append(hidden.detach())
            weight, bias = (None if p is None else p.detach() for p in rule.affine)
            return F.linear(hidden, cast(Tensor, weight), bias) + next(shifts)

        return use


@dataclass
class _AtEachStep:
    """Zeros [n, steps, out], whose gradient is what a linear map needs that is used at each step.

    `seen` is what it multiplied, [n, in] a step.
    """

    linear: LinearRule
    seen: list[Tensor]

    def __post_init__(self) -> None:
        self.parameters = self.linear.parameters

    @property
    def affine(self) -> tuple[Tensor, Tensor | None]:
        return self.linear.layer.weight, self.linear.layer.bias

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return inputs.new_zeros(*inputs.shape[:2], len(self.affine[0])), ()

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        raise AssertionError("its inputs have no gradient")

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        return self.linear.per_example_gradients(torch.stack(self.seen, 1), saved, output_gradient)


def _rnn(layer: Any, of_inputs: Tensor, of_hidden: Tensor, state: State) -> State:
    total = of_inputs + of_hidden
    return (total.tanh() if layer.nonlinearity == "tanh" else total.relu(),)


def _lstm(layer: Any, of_inputs: Tensor, of_hidden: Tensor, state: State) -> State:
    keep, forget, new, show = (of_inputs + of_hidden).chunk(4, 1)
    cell = forget.sigmoid() * state[1] + keep.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _gru(layer: Any, of_inputs: Tensor, of_hidden: Tensor, state: State) -> State:
    (reset, update, new), (reset_h, update_h, new_h) = of_inputs.chunk(3, 1), of_hidden.chunk(3, 1)
    candidate = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return (candidate + (update + update_h).sigmoid() * (state[0] - candidate),)


_CELLS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor, State], State]] = {
    nn.RNN: _rnn,
    nn.LSTM: _lstm,
    nn.GRU: _gru,
}
