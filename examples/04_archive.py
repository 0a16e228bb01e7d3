"""Seal a state dict to somebody, sign it, let anyone check it, and let only them open it."""

import tempfile
from pathlib import Path

from torch import nn

from secure_cnn import archive


def main() -> None:
    model = nn.Linear(4, 2)
    reader = archive.generate_identity()  # theirs: they give you reader.recipient
    signer = archive.generate_signer()  # yours: you publish signer.verifier
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.sealed")
        archive.save(
            path,
            model.state_dict(),
            recipients=[reader.recipient],
            signer=signer,
            claims={"accuracy": 0.93, "trained_on": "digits"},
        )
        # Anyone, without a key:
        print(archive.verify(path, trusted=[signer.verifier]))
        # The reader, who demands the signature and one claim before a tensor is handed out:
        state = archive.load(
            path, identity=reader, trusted=[signer.verifier], expect={"trained_on": "digits"}
        )
        model.load_state_dict(state)
        print("opened")


if __name__ == "__main__":
    main()
