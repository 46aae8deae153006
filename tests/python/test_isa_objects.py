"""Objects compiled with wide instructions hold no weak symbol.

The linker keeps one copy of an inline function for the whole program; were it the one from an AVX-512 object, the
library would die on a machine without AVX-512.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def isa_objects() -> list[Path]:
    """Kernel objects of FASTLLM_BUILD_DIR, else of the release builds in the source tree, CMake's and pip's."""
    given = os.environ.get("FASTLLM_BUILD_DIR")
    folders = [Path(given)] if given else [ROOT / "build" / "release", *sorted((ROOT / "build").glob("cp3*"))]
    return [o for f in folders for o in sorted(f.glob("**/fastllm_cpu_*.dir/**/*.o"))]


def test_isa_objects_hold_no_weak_symbols() -> None:
    """Every symbol is local, undefined or one of the table's own functions."""
    if shutil.which("nm") is None:
        pytest.skip("binutils' nm is not installed")
    objects = isa_objects()
    if not objects:
        pytest.skip("no build folder with kernel objects; set FASTLLM_BUILD_DIR")
    for path in objects:
        lines = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True).stdout.splitlines()
        weak = [line for line in lines if len(line.split()) > 1 and line[17] in "WwVvu"]
        assert not weak, f"{path.name} has symbols the linker may merge: {weak}"
