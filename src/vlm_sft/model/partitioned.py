"""Whether ZeRO-3 has shared a weight out among the ranks, so that this process holds a part of it."""

from __future__ import annotations
