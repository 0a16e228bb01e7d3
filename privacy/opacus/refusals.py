"""What Opacus' users write, call or ask for: each is followed, or refused by name."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import nn

from privacy.clipping.layers import recorded_name
from privacy.errors import PlanError, StepError, UnsupportedLayer

__all__ = [
    "ENGINE",
    "LOADER",
    "MODULE",
    "OPTIMIZER",
    "Followed",
    "RefusedAttribute",
    "UnsupportedModule",
    "as_opacus_raises",
    "check_reduction",
    "check_settings",
    "check_unrecorded",
    "refusal",
    "refuse_adaptive",
]

_STEP = "clipping and noise are one step here and no gradient of an example is kept; call step()"
_AGAIN = "it is fixed by make_private; call that again, on a new engine, with other settings"
_CRYPTOGRAPHIC = (
    "the noise and the samples come from a cryptographic generator always, for who knows a seed "
    "can take the noise off again; leave it out"
)
_ADAPTIVE = 'it belongs to adaptive clipping; choose grad_sample_mode="hooks" for that'
_ADAPTIVE_SETTINGS = (
    *("target_unclipped_quantile", "clipbound_learning_rate", "max_clipbound", "min_clipbound"),
    "unclipped_num_std",
)
_QUEUE = "say with signal_skip_step() whether a batch completes its sample"
_RECORDED = (
    "no hooks hang on this module: take gradients of your own in eval mode or with inputs that "
    "require a gradient, and get the plain module back with to_standard_module()"
)
_LOADED = (
    "it is fixed by make_private; give the DataLoader that goes into make_private this setting"
)

OPTIMIZER: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("grad_samples", "clip_and_accumulate", "add_noise", "scale_grad", "pre_step"),
            *("accumulate", "reduce_gradients"),
        ),
        _STEP,
    ),
    **dict.fromkeys(("original_optimizer", "plan", "ledger", "non_finite", "params"), _AGAIN),
    **dict.fromkeys(("generator", "secure_mode"), _CRYPTOGRAPHIC),
    **dict.fromkeys(("_step_skip_queue", "_is_last_step_skipped"), _QUEUE),
    "accumulated_iterations": "it is 1 always: each batch is one backward pass",
    **dict.fromkeys(_ADAPTIVE_SETTINGS, _ADAPTIVE),
    **dict.fromkeys(("sample_size", "unclipped_num", "update_max_grad_norm"), _ADAPTIVE),
    "max_grad_norms": "the fused mode clips the whole gradient to one norm; write max_grad_norm, "
    'or choose grad_sample_mode="hooks" and clipping="per_layer"',
}  # fmt: skip
MODULE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("add_hooks", "remove_hooks", "disable_hooks", "enable_hooks", "hooks_enabled"),
            *("autograd_grad_sample_hooks", "capture_activations_hook", "iterate_submodules"),
            *("capture_backprops_hook", "rearrange_grad_samples", "grad_accumulation_hook"),
        ),
        _RECORDED,
    ),
    **dict.fromkeys(
        ("grad_accumulation_allowed", "allow_grad_accumulation"),
        "a second backward pass before the step is refused always, for an example would count "
        "more than once; add the losses up and call backward() once",
    ),
    **dict.fromkeys(
        ("batch_first", "loss_reduction", "force_functorch", "strict"),
        "it is fixed by make_private; the optimizer's loss_reduction may be written",
    ),
    **dict.fromkeys(
        ("GRAD_SAMPLERS", "NORM_SAMPLERS", "is_supported", "max_grad_norm", "use_ghost_clipping"),
        "every layer has its own rule here or takes the general one; write the optimizer's "
        "max_grad_norm for another C",
    ),
    **dict.fromkeys(
        ("add_module", "register_module", "register_parameter", "register_buffer"),
        "it would be put on the wrapper and not used; change the module before make_private",
    ),
    **dict.fromkeys(
        (
            *("get_clipping_coef", "get_norm_sample", "per_sample_gradient_norms"),
            *("log_module_gradient_sample_mode", "set_pattern_param_sample_norm_sum"),
        ),
        "norms and factors of single examples are not kept: no epsilon covers them",
    ),
    "validate": "PrivacyEngine.validate(module=...) is asked before make_private",
    "compile": "a compiled module cannot be recorded; train it uncompiled, and compile the result "
    "of to_standard_module()",
}
LOADER: Mapping[str, str] = {
    **dict.fromkeys(("generator", "sample_rate", "distributed"), _CRYPTOGRAPHIC),
    **dict.fromkeys(
        (
            *("dataset", "batch_size", "batch_sampler", "sampler", "drop_last"),
            *("num_workers", "persistent_workers", "prefetch_factor", "rand_on_empty"),
        ),
        _LOADED,
    ),
    "from_data_loader": "make_private makes the private loader of the DataLoader that it gets",
}  # fmt: skip
ENGINE: Mapping[str, str] = {
    "accountant": "an engine has one account from its first step to its last; give it what was "
    "spent elsewhere with accountant.load_state_dict(other.state_dict()), or make both trainings "
    "private by one engine",
    "secure_mode": "noise of the fused mode is cryptographic always, and Opacus' own modes take "
    "it when the engine is made: PrivacyEngine(secure_mode=...)",
    "secure_rng": _CRYPTOGRAPHIC,
    "dataset": "a data set comes with the data_loader of make_private",
}


class UnsupportedModule(UnsupportedLayer, UnsupportedModuleError):  # type: ignore[misc]
    """An `UnsupportedLayer` that is caught by who catches Opacus' error, too."""


@contextmanager
def as_opacus_raises() -> Iterator[None]:
    """Lets what is refused about a module be caught as in a script for Opacus."""
    try:
        yield
    except UnsupportedModuleError:
        raise
    except UnsupportedLayer as error:
        raise UnsupportedModule(str(error)) from error


class RefusedAttribute(StepError, AttributeError):
    """An Opacus attribute that the fused mode does not follow; for `hasattr` it is absent."""


def refusal(owner: object, name: str, reasons: Mapping[str, str]) -> RefusedAttribute:
    """The error that names an attribute, and what to do instead."""
    reason = reasons.get(
        name, "nothing here reads it; keep values of your own in an object of your own"
    )
    return RefusedAttribute(
        f"{type(owner).__name__}.{name}: not followed in the fused mode: {reason}"
    )


class Followed:
    """A wrapper to which every write has its effect or is refused."""

    # Names that may be written, each of which has its effect.
    followed: ClassVar[frozenset[str]] = frozenset()
    # Of other names, why they may not and what to do.
    refused: ClassVar[Mapping[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.refused:
            raise refusal(self, name, self.refused)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in self.followed or (name.startswith("_") and name in vars(self))):
            raise refusal(self, name, self.refused)
        super().__setattr__(name, value)


def check_settings(
    batch_first: bool,
    poisson_sampling: bool,
    clipping: str,
    noise_generator: torch.Generator | None,
    wrap_model: bool,
) -> None:
    """Refuses what the fused mode does not offer, each with its reason."""
    elsewhere = 'or choose one of Opacus\' modes, such as grad_sample_mode="hooks"'
    if not batch_first:
        raise PlanError(f"batch_first: expected True: examples are in dimension 0; {elsewhere}")
    if not poisson_sampling:
        raise PlanError(
            "poisson_sampling: expected True: batches that are not Poisson samples must not be "
            "accounted as such, and shuffled ones can cost several times the epsilon reported"
        )
    if clipping != "flat":
        raise PlanError(f'clipping: expected "flat", got {clipping!r}; give that, {elsewhere}')
    if noise_generator is not None:
        raise PlanError(
            "noise_generator: expected None: who knows a torch.Generator's seed can take the noise "
            f"off again, so the noise is cryptographic always; leave it out, {elsewhere}"
        )
    if not wrap_model:
        raise PlanError(
            "wrap_model: expected True; for a training that leaves the model as it is use "
            f"privacy.attach, {elsewhere}"
        )


def refuse_adaptive(given: Collection[str]) -> None:
    """Refuses the settings of Opacus' adaptive clipping among those given."""
    names = [name for name in _ADAPTIVE_SETTINGS if name in given]
    if names:
        raise PlanError(
            f"{', '.join(names)}: settings of adaptive clipping, which the fused mode does not "
            'have; leave them out, or choose grad_sample_mode="hooks" and clipping="adaptive"'
        )


def check_unrecorded(module: nn.Module) -> None:
    """Refuses, in a mode of Opacus', a module that a private training of ours records already."""
    names = [recorded_name(each) for each in module.modules()]
    if recorded := [name for name in names if name is not None]:
        raise StepError(
            f"{recorded[0]}: expected a plain module, got one in a private training of the fused "
            "mode or of privacy.attach; call to_standard_module() on what make_private returned, "
            "or private.detach()"
        )


def check_reduction(reduction: object) -> None:
    """Refuses a way to join the rows of a loss that is neither their mean nor their sum."""
    if reduction not in ("mean", "sum"):
        raise PlanError(f'loss_reduction: expected "mean" or "sum", got {reduction!r}')
