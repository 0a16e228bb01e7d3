"""Drop-in for people who use Opacus: the same interface, with our private step behind it.

Switching is one import: `from privacy.opacus import PrivacyEngine`. In the mode "fused", the
default, step, sampling, noise and accounting are those of `privacy`; every other `grad_sample_mode`
is Opacus' own engine, with an account that cannot fall. Opacus' BatchMemoryManager, schedulers and
accountants work with both. In the fused mode a script can notice these differences:

- The sampling rate is exactly batch_size / len(dataset), from a cryptographic generator, and a pass
  has as many steps as the loader had batches.
- An empty sample is one row of zeros that counts nothing, of the type that other batches have.
- Each batch of the loader belongs to one step; a second backward pass in it raises.
- The loss must be the mean or the sum of one loss an example, as `loss_reduction` says.
- Noise and samples are cryptographic always: `secure_mode` changes nothing, no generator is taken,
  and no seed repeats them.
- `make_private` runs the module on the first examples, and refuses there what does not fit; how the
  loop calls it may be said by `forward`.
- After `make_private_with_epsilon` the step beyond the budget raises `BudgetExceeded`, whatever a
  schedule makes of the noise.
- The account needs no hook: each step is charged before it is taken.
- What is written to an attribute has its effect, or raises.
- Errors about a module are Opacus' `UnsupportedModuleError` and ours, those about a misused step
  `ValueError` and ours.
- After `to_standard_module()` optimizer and loader raise: the training was detached.
"""

from privacy.opacus.engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
