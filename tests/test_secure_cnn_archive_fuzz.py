"""The fuzzer's targets: guided by atheris where it is, and by mutation of the corpus everywhere."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import targets
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_cnn import archive
from secure_cnn.archive.format import stream as stream_module

FOLDER = Path(__file__).parent / "fuzz"
SEEDS = {name: targets.seeds(name) for name in targets.TARGETS}


@st.composite
def mutated(draw, seeds):
    """A seed with a few parts flipped, cut, doubled, spliced with another, or set to a number."""
    raw = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        length = draw(st.integers(0, 64))
        other = draw(st.sampled_from(seeds))
        raw[at : at + length] = draw(
            st.one_of(
                st.binary(max_size=8),
                st.just(b""),
                st.just(bytes(raw[at : at + length]) * 2),
                st.just(other[at : at + length]),
                st.integers(0, 2**32 - 1).map(lambda number: number.to_bytes(4, "big")),
            )
        )
    return bytes(raw)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_and_corpus_end_in_our_errors(name):
    """Vectors, parts of them, and every input that the fuzzer found worth keeping."""
    assert SEEDS[name]
    for raw in SEEDS[name]:
        targets.TARGETS[name](raw)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_mutations_end_in_our_errors(name):
    """Without guidance: a few hundred neighbours of the seeds."""

    @settings(max_examples=300, deadline=None, database=None)
    @given(mutated(SEEDS[name]))
    def run(raw):
        targets.TARGETS[name](raw)

    run()


def test_the_seeds_reach_deep(monkeypatch):
    """Control: some of each kind open, also behind a core that was forged from within."""
    assert len(targets.OPENED) > 5
    assert len(targets.VOUCHED) > 5
    parts = targets.Parts.of(targets.SEALED["unsigned"])
    parts.tell(name="another name")
    opened, seen = targets.opened, []
    monkeypatch.setattr(targets, "opened", lambda raw: seen.append(opened(raw)))
    targets.forged(parts.core)
    assert seen[0] is not None


def caught(target, raws):
    """Whether a target finds something in one of these."""
    for raw in raws:
        try:
            target(raw)
        except AssertionError:
            return True
    return False


def test_a_stream_that_lets_segments_move_is_found(monkeypatch):
    """Control: without the position in its tag, an exchange of two segments is a finding."""

    def exchanged():
        raw = targets.whole_stream()
        return raw[:74] + raw[138:202] + raw[74:138] + raw[202:]

    assert not caught(targets.stream, [exchanged()])
    monkeypatch.setattr(stream_module, "_segment_aad", lambda position, last: b"")
    assert caught(targets.stream, [exchanged()])


def test_a_signature_that_is_not_checked_is_found(monkeypatch):
    """Control: the vectors hold files that nothing but the signature stops."""
    assert not caught(targets.file, targets.SEALED.values())
    monkeypatch.setattr(archive.Verifier, "check", lambda *arguments: None)
    assert caught(targets.file, targets.SEALED.values())


@pytest.mark.parametrize("name", ["header", "stream"])
def test_a_short_guided_run_finds_nothing(name, tmp_path):
    """Atheris for a second each over header and stream; longer runs are `tests/fuzz/run.py`."""
    pytest.importorskip("atheris", reason="atheris is not installed: no guided run")
    for number, raw in enumerate(SEEDS[name]):
        (tmp_path / str(number)).write_bytes(raw)
    run = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", str(FOLDER / "run.py"), name),
            *("-max_total_time=1", "-timeout=120", "-rss_limit_mb=3000", "-max_len=16384"),
            *(f"-artifact_prefix={tmp_path}/", f"-dict={FOLDER / 'tokens.dict'}", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Done" in run.stderr


def test_the_corpus_is_small():
    """What is kept in the repository: a few hundred kilobytes at most."""
    files = [path for path in (FOLDER / "corpus").rglob("*") if path.is_file()]
    assert all(path.stat().st_size <= 8192 for path in files)
    assert sum(path.stat().st_size for path in files) <= 400_000
