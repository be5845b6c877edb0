"""Lets the tests import what their child processes run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
