"""Other Pythons of this machine: older ones, such as a droplet may have."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def python_3(minor: int) -> str | None:
    """A Python of this version, on the PATH or among those of pyenv."""
    name = f"python3.{minor}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for candidate in [shutil.which(name), *map(str, sorted(pyenv.glob(f"versions/*/bin/{name}")))]:
        if candidate:  # which may be one of pyenv's that says only that it is switched off
            told = [candidate, "-c", "import sys; print(sys.version_info[1])"]
            if subprocess.run(told, capture_output=True, text=True, check=False).stdout.strip() == str(minor):
                return candidate
    return None
