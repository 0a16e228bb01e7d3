"""Which settings of the methods without a guarantee are best, by a tenth that is not the table's.

`python docs/unlearning_search.py` lets each method of `privacy.unlearning`, with each of its
settings here, forget a *second* random tenth of the images of `docs/unlearning_table.py`, which has
two oracles of its own, and writes the gaps into unlearning-search.json. The least average gap of
a method is what the table takes over. So nobody looked at the tenth, and at the oracles, that the
table judges by. It goes on where it was stopped, from its folder in runs/.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import nn
from unlearning_table import (
    FORGOTTEN,
    IMAGES,
    MARGIN,
    TESTED,
    WORK,
    Batches,
    batch,
    in_words,
    rows_of,
    trained,
    write,
)

from privacy.unlearning import (
    SCRUB,
    SSD,
    Difference,
    FineTuning,
    Heuristic,
    NegGradPlus,
    OracleGap,
    SalUn,
)
from secure_cnn import build_model, load_data

DOCUMENT = Path(__file__).with_name("unlearning-search.json")
RESULTS = WORK / "search.json"
ORACLES, FIRST_SEED = 2, 101
Accuracies = dict[str, float]


def settings() -> dict[str, list[tuple[Heuristic, ...]]]:
    """Of each method what is tried; then methods that leave more to repair, and the repair."""
    rest = FineTuning(epochs=2, learning_rate=0.002, batch_size=64)
    strong = NegGradPlus(
        epochs=1, batch_size=64, forget_batch_size=64, learning_rate=0.03, alpha=0.7
    )

    def repair(epochs: int) -> Heuristic:
        return FineTuning(epochs=epochs, learning_rate=0.02, batch_size=64)

    alone: dict[str, list[Heuristic]] = {
        "SCRUB": [
            SCRUB(batch_size=64, learning_rate=0.005, epochs=5, max_epochs=3),
            SCRUB(batch_size=64, learning_rate=0.01, epochs=4),
            SCRUB(learning_rate=0.005),
            SCRUB(learning_rate=0.005, max_epochs=1),
            SCRUB(learning_rate=0.002),
            SCRUB(learning_rate=0.002, max_epochs=1),
        ],
        "SalUn": [
            SalUn(epochs=5, batch_size=64, forget_batch_size=100, learning_rate=0.02),
            SalUn(epochs=5, batch_size=64, forget_batch_size=400),
            SalUn(epochs=5),
            SalUn(epochs=5, learning_rate=0.03),
            SalUn(epochs=5, learning_rate=0.06),
        ],
        "NegGrad+": [
            NegGradPlus(
                epochs=3, batch_size=64, forget_batch_size=64, learning_rate=0.03, alpha=alpha
            )
            for alpha in (0.7, 0.5)
        ]
        + [
            NegGradPlus(epochs=3, learning_rate=rate, alpha=alpha)
            for rate, alpha in product((0.01, 0.03), (0.95, 0.9))
        ],
        "fine-tuning": [
            FineTuning(epochs=5, learning_rate=0.05),
            FineTuning(epochs=5, learning_rate=0.1),
            FineTuning(epochs=5, learning_rate=0.05, weight_decay=0.005),
        ],
        "SSD": [SSD(selection=2.0), SSD(selection=2.0, dampening=0.5)],
    }
    sequences = [
        (SalUn(epochs=2, learning_rate=0.06), repair(4)),
        (SalUn(epochs=5, learning_rate=0.03), repair(4)),
        (SalUn(epochs=2, learning_rate=0.1, share=1.0), repair(5)),
        (SalUn(epochs=5, learning_rate=0.03), repair(5), rest),
        (strong, repair(4)),
    ]
    return {**{n: [(m,) for m in ms] for n, ms in alone.items()}, "then fine-tuning": sequences}


def accuracies(model: nn.Module, sets: dict[str, Batches]) -> Accuracies:
    """Of a model, by set."""
    found = {}
    with torch.no_grad():
        for name, [(images, labels)] in sets.items():
            right = sum(
                int((model(some).argmax(1) == own).sum())
                for some, own in zip(images.split(500), labels.split(500), strict=True)
            )
            found[name] = right / len(labels)
    return found


def gap_of(unlearned: Accuracies, oracles: list[Accuracies], sets: dict[str, Batches]) -> OracleGap:
    """As `oracle_gap` has it, of accuracies that are there."""
    parts = {
        name: Difference(
            unlearned=unlearned[name],
            oracles=tuple(each[name] for each in oracles),
            examples=len(examples[0][1]),
            margin=MARGIN,
            error=0.05 / len(sets),
        )
        for name, examples in sets.items()
    }
    return OracleGap(**parts)


def found_gaps() -> Iterator[tuple[str, str, OracleGap]]:
    """Each method with each of its settings, as words, and its gap; first of the model before."""
    data = load_data("fashion-mnist")
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    second = slice(FORGOTTEN, 2 * FORGOTTEN)  # the first are those of the table
    others = torch.cat([order[:FORGOTTEN], order[2 * FORGOTTEN :]])
    sets = {
        "forget": batch(data.train, order[second]),
        "retain": batch(data.train, others),
        "test": batch(data.test, torch.arange(TESTED, 2 * TESTED)),
    }
    original, _ = trained("original", data.spec, 0, batch(data.train, order))
    oracles = [
        accuracies(trained(f"search-{n}", data.spec, n, sets["retain"])[0], sets)
        for n in range(FIRST_SEED, FIRST_SEED + ORACLES)
    ]
    yield "nothing", "nothing", gap_of(accuracies(original, sets), oracles, sets)
    known: dict[str, Accuracies] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, tried in settings().items():
        for methods in tried:
            words = ", ".join(map(repr, methods))
            if words not in known:
                model = build_model("compact", data.spec)
                model.load_state_dict(original.state_dict())
                for method in methods:
                    method(model, sets["retain"], sets["forget"])
                known[words] = accuracies(model.eval(), sets)
                RESULTS.write_text(json.dumps(known))
            gap = gap_of(known[words], oracles, sets)
            print(in_words(*methods), f"{gap.average_gap:.2f}", flush=True)
            yield name, in_words(*methods), gap


def main() -> None:
    """Measures all, writes the document, and prints the best of each method."""
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    found = list(found_gaps())
    write(DOCUMENT, [row for _, words, gap in found for row in rows_of(words, gap, None)])
    for name in dict.fromkeys(name for name, _, _ in found):
        own = [(gap.average_gap, words, gap) for each, words, gap in found if each == name]
        average, words, gap = min(own, key=lambda one: one[:2])
        print(f"{name}: {words}, {average:.2f}", gap, sep="\n")


if __name__ == "__main__":
    main()
