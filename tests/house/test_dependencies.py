"""Every dependency has its reason, and the lock files hold every one of them, with hashes."""

from __future__ import annotations

import re
import tomllib

import pytest

from house.sources import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)
DEFAULT = PROJECT["project"]["dependencies"]
MORE = [
    *PROJECT["dependency-groups"]["dev"],
    *(one for extra in PROJECT["project"]["optional-dependencies"].values() for one in extra),
]


def name(requirement: str) -> str:
    """The package's name as locks spell it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def locked(file: str) -> dict[str, str]:
    """Package to its whole entry in a lock file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)
    return {name(entry): entry for entry in entries if re.match(r"[A-Za-z0-9]", entry)}


@pytest.mark.parametrize("requirement", [*DEFAULT, *MORE])
def test_each_has_its_reason_on_its_line(requirement: str) -> None:
    lines = [line for line in PYPROJECT.splitlines() if f'"{requirement}"' in line]
    assert lines and all(re.search(r"#\s*\S{3,}", line) for line in lines), f"{requirement}: say why in a comment"


@pytest.mark.parametrize("requirement", DEFAULT)
def test_the_lock_holds_what_the_server_needs(requirement: str) -> None:
    assert name(requirement) in locked("requirements.lock")


@pytest.mark.parametrize("requirement", [*DEFAULT, *MORE])
def test_the_lock_for_development_holds_everything(requirement: str) -> None:
    assert name(requirement) in locked("requirements-dev.lock")


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-dev.lock"])
def test_everything_is_pinned_and_hashed(file: str) -> None:
    for package, entry in locked(file).items():
        assert re.match(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+", entry) and "--hash=sha256:" in entry, package


def test_both_locks_agree() -> None:
    def version(entry: str) -> str:
        return entry.split("==")[1].split()[0]

    default, whole = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {name: version(entry) for name, entry in default.items()} == {
        name: version(whole[name]) for name in default if name in whole
    }


def test_what_is_heavy_or_for_tests_is_no_default() -> None:
    assert not {"torch", "openai", "pytest", "ray", "psycopg", "redis", "numpy"} & locked("requirements.lock").keys()
