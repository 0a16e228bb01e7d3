"""Train convolutional networks that are private, robust and sealed, and know what it costs.

The engine, what it reads and what leaves it. `privacy` and `defenses` work without this package, in
any training loop. What is public here is loaded when it is first asked for: the command's front
door stands in this package, and must be open before torch is.
"""

import typing

if typing.TYPE_CHECKING:
    from secure_cnn import archive
    from secure_cnn.checkpoint import LoadedModel, Sealing, Unlocking, read_model, write_model
    from secure_cnn.data import DataSpec, ImageData, ImageReading, Split, load_data
    from secure_cnn.engine import keep_freed_memory
    from secure_cnn.errors import DataError, ModelError, RunError, SecureCNNError
    from secure_cnn.evaluate import ClassificationReport, evaluate_model, predict
    from secure_cnn.models import MODELS, Architecture, build_model
    from secure_cnn.nonexpansive import lipschitz_bound
    from secure_cnn.own_network import OwnNetwork
    from secure_cnn.recipe import Recipe
    from secure_cnn.recipe.run import Run, run

__all__ = [
    "MODELS",
    "Architecture",
    "ClassificationReport",
    "DataError",
    "DataSpec",
    "ImageData",
    "ImageReading",
    "LoadedModel",
    "ModelError",
    "OwnNetwork",
    "Recipe",
    "Run",
    "RunError",
    "Sealing",
    "SecureCNNError",
    "Split",
    "Unlocking",
    "archive",
    "build_model",
    "evaluate_model",
    "keep_freed_memory",
    "lipschitz_bound",
    "load_data",
    "predict",
    "read_model",
    "run",
    "write_model",
]

if not typing.TYPE_CHECKING:  # a type checker would take it for any name at all

    def __getattr__(name: str) -> object:
        """A public name, from the room that it is public in."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import secure_cnn.archive  # first: a public name itself, on no other room

        if name == "archive":  # asked for by a room that is itself being imported
            return secure_cnn.archive
        from secure_cnn import (
            checkpoint,
            data,
            engine,
            errors,
            evaluate,
            models,
            nonexpansive,
            own_network,
            recipe,
        )

        rooms = (checkpoint, data, engine, errors, evaluate, models, nonexpansive)
        rooms = (*rooms, own_network, recipe)
        for room in rooms:
            found = {each: getattr(room, each) for each in room.__all__ if each in __all__}
            globals().update(found)
        return globals()[name]

    def __dir__() -> list[str]:
        return __all__
