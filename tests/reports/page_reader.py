"""Reads a report as a browser's parser would, for tests: attributes, text outside scripts, and numbers with their fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Page:
    """`numbers` are (field, exact value, text shown); `tags` every start tag with its attributes; `text` what is read."""

    numbers: list[tuple[str, str, str]] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page, self.quiet, self.number = Page(), "", None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.page.tags.append((tag, named))
        if tag in ("script", "style"):
            self.quiet = tag
        if tag == "data" and named.get("data-field"):
            self.number = (named["data-field"], named["value"], "")

    def handle_endtag(self, tag: str) -> None:
        if tag == self.quiet:
            self.quiet = ""
        if tag == "data" and self.number:
            self.page.numbers.append(self.number)
            self.number = None

    def handle_data(self, data: str) -> None:
        if self.quiet:
            return
        self.page.text += data
        if self.number:
            self.number = (*self.number[:2], self.number[2] + data)


def read_page(html: str) -> Page:
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.page
