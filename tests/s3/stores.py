"""The object stores that a test may be run on; the fixture ``open_store`` opens them by these names."""

from __future__ import annotations

import pytest

STORES = [pytest.param("moto", marks=pytest.mark.s3), pytest.param("swift", marks=pytest.mark.s3_real)]
