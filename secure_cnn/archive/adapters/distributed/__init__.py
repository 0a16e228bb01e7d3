"""`torch.distributed.checkpoint` over sealed files: data, names and plan all sealed, no pickle.

A checkpoint is a folder: one sealed file for each rank that has something to write, and then
`metadata.sealed`, which names every file with its core hash and so makes the checkpoint count.
Torch's own writer pickles `.metadata` in clear, outside of its extensions; that file is neither
written nor read here.
"""

from secure_cnn.archive.adapters.distributed.planners import SealedLoadPlanner, SealedSavePlanner
from secure_cnn.archive.adapters.distributed.reader import SealedReader
from secure_cnn.archive.adapters.distributed.writer import SealedWriter

__all__ = ["SealedLoadPlanner", "SealedReader", "SealedSavePlanner", "SealedWriter"]
