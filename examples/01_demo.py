"""The whole project in one go: train with and without protection, seal, open, refuse, report."""

import shutil
import tempfile
from pathlib import Path

from rich.console import Console

import secure_cnn
from secure_cnn import archive, bench
from secure_cnn.pages import summary_table

console = Console(highlight=False, soft_wrap=True)


def refused(what: str, path: Path, identity: archive.Identity) -> None:
    """Opens a file that must not open."""
    try:
        archive.load(path, identity=identity)
    except archive.ArchiveError as error:
        console.print(f"  {what}: refused, {type(error).__name__}")
    else:
        raise SystemExit(f"{what}: opened, and must not have")


def main() -> None:
    out = Path("runs/demo")
    shutil.rmtree(out, ignore_errors=True)
    identity, signer = archive.generate_identity(), archive.generate_signer()
    recipe = secure_cnn.Recipe(data="digits", epochs=60, epsilon=8.0, eps=0.05, out=out)
    sealing = secure_cnn.Sealing(recipients=(identity.recipient,), signer=signer)

    console.print("training plain, then with DP-SGD and adversarial examples; sealing ...")
    run = secure_cnn.run(recipe, sealing=sealing, measure_cost=bench.step_costs)
    if run.model is None:
        console.print("interrupted; run it again from the start: its keys were in memory only")
        raise SystemExit(130)
    console.print(summary_table(run.record))

    sealed = run.folder.model
    trust = secure_cnn.Unlocking(identity=identity, trusted=[signer.verifier])
    model = secure_cnn.read_model(sealed, unlocking=trust).model
    data = secure_cnn.load_data("digits")
    again = secure_cnn.evaluate_model(model, data.test, data.spec.classes)
    console.print(f"sealed checkpoint {sealed}")
    console.print(f"  with its key: opened, signature holds, accuracy {again.accuracy:.1%}")
    refused("with another key", sealed, archive.generate_identity())
    with tempfile.TemporaryDirectory() as folder:
        damaged = Path(folder, "damaged.sealed")
        content = bytearray(sealed.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        refused("with one bit flipped", damaged, identity)
    console.print(*run.record.notes, f"report: {run.folder.page}", sep="\n")


if __name__ == "__main__":
    main()
