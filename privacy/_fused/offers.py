"""What of Opacus' settings the fused mode does not offer, each with its reason."""

import torch

from privacy.errors import PlanError

__all__ = ["check_settings", "refuse_adaptive"]


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


def refuse_adaptive(given: dict[str, float]) -> None:
    """Refuses the settings of Opacus' adaptive clipping."""
    if given:
        raise PlanError(
            f"{', '.join(given)}: settings of adaptive clipping, which the fused mode does not "
            'have; leave them out, or choose grad_sample_mode="hooks" and clipping="adaptive"'
        )
