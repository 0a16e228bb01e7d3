"""The command line: what it prints and where, its exit codes, and the own-loop snippet."""

import json
import shlex
import stat
import subprocess

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from secure_cnn import Recipe, archive, load_data, read_model
from secure_cnn.record import Measurements, RunRecord

QUICK = ("--epochs", "1", "--robust-samples", "4")

# The design's own-loop snippet, with other data and sizes, and an optimizer of the user's own.
OWN_LOOP = """
import torch
import defenses, privacy, secure_cnn

data = secure_cnn.load_data(DATA)
model = secure_cnn.build_model("compact", data.spec)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

threat = defenses.ThreatModel(norm="linf", eps=0.1)
objective = defenses.AdversarialTraining(threat, method="n-fgsm")

plan = privacy.DPPlan(samples=len(data.train), batch_size=64, epochs=4, max_grad_norm=1.0)
plan = plan.calibrate(epsilon=8.0, delta=1e-5)
private = privacy.attach(plan, model, optimizer, data.train)
for images, labels in private.batches:
    private.step(objective(private.model, images, labels))
private.spent()

report = defenses.evaluate(model, data.test, threat)
"""


@pytest.fixture
def keys(cli, tmp_path):
    """A reader's and a maker's key files, and the files of their public halves."""
    for name, options in (("reader", ()), ("maker", ("--signer",))):
        code, public, _ = cli("archive", "keygen", tmp_path / f"{name}.key", *options)
        assert code == 0
        (tmp_path / f"{name}.pub").write_text(f"# of {name}\n{public}")
    return tmp_path


def test_colour_pictures_in_class_folders_are_trained_on(cli, tmp_path):
    """The command of the issue, on PNG files made here; then the checkpoint is evaluated."""
    random = np.random.default_rng(0)
    pets, run = tmp_path / "pets", tmp_path / "run"
    for number, name in enumerate(("cat", "dog", "hen")):
        (pets / name).mkdir(parents=True)
        for index in range(40):
            pixels = random.integers(0, 150, (12, 10, 3), dtype=np.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels).save(pets / name / f"{index}.png")
    words = ("--model", "compact", "--epsilon", "8", "--attack", "fgsm", "--eps", "0.03")
    code, out, err = cli("train", "--data", pets, *words, "--epochs", "1", "--out", run)
    assert code == 0, err
    assert "private+fgsm" in out
    assert f"report: {run / 'report.html'}" in err
    record = RunRecord.read(run / "run.json")
    assert record.status == "complete"
    assert record.data.shape == (3, 12, 10)
    assert record.data.classes == ("cat", "dog", "hen")
    assert record.claims["privacy"]["epsilon"] <= 8.0
    assert record.claims["robustness"]["eps"] == 0.03
    model = run / "checkpoints" / "model.safetensors"
    code, out, err = cli("evaluate", model, "--data", pets, "--json", tmp_path / "figures.json")
    assert (code, err) == (0, "")
    assert "recall of hen" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["clean"]["accuracy"] == record.results[-1].accuracy
    assert len(figures["robust"]["indices"]) == len(load_data(pets).test)
    code, _, err = cli("evaluate", model)
    assert code == 3
    assert "was trained on pets" in err
    assert "--data" in err


def test_a_sealed_checkpoint_from_key_to_evaluation(cli, keys, shapes):
    """Keys, train, inspect, verify, evaluate, open: each with what it needs and nothing more."""
    run = keys / "run"
    maker = ("--trusted", keys / "maker.pub")
    sealing = ("--recipient", keys / "reader.pub", "--signer", keys / "maker.key")
    code, _, err = cli("train", "--data", shapes, *QUICK, *sealing, "--out", run)
    assert code == 0, err
    sealed = run / "checkpoints" / "model.sealed"
    code, out, _ = cli("archive", "inspect", sealed)
    assert (code, out.startswith("UNVERIFIED")) == (0, True)
    code, out, _ = cli("archive", "inspect", sealed, "--json")
    claims = json.loads(out)
    assert (code, claims["variant"], claims["architecture"]["model"]) == (0, "plain", "compact")
    code, out, _ = cli("archive", "verify", sealed, *maker)
    assert (code, out.startswith("VERIFIED")) == (0, True)
    data = ("--data", shapes)
    code, out, _ = cli("evaluate", sealed, *data, "--identity", keys / "reader.key", *maker)
    assert code == 0
    assert f"{100 * claims['accuracy']:.1f} %" in out
    plain = keys / "plain.safetensors"
    reader = ("--identity", keys / "reader.key")
    code, _, err = cli("archive", "open", sealed, "--out", plain, *reader, *maker)
    assert (code, f"plain file: {plain}" in err) == (0, True)
    assert stat.S_IMODE(plain.stat().st_mode) == 0o600
    tensors = safetensors.torch.load_file(plain)
    identity = archive.read_identity(keys / "reader.key")
    assert {n: t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in archive.load(sealed, identity=identity).items()
    }


def test_a_passphrase_comes_from_a_file_or_the_environment(cli, shapes, tmp_path, monkeypatch):
    """Never from an argument; the first line counts."""
    cost = archive.INSECURE_TEST_COST
    inner = archive.Passphrase
    monkeypatch.setattr(archive, "Passphrase", lambda text: inner(text, cost=cost))
    (tmp_path / "secret").write_text("correct horse\nsecond line\n")
    (tmp_path / "wrong").write_text("battery staple\n")
    for name in ("secret", "wrong"):
        (tmp_path / name).chmod(0o600)
    words = ("train", "--data", shapes, *QUICK, "--out", tmp_path / "run")
    assert cli(*words, "--passphrase-file", tmp_path / "secret")[0] == 0
    sealed = tmp_path / "run" / "checkpoints" / "model.sealed"
    monkeypatch.setenv("SECURE_CNN_PASSPHRASE", "correct horse")
    assert cli("evaluate", sealed, "--data", shapes, "--passphrase-file", "-")[0] == 0
    code, _, err = cli(
        "evaluate", sealed, "--data", shapes, "--passphrase-file", tmp_path / "wrong"
    )
    assert code == 6
    assert "battery" not in err


def test_keys_are_for_their_owner_and_never_overwritten(cli, tmp_path):
    """The secret in a file of mode 0600, the public half on standard output alone."""
    path = tmp_path / "me.key"
    code, out, err = cli("archive", "keygen", path)
    assert (code, out) == (0, archive.read_identity(path).recipient.to_text() + "\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "secret" not in out
    assert f"secret key: {path}" in err
    before = path.read_bytes()
    code, _, err = cli("archive", "keygen", path)
    assert code == 6
    assert path.read_bytes() == before
    shown = err.partition("if it is such a key, ")[2].partition(" prints its recipient")[0]
    printed = subprocess.run(shlex.split(shown), check=True, capture_output=True, text=True)
    assert printed.stdout == out


def test_a_named_file_without_a_key_never_leaves_a_plain_model(cli, keys, shapes):
    """The shell has emptied it, or it is all comment: refused before the training."""
    for name, text in (("empty", ""), ("comment", "# of the reader\n\n"), ("long", "#" * 2**21)):
        (keys / f"{name}.pub").write_text(text)
    reader = ("--recipient", keys / "reader.pub")
    for name, said in (
        ("empty", "expected a public key, found none"),
        ("comment", "expected a public key, found none"),
        ("long", "more than 1048576 bytes"),
    ):
        path = keys / f"{name}.pub"
        for words in (
            ("--recipient", path),
            (*reader, "--recipient", path),
            ("--recipient", path, "--signer", keys / "maker.key"),
            (*reader, "--trusted", path),
            ("--trusted", path),
        ):
            code, out, err = cli("train", "--data", shapes, *QUICK, "--out", keys / "run", *words)
            assert (code, out, "hint: " in err) == (6, "", True), err
            assert f"{path}: expected a" in err
            assert said in err
            assert not (keys / "run").exists()


BAD_TRAINING = {
    ("--data", "nowhere"): (3, "nowhere"),
    ("--model", "lenet"): (3, "model: expected one of"),
    ("--epochs", "0"): (3, "epochs"),
    ("--optimizer", "lion"): (3, "optimizer"),
    ("--norm", "l3"): (3, "norm"),
    ("--robust-samples", "-1"): (3, "robust_samples"),
    ("--delta", "0.1"): (3, "delta"),
    ("--resume",): (3, "--resume: goes on with the run's own settings, got --data too"),
    ("--epsilon", "1e-12", "--delta", "1e-3", "--batch-size", "64"): (4, "epsilon"),
    ("--epsilon", "8", "--delta", "0.5"): (4, "delta"),
    ("--epsilon", "8", "--batch-size", "1000"): (4, "batch_size"),
    ("--eps", "8"): (5, "eps"),
    ("--eps", "0.1", "--attack", "magic"): (5, "magic"),
    ("--recipient", "no-key"): (6, "key"),
    ("--recipient", "a\nb"): (6, "key"),
    ("--signer", "no-file"): (6, "recipient"),
    ("--passphrase-file", "no-file"): (6, "no-file"),
    ("--unknown",): (2, "--unknown"),
    ("--epochs", "many"): (2, "--epochs"),
}


@pytest.mark.parametrize("words", BAD_TRAINING, ids=" ".join)
def test_whose_fault_it_is_shows_in_the_exit_code(cli, shapes, tmp_path, words):
    """One line of error, at most one of hint, no traceback, no folder made."""
    code, out, err = cli("train", "--data", shapes, "--out", tmp_path / "run", *words)
    expected, part = BAD_TRAINING[words]
    assert (code, out) == (expected, "")
    assert part in err
    assert "Traceback" not in err
    if expected != 2:
        lines = err.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["error", "hint"][: len(lines)]
    assert not (tmp_path / "run").exists()


def test_usage_is_shown_where_nothing_is_asked_for(cli):
    """Help on request ends well; no command, a missing option and a missing file do not."""
    for words in ((), ("archive",), ("bench",)):
        code, out, err = cli(*words)
        assert code in (0, 2)
        assert "Usage" in out + err
    assert cli("--help")[0] == 0
    for words in (("train",), ("evaluate",), ("archive", "verify", "file"), ("fly",)):
        assert cli(*words)[0] == 2


def test_help_names_every_setting_of_a_recipe(cli):
    """No setting can be reached from Python only."""
    shown = cli("train", "--help")[1]
    for name in Recipe.__dataclass_fields__:
        option = "model_option" if name == "model_options" else name
        assert f"--{option.replace('_', '-')} " in shown.replace("\n", " ")


def test_an_error_that_nobody_foresaw_is_not_dressed_up(cli, monkeypatch):
    """It passes through with its traceback: exit code 1 of the interpreter."""
    monkeypatch.setattr("secure_cnn.cli.finished.read_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("evaluate", "file")


def test_an_impatient_ctrl_c_is_130(cli, monkeypatch):
    """The second one, which does not wait for the step: the same code, no traceback."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("secure_cnn.cli.finished.read_model", interrupted)
    code, _, err = cli("evaluate", "file")
    assert code == 130
    assert "Traceback" not in err


def test_an_interrupted_run_says_how_to_go_on(cli, quick, stopped_after, shapes, tmp_path):
    """Exit code 130 and the command; with that command it is done, with its own settings."""
    words = ("train", "--data", shapes, "--epochs", "2", "--batch-size", "16")
    with stopped_after(5):
        code, out, err = cli(*words, "--out", tmp_path / "run")
    assert (code, out) == (130, "")
    assert f"secure-cnn train --out {tmp_path / 'run'} --resume" in err
    code, _, err = cli("train", "--out", tmp_path / "run", "--resume", "--epochs", "9")
    assert code == 3
    assert "got --epochs too" in err
    code, out, _ = cli("train", "--out", tmp_path / "run", "--resume")
    assert code == 0
    assert len(RunRecord.read(tmp_path / "run" / "run.json").epochs) == 2


def test_an_interrupted_sealed_run_says_which_keys_it_needs(
    cli, quick, stopped_after, shapes, tmp_path
):
    """The line that it prints goes on, once the keys that it names are filled in."""
    keys = {name: tmp_path / name for name in ("reader.key", "maker.key")}
    public = cli("archive", "keygen", keys["reader.key"])[1].strip()
    assert cli("archive", "keygen", "--signer", keys["maker.key"])[0] == 0
    sealing = ("--recipient", public, "--signer", keys["maker.key"])
    words = ("train", "--data", shapes, "--epochs", "2", "--batch-size", "16", "--no-baseline")
    with stopped_after(5):
        code, out, err = cli(*words, "--out", tmp_path / "run", *sealing)
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert "--resume, with its recipients and signer again and --identity" in err
    go_on = ("train", "--out", tmp_path / "run", "--resume", *sealing)
    assert cli(*go_on, "--identity", keys["reader.key"])[0] == 0


def test_a_run_is_replaced_by_force_only(cli, quick, shapes, tmp_path):
    """Refused, with the way out; then done."""
    words = ("train", "--data", shapes, "--epochs", "1", "--out", tmp_path / "run")
    assert cli(*words)[0] == 0
    code, _, err = cli(*words)
    assert (code, "--force" in err) == (3, True)
    assert cli(*words, "--force")[0] == 0


@pytest.fixture
def model(cli, quick, shapes, tmp_path):
    """A plain checkpoint of a robust training with a split of its own, and its data."""
    arrays = dict(np.load(shapes))
    data = tmp_path / "whole.npz"
    np.savez(data, images=arrays["images"], labels=arrays["labels"])
    words = ("--data", data, "--eps", "0.05", "--attack", "fgsm", "--seed", "3", "--no-baseline")
    code, _, err = cli("train", *words, *QUICK, "--out", tmp_path / "run")
    assert code == 0, err
    return tmp_path / "run" / "checkpoints" / "model.safetensors", data


def test_evaluation_is_on_images_that_were_not_trained_on(cli, model, tmp_path):
    """The split follows the checkpoint's own seed, whatever seed the attacks get."""
    path, data = model
    claims = read_model(path, unlocking=None).claims
    for seed in ("0", "3"):
        told = ("--seed", seed, "--json", tmp_path / "f.json", "--samples", "4")
        code, _, err = cli("evaluate", path, "--data", data, *told)
        assert (code, err) == (0, "")
        figures = json.loads((tmp_path / "f.json").read_text())
        assert figures["clean"]["accuracy"] == claims["accuracy"]
        assert figures["clean"]["count"] == len(load_data(data, seed=3).test)


def test_other_images_are_said_to_be_others(cli, model, shapes):
    """They may hold training images: a note, on standard error."""
    path, _ = model
    code, out, err = cli("evaluate", path, "--data", shapes, "--samples", "4")
    assert code == 0
    assert "accuracy" in out
    assert "note: " in err
    assert "may be among these test images" in err


def test_evaluation_attacks_as_claimed_or_as_told(cli, model, tmp_path):
    """The checkpoint's threat model by default; another, and other attacks, on request."""
    path, data = model
    words = ("evaluate", path, "--data", data, "--json", tmp_path / "f.json", "--samples", "4")
    assert "apgd and apgdt, linf 0.05" in cli(*words)[1]
    told = cli(*words, "--eps", "0.5", "--norm", "l2", "--attack", "pgd")
    assert "pgd, l2 0.5, 4 images" in told[1]
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["robust"]["threat"]["norm"] == "l2"


BAD_EVALUATION = {
    ("--eps", "0.1", "--norm", "l3"): (5, "norm: expected one of "),
    ("--norm", "l2"): (3, "--norm: expected --eps with it"),
    ("--eps", "9"): (5, "eps"),
    ("--attack", "magic"): (5, "magic"),
    ("--data", "digits"): (3, "expected images of the classes 0, 1, 2, 3"),
    ("--trusted", "somebody"): (6, "carries no signature"),
    ("--identity", "no-file"): (6, "no-file"),
    ("--json", "no-folder/f.json"): (3, "no-folder/f.json: expected a place to write to"),
}


@pytest.mark.parametrize("words", BAD_EVALUATION, ids=" ".join)
def test_a_bad_evaluation_is_refused(cli, model, words):
    """Nothing that was asked for is silently left out: no signature, no norm, no file."""
    path, data = model
    code, _, err = cli("evaluate", path, "--data", data, "--samples", "2", *words)
    expected, part = BAD_EVALUATION[words]
    assert code == expected, err
    assert part in err
    assert "Traceback" not in err


def test_what_cannot_be_opened_is_an_archive_error(cli, keys, model):
    """A plain file where a key is given, and none to open with; a missing one is no model."""
    path, data = model
    assert cli("evaluate", keys / "nowhere")[0] == 3
    assert cli("evaluate", keys / "nowhere", "--identity", keys / "reader.key")[0] == 3
    code, _, err = cli("evaluate", path, "--data", data, "--identity", keys / "reader.key")
    told = " ".join(err.split())
    assert (code, "if it should be plain, leave --identity," in told) == (6, True)
    assert cli("archive", "inspect", path)[0] == 6
    assert cli("archive", "open", path, "--out", keys / "out")[0] == 6
    assert not (keys / "out").exists()


def test_the_price_of_a_step_is_a_table_and_json(cli, tmp_path):
    """Every variant of every case, in the shape that all benchmarks share."""
    told = ("--objective", "fgsm", "--rounds", "1", "--json", tmp_path / "rows.json")
    code, out, err = cli("bench", "step", "--case", "compact", "--copies", "2", *told)
    assert (code, err) == (0, "")
    assert "private+fgsm" in out
    assert "compact: private-2-copies ÷ as many plain steps:" in out
    rows = Measurements.read(tmp_path / "rows.json").rows
    of_copies = {"private-2-copies", "plain-2-steps"}
    protected = {"private", "fgsm", "private+fgsm"}
    assert {row.variant for row in rows} == {"plain"} | protected | of_copies
    assert {row.metric for row in rows} == {"time", "time_ratio", "noise_share", "copies_ratio"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--case", "compact", "--case", "lenet"), 3),
        (("--rounds", "0"), 3),
        (("--copies", "1"), 3),
        (("--objective", "magic"), 5),
    ],
)
def test_a_bad_measurement_is_refused_before_it_starts(cli, monkeypatch, words, code):
    """No case is timed before all are known."""
    monkeypatch.setattr("secure_cnn.bench.timing.median", lambda *_: pytest.fail("timed"))
    assert cli("bench", "step", *words)[0] == code


def test_the_own_loop_runs(shapes):
    """From the three imports to the report: epsilon within its budget, and a model that learnt."""
    names = {"DATA": shapes}
    exec(compile(OWN_LOOP, "own loop", "exec"), names)
    assert names["private"].steps == names["plan"].steps == 4
    assert 0 < names["private"].spent() <= 8.0
    report = names["report"]
    assert set(report.attack_accuracy) == {"apgd", "apgdt"}
    assert report.worst_case_accuracy <= report.clean_accuracy
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())
