"""Every kind of page in a real browser: no error, nothing cut off, covered, pale, out of reach."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from support.audit_records import record_of as audit_record
from support.certificates import report as certification
from support.erasures import verified
from support.leakage_records import SHIFTS, extraction_of, inversion_of, membership_of
from support.leakage_records import record_of as leakage_record
from support.robustness_records import record_of as robustness_record
from support.run_records import PROTECTED, make_examples, make_record
from support.saved_runs import saved_run

from secure_cnn.pages import (
    InversionPicture,
    render_audit,
    render_bench,
    render_certificate,
    render_comparison,
    render_leakage,
    render_page,
    render_robustness,
)
from secure_cnn.record import ControlRecord, Measurements, Needs, Row, compare_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

KINDS = ["run", "audit", "evaluation", "bench", "compare", "leakage", "certificate"]
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text of any size
SMALLEST_TEXT = 8.5  # pixels on the screen
MEASURE = """
const wait = () => Promise.all([...document.querySelectorAll("iframe")].map(frame =>
  frame.contentDocument && frame.contentDocument.readyState === "complete" &&
  frame.contentDocument.URL !== "about:blank"
    ? null : new Promise(done => frame.addEventListener("load", done))));
const numbers = color => color.match(/[\\d.]+/g).map(Number);
const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((m, n) => n - m);
  return (x + 0.05) / (y + 0.05); };
function ground(view, element) {
  for (let at = element; at; at = at.parentElement) {
    const color = numbers(view.getComputedStyle(at).backgroundColor);
    if (color.length === 3 || color[3] > 0) return color;
  }
  return [255, 255, 255];
}
function measure(frame) {
  const doc = frame.contentDocument, view = frame.contentWindow, found = {
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    overflow: 0, covered: [], outside: [], pale: [], unreachable: [], texts: 0, small: [],
    hidden: [], cut: [] };
  doc.querySelectorAll("details").forEach(each => { each.open = true; });
  const root = doc.documentElement;
  found.overflow = root.scrollWidth - root.clientWidth;
  for (const svg of doc.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter(each => each.textContent.trim());
    const boxes = texts.map(each => each.getBoundingClientRect());
    found.texts += texts.length;
    const scale = frame.width / svg.viewBox.baseVal.width;
    for (const each of texts)
      if (scale * parseFloat(view.getComputedStyle(each).fontSize) < SMALLEST)
        found.small.push(svg.getAttribute("aria-label") + ": " + each.textContent);
    boxes.forEach((box, i) => {
      const edge = 2;
      if (box.left < frame.left - edge || box.right > frame.right + edge ||
          box.top < frame.top - edge || box.bottom > frame.bottom + edge)
        found.outside.push(svg.getAttribute("aria-label") + ": " + texts[i].textContent);
      for (let j = 0; j < i; j++) {
        const other = boxes[j], x = 1, y = 0.2 * Math.min(box.height, other.height);
        if (box.left + x < other.right && other.left + x < box.right &&
            box.top + y < other.bottom && other.top + y < box.bottom)
          found.covered.push(svg.getAttribute("aria-label") + ": " + texts[j].textContent +
            " / " + texts[i].textContent);
      }
    });
  }
  for (const each of doc.querySelectorAll("body *")) {
    const own = [...each.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || each.closest(".skip, style")) continue;
    const style = view.getComputedStyle(each), drawn = each.closest("svg");
    const color = numbers(drawn ? style.fill : style.color), behind = ground(view, each);
    // The number in a mark has the colour of the card, and stands on the colour of its series.
    if (drawn && color.join() === behind.join()) continue;
    if (ratio(color, behind) < LEAST) found.pale.push(each.textContent.trim().slice(0, 40) +
      " " + ratio(color, behind).toFixed(2));
  }
  const narrow = root.clientWidth < 480;
  for (const each of doc.querySelectorAll(narrow ? ".scroll" : ".scroll:has(svg, .stacked)"))
    if (each.scrollWidth > each.clientWidth) found.cut.push(each.getAttribute("aria-label"));
  for (const each of doc.querySelectorAll(".scroll:has(table)")) {
    const edge = each.getBoundingClientRect().right + 1;
    const inside = item => item.getBoundingClientRect().right <= edge;
    const figures = each.querySelectorAll("tbody th[scope=row] ~ td, tbody tr:not(:has(th)) td");
    if (![...figures].some(inside) ||
        ![...each.querySelectorAll("caption > *")].every(inside))
      found.hidden.push(each.getAttribute("aria-label"));
  }
  for (const each of doc.querySelectorAll("main *"))
    if (["auto", "scroll"].includes(view.getComputedStyle(each).overflowX) && each.tabIndex < 0)
      found.unreachable.push(each.className);
  return found;
}
addEventListener("load", async () => {
  await wait();
  const all = {};
  document.querySelectorAll("iframe").forEach(frame => { all[frame.title] = measure(frame); });
  document.getElementById("found").textContent = JSON.stringify(all);
});
"""


def make_bench():
    """A benchmark with all that its page shows."""
    rows = []

    def add(variant, metric, value, unit, case="compact 1x8x8"):
        low, high = 0.95 * value, min(1.05 * value, 1.0 if unit == "share" else 1e9)
        fields = {"case": case, "variant": variant, "metric": metric, "unit": unit, "n": 15}
        rows.append(Row(median=value, low=low, high=high, **fields))

    variants = {"plain": 1.0, "plain-again": 1.0, "private": 1.9, "pgd": 6.2, PROTECTED: 3.3}
    variants[f"{PROTECTED}+average+sealed-background"] = 3.8
    for variant, ratio in variants.items():
        add(variant, "time", 0.01 * ratio, "s")
        add(variant, "time_ratio", ratio, "x")
        add(variant, "images_per_second", 100 / ratio, "1/s")
        for part in ("data", "attack", "forward", "clipping", "other"):
            add(variant, f"time_{part}", 0.002 * ratio, "s")
        for when in ("examples", "time"):
            add(variant, f"accuracy_same_{when}", 0.95 - 0.02 * ratio, "share")
            add(variant, f"macro_recall_same_{when}", 0.9 - 0.02 * ratio, "share")
            add(variant, f"robust_accuracy_same_{when}", 0.1 + 0.1 * ratio, "share")
            if "private" in variant:
                add(variant, f"epsilon_same_{when}", 8.0, "epsilon")
        for size in (32, 64, 128):
            add(variant, "time", 1e-4 * size * ratio, "s", case=f"batch {size}")
        add(variant, "exponent", 0.97, "1", case="batch")
    return Measurements(created="2026-01-01", hardware={}, versions={}, rows=tuple(rows))


def make_leakage():
    """A measurement with all that its page shows, and pictures."""
    shifts = {f"{name}-{end}": k / 20 for k, name in enumerate(SHIFTS) for end in ("on", "off")}
    record = leakage_record(
        membership=membership_of({"a-name-of-an-attack-that-is-long": 1.2, **shifts}),
        controls=[
            *leakage_record().controls,
            ControlRecord(name="noise switched off", expected="more than ε allows, " * 4,
                          got="0.31 to 0.35, where 0.04 is allowed", passed=True),
        ],
        inversion=[inversion_of(p, b, 7) for p in ("plain", "noised") for b in (1, 4, 8)],
        extraction=[
            extraction_of(pool=pool, answers=answers, queries=queries)
            for pool in ("unseen images of the same kind", "noise")
            for answers in ("probabilities", "top 3, rounded", "labels")
            for queries in (100, 1000, 10000)
        ],
        epsilon=3.0, delta=1e-5, variant="private",
        notes=("These figures are of the private images themselves, and no ε covers them.",),
    )  # fmt: skip
    images = np.linspace(0, 1, 8 * 28 * 28).reshape(8, 1, 28, 28)
    return record, [
        InversionPicture(title=f"batch {n}", originals=images[:n], reconstructions=1 - images[:n])
        for n in (1, 4, 8)
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder with one page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    record, examples = make_record(), make_examples()
    certified = robustness_record().__class__(
        **(vars(robustness_record()) | {"certification": certification().to_dict()})
    )
    runs = [saved_run(f"run {n}", accuracy=0.8 - 0.004 * n, epsilon=2.0**n) for n in range(7)]
    runs[:2] = [replace(run, leakage=leakage_record(variant=PROTECTED)) for run in runs[:2]]
    texts = {
        "run": render_page(record, examples),
        "audit": render_audit(audit_record()),
        "evaluation": render_robustness(certified, examples),
        "bench": render_bench(make_bench()),
        "leakage": render_leakage(*make_leakage()),
        "compare": render_comparison(compare_runs(runs), Needs(epsilon=2.0)),
        "certificate": render_certificate(verified()),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


def browse(folder, *options):
    """What the browser prints and what it logs."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--enable-logging=stderr", "--v=0", "--allow-file-access-from-files"),
        f"--user-data-dir={folder / 'profile'}",
    ]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout, re.findall(r".*CONSOLE.*", run.stderr)


def measured(pages, folder, width, *options):
    """Each page laid out in a frame of that width, and what is wrong with it."""
    frames = "".join(
        f'<iframe title="{kind}" src="{(pages / kind).as_uri()}.html" '
        f'style="width:{width}px;height:900px;border:0"></iframe>'
        for kind in KINDS
    )
    script = MEASURE.replace("LEAST", str(LEAST_CONTRAST)).replace("SMALLEST", str(SMALLEST_TEXT))
    (folder / "all.html").write_text(
        f'<!doctype html><body>{frames}<pre id="found"></pre><script>{script}</script>'
    )
    address = (folder / "all.html").as_uri()
    out, log = browse(folder, "--dump-dom", "--virtual-time-budget=9000", *options, address)
    assert log == []
    return json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', out, re.DOTALL)[1]))


DARK = "--blink-settings=preferredColorScheme=0"


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("options", [(), (DARK,)], ids=["light", "dark"])
def test_pages_can_be_read(pages, tmp_path, width, options):
    """Nothing wider than the screen, on a phone not even in a box; all legible and in reach."""
    found = measured(pages, tmp_path, width, *options)
    assert list(found) == KINDS
    for kind, page in found.items():
        assert page.pop("texts") > 5 or kind == "certificate", kind  # which has no figure
        assert page.pop("dark") == bool(options)
        assert {name: value for name, value in page.items() if value} == {}, kind


def test_bad_pages_are_caught(tmp_path):
    """Control: each fault that the measurement looks for, planted."""
    text = '<text x="{}" y="{}" style="fill:{};font-size:16px">words</text>'
    svg = "".join(text.format(*at) for at in ((5, 20, "#000"), (8, 22, "#000"), (190, 50, "#ccc")))
    page = (
        "<!doctype html><body><main>"
        '<svg width="200" height="60" viewBox="0 0 200 60" aria-label="figure" '
        f'style="overflow:visible">{svg}</svg><div style="width:900px">wide</div>'
        '<svg width="50" viewBox="0 0 100 60"><text y="30" style="font-size:14px">x</text></svg>'
        '<div class="scroll" tabindex="0" aria-label="broad" style="overflow-x:auto;width:99px">'
        '<svg width="400" viewBox="0 0 400 9"></svg></div>'
        '<div class="scroll" tabindex="0" aria-label="long" style="overflow-x:auto;width:99px">'
        '<table class="stacked"><td>a</td><td style="min-width:200px">words</td></table></div>'
        '<div class="hidden" style="overflow-x:auto;width:9px">aaaaaaaaaaaa</div>'
        '<div class="scroll" tabindex="0" aria-label="table" style="overflow-x:auto;width:99px">'
        '<table><tr><th style="min-width:200px">name</th><td>1</td></tr></table></div>'
        "</main></body>"
    )
    for kind in KINDS:
        (tmp_path / f"{kind}.html").write_text(page)
    found = measured(tmp_path, tmp_path, 390)["run"]
    assert found["overflow"] > 400
    assert found["covered"] == ["figure: words / words"]
    assert found["outside"] == ["figure: words"]
    assert [words.split()[0] for words in found["pale"]] == ["words"]
    assert found["small"] == ["null: x"]
    assert found["unreachable"] == ["hidden"]
    assert found["hidden"] == ["table"]
    assert found["cut"] == ["broad", "long", "table"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_without_an_error(pages, tmp_path, kind):
    """Nothing in the console, a picture that is not blank, and a page that prints."""
    address = (pages / kind).as_uri() + ".html"
    picture, paper = tmp_path / "page.png", tmp_path / "page.pdf"
    _, log = browse(tmp_path, f"--screenshot={picture}", "--window-size=1200,1600", address)
    assert log == []
    assert picture.stat().st_size > 30_000
    _, log = browse(tmp_path, f"--print-to-pdf={paper}", "--no-pdf-header-footer", address)
    assert log == []
    assert paper.read_bytes()[:5] == b"%PDF-"
