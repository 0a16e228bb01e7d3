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
        """Whether `validate` passes.

        Example:
            >>> from privacy.opacus import PrivacyEngine
            >>> PrivacyEngine().is_compatible(module=nn.BatchNorm2d(4, affine=False))
            False
        """
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

        Example:
            >>> from privacy.opacus import PrivacyEngine
            >>> PrivacyEngine().validate(module=nn.Linear(4, 2))
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

        Example:
            >>> from privacy.opacus import PrivacyEngine
            >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False))
            >>> type(PrivacyEngine.get_compatible_module(model)[1]).__name__
            'GroupNorm'
        """
        module = ModuleValidator.fix(fix(copy.deepcopy(module)))
        cls().validate(module=module)
        return module
