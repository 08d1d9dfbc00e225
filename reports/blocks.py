"""What a page is made of: sections of blocks. Sections say what is shown; the template alone says how it looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

Tone = Literal["", "good", "bad", "warn", "quiet"]


@dataclass(frozen=True)
class Cell:
    """One number or word. `text` is what is read; `value` the exact number behind it (also the sort key of a table);
    `path` names the field of the result file that it was read from, so that a reader (or a test) can check it."""

    text: str
    value: float | int | None = None
    path: str = ""
    tone: Tone = ""
    badge: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells. `live` tables can be sorted and filtered; their state lives in the page's address."""

    id: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    live: bool = False
    marked: frozenset[int] = frozenset()
    folded: str = ""


@dataclass(frozen=True)
class Figure:
    """A plotly figure as plain data. `summary` says in words what the picture shows, for those who cannot see it."""

    id: str
    spec: dict[str, Any]
    summary: str
    title: str = ""
    height_px: int = 380
    half: bool = False


@dataclass(frozen=True)
class Drawing:
    """Inline SVG, already escaped."""

    id: str
    svg: Markup
    summary: str


@dataclass(frozen=True)
class Text:
    """Sentences; several make a list."""

    items: tuple[str, ...]
    tone: Tone = ""
    numbered: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline number: a label, its values (predicted, measured) and what was promised."""

    label: str
    cells: tuple[Cell, ...]
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Tiles:
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Facts:
    """Named facts in two columns."""

    rows: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True)
class Links:
    """Files beside the page: (address relative to it, name, size in words, first digits of its SHA-256)."""

    rows: tuple[tuple[str, str, str, str], ...]


Block = Table | Figure | Drawing | Text | Tiles | Facts | Links


@dataclass(frozen=True)
class Section:
    """A titled part of a chapter. Without blocks it is left out, and `absent` says why."""

    id: str
    title: str
    blocks: tuple[Block, ...] = ()
    lead: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Chapter:
    """Everything about one model on one cluster."""

    id: str
    title: str
    sections: tuple[Section, ...] = field(default_factory=tuple)

    @property
    def shown(self) -> tuple[Section, ...]:
        return tuple(s for s in self.sections if s.blocks)

    @property
    def left_out(self) -> tuple[Section, ...]:
        return tuple(s for s in self.sections if not s.blocks)
