"""Finding shards that are missing, truncated or damaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forebear.errors import FormatError
from forebear.progress import track
from forebear.store.lock import Lock
from forebear.store.manifest import Manifest
from forebear.store.reader import Store
from forebear.store.shards import Shard, path_of


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        shards: how many there should be.
        missing: numbers of those that are not there.
        damaged: what is wrong with others, by number.
        repaired: damaged ones were removed, so that building again makes them anew.
    """

    shards: int
    missing: tuple[int, ...]
    damaged: Mapping[int, str]
    repaired: bool = False

    @property
    def complete(self) -> bool:
        """Whether every shard is there and intact."""
        return not self.missing and not self.damaged


def verify(folder: str | Path, *, repair: bool = False) -> Verification:
    """Compare the content of every shard with the hash it was written with.

    Args:
        folder: of a store, complete or not.
        repair: remove damaged shards; building again makes them and nothing else.

    Raises:
        FormatError: it is no store, or its manifest is damaged or from a newer version.
        DataError: all shards are intact and an id stands more than once.
        ForebearError: with `repair`, another process is building the store.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    lock = Lock(folder)
    if repair:
        lock.take()
    try:
        missing, damaged = _examined(folder, manifest)
        if repair:
            for number in damaged:
                path_of(folder, number).unlink()
    finally:
        lock.release()
    if not missing and not damaged:
        Store(folder, manifest).require_unique_ids()
    return Verification(manifest.shards, tuple(missing), damaged, repair and bool(damaged))


def _examined(folder: Path, manifest: Manifest) -> tuple[list[int], dict[int, str]]:
    missing: list[int] = []
    damaged: dict[int, str] = {}
    for number in track(range(manifest.shards), "shards"):
        if not path_of(folder, number).exists():
            missing.append(number)
            continue
        try:
            intact = Shard.open(folder, number, manifest).intact
        except FormatError as error:
            damaged[number] = str(error)
            continue
        if not intact:
            damaged[number] = (
                f"{path_of(folder, number)} is damaged: its content has another hash than when it "
                "was written"
            )
    return missing, damaged
