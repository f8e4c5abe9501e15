"""Measurements and long tests, ``python -m benchmarks.NAME``, and what they share.

A measurement prints its command, versions and machine.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tpu"))  # for chips, hlo and compile_ahead
