"""Run dosvob.py as it is, but with other values for some of its constants: limits of minutes are not for tests.

It is called as `python with_constants.py '{"ACTION_LIMIT": 2}'` and dosvob's own arguments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dosvob

for name, value in json.loads(sys.argv[1]).items():
    if not hasattr(dosvob, name):
        sys.exit(f"dosvob has no constant {name}")
    setattr(dosvob, name, value)
sys.exit(dosvob.main(sys.argv[2:]))
