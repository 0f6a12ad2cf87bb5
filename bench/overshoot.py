"""How well limits hold: crowds against a limit, over and over, by the upstream's own count of what it answered.

    python bench/overshoot.py [--runs 5] [--callers 1000] [--worth 100] [--leaving 0.3] [--failing 0.3] [--kill]

Each run starts a gateway with a limit of money worth --worth of the requests, and --callers that all ask at once and
come back as long as they are told to. Shares of them leave in the middle or ask for a model whose upstream fails; with
--kill the gateway is killed with SIGKILL when a third is answered, and started again. Printed are, as shares of the
limit, what the upstream answered and what the gateway says was spent, and what is still reserved at the end; exit code
1 if anything was overshot, stayed reserved, or less than 95 % could be used.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from crowds import COST, Crowd, play
from mock_upstream import started


def run(options: argparse.Namespace, seed: int) -> bool:
    async def in_the_middle(crowd: Crowd) -> None:
        while crowd.answered < options.worth // 3:
            await asyncio.sleep(0.005)

    limit, began = options.worth * COST, time.monotonic()
    with started("--gap", "0.01", "--delay", "0.1") as upstream, tempfile.TemporaryDirectory() as data:
        found = uvloop.run(
            play(
                Path(data) / "data", upstream, f"spend_limit = {limit / 1e9}", callers=options.callers, seed=seed,
                leaving=options.leaving, failing=options.failing, kill_after=in_the_middle if options.kill else None,
            )
        )  # fmt: skip
    print(
        f"{seed:4} upstream {found.cost / limit:7.2%}   spent {found.spent / limit:7.2%}   reserved {found.reserved}   "
        f"{found.requests} requests, {time.monotonic() - began:.1f} s",
        flush=True,
    )
    return found.cost <= found.spent <= limit and found.spent >= 0.95 * limit and not found.reserved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--callers", type=int, default=1000)
    parser.add_argument("--worth", type=int, default=100, help="requests that the limit is worth")
    parser.add_argument("--leaving", type=float, default=0.3, help="share of callers that leave in the middle")
    parser.add_argument("--failing", type=float, default=0.3, help="share that asks for what fails")
    parser.add_argument("--kill", action="store_true", help="kill the gateway in the middle")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held = [run(options, seed) for seed in range(1, options.runs + 1)]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
