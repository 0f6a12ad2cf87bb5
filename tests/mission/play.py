"""Runs blocks of code from tests/mission/blocks as a reader of the text they come from would: one after the other in
one namespace, like the cells of a notebook. A line `pip install ...` is run by pip, as a notebook does.

As a program, `python play.py BLOCK...` runs the blocks and then serves the Flask or FastAPI `app` they made, for real,
on a port of the system's choice, which it prints. The blocks themselves are never changed.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import types
from pathlib import Path

BLOCKS = Path(__file__).with_name("blocks")


def source(block: str) -> str:
    """The text of a block as it was written."""
    return (BLOCKS / f"{block}.py").read_text(encoding="utf-8")


def cells(text: str) -> tuple[list[str], str]:
    """The shell lines of a block, and its Python with those lines left empty."""
    lines = text.split("\n")
    shell = [line for line in lines if line.startswith("pip install ")]
    return shell, "\n".join("" if line in shell else line for line in lines)


def play(text: str, module: types.ModuleType, name: str = "block") -> None:
    """Runs the text of a block in the module. Raises CalledProcessError if a shell line fails."""
    shell, python = cells(text)
    for line in shell:
        # What is asked for is there already; with PIP_NO_INDEX pip fails rather than look for it elsewhere.
        environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        command = [sys.executable, "-m", *shlex.split(line)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=120)
    exec(compile(python, name, "exec"), module.__dict__)


def notebook() -> types.ModuleType:
    """An empty namespace, known to the import system as Flask expects of its argument."""
    module = sys.modules["mission"] = types.ModuleType("mission")
    return module


def main(blocks: list[str]) -> None:
    module = notebook()
    for block in blocks:
        play(source(block), module, block)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    app = module.__dict__["app"]
    if type(app).__name__ == "Flask":
        from werkzeug.serving import make_server

        make_server("127.0.0.1", 0, app, threaded=True, fd=listener.fileno()).serve_forever()
    else:
        import uvicorn

        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1:])
