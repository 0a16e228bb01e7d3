"""Drop-in for people who use Opacus: the same interface, with our private step behind it.

Switching is one import: `from privacy.opacus import PrivacyEngine`. In the mode "fused", the
default, step, sampling, noise and accounting are those of `privacy`; every other `grad_sample_mode`
is Opacus' own engine, with an account that cannot fall.
"""

from privacy.opacus.engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
