"""What comes about in another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(ready: Callable[[], Any], timeout: float = 120) -> Any:
    """What ``ready`` gives, once it gives something."""
    end = time.monotonic() + timeout
    while not (found := ready()):
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
    return found
