"""Which modules the drop-in takes, and what it puts in the place of others."""

import copy
from typing import Any

from opacus.validators import ModuleValidator
from torch import nn

from privacy.errors import PrivacyError, UnsupportedLayer
from privacy.replacement import fix
from privacy.validate import check_layers

__all__ = ["Validation"]


class Validation:
    """What `PrivacyEngine` says of modules."""

    def is_compatible(
        self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None
    ) -> bool:
        """Whether `validate` passes."""
        try:
            self.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except PrivacyError:
            return False
        return True

    def validate(
        self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None
    ) -> None:
        """Refuses a module that mixes examples, by Opacus' rules and by ours.

        Raises:
            UnsupportedLayer: Says which layers and why.
        """
        check_layers(module)
        errors = ModuleValidator.validate(module, strict=False)
        if errors:
            raise UnsupportedLayer(
                f"{type(module).__name__}: {'; '.join(str(error) for error in errors)}"
            )

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy that passes `validate`: replaced by `privacy.fix`, and by Opacus what that leaves.

        Ours come first: they keep the weights, and refuse what they cannot keep.

        Raises:
            UnsupportedLayer: A layer has no replacement.
        """
        module = ModuleValidator.fix(fix(copy.deepcopy(module)))
        cls().validate(module=module)
        return module
