"""The record of a run, with results and examples, and its page as parsed text."""

from html.parser import HTMLParser

import numpy as np
import torch
from hypothesis import strategies as st

from secure_cnn import pages, record

PROTECTED = "private+n-fgsm"


def make_epoch(variant, number, **fields):
    private = "private" in variant
    values = {
        "step": 10 * number,
        "seconds": 1.5,
        "learning_rate": 0.1,
        "test_loss": 1 / number,
        "test_accuracy": 1 - 0.5 / number,
        "train_loss": None if private else 0.5 / number,
        "epsilon": 0.6 * number if private else None,
    }
    return record.EpochRecord(variant=variant, epoch=number, **(values | fields))


def make_result(variant, classes, **fields):
    confusion = 8 * np.eye(classes, dtype=int) + 2 * np.roll(np.eye(classes, dtype=int), 1, axis=1)
    values = {
        "accuracy": 0.8,
        "macro_recall": 0.8,
        "recall": (0.8,) * classes,
        "confusion": confusion.tolist(),
        "epsilon": 2.991 if "private" in variant else None,
        "robust_accuracy": 0.6,
        "robust_low": 0.55,
        "robust_high": 0.65,
        "robust_recall": (0.6,) * classes,
        "attacks": {"pgd": 0.62, "apgd": 0.61},
        "seconds_per_step": 0.02,
    }
    return record.ResultRecord(variant=variant, **(values | fields))


def make_record(variants=("plain", PROTECTED), names=("cat", "dog", "eel"), length=3, **fields):
    row = record.Row(
        case="compact", variant=PROTECTED, metric="time_ratio", median=2.0, low=1.8, high=2.2,
        unit="x", n=30,
    )  # fmt: skip
    privacy = record.PrivacyRecord(
        epsilon=3.0, delta=1e-5, noise_multiplier=1.1, max_grad_norm=1.0, sampling_rate=0.1,
        steps=50, relation="add-or-remove-one", accountant="prv",
    )  # fmt: skip
    values = {
        "created": "2025-11-03T14:20:00+00:00",
        "status": "complete",
        "seconds": 41.5,
        "settings": {"batch_size": 128, "seed": None, "augment": ["shift"]},
        "versions": {"torch": "2.9"},
        "hardware": {"cpu": "a processor", "memory": 2**34},
        "data": record.DataRecord(
            name="animals", fingerprint="sha256:00ff", train=900, test=90, shape=(1, 8, 8),
            classes=names,
        ),
        "model": record.ModelRecord(name="compact", parameters=9000),
        "privacy": privacy if PROTECTED in variants else None,
        "threat": record.ThreatRecord(norm="linf", eps=0.1, bounds=(0, 1)),
        "epochs": [make_epoch(v, n) for v in variants for n in range(1, length + 1)],
        "results": [make_result(v, len(names)) for v in variants],
        "cost": [row] if PROTECTED in variants else [],
        "claims": {"epsilon": 3.0},
        "checkpoints": ["checkpoints/final.sealed"],
        "notes": ["a note"],
    }  # fmt: skip
    return record.RunRecord(**(values | fields))


def make_examples(names=("cat", "dog", "eel"), channels=1):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(4, channels, 8, 8, generator=generator)
    labels = torch.tensor([0, 1, 1, 0])
    return pages.Examples(
        clean=clean, adversarial=(clean + 0.1).clamp(0, 1), labels=labels, before=labels,
        after=1 - labels, classes=names, variant=PROTECTED, attack="apgd",
    )  # fmt: skip


class Page(HTMLParser):
    """The tags, identifiers and visible words of a page, as a browser's parser sees them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.attributes, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


number = st.floats(allow_nan=False)
