"""Which paper a module comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """The source of a method: what `headstart cite` prints and where `departs` says what differs.

    >>> print(Paper("LogME", "You et al.", 2021, arxiv="2102.11005").bibtex("logme"))
    @article{logme,
      title = {LogME},
      author = {You et al.},
      year = {2021},
      eprint = {2102.11005}
    }
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
