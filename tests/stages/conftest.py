"""Fixtures that several modules share."""

from __future__ import annotations

from recovery_world import serial, world

__all__ = ["serial", "world"]
