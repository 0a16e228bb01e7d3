"""The door: the one place where an attack touches a model.

An attack needs the model in evaluation mode, gradients for the images only, and randomness. Taken
without care each of these leaks into training: un-frozen layers, gradients that were never asked
for, a noise stream that repeats. `attack_scope` lends them and takes everything back.

The module is used as it is: no copy, no wrapper. Deliberately not here: any attack.
"""

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from defenses.errors import AttackError, DefenseError
from defenses.quantities import as_whole, shown

__all__ = ["answer_to", "attack_scope", "check_logits", "check_module", "home_of"]


@contextmanager
def attack_scope(model: nn.Module, *, seed: int | None = None) -> Iterator[int]:
    """Lends `model` to an attack and puts everything back, whatever happens inside.

    Inside, every module is in evaluation mode, no parameter requires a gradient or has one (so
    whatever records the gradients of trainable parameters records nothing), Opacus' hooks are
    off, gradients are enabled even under `torch.no_grad` or `torch.inference_mode`, and the
    global random states of torch (CPU and accelerators), numpy and Python start from `seed`.

    Afterwards, also after an exception or a Ctrl-C inside: each module's own training flag, each
    parameter's `requires_grad` and `.grad` (the same tensor object), each buffer, each hook
    switch, torch's default dtype and each random state are bit-identical to what they were. Scopes
    nest.

    Not covered: in-place changes of the parameters themselves, which no attack has a reason to
    make, and state that a module keeps outside parameters and buffers.

    Args:
        model: Any module; it is not copied.
        seed: 0 <= seed < 2**63 to repeat an attack; None draws a fresh one from the system.

    Yields:
        The seed in use.

    Raises:
        AttackError: `model` is not a module or `seed` is out of range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, 2)).train()
        >>> with attack_scope(model, seed=1):
        ...     model.training, model[2].weight.requires_grad
        (False, False)
        >>> model.training, model[2].weight.requires_grad
        (True, True)
    """
    check_module(model)
    used = int.from_bytes(os.urandom(7), "big") if seed is None else seed
    used = as_whole(used)
    if not 0 <= used < 2**63:
        raise AttackError(f"seed: expected an integer in [0, 2**63), got {shown(seed)}")
    with ExitStack() as undo:
        for hold in (_hold_buffers, _hold_modes, _hold_parameters, _hold_hooks):
            hold(model, undo)
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        _hold_random_states(used, undo)
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield used


def check_logits(
    logits: object, *, count: int, largest_label: int, error: type[DefenseError]
) -> Tensor:
    """Refuses what is not one row of finite logits per image, or too few classes for the labels.

    Probabilities are refused too, known by every row being at least 0 and summing to 1 within 1e-4:
    a softmax inside the model flattens the gradients, and a loss would take a second one.

    Args:
        count: How many images the model was given, at least 1.
        error: The class of what is raised.
    """
    if not isinstance(logits, Tensor):
        raise error(f"model: expected a tensor of logits, got {type(logits).__name__}")
    real = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    dense = logits.layout == torch.strided and not (logits.is_nested or logits.is_meta)
    if not dense or logits.dtype not in real:
        raise error(
            f"model: expected dense floating-point logits, got {logits.dtype}, {logits.layout} "
            f"on {logits.device}"
        )
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        raise error(
            f"model: expected logits of shape [{count}, classes] with at least 2 classes, "
            f"got {list(logits.shape)}"
        )
    classes = logits.shape[1]
    if largest_label >= classes:
        raise error(
            f"labels: expected 0 to {classes - 1} for a model of {classes} classes, "
            f"got {largest_label}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise error("model: expected finite logits, got NaN or infinity; has training diverged?")
    _refuse_probabilities(logits.detach(), error)
    return logits


def _refuse_probabilities(logits: Tensor, error: type[DefenseError]) -> None:
    """Refuses rows that are all at least 0 and sum to 1, as several rows of logits never do."""
    if len(logits) == 1:
        return  # one row may by accident
    sums = logits.to(torch.promote_types(logits.dtype, torch.float32)).sum(dim=1)
    # Half precision rounds each probability, so that their sum is off by more.
    slack = max(1e-4, 2 * torch.finfo(logits.dtype).eps)
    # Nothing but zeros and ones is a decision, not a softmax, and as good as any logits.
    soft = ((logits > 0) & (logits < 1)).any()
    if bool(soft & (logits >= 0).all() & ((sums - 1).abs() <= slack).all()):
        raise error(
            "model: expected logits, got probabilities (every row is at least 0 and sums to 1); "
            "take the softmax out of the model"
        )


def answer_to(model: nn.Module, images: Tensor, error: type[DefenseError]) -> object:
    """What a model answers to images; refused if it changed them.

    Whoever holds them would go on with others.
    """
    before = images.detach().clone()
    answer: object = model(images)
    if not torch.equal(before, images.detach()):
        raise error(
            "model: changes the images that it is given, in place; let its forward work on a copy "
            "(images = images.clone())"
        )
    return answer


def home_of(model: nn.Module, images: Tensor) -> tuple[torch.device, torch.dtype]:
    """The device and dtype a model computes in; those of `images` if it has no tensors."""
    check_module(model)
    for group in (model.parameters(), model.buffers()):
        for tensor in group:
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return images.device, images.dtype


def check_module(model: object) -> None:
    """Refuses what is no module."""
    if not isinstance(model, nn.Module):
        order = "; the order is (model, images, labels)" if isinstance(model, Tensor) else ""
        raise AttackError(f"model: expected a torch.nn.Module, got {type(model).__name__}{order}")


def _hold_modes(model: nn.Module, undo: ExitStack) -> None:
    """Evaluation mode, by the flag: `eval()` may be overridden to do more than that."""
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in flags:
            module.training = training

    undo.callback(restore)
    for module, _ in flags:
        module.training = False


def _hold_parameters(model: nn.Module, undo: ExitStack) -> None:
    """No parameter requires a gradient; gradients already there are out of reach."""
    held = [(each, each.requires_grad, each.grad) for each in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad, grad in held:
            parameter.requires_grad = requires_grad
            parameter.grad = grad

    undo.callback(restore)
    for parameter, _, _ in held:
        parameter.requires_grad = False
        parameter.grad = None


def _hold_buffers(model: nn.Module, undo: ExitStack) -> None:
    """Remembers every buffer: which tensor it is, and its values."""
    held = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]

    def restore() -> None:
        for module, name, buffer, values in held:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            # Only what changed: a copy would invalidate a graph that saved the buffer.
            if not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)

    undo.callback(restore)


def _hold_hooks(model: nn.Module, undo: ExitStack) -> None:
    """Opacus' hooks off: in evaluation mode they raise, in training mode they add gradients."""
    for module in model.modules():
        enable = getattr(module, "enable_hooks", None)
        disable = getattr(module, "disable_hooks", None)
        if callable(enable) and callable(disable) and getattr(module, "hooks_enabled", True):
            undo.callback(enable)
            disable()


def _hold_random_states(seed: int, undo: ExitStack) -> None:
    """The global random states, seeded: some attacks re-seed them all on every call."""
    undo.callback(torch.default_generator.set_state, torch.default_generator.get_state())
    torch.default_generator.manual_seed(seed)
    # Every device, not only the model's: torch.manual_seed in an attack reaches all of them.
    if torch.cuda.is_available():
        undo.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        undo.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        torch.mps.manual_seed(seed)
    undo.callback(random.setstate, random.getstate())
    random.seed(seed)
    _hold_numpy_state(seed, undo)


def _hold_numpy_state(seed: int, undo: ExitStack) -> None:
    """The global state of numpy, in whatever bit generator it uses."""
    mtrand = np.random.mtrand
    undo.callback(mtrand.set_state, mtrand.get_state(legacy=False))
    bit_generator = type(mtrand.get_bit_generator())
    mtrand.set_state(dict(bit_generator(seed).state))
