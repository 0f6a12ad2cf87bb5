"""Seeds a data directory for bench/serve: one organization, one project, 1,000 keys and the one in BENCH_KEY."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from tertulia.config import load
from tertulia.server import Server

data = Path(sys.argv[1])
server = Server(load({"data": str(data), "api_key": os.environ["BENCH_KEY"]}, {}))
organization, project = server.directory.home()
server.directory.add_keys(
    [f"sk-proj-{secrets.token_urlsafe(32)}" for _ in range(1000)], "project", organization, project, "bench"
)
(data / "seeded").touch()
