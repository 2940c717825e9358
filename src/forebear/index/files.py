"""The folder of an index: a description that is written last, and files that it vouches for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forebear.errors import FormatError, MismatchError
from forebear.index.base import Recall, Trial
from forebear.store import Store
from forebear.store.files import write_whole
from forebear.types import FORMAT, read_json

NAME = "index.json"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `index.json` says.

    Attributes:
        kind: name of the kind.
        settings: of the kind, ready for JSON.
        store: fingerprint of the store it was built from.
        rows: of that store.
        libraries: versions of what built it, by name.
        files: size and SHA-256 of each data file, by name.
        recall: against exact search.
        trials: efforts that were measured.
    """

    kind: str
    settings: Mapping[str, Any]
    store: str
    rows: int
    libraries: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    recall: Recall
    trials: tuple[Trial, ...]

    def write(self, folder: Path) -> None:
        """Write `index.json` whole or not at all."""
        content = json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"
        write_whole(folder / NAME, [content.encode()])


def folder_of(store: Store, kind: str) -> Path:
    """Where the index of a kind is."""
    return store.folder / f"index-{kind}"


def remedy_of(kind: str) -> str:
    """What to do about an index that cannot be used."""
    return f"build it again: forebear.index.build(store, {kind!r})"


def fingerprint(store: Store) -> str:
    """SHA-256 of what a store says of itself and of the content of its shards.

    The same rows stored again give the same one, by whatever version of forebear.
    """
    facts = {name: fact for name, fact in store.manifest.plain().items() if name != "version"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for shard in range(store.manifest.shards):
        digest.update(store.shard(shard).sha256.encode())
    return digest.hexdigest()


def described_files(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, by name."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
        for name in names
    }


def read_description(store: Store, kind: str) -> Description:
    """The description of an index that is whole and fits the store.

    Raises:
        FormatError: there is none, or it is damaged or from a newer version.
        MismatchError: the store has changed since it was built.
    """
    folder = folder_of(store, kind)
    remedy = remedy_of(kind)
    if not (folder / NAME).exists():
        raise FormatError(f"{store.folder} has no finished index of kind {kind!r}: {remedy}")
    try:
        content = read_json(folder / NAME)
    except FormatError as error:
        raise FormatError(f"{error}, or {remedy}") from error
    try:
        trials = tuple(Trial(**trial) for trial in content.pop("trials"))
        recall = Recall(**content.pop("recall"))
        del content["format"]
        found = Description(**content, recall=recall, trials=trials)
    except (KeyError, TypeError) as error:
        raise FormatError(f"{folder / NAME} is damaged ({error}): {remedy}") from error
    if found.kind != kind:
        raise FormatError(f"{folder} holds an index of kind {found.kind!r}: {remedy}")
    if found.store != fingerprint(store):
        raise MismatchError(
            f"the index {folder} was built from other rows than {store.folder} holds now: {remedy}"
        )
    _require_whole(folder, found.files, remedy)
    return found


def _require_whole(folder: Path, files: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """Compare content with hashes: a library that is given a damaged file may crash."""
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise FormatError(f"{path} does not exist: {remedy}") from None
        if size != expected["bytes"] or _digest(path) != expected["sha256"]:
            raise FormatError(
                f"{path} is damaged: it has {size} bytes and another hash than when it was "
                f"written with {expected['bytes']}; {remedy}"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
