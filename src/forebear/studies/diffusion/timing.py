"""How long each part of the study took, also when it was stopped and went on."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from forebear.studies.base import Pieces
from forebear.types import read_json, write_json

TRAINING, TRUTH, SCORING, REMOVAL = "training", "ground truth", "scoring", "removal"

PARTS = (TRAINING, TRUTH, SCORING, REMOVAL)


@dataclass(frozen=True)
class TimedPieces(Pieces):
    """Pieces that remember the time of the processor they took, whichever run made them.

    What a stopped run had not finished is not counted: sums are what the work takes from nothing.

    Attributes:
        used: part of the study and seconds, by name of every piece that was asked for.
        made: seconds of those that were made by this run.
    """

    used: dict[str, tuple[str, float]] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)

    def timed(
        self,
        part: str,
        name: str,
        make: Callable[[], dict[str, Tensor]],
        about: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The piece of that name and what is known of it, `"seconds"` among them.

        Args:
            part: of the study.
            name: of the piece.
            make: makes it when it is not there.
            about: more to remember, ready for JSON; `make` may fill it.
        """
        path = self.folder / f"{name}.json"

        def measured() -> dict[str, Tensor]:
            start = time.process_time()
            found = make()
            self.made[name] = time.process_time() - start
            # Before the piece itself: a piece that is there always has its time.
            write_json(path, {**(about or {}), "part": part, "seconds": self.made[name]})
            return found

        tensors = self.tensors(name, measured)
        known = read_json(path)
        self.used[name] = (part, known["seconds"])
        return tensors, known

    def seconds(self, part: str) -> float:
        """Of the processor, for all pieces of a part that were asked for."""
        return sum(seconds for other, seconds in self.used.values() if other == part)
