"""Convolutional networks by name, scaled to the size of the images.

Every model takes float images `[n, channels, height, width]` in [0, 1] and returns logits
`[n, classes]`. No layer mixes examples: normalisation is GroupNorm (Wu and He, 2018,
arXiv:1803.08494), so a private step can bound what each example contributes. There is no dropout
either: it would draw from the global random state.

Pixels are scaled by fixed constants, never by the mean and deviation of the training data. Those
are a function of every private example; a model that carries them leaks them, and no accountant
would know. Features of `scattering` and `nonexpansive`, and first filters of `quick`, are fixed by
formulas, those of `handcrafted` by formulas and chance.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from secure_cnn.cosines import Cosines
from secure_cnn.data import DataSpec
from secure_cnn.ensemble import Ensemble
from secure_cnn.errors import ModelError
from secure_cnn.handcrafted import Handcrafted, handcrafted_features
from secure_cnn.layers import Bands, Normalize, Stack
from secure_cnn.own_network import OwnNetwork, are_options, as_arguments, is_own_name
from secure_cnn.scattering import Scattering, scattering_features, scattering_layers

__all__ = ["BANDS_REACH", "MODELS", "Architecture", "build_model", "load_weights"]

_SMALLEST_SIDE = 8
_MOST_INPUTS = 1 << 24  # channels * height * width that a file may ask for
_MOST_CLASSES = 1 << 16
_MOST_MEMBERS = 1 << 8
_MOST_CHANNELS, _LONGEST_SIDE = 64, 4096
"""Of images for features from formulas, whose filters and variances grow with both."""
_BANDS = (0.1, 0.35, 0.6, 0.9)
BANDS_REACH = _BANDS[0]
"""A change of so much shows nothing on black and on white."""


@final
@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that decides the layers of a model; plain values, so a checkpoint can carry it.

    The class names are in the order of the logits. The model is one of `MODELS`, for images of at
    least 8x8 pixels, or has the name of an `OwnNetwork`, whose options are `options`. Of more than
    one of `members`, up to 256, it is an `Ensemble` of such networks.

    Raises:
        ModelError: A value is outside its range.

    Example:
        >>> architecture = Architecture(
        ...     model="compact", channels=1, height=8, width=8, classes=("cat", "dog"))
        >>> architecture.build()(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 2])
    """

    model: str
    channels: int
    height: int
    width: int
    classes: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    members: int = 1

    def __post_init__(self) -> None:
        if self.model not in _BUILDERS and not is_own_name(self.model):
            raise ModelError(
                f"model: expected one of {', '.join(MODELS)}, or module:function for one of your "
                f"own, got {self.model!r}"
            )
        if not are_options(self.options) or (self.options and not self.is_own):
            raise ModelError(
                f"options: expected plain values for a network of your own, none for {self.model}"
            )
        if self.channels < 1:
            raise ModelError(f"channels: expected at least 1, got {self.channels}")
        if min(self.height, self.width) < (1 if self.is_own else _SMALLEST_SIDE):
            raise ModelError(
                f"image: expected at least {_SMALLEST_SIDE}x{_SMALLEST_SIDE} pixels, "
                f"got {self.height}x{self.width}; enlarge the images"
            )
        if self.channels * self.height * self.width > _MOST_INPUTS:
            raise ModelError(
                f"image: expected at most {_MOST_INPUTS} values, "
                f"got {self.channels}x{self.height}x{self.width}; make the images smaller"
            )
        if not 1 <= self.members <= _MOST_MEMBERS:
            raise ModelError(f"members: expected 1..{_MOST_MEMBERS}, got {self.members}")
        if not 2 <= len(self.classes) <= _MOST_CLASSES:
            raise ModelError(f"classes: expected 2..{_MOST_CLASSES} names, got {len(self.classes)}")

    @property
    def is_own(self) -> bool:
        """Whether the model is not one of `MODELS`, so that only its name is known here."""
        return self.model not in _BUILDERS

    @property
    def spec(self) -> DataSpec:
        """The data that it is for."""
        return DataSpec(shape=(self.channels, self.height, self.width), classes=self.classes)

    @classmethod
    def for_data(
        cls, model: str, spec: DataSpec, *, options: Mapping[str, Any] = MappingProxyType({})
    ) -> "Architecture":
        """The architecture of the model of this name for images of this shape and these classes."""
        size = dict(zip(("channels", "height", "width"), spec.shape, strict=True))
        return cls(options=dict(options), model=model, classes=spec.classes, **size)

    def build(self, *, generator_seed: int = 0, network: OwnNetwork | None = None) -> nn.Module:
        """A new model with freshly drawn weights, on the CPU, in training mode.

        Guarantee: the same architecture and seed give the same weights, bit for bit; the global
        random state is neither read nor moved. Weights are drawn after He et al. (2015,
        arXiv:1502.01852), the last layer's small, so that the first logits are near 0. A network of
        one's own draws its own; it is made by `network`, and by one of the same name and options
        alone.

        Raises:
            ModelError: `network` is another one, is missing, or is given for one of `MODELS`; or
                what it makes does not fit the data.
        """
        self._check_network(network)
        if self.members > 1:
            seeds = range(generator_seed, generator_seed + self.members)
            return Ensemble([self.member.build(generator_seed=s, network=network) for s in seeds])
        if network is not None:
            return network.build(self.spec, generator_seed=generator_seed).train()
        return _drawn(self.blank(), torch.Generator().manual_seed(generator_seed))

    def blank(self, *, network: OwnNetwork | None = None) -> nn.Module:
        """A model that waits for its weights: until they are loaded it holds anything.

        What no file carries is there. A network of one's own draws its weights all the same.

        Raises:
            ModelError: As by `build`.
        """
        if network is not None or self.is_own:
            return self.build(network=network)
        if self.members > 1:
            return Ensemble([self.member.blank() for _ in range(self.members)])
        with torch.device("meta"):  # no memory and no random number for weights that come anew
            model = _BUILDERS[self.model](self)
        model = model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, Scattering | Cosines):
                module.reset()
        return model

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {**asdict(self), "classes": list(self.classes)}
        usual = {"members"} if self.members == 1 else set()
        usual |= set() if self.is_own else {"options"}
        return {name: value for name, value in values.items() if name not in usual}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Architecture":
        """The architecture that `to_dict` described; the values may come from a stranger."""
        names = {"model": str, "channels": int, "height": int, "width": int, "classes": list}
        later = {"options": dict, "members": int}
        names |= {name: kind for name, kind in later.items() if name in values}
        if set(values) != set(names):
            raise ModelError(
                f"architecture: expected exactly {sorted(names)}, got {sorted(map(str, values))}"
            )
        for name, kind in names.items():
            if type(values[name]) is not kind:
                raise ModelError(
                    f"architecture: expected {name} as {kind.__name__}, "
                    f"got {type(values[name]).__name__}"
                )
        if not all(type(each) is str for each in values["classes"]):
            raise ModelError("architecture: expected classes as a list of names")
        return cls(**{**values, "classes": tuple(values["classes"])})

    @property
    def member(self) -> "Architecture":
        """That of one member."""
        return replace(self, members=1)

    def _check_network(self, network: OwnNetwork | None) -> None:
        """Refuses to call anything but what the person brought for this very architecture."""
        needed = as_arguments(self.model, self.options)
        if network is None and self.is_own:
            raise ModelError(
                f"model: {self.model} is not one of ours, and no code is run because a file names "
                f"it; name it yourself with {needed}, or give its OwnNetwork in Python"
            )
        if network is not None and not self.is_own:
            raise ModelError(f"model: is {self.model}, one of ours; leave {network.name} out")
        if network is not None and (network.name, network.options) != (self.model, self.options):
            raise ModelError(
                f"model: expected {needed}, got {as_arguments(network.name, network.options)}; "
                "name the network that it is"
            )


def build_model(name: str, spec: DataSpec, *, generator_seed: int = 0) -> nn.Module:
    """The model called `name` for data of this `spec`: the short form of `Architecture.build`.

    `compact` is small and suits every protection, `quick` trains fastest. `handcrafted` and
    `scattering` are a linear layer on features that formulas give, for private training;
    `nonexpansive` too, whose answers are certified in l2 for nothing (`lipschitz_bound`). `banded`
    sees bands of brightness, for training against changes of up to 0.1 in linf. The others are
    `alexnet`, `vgg11`, `resnet20` and `resnet18`.

    Raises:
        ModelError: There is no such model, or it does not fit the images, at least 8x8.

    Example:
        >>> model = build_model("compact", DataSpec(shape=(1, 28, 28), classes=("cat", "dog")))
        >>> model(torch.rand(5, 1, 28, 28)).shape
        torch.Size([5, 2])
    """
    return Architecture.for_data(name, spec).build(generator_seed=generator_seed)


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of `state` into `model`, all of them or none; names what does not fit."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    for name in own.keys() & state.keys():
        expected, got = own[name], state[name]
        if (expected.shape, expected.dtype) != (got.shape, got.dtype):
            problems.append(
                f"{name}: expected {expected.dtype} {list(expected.shape)}, "
                f"got {got.dtype} {list(got.shape)}"
            )
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ModelError(
            f"checkpoint of another model: {', '.join(sorted(problems)[:8])}{more}; "
            "build the model that it was saved from"
        )
    model.load_state_dict(dict(state))


def _compact(architecture: Architecture, *, quick: bool = False) -> nn.Sequential:
    """Few and moderately wide layers: what a private run rewards (Tramèr and Boneh, 2021)."""
    stack = Stack(architecture.spec.shape, len(architecture.classes))
    stack.conv(16 * architecture.channels if quick else 16, pooled=True)
    if quick:
        stack.layers["conv1"] = Cosines(architecture.channels)
        del stack.layers["norm1"]
    stack.conv(32, pooled=True)
    # A third pool is for plain runs: on Fashion-MNIST (one seed) it cost 100 private steps 1.4
    # points, and gained a plain epoch 1.7.
    stack.conv(64, pooled=quick)
    return stack.finish(8)


def _banded(architecture: Architecture) -> nn.Sequential:
    """`compact` on three bands of brightness, against changes of up to 0.1 in linf."""
    stack = Stack(architecture.spec.shape, len(architecture.classes))
    stack.layers["normalize"] = Normalize(architecture.spec.shape, 0.0, 1.0)
    stack.layers["bands"] = Bands(_BANDS, reach=BANDS_REACH)
    stack.channels *= len(_BANDS) - 1
    for channels, pooled in ((16, True), (32, True), (64, False)):
        stack.conv(channels, pooled=pooled)
    return stack.finish(8)


def _alexnet(architecture: Architecture) -> nn.Sequential:
    """Five convolutions and two hidden layers (Krizhevsky et al., 2012), with small kernels."""
    stack = Stack(architecture.spec.shape, len(architecture.classes))
    stack.conv(64, stride=_first_stride(architecture), pooled=True)
    stack.conv(192, pooled=True)
    stack.conv(384)
    stack.conv(256)
    stack.conv(256, pooled=True)
    return stack.finish(4, 512, 512)


def _vgg11(architecture: Architecture) -> nn.Sequential:
    """Configuration A of Simonyan and Zisserman (2015, arXiv:1409.1556), with one linear layer."""
    stack = Stack(architecture.spec.shape, len(architecture.classes))
    stack.conv(64, pooled=True)
    stack.conv(128, pooled=True)
    for channels in (256, 512, 512):
        stack.conv(channels)
        stack.conv(channels, pooled=True)
    return stack.finish(1)


def _resnet20(architecture: Architecture) -> nn.Sequential:
    """The CIFAR network of He et al. (2015, section 4.2), with projections as shortcuts."""
    stack = Stack(architecture.spec.shape, len(architecture.classes))
    stack.conv(16, stride=_first_stride(architecture))
    for number, channels in enumerate((16, 32, 64), 1):
        stack.stage(f"stage{number}", channels, blocks=3, stride=1 if number == 1 else 2)
    return stack.finish(1)


def _resnet18(architecture: Architecture) -> nn.Sequential:
    """The ImageNet network of He et al. (2015, table 1), with the first layer of a small one."""
    stack = Stack(architecture.spec.shape, len(architecture.classes))
    stack.conv(64, stride=_first_stride(architecture))
    for number, channels in enumerate((64, 128, 256, 512), 1):
        stack.stage(f"stage{number}", channels, blocks=2, stride=1 if number == 1 else 2)
    return stack.finish(1)


def _scattering(architecture: Architecture) -> nn.Sequential:
    """A linear layer on wavelets that are not trained (Tramèr and Boneh, 2021), of norm 1."""
    shape = _bounded(architecture)
    return _linear(architecture, scattering_layers(*shape), scattering_features(*shape))


def _nonexpansive(architecture: Architecture) -> nn.Sequential:
    """A linear layer on wavelets as they are: features that move less than the image does."""
    shape = _bounded(architecture)
    layers = {"scattering": Scattering(*shape[1:]), "flatten": nn.Flatten()}
    return _linear(architecture, layers, scattering_features(*shape))


def _handcrafted(architecture: Architecture) -> nn.Sequential:
    """A linear layer on wavelets and random patches, whitened: for private training."""
    shape = _bounded(architecture)
    return _linear(architecture, {"features": Handcrafted(*shape)}, handcrafted_features(*shape))


def _bounded(architecture: Architecture) -> tuple[int, int, int]:
    """The shape of images whose fixed features are made in seconds; a file may ask for others."""
    channels, height, width = architecture.spec.shape
    if channels > _MOST_CHANNELS or max(height, width) > _LONGEST_SIDE:
        raise ModelError(
            f"image: expected at most {_MOST_CHANNELS} channels and {_LONGEST_SIDE} pixels a side "
            f"for {architecture.model}, got {channels}x{height}x{width}"
        )
    return architecture.spec.shape


def _linear(
    architecture: Architecture, layers: dict[str, nn.Module], features: int
) -> nn.Sequential:
    """A linear layer on so many features, which layers make of images in [0, 1]."""
    head = nn.Linear(features, len(architecture.classes))
    normalize = Normalize(architecture.spec.shape, 0.0, 1.0)
    return nn.Sequential(OrderedDict[str, nn.Module](normalize=normalize, **layers, head=head))


def _first_stride(architecture: Architecture) -> int:
    """Images of 64x64 and more are halved at once: deep nets are too slow at full size."""
    return 2 if min(architecture.height, architecture.width) >= 64 else 1


def _drawn(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draws every weight; a layer that this does not know is our own mistake."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    for module in model.modules():
        if module is last:
            nn.init.normal_(last.weight, std=0.01, generator=generator)
            nn.init.zeros_(last.bias)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Handcrafted):
            module.draw(generator)
        else:
            assert not list(module.parameters(recurse=False)), f"{type(module)} keeps no weights"
    return model


_BUILDERS: Mapping[str, Callable[[Architecture], nn.Sequential]] = MappingProxyType(
    {
        "compact": _compact,
        "quick": lambda architecture: _compact(architecture, quick=True),
        "banded": _banded,
        "alexnet": _alexnet,
        "vgg11": _vgg11,
        "resnet20": _resnet20,
        "resnet18": _resnet18,
        "scattering": _scattering,
        "nonexpansive": _nonexpansive,
        "handcrafted": _handcrafted,
    }
)
MODELS = tuple(_BUILDERS)
