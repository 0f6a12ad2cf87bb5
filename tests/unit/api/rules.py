"""What the tests of the endpoints' rules share: a body in, the refusal or the call out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tertulia.core import NOBODY, Call, Reply, Task
from tertulia.engines.base import Collector
from tertulia.errors import BadRequest


def checked(task: Task, body: dict[str, Any]) -> Call:
    call = Call("req_1", NOBODY, task, json.dumps(body).encode(), Reply(Collector()), 0)
    task.check(call)
    return call


def refusal(task: Task, body: dict[str, Any]) -> tuple[str, str | None, str | None]:
    with pytest.raises(BadRequest) as error:
        checked(task, body)
    return error.value.message, error.value.param, error.value.code
