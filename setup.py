"""Only what pyproject.toml cannot say: the modules that every piece of every answer passes can be compiled by mypyc,
which makes a call cost about a quarter less CPU. TERTULIA_COMPILE=1 compiles them; anything else builds pure Python.

The source is the same and runs either way; what is compiled is typed strictly and holds no msgspec structs, whose
annotations do not survive it. `make compiled` builds into build/compiled, beside the source and not over it.
"""

import os

from setuptools import setup

MODULES = (
    "call", "direct", "turns", "accounts/budgets", "accounts/ledger", "accounts/limits", "accounts/prices", "api/edge",
    "api/exchange", "api/rules",
    "engines/attempts", "engines/connection", "engines/sse", "engines/timeouts", "engines/upstream",
    "gateway/accesslog", "gateway/admit", "gateway/cache", "gateway/meter", "gateway/metrics", "gateway/names",
    "gateway/pipeline", "gateway/route", "gateway/targets", "store/journal", "store/slots",
)  # fmt: skip


def extensions() -> list:
    if os.environ.get("TERTULIA_COMPILE") != "1":
        return []
    from mypyc.build import mypycify

    return mypycify(
        ["--config-file=mypyc.ini", *(f"src/tertulia/{name}.py" for name in MODULES)], opt_level="2", debug_level="0"
    )


setup(ext_modules=extensions())
