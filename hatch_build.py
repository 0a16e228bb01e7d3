"""Compiles the C of `privacy/native/` when the project is installed or a wheel is built.

Where there is no C compiler, or it fails, the installation goes on without: the private step then
takes kernels made of torch's operations, which give the same gradients and are slower.
"""

import contextlib
import hashlib
import os
import platform
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_NATIVE = Path("privacy", "native")
_COMMON = ("-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-Wall", "-Wextra")
# One library for each width of vectors, under a name that Python does not take for a module; torch
# says at run time what the processor has.
_X86 = {
    "avx512": (
        *("-DVECTOR=64", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
    "avx2": ("-DVECTOR=32", "-mavx2", "-mfma"),
}
_ANY = {"plain": ("-DVECTOR=16",)}


class NativeBuildHook(BuildHookInterface):
    """Hatchling calls `initialize` before it builds a wheel, an editable one too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles every variant into the source tree, and lets the wheel take them along."""
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / _NATIVE
        variants = _X86 if platform.machine() in ("x86_64", "AMD64") else {}
        try:
            _clear(folder)
            for name, flags in {**variants, **_ANY}.items():
                self._compile(folder, name, flags)
        except (OSError, subprocess.CalledProcessError) as error:
            with contextlib.suppress(OSError):  # somebody else's folder
                _clear(folder)
            why = getattr(error, "stderr", None) or error
            self.app.display_warning(f"installing without compiled kernels: {why}")
            return
        build_data["artifacts"] += [f"/{(_NATIVE / '*.so.1').as_posix()}"]
        build_data["pure_python"] = False
        # No Python in it: any Python 3 on this platform loads it.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().translate(_TAG)}"

    def _compile(self, folder: Path, name: str, flags: tuple[str, ...]) -> None:
        """One variant."""
        compiler = (os.environ.get("CC") or "cc").split()
        sources = sorted(str(path) for path in folder.glob("*.c"))
        unfinished = folder / "unfinished.so.1"
        command = [*compiler, *_COMMON, *flags, *sources, "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        # As `privacy.native` looks for it: a library of other sources is never loaded.
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.[ch]")))
        digest = hashlib.sha256(text).hexdigest()[:16]
        unfinished.replace(folder / f"privacy-{name}-{digest}.so.1")


def _clear(folder: Path) -> None:
    """Removes what was compiled before, finished or not."""
    for made in folder.glob("*.so.1"):
        made.unlink()


_TAG = str.maketrans("-.", "__")
