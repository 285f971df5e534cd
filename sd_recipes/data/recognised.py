"""What a source turned out to be, so that a wrong reading is seen in a run's first lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NAMED = 5  # names that a message lists


@dataclass
class Recognised:
    """In words: what lies there, where the captions come from, and what was passed over."""

    layout: str
    captions: str = ""
    notes: list[str] = field(default_factory=list)
    has_names: bool = False  # whether its rows are files, whose names may be captions

    def note(self, what: str, names: Sequence[str]) -> None:
        """Note that there are some of `what`, with their number and the first names; nothing where there are none."""
        if names:
            self.notes.append(f"{len(names):,} {what}: {some(names)}")

    def note_nearly(self, number: int) -> None:
        """Note how many paths were not exactly a file's."""
        if number:
            self.notes.append(f"{number:,} paths were found in another case, form or with another slash")


def some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
