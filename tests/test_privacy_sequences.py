"""Attention and recurrent layers: their rules against one example at a time; refusals."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gradients import check, close, drawn, filled
from torch import Tensor, nn

from privacy import UnsupportedLayer
from privacy.clipping import rule_of
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape


def sequences(examples: int = 3, steps: int = 5, width: int = 4) -> Tensor:
    return drawn(examples, steps, width)


class First(nn.Module):
    """What a layer gives first, called in one way."""

    def __init__(self, layer: nn.Module, call: Any) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.call(self.layer, inputs)
        return outputs[0] if isinstance(outputs, tuple) else outputs


def masked(layer: nn.Module, x: Tensor, **more: Any) -> Any:
    """With padding in the first two examples, and no look ahead."""
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[:, -1] = x[:, 0, 0] > 0
    ahead = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) < 0
    return layer(x, x, x, key_padding_mask=padding, attn_mask=ahead, **more)


ATTENTION: dict[str, tuple[dict[str, Any], Any]] = {
    "self": ({}, lambda layer, x: layer(x, x, x)),
    "no weights": ({}, lambda layer, x: layer(x, x, x, need_weights=False)),
    "both outputs": (
        {},
        lambda layer, x: torch.cat(
            [each.flatten(1) for each in layer(x, x, x, average_attn_weights=False)], 1
        ),
    ),
    "no bias": ({"bias": False}, lambda layer, x: layer(x, x, x)),
    "cross": ({}, lambda layer, x: layer(x, x.sin(), x.cos())),
    "memory": ({}, lambda layer, x: layer(x[:, :3], *[x.sin()] * 2)),
    "other widths": (
        {"kdim": 3, "vdim": 2},
        lambda layer, x: layer(x, x[..., :3], x[..., 1:3], need_weights=False),
    ),
    "masks": ({}, masked),
    "masks, no weights": ({}, lambda layer, x: masked(layer, x, need_weights=False)),
    "zeros": ({"add_zero_attn": True}, masked),
    "second": (
        {"batch_first": False},
        lambda layer, x: layer(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
    ),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_gives_each_examples_gradient_and_torchs_values(kind: str) -> None:
    """Every way to call it: norms, sums and input gradients of one example at a time."""
    settings, call = ATTENTION[kind]
    layer = filled(nn.MultiheadAttention(4, 2, **{"batch_first": True, **settings}))
    model, inputs = First(layer, call), sequences()
    recorded = copy.deepcopy(model)
    install(recorded, Tape(), rule_of)
    close(recorded(inputs).detach(), model(inputs).detach())
    check(model, inputs)


RECURRENT: dict[str, nn.Module] = {
    "rnn": nn.RNN(4, 3, batch_first=True),
    "relu": nn.RNN(4, 3, batch_first=True, nonlinearity="relu"),
    "lstm": nn.LSTM(4, 3, batch_first=True),
    "gru": nn.GRU(4, 3, batch_first=True),
    "deep": nn.GRU(4, 3, num_layers=3, batch_first=True),
    "both ways": nn.LSTM(4, 3, num_layers=2, batch_first=True, bidirectional=True),
    "no bias": nn.LSTM(4, 3, bias=False, batch_first=True),
    "shortened": nn.LSTM(4, 3, num_layers=2, proj_size=2, batch_first=True, bidirectional=True),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_give_each_examples_gradient_and_torchs_values(kind: str) -> None:
    """Any depth and direction; outputs and the last states, whose batch is in dimension 1."""
    layer = filled(copy.deepcopy(RECURRENT[kind]))

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        outputs, states = layer(x)
        states = states if isinstance(states, tuple) else (states,)
        return torch.cat([outputs.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)

    model, inputs = First(layer, call), sequences()
    recorded = copy.deepcopy(model)
    install(recorded, Tape(), rule_of)
    close(recorded(inputs).detach(), model(inputs).detach())
    check(model, inputs)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_states_are_given_and_the_batch_may_be_second(kind: str) -> None:
    """The first states have gradients too: they come from another layer."""

    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(4, 3)
            self.layer = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            start = self.start(inputs[:, 0])[None]
            states = (start, start.sin()) if kind == "lstm" else start
            outputs: Tensor = self.layer(inputs.transpose(0, 1), states)[0]
            return outputs.transpose(0, 1)

    model, inputs = filled(Started()), sequences()
    recorded = copy.deepcopy(model)
    install(recorded, Tape(), rule_of)
    close(recorded(inputs).detach(), model(inputs).detach())
    check(model, inputs)


@pytest.mark.parametrize("frozen", ["weight_hh", "weight_ih", "bias", "in_proj", "out_proj"])
def test_parts_of_a_layer_may_be_frozen(frozen: str) -> None:
    """The others keep their gradients: the layer is recorded as one, whichever they are."""
    attention = "proj" in frozen
    layer = nn.MultiheadAttention(4, 2, batch_first=True) if attention else nn.GRU(4, 3)
    layer = filled(layer)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    calls = {True: lambda layer, x: layer(x, x, x), False: lambda layer, x: layer(x.mT.mT)}
    if not attention:
        layer.batch_first = True
    check(First(layer, calls[attention]), sequences())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
        lambda: nn.TransformerDecoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), 2
        ),
    ],
    ids=["encoder layer", "decoder layer", "encoder"],
)
@pytest.mark.parametrize("training", [True, False])
def test_transformers_give_each_examples_gradient(make: Any, training: bool) -> None:
    """In eval mode too, where torch has a fast path that calls no layer: it is not taken here."""
    model = filled(make()).train(training)
    decoder = isinstance(model, nn.TransformerDecoderLayer)
    call = (lambda layer, x: layer(x, x.sin())) if decoder else (lambda layer, x: layer(x))
    check(First(model, call), sequences())


def test_dropout_inside_is_drawn_once() -> None:
    """Of attention and between recurrent layers: the gradients are those of what was drawn."""
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.5)
    model = filled(nn.Sequential(model, nn.GRU(4, 3, num_layers=2, dropout=0.5, batch_first=True)))
    tape, inputs = Tape(), sequences(1)
    plain = copy.deepcopy(model)
    install(model, tape, rule_of)
    torch.manual_seed(0)
    losses = model(inputs)[0].square().flatten(1).sum(1)
    with tape.record(examples=1):
        losses.sum().backward()
    parts = tape.take()
    install(plain, tape := Tape(), rule_of)
    # One example: its gradient is that of a backward pass through the same, written out layers.
    torch.manual_seed(0)
    again = plain(inputs)[0].square().flatten(1).sum(1)
    close(losses.detach(), again.detach())
    step = 1e-6
    for name, parameter in list(model.named_parameters())[:4]:
        found = parts[parameter].instantiate()[0].flatten()[0]
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                dict(plain.named_parameters())[name].flatten()[0] += sign * step
            torch.manual_seed(0)
            moved.append(plain(inputs)[0].square().sum().item())
            with torch.no_grad():
                dict(plain.named_parameters())[name].flatten()[0] -= sign * step
        assert float(found) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-4, abs=1e-6)


REFUSED: dict[str, tuple[nn.Module, Any, str]] = {
    "packed": (
        nn.LSTM(4, 3, batch_first=True),
        lambda layer, x: layer(nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2], batch_first=True)),
        r"^layer: rows of a PackedSequence .*pad_sequence.*lengths - 1",
    ),
    "one sequence": (nn.GRU(4, 3), lambda layer, x: layer(x[0]), r"^layer: expected a batch"),
    "states": (
        nn.GRU(4, 3, batch_first=True),
        lambda layer, x: layer(x, torch.zeros(2, 3, 3)),
        r"^layer: expected states of shapes \[\(1, 3, 3\)\], got \[\(2, 3, 3\)\]",
    ),
    "one attention": (
        nn.MultiheadAttention(4, 2),
        lambda layer, x: layer(x[0], x[0], x[0]),
        r"^layer: expected query, key and value as batches",
    ),
    "no mask": (
        nn.MultiheadAttention(4, 2),
        lambda layer, x: layer(x, x, x, is_causal=True),
        r"^layer: is_causal is a hint that needs the mask",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_examples_in_its_rows_is_refused(kind: str) -> None:
    """By the layer's name, with the cure."""
    layer, call, message = REFUSED[kind]
    model = First(copy.deepcopy(layer).double(), call)
    install(model, Tape(), rule_of)
    with pytest.raises(UnsupportedLayer, match=message):
        model(sequences())


def test_attention_with_biases_of_key_and_value_is_refused() -> None:
    """When it is attached."""
    with pytest.raises(UnsupportedLayer, match=r"^mix: MultiheadAttention with add_bias_kv"):
        rule_of(nn.MultiheadAttention(4, 2, add_bias_kv=True), "mix")


class WithCompiled(nn.Module):
    """A plain module with a compiled function in it, on its parameter or around its layers."""

    def __init__(self, helper: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))
        self.helper = torch.compile(helper, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.helper(self, x)
        return output


def activation(model: WithCompiled, x: Tensor) -> Tensor:
    return model.last(nn.functional.gelu(model.first(x)) * model.scale.sigmoid())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize(
    "where",
    ["a function of tensors", pytest.param("layers and a parameter", marks=pytest.mark.slow)],
)
def test_a_compiled_function_in_a_plain_module_changes_nothing(where: str) -> None:
    """It is traced with what records inside; a compiled module is refused elsewhere."""
    if where == "layers and a parameter":
        model = WithCompiled(activation)
    else:
        compiled = torch.compile(nn.functional.gelu, backend="eager")
        model = WithCompiled(activation)
        model.helper = lambda own, x: own.last(compiled(own.first(x)) * own.scale)
    check(filled(model), drawn(5, 4))
