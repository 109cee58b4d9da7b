"""Every tolerance of the test suite, in one place. None is loosened to make a test pass: find the cause.

Relative errors are max|a - b| / max|b| over a whole tensor, b being the oracle.
"""

from __future__ import annotations
