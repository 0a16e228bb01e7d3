"""The images that `secure-cnn evaluate` asks a model about: those that its run tested on."""

from dataclasses import replace
from pathlib import Path

from secure_cnn.checkpoint import LoadedModel, Unlocking
from secure_cnn.cli.options import groups_for, message
from secure_cnn.data import ImageData, ImageReading, load_data
from secure_cnn.data.named import NAMES
from secure_cnn.errors import ModelError
from secure_cnn.recipe.identity import KEYED, keyed_fingerprint
from secure_cnn.unlearning.stage_files import inventory_beside

__all__ = ["tested_images"]


def tested_images(
    loaded: LoadedModel,
    checkpoint: Path,
    data: str | None,
    groups: str | None,
    reading: ImageReading,
    unlocking: Unlocking | None,
) -> ImageData:
    """The data given, or that which the checkpoint names; split as in its training.

    Of a run that people left the split is another one than that of its data as they are now: the
    inventory in its folder says which images it tested on. Others are said to be others.

    Raises:
        DataError: The data cannot be read.
        ModelError: The checkpoint names no data that are there, or is of other classes.
    """
    claims = loaded.claims.get("data")
    claimed = claims if isinstance(claims, dict) else {}
    name, split_seed = data or claimed.get("name"), claimed.get("split_seed")
    if data is None and name not in NAMES:
        raise ModelError(
            f"{checkpoint}: was trained on {name or 'data that it does not name'}, which is no "
            "data set that has a name; say where it is with --data"
        )
    seed = split_seed if type(split_seed) is int and split_seed >= 0 else 0
    groups = groups_for(loaded, data, groups)
    images = load_data(str(name), reading=reading, groups=groups, seed=seed)
    inventory = inventory_beside(checkpoint, unlocking)
    own = None if inventory is None else inventory.tested(images)
    if inventory is not None and own is not None:
        images = replace(images, test=own, test_groups=None)
        gone = len(inventory.test) - len(own)
        if gone:
            message(f"note: {gone} of {len(inventory.test)} test images of the run are gone")
    elif not _fits(loaded, images):
        message(
            f"note: {name} is not the data that the checkpoint names: its training images may be "
            "among these test images"
        )
    if images.spec.classes != loaded.architecture.classes:
        raise ModelError(
            f"{checkpoint}: expected images of the classes "
            f"{', '.join(loaded.architecture.classes[:8])}, got "
            f"{', '.join(images.spec.classes[:8])}; give the data that it was trained for with "
            "--data"
        )
    return images


def _fits(loaded: LoadedModel, images: ImageData) -> bool:
    """Whether images are those that a checkpoint names, as far as its fingerprint tells."""
    claims = loaded.claims.get("data")
    claimed = claims if isinstance(claims, dict) else {}
    key = loaded.private_claims.get("data_fingerprint_key")
    if isinstance(key, str):
        return claimed.get("fingerprint") == keyed_fingerprint(images.fingerprint, key)
    if key is None and str(claimed.get("fingerprint")).startswith(KEYED):
        # Without its key, which only a sealed file holds, a keyed fingerprint says nothing.
        return images.name == claimed.get("name")
    return claimed.get("fingerprint") == images.fingerprint
