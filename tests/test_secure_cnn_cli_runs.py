"""`secure-cnn evaluate RUN`, and what every command says after a Ctrl-C."""

import io

import pytest
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

import defenses
from secure_cnn import Recipe, Sealing, archive, run
from secure_cnn.data import Split
from secure_cnn.evaluate import batch_for
from secure_cnn.record import RunRecord

QUICK = ("--epochs", "1", "--no-baseline")
ATTACKED = ("--attack", "fgsm", "--no-verdicts", "--samples", "8")


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A plain run against an attacker, and a sealed one with the key to it: three paths."""
    root = tmp_path_factory.mktemp("trained")
    identity = archive.generate_identity()
    archive.write_key(root / "me.key", identity)
    common = {"data": shapes, "epochs": 1, "baseline": False, "robust_samples": 4}
    sealing = Sealing(recipients=(identity.recipient,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secure_cnn.recipe.folder.write_page", lambda *_: None)
        run(Recipe(out=str(root / "plain"), eps=8 / 255, **common))
        run(Recipe(out=str(root / "sealed"), **common), sealing=sealing)
    return root / "plain", root / "sealed", root / "me.key"


def test_a_run_is_evaluated_by_its_folder_alone(cli, trained):
    """Its model, its data and its attacker are found, as if all three had been typed."""
    plain, _, _ = trained
    code, found, err = cli("evaluate", plain, *ATTACKED)
    assert (code, err) == (0, "")
    assert f"linf {8 / 255:g}" in found
    data = RunRecord.read(plain / "run.json").settings["data"]
    model = plain / "checkpoints" / "model.safetensors"
    typed = ("evaluate", model, "--data", data, "--eps", "8/255", *ATTACKED)
    assert cli(*typed)[:2] == (0, found)


def test_a_sealed_run_asks_for_its_key(cli, trained):
    """By the options that take one; with it, it opens."""
    _, sealed, key = trained
    code, _, err = cli("evaluate", sealed)
    assert (code, "model.sealed: is sealed" in err, "--identity" in err) == (6, True, True)
    code, out, _ = cli("evaluate", sealed, "--identity", key)
    assert (code, "accuracy" in out) == (0, True)


def test_a_plain_run_needs_no_key_and_says_so(cli, trained):
    """A plain file in the place of a sealed one is not taken for it; without the option it is."""
    plain, _, key = trained
    code, _, err = cli("evaluate", plain, "--identity", key, columns=400)
    assert code == 6
    assert "model.safetensors: expected a sealed model" in err
    assert "leave --identity, --passphrase-file, --kek and --trusted out: it needs no key" in err


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("interrupted", "was interrupted, and has no model yet"),
        ("running", "is under way, or was killed, and has no model yet"),
    ],
)
def test_a_run_that_has_not_ended_is_refused_by_name(cli, trained, tmp_path, status, words):
    """With the command that ends it, which a shell takes as it is printed."""
    folder = tmp_path / "a run"
    folder.mkdir()
    text = (trained[0] / "run.json").read_text().replace('"complete"', f'"{status}"')
    (folder / "run.json").write_text(text)
    code, _, err = cli("evaluate", folder, columns=400)
    assert (code, f"{folder}: its run {words}" in err) == (3, True)
    assert f"secure-cnn train --out '{folder}' --resume" in err


def test_a_folder_without_a_run_a_model_or_its_data_is_refused_by_name(cli, trained, tmp_path):
    """Three faults, three sentences, and what to do about each."""
    assert "with run.json in it, found none" in cli("evaluate", tmp_path)[2]
    record = (trained[0] / "run.json").read_text()
    (tmp_path / "run.json").write_text(record)
    code, _, err = cli("evaluate", tmp_path)
    assert (code, "expected the model of its run in" in err) == (3, True)
    data = RunRecord.read(tmp_path / "run.json").settings["data"]
    (tmp_path / "run.json").write_text(record.replace(data, "photos"))
    (tmp_path / "checkpoints").mkdir()
    for name in ("model.safetensors",):
        (tmp_path / "checkpoints" / name).write_bytes(
            (trained[0] / "checkpoints" / name).read_bytes()
        )
    code, _, err = cli("evaluate", tmp_path)
    assert (code, "was trained on photos, which is not there" in err) == (3, True)
    assert cli("evaluate", tmp_path, "--data", data, *ATTACKED)[0] == 0


def test_the_batch_is_as_large_as_told(cli, trained, monkeypatch):
    """Of the clean images and of the attacked ones; none is refused."""
    asked = []
    inner = defenses.evaluate

    def noted(*words, batch_size, **options):
        asked.append(batch_size)
        return inner(*words, batch_size=batch_size, **options)

    monkeypatch.setattr(defenses, "evaluate", noted)
    for words in (("--batch-size", "3"), ()):
        assert cli("evaluate", trained[0], *ATTACKED, *words)[0] == 0
    assert asked == [3, 256]
    assert cli("evaluate", trained[0], "--batch-size", "0")[0] == 3


def test_the_usual_batch_is_smaller_where_a_pass_is_long():
    """By the operations that a convolution is known to take: two for each weight at each place."""
    split = Split(images=torch.zeros(2, 1, 64, 64, dtype=torch.uint8), labels=torch.zeros(2).long())
    for width in (1, 8192):
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3, padding=1),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
        operations = 2 * 9 * width * 64 * 64
        assert batch_for(net, split) == max(1, min(256, 2**35 // operations))
        if width == 8192:
            assert 1 < batch_for(net, split) < 256


def interrupted(*_, **__):
    """What a Ctrl-C does in the middle of a call."""
    raise KeyboardInterrupt


NOTHING = "nothing of it was kept; the same command begins anew"
INTERRUPTED = {
    ("evaluate", "RUN", *ATTACKED): ("defenses.evaluate", "with --state FILE beside it"),
    ("evaluate", "RUN", *ATTACKED, "--state", "s.json"): (
        "defenses.evaluate",
        "the same command again goes on from s.json",
    ),
    ("evaluate", "RUN", *ATTACKED, "--certify", "1/4"): ("defenses.certify", "--state FILE"),
    ("audit",): ("secure_cnn.recipe.settings.load_data", NOTHING),
    ("bench", "step"): ("secure_cnn.cli.bench.workload", NOTHING),
    ("bench", "archive"): ("secure_cnn.bench.archive.archive_workload", NOTHING),
    ("bench", "overhead"): ("secure_cnn.cli.bench_overhead.load_data", NOTHING),
    ("train", "--out", "new"): ("secure_cnn.cli.train.run", "nothing was trained yet"),
    ("train", "--out", "RUN"): ("secure_cnn.cli.train.run", "secure-cnn train --out RUN --resume"),
}


@pytest.mark.parametrize("words", INTERRUPTED, ids=" ".join)
def test_an_interruption_says_how_to_go_on(cli, trained, monkeypatch, words):
    """Two lines and 130, whatever the command; where nothing was kept it says that."""
    where, told = INTERRUPTED[words]
    monkeypatch.setattr(where, interrupted)
    place = str(trained[0])
    code, _, err = cli(*[place if word == "RUN" else word for word in words], columns=400)
    first, second = err.splitlines()
    assert (code, first) == (130, "interrupted")
    assert second.startswith("hint: ")
    assert told.replace("RUN", place) in second


def test_an_interrupted_evaluation_goes_on_where_it_was(cli, trained, monkeypatch, tmp_path):
    """With the same command; batches that were written down are not attacked again."""
    attacked = []
    inner = defenses.attacks.FGSM._search

    def noted(self, model, images, *rest):
        attacked.append(len(images))
        if len(attacked) == 3:
            raise KeyboardInterrupt
        return inner(self, model, images, *rest)

    words = ("evaluate", trained[0], *ATTACKED, "--batch-size", "2", "--state", tmp_path / "s")
    whole = cli(*words[:-2])[1]
    monkeypatch.setattr(defenses.attacks.FGSM, "_search", noted)
    code, out, err = cli(*words)
    assert (code, out) == (130, "")
    assert f"goes on from {tmp_path / 's'}" in err
    before = len(attacked)
    assert cli(*words)[:2] == (0, whole)
    again = len(attacked) - before
    monkeypatch.undo()
    assert again == len(list(filter(None, attacked))) - before
    assert again < -(-8 // 2)


def test_a_batch_of_a_slow_network_is_seen_to_go_on(monkeypatch):
    """The bar counts the passes inside of it, and the model has no hook afterwards."""
    told = []

    class Bar(Progress):
        def update(self, task, **fields):
            told.append(fields.get("speed"))
            super().update(task, **fields)

    bar = Bar(TextColumn("{task.fields[speed]}"), console=Console(file=io.StringIO()))
    monkeypatch.setattr("defenses.measuring.measurement.progress_bar", lambda **_: bar)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    data = [(torch.rand(1, 2, 2), number % 2) for number in range(8)]
    threat = defenses.ThreatModel(norm="linf", eps=0.1)
    pgd = defenses.attacks.PGD(threat, steps=7)
    defenses.evaluate(net, data, threat, attacks=[pgd], exhaustive=True)
    seen = [words.partition("pass ")[2] for words in told if words and "pass" in words]
    assert {str(number) for number in range(1, 8)} <= set(seen)
    assert not net._forward_pre_hooks
