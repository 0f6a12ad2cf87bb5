"""The ledger has every attempt that reached the upstream, once, however often the gateway is killed."""

from __future__ import annotations

import os
from pathlib import Path

from kills import play
from mock_upstream import started

KILLS = int(os.environ.get("TERTULIA_TEST_KILLS", "20"))


def test_entries_equal_what_reached_the_upstream_under_kill_9(tmp_path: Path) -> None:
    with started("--gap", "0.005", "--chunks", "5") as upstream:
        found = play(tmp_path / "data", upstream, KILLS, seed=4)
    print(found)
    assert found.upstream > 10 * KILLS and found.answered > 5 * KILLS
    assert (found.lost, found.twice, found.unexplained) == (0, 0, 0), found
    assert found.entries == found.upstream + found.unseen and found.unseen <= found.interrupted
    assert found.unseen <= 0.02 * found.entries, found  # killed between the intent and the first byte
