"""Only what pyproject.toml cannot say: the modules that every piece of every answer passes can be compiled by mypyc,
which makes a call cost about a quarter less CPU. TERTULIA_COMPILE=1 compiles them; anything else builds pure Python.

The source is the same and runs either way; what is compiled is typed strictly and holds no msgspec structs, whose
annotations do not survive it. One function is C, where a compiler cannot make it of Python: it looks at 64 bytes of a
body at a time (api/decode.py, skim). `make compiled` builds into build/compiled, beside the source and not over it.
"""

import os
import platform

from setuptools import Extension, setup

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

    found = mypycify(
        ["--config-file=mypyc.ini", *(f"src/tertulia/{name}.py" for name in MODULES)], opt_level="2", debug_level="0"
    )
    if platform.machine() in ("x86_64", "AMD64"):
        found.append(Extension("tertulia.api._outline", ["src/tertulia/api/_outline.c"]))
    return found


setup(ext_modules=extensions())
