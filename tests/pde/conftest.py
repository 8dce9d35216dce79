"""Let these tests import ``oracles`` from ``tests/``, whichever folder pytest starts in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
