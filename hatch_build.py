"""Compiles the C of `privacy/native/` when the project is installed or a wheel is built.

Where there is no C compiler, or it fails, the installation goes on without: the private step then
takes kernels made of torch's operations, which give the same gradients and are slower.
"""

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
        for made in folder.glob("*.so.1"):
            made.unlink()
        variants = _X86 if platform.machine() in ("x86_64", "AMD64") else {}
        try:
            for name, flags in {**variants, **_ANY}.items():
                self._compile(folder, name, flags)
        except (OSError, subprocess.CalledProcessError) as error:
            for made in folder.glob("*.so.1"):
                made.unlink()
            why = getattr(error, "stderr", None) or error
            self.app.display_warning(f"installing without compiled kernels: {why}")
            return
        build_data["artifacts"] += [f"/{(_NATIVE / '*.so.1').as_posix()}"]
        build_data["pure_python"] = False
        # No Python in it: any Python 3 on this platform loads it.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().translate(_TAG)}"

    def _compile(self, folder: Path, name: str, flags: tuple[str, ...]) -> None:
        """One variant."""
        compiler = os.environ.get("CC", "cc").split()
        sources = sorted(str(path) for path in folder.glob("*.c"))
        target = str(folder / f"privacy-{name}.so.1")
        command = [*compiler, *_COMMON, *flags, *sources, "-o", target]
        subprocess.run(command, check=True, capture_output=True, text=True)


_TAG = str.maketrans("-.", "__")
