#!/usr/bin/env python
"""Feeds one target under atheris, guided by what each input reaches.

    python tests/fuzz/run.py TARGET [options of libFuzzer]

Needs `pip install atheris`. Corpus and findings go where libFuzzer is told; none are written here.
"""

import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

with atheris.instrument_imports(include=["secure_cnn.archive"]):
    from fuzz.targets import TARGETS

if __name__ == "__main__":
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()
