"""Situations that a user or somebody else's files may bring about, each played through the public command.

bench/situations.py plays them all and writes what came of them; test_situations.py plays them as tests.
"""

from __future__ import annotations

from tests.faults.situations import places, records, secrets, shared_data, texts

SITUATIONS = [one for module in (secrets, texts, shared_data, places, records) for one in module.situation.situations]
