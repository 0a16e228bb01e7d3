"""`secure-cnn evaluate`: its tables, its page, its state file and its exit codes."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from support.robustness_records import record_of
from support.suspects import ALL

from defenses import RobustnessReport, ThreatModel
from secure_cnn.checkpoint import read_model, write_model
from secure_cnn.cli import evaluate as evaluate_command
from secure_cnn.data import load_data
from secure_cnn.errors import RunError
from secure_cnn.evaluate import ClassificationReport
from secure_cnn.models import Architecture
from secure_cnn.pages import Examples, render_robustness
from secure_cnn.record import RobustnessRecord

EPS = ("--eps", "0.3", "--attack", "fgsm", "--attack", "ffgsm")


@pytest.fixture
def cli(cli):
    """Runs `secure-cnn evaluate`; exit code, standard output and error."""
    return partial(cli, "evaluate", columns=160)


@pytest.fixture(scope="session")
def model(shapes, tmp_path_factory):
    """A checkpoint of a net that has learnt the shapes a little, and its data."""
    data = load_data(shapes)
    architecture = Architecture(
        model="compact", channels=1, height=8, width=8, classes=data.spec.classes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = architecture.build()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    images, labels = data.train.batch(torch.arange(len(data.train)))
    for _ in range(15):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    claimed = {"name": data.name, "fingerprint": data.fingerprint, "split_seed": 0}
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_model(path, network, architecture, claims={"data": claimed}, sealing=None)
    return path, ("--data", shapes)


def test_figures_verdicts_and_page(cli, model, tmp_path):
    """Everything is printed, and the folder holds the record and a page that is whole."""
    path, data = model
    out = tmp_path / "robust"
    code, printed, err = cli(path, *data, *EPS, "--out", out)
    assert code == 0, err
    for words in ("fgsm", "tried on", "recall of 3", "gradients are not zero", "not checked"):
        assert words in printed
    assert f"report: {out / 'robustness.html'}" in err
    assert sorted(each.name for each in out.iterdir()) == ["robustness.html", "robustness.json"]
    found = json.loads((out / "robustness.json").read_text())
    assert (found["kind"], found["model"], found["report"]["threat"]["eps"]) == (
        *("robustness", "compact"),
        0.3,
    )
    assert tuple(each["name"] for each in found["report"]["verdicts"]) == ALL
    page = (out / "robustness.html").read_text()
    assert page.count("<svg") >= 3
    assert "default-src 'none'" in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)


def test_a_file_that_is_missing_or_of_another_network_is_told_so(cli, model, tmp_path):
    """Both are a matter of the model: exit code 3."""
    path, data = model
    code, _, err = cli(tmp_path / "nowhere", *data)
    assert code == 3
    assert "no such file" in err
    assert cli(path, *data, *EPS, "--surrogate", tmp_path / "nowhere")[0] == 3
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    code, _, err = cli(tmp_path / "other.safetensors", *data)
    assert code == 3
    assert "defenses.evaluate" in err


def test_radii_are_certified_where_asked(cli, model, tmp_path):
    """A table, an entry of the JSON and a section of the page; without --certify none of them."""
    path, data = model
    out, figures = tmp_path / "robust", tmp_path / "figures.json"
    words = (path, *data, *EPS, "--no-verdicts", "--samples", "4", "--json", figures)
    code, printed, err = cli(*words, "--certify", "0.25", "--out", out)
    assert code == 0, err
    assert "certified accuracy" in printed
    found = json.loads(figures.read_text())
    assert found["certified"]["smoothing"]["sigma"] == 0.25
    assert 'id="certificate"' in (out / "robustness.html").read_text()
    assert "certified accuracy" not in cli(*words)[1]
    assert json.loads(figures.read_text())["certified"] is None


def test_a_surrogate_checks_the_transfer(cli, model):
    """Any checkpoint may be one."""
    path, data = model
    code, printed, _ = cli(path, *data, *EPS, "--surrogate", path)
    assert code == 0
    assert "No surrogate model" not in printed


def test_without_verdicts_there_are_none(cli, model, tmp_path):
    """Neither printed nor written."""
    path, data = model
    told = ("--no-verdicts", "--json", tmp_path / "f.json")
    code, printed, err = cli(path, *data, *EPS, *told)
    assert (code, err) == (0, "")
    assert "what should hold" not in printed
    assert json.loads((tmp_path / "f.json").read_text())["robust"]["verdicts"] == []


@pytest.mark.parametrize(
    ("demands", "code", "words"),
    [
        (("clean>=0.1", "robust>=0"), 0, ()),
        (("clean>=10%",), 0, ()),
        (("robust>=1.0",), 7, ("missed: robust>=1.0: got 0.",)),
        (("robust-low>=0.99", "robust>=99%"), 7, ("missed: robust-low", "missed: robust>=99%")),
    ],
)
def test_a_missed_demand_has_its_exit_code(cli, model, tmp_path, demands, code, words):
    """Each is named; figures and files are there all the same."""
    path, data = model
    given = [word for demand in demands for word in ("--require", demand)]
    found, printed, err = cli(path, *data, *EPS, *given, "--json", tmp_path / "f.json")
    assert found == code, err
    assert all(word in err for word in words)
    assert len(err.splitlines()) == len(words)
    assert "accuracy" in printed
    assert (tmp_path / "f.json").exists()


def test_verdicts_none_of_which_failed_are_enough(cli, model):
    """One that could not be checked, here by transfer, is no failure."""
    path, data = model
    gentle = ("--eps", "0.02", "--attack", "fgsm")
    code, printed, err = cli(path, *data, *gentle, "--require", "verdicts")
    assert (code, "not checked" in printed) == (0, True), err


def test_verdicts_that_did_not_run_are_missed(cli, model):
    """Nothing is passed by not looking."""
    path, data = model
    code, _, err = cli(path, *data, *EPS, "--no-verdicts", "--require", "verdicts")
    assert (code, "not checked" in err) == (7, True)


def test_a_failed_verdict_is_missed(cli, model, tmp_path):
    """A net whose logits saturate the loss is called out by name."""
    path, data = model
    loaded = read_model(path, unlocking=None)
    last = [each for each in loaded.model.modules() if isinstance(each, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(1e5)
        last.bias.mul_(1e5)
    masked = tmp_path / "masked.safetensors"
    write_model(masked, loaded.model, loaded.architecture, claims=loaded.claims, sealing=None)
    code, printed, err = cli(masked, *data, *EPS, "--require", "verdicts")
    assert code == 7
    assert "gradients are not zero" in err
    assert "FAIL" in printed


@pytest.mark.parametrize("demand", ["robust", "robust>0.4", "robust>=1.2", "speed>=1", "robust>=x"])
def test_a_demand_that_says_nothing_is_wrong_usage(cli, model, demand):
    """Before any work."""
    path, data = model
    code, _, err = cli(path, *data, *EPS, "--require", demand)
    assert (code, "--require" in err) == (2, True)


@pytest.mark.parametrize(
    "option",
    [
        ("--state", "s"),
        ("--out", "o"),
        ("--require", "robust>=0"),
        ("--attack", "autoattack"),
        ("--norm", "l2"),
        ("--surrogate", "m"),
        ("--exhaustive",),
    ],
)
def test_what_needs_an_attack_asks_for_eps(cli, model, option, tmp_path, monkeypatch):
    """Where the checkpoint claims no robustness."""
    monkeypatch.chdir(tmp_path)
    path, data = model
    code, _, err = cli(path, *data, *option)
    assert (code, "--eps" in err) == (3, True)
    assert list(tmp_path.iterdir()) == []


def test_the_state_file_is_gone_on_from(cli, model, tmp_path):
    """The same figures from it; another seed is refused with exit code 5."""
    path, data = model
    state = tmp_path / "state.json"
    first, second = (
        cli(path, *data, *EPS, "--state", state, "--json", tmp_path / f"{k}.json") for k in range(2)
    )
    assert first == second
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    code, _, err = cli(path, *data, *EPS, "--state", state, "--seed", "1")
    assert (code, "other" in err) == (5, True)


def test_a_certification_is_gone_on_from_without_an_attack(cli, model, tmp_path):
    """Half of the images are taken from the file; another sigma is refused with exit code 5."""
    path, data = model
    state, figures = tmp_path / "state.json", tmp_path / "figures.json"
    words = (path, *data, "--samples", "4", "--state", state, "--json", figures, "--certify")
    code, printed, err = cli(*words, "0.25")
    assert code == 0, err
    kept, whole = tmp_path / "state.json.certify", figures.read_bytes()
    content = json.loads(kept.read_text())
    assert len(content["content"]["hits"]) == 4
    for done in ("selected", "hits"):
        del content["content"][done][2:]
    kept.write_text(json.dumps(content))
    assert cli(*words, "0.25") == (code, printed, err)
    assert figures.read_bytes() == whole
    code, _, err = cli(*words, "0.5")
    assert (code, "other" in err) == (5, True)


def test_autoattack_is_the_ensemble(cli, model, tmp_path):
    """By the names of its members and the standard's constants."""
    path, data = model
    words = ("--eps", "0.05", "--attack", "autoattack", "--samples", "3", "--no-verdicts")
    code, _, err = cli(path, *data, *words, "--exhaustive", "--json", tmp_path / "f.json")
    assert code == 0, err
    settings = json.loads((tmp_path / "f.json").read_text())["robust"]["settings"]
    assert list(settings) == ["apgd", "apgdt", "fab", "square"]
    assert settings["apgd"]["steps"] == settings["apgdt"]["steps"] == 100
    assert settings["square"]["queries"] == 5000


def test_the_page_says_when_not_to_believe_it():
    """A failed check stands above the figures, and text is escaped."""
    page = render_robustness(record_of())
    assert "1 of 1 checks failed" in page
    assert "✗ FAIL" in page
    for raw in ("<b>", "<i>", "<c>"):
        assert raw not in re.sub(r"<b>[\d.]+[^<]*</b>", "", page)
    unchecked = render_robustness(record_of(verdicts=[]))
    assert "was not checked" in unchecked
    assert render_robustness(record_of()) == page


def test_the_page_says_which_attacks_had_no_draws():
    """Of a model that answers at random, and of no other; those with draws are not named."""
    told = "answers at random, and <pgd> met one draw"
    drawn = {"<pgd>": {"steps": 3, "draws": 20}}
    clean = {"clean": ["11", "01", "10", "11"]}
    assert told.replace("<pgd>", "&lt;pgd&gt;") in render_robustness(record_of(repeats=clean))
    for record in (record_of(), record_of(repeats={}), record_of(repeats=clean, settings=drawn)):
        assert "at random" not in render_robustness(record)


def test_a_note_says_which_attacks_had_no_draws(capsys):
    """On standard error, below the figures."""
    figures = {"count": 2, "accuracy": 1.0, "macro_recall": 1.0, "recall": (1.0, 1.0)}
    found = ClassificationReport(classes=("a", "b"), confusion=((1, 0), (0, 1)), **figures)
    robust = RobustnessReport(
        threat=ThreatModel(norm="linf", eps=0.1),
        classes=2,
        indices=(0, 1),
        labels=(0, 1),
        predictions=(0, 1),
        outcomes={"pgd": (True, False)},
        settings={"pgd": {"steps": 3}},
        seed=0,
        images="",
        versions={},
        repeats={"clean": ("11", "11"), "pgd": ("01", "00")},
    )
    evaluate_command._show(found, robust)
    assert "answers at random, and pgd met one draw of it" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_page_shows_examples():
    """With what the model took them for."""
    image, label = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    examples = Examples(
        clean=image,
        adversarial=image.flip(3),
        labels=label,
        before=label,
        after=1 - label,
        classes=("cat", "dog"),
        variant="compact",
        attack="pgd",
    )
    page = render_robustness(record_of(), examples)
    assert page.count("✗ dog") == page.count("✗ cat") == 1
    assert "change ×" in page


def test_many_classes_are_cut_to_the_worst():
    """Forty do not fit; those with the lowest recall do."""
    summary = record_of().report["summary"]
    recall = [k / 40 for k in range(40)]
    names = tuple(f"class {k:02}" for k in range(40))
    report = dict(record_of().report)
    report["summary"] = {**summary, "clean_recall": recall, "worst_case_recall": recall}
    record = RobustnessRecord(
        created="", hardware={}, versions={}, model="m", data="d", classes=names, report=report
    )
    page = render_robustness(record)
    assert "class 00" in page
    assert "class 39" not in page


def test_a_report_that_lacks_figures_is_refused():
    """Named, when the record is made."""
    with pytest.raises(RunError, match=r"robustness\.report: expected entries"):
        RobustnessRecord(
            created="", hardware={}, versions={}, model="", data="", classes=(), report={}
        )
