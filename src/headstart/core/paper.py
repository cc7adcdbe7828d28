"""Which paper a module comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """The source of a method: what `headstart cite` prints and where `departs` says what differs.

    >>> Paper("LogME: Practical Assessment of Pre-trained Models", "You et al.", 2021, arxiv="2102.11005").bibtex("logme")
    '@article{logme,\\n  title = {LogME: Practical Assessment of Pre-trained Models},\\n  author = {You et al.},\\n  year = {2021},\\n  eprint = {2102.11005}\\n}'
    """

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    code: str | None = None
    departs: str = ""

    def bibtex(self, key: str) -> str:
        """The BibTeX entry under `key`."""
        fields = {"title": self.title, "author": self.authors, "year": self.year, "eprint": self.arxiv}
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value is not None)
        return f"@article{{{key},\n{body}\n}}"
