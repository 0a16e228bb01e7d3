"""The composition root: a frozen `Recipe` says what to train and how, `run` does it.

Reading order: `settings`, `seams` (where a protection is chosen), `training`, `outcome`, `run`.
"""

from secure_cnn.recipe.folder import RunFolder
from secure_cnn.recipe.run import Run, run
from secure_cnn.recipe.settings import Recipe
from secure_cnn.recipe.variant import Variant

__all__ = ["Recipe", "Run", "RunFolder", "Variant", "run"]
