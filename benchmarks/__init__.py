"""Measurements, each runnable alone; each prints its command, versions and machine."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tpu"))  # for hlo and compile_ahead
