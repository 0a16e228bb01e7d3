"""A body from public images, a head trained privately on others: beside the same from scratch."""

import tempfile
from pathlib import Path

import numpy as np

import secure_cnn

DIGITS = 5  # public are 0 to 4, private 5 to 9


def write_half(path: Path, first: int) -> str:
    """Half of the classes, as a file of arrays."""
    data, arrays = secure_cnn.load_data("digits"), {}
    for part, split in (("", data.train), ("test_", data.test)):
        kept = (split.labels >= first) & (split.labels < first + DIGITS)
        arrays[f"{part}images"] = split.images[kept, 0].numpy()
        arrays[f"{part}labels"] = (split.labels[kept] - first).numpy()
    np.savez(path, **arrays)
    return str(path)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        public = write_half(folder / "public.npz", 0)
        private = write_half(folder / "private.npz", DIGITS)

        body = secure_cnn.run(
            secure_cnn.Recipe(out=folder / "body", data=public, shift=1, epochs=20)
        )
        settings = {"data": private, "epsilon": 0.5, "epochs": 8, "baseline": False}
        settings |= {"model": "compact"}  # the body's; by default a private head has its own
        for said, start in (
            ("from scratch", {}),
            ("head alone", {"weights": body.folder.model, "train_only": ["head.*"]}),
        ):
            recipe = secure_cnn.Recipe(out=folder / said, **settings, **start)
            record = secure_cnn.run(recipe).record
            found = record.results[-1]
            print(
                f"{said:13}{record.model.parameters:7,} parameters, "
                f"accuracy {found.accuracy:.1%} at epsilon {found.epsilon:.2f}"
            )
        for note in record.notes:
            print(note)


if __name__ == "__main__":
    main()
