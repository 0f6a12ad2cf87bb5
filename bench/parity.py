"""Whether the ledger has every attempt that reached the upstream, once, when the gateway is killed at random moments:

    python bench/parity.py [--kills 200] [--seed 1]

A gateway under load is killed with SIGKILL and started again, over and over. See tests/kills.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from kills import play
from mock_upstream import started

SAID = {
    "kills": "times killed", "sent": "requests sent by clients", "answered": "answered with 200",
    "upstream": "attempts that the upstream counted", "entries": "entries of the ledger",
    "interrupted": "of these made at a start, for attempts that a kill cut off",
    "lost": "attempts without an entry", "twice": "attempts with more than one entry",
    "unseen": "entries whose attempt was killed before its bytes had left",
    "unexplained": "entries whose attempt the upstream does not know, for no such reason",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with started("--gap", "0.005", "--chunks", "5") as upstream, tempfile.TemporaryDirectory() as data:
        found = play(Path(data) / "data", upstream, options.kills, options.seed)
    for name, value in asdict(found).items():
        print(f"{value:>9,}  {SAID[name]}")
    print(f"{time.monotonic() - began:9.0f}  seconds")
    wrong = found.lost or found.twice or found.unexplained
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
