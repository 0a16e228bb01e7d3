"""Train convolutional networks that are private, robust and sealed, and know what it costs.

The engine, what it reads and what leaves it. `privacy` and `defenses` work without this package, in
any training loop.
"""

from secure_cnn import archive
from secure_cnn.checkpoint import LoadedModel, Sealing, Unlocking, read_model, write_model
from secure_cnn.data import DataSpec, ImageData, ImageReading, Split, load_data
from secure_cnn.engine import keep_freed_memory
from secure_cnn.errors import DataError, ModelError, RunError, SecureCNNError
from secure_cnn.evaluate import ClassificationReport, evaluate_model, predict
from secure_cnn.models import MODELS, Architecture, build_model
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe import Recipe, Run, run

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
    "load_data",
    "predict",
    "read_model",
    "run",
    "write_model",
]
