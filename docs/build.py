"""Generate the documentation that must not drift: the claims table, the method pages, and code quoted from the source.

python docs/build.py            writes docs/*.md from docs/templates/*.md, the catalogue and the verdict files
python docs/build.py --check    fails when a generated page is not what it would write
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

from headstart.core.catalogue import catalogue, claim_modules

DOCS = Path(__file__).parent
ROOT = DOCS.parent
VERDICTS = ROOT / "src/headstart/claims/verdicts"


def quoted(match: re.Match[str]) -> str:
    """{{ source PATH }} -> the file as a code block, under its name."""
    path = match.group(1)
    return f"`{path}`\n\n```python\n{(ROOT / path).read_text(encoding='utf-8').strip()}\n```"


def claims_table() -> str:
    """{{ claims }} -> one row for each claim, held or not, with the figures of its stored record."""
    rows = [
        "| claim | says | verdict | difference (95 % interval) | seeds | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for slug in sorted(claim_modules()):
        path = VERDICTS / f"{slug}.json"
        if not path.exists():
            rows.append(f"| {slug} | | not run | | | |")
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        for verdict in record["verdicts"]:
            claim, (low, high) = verdict["claim"], verdict["interval"]
            word = ("held" if verdict["held"] else "**failed**") + ("" if verdict["certain"] else ", uncertain")
            figures = f"{verdict['difference']:+.4f} ({low:+.4f} to {high:+.4f}); asked: > {claim['by']:g}"
            rows.append(
                f"| {slug} | {claim['says']} | {word} | {figures} | {claim['seeds']} | {record['seconds']:.0f} |"
            )
        if record["note"]:
            notes.append(f"**{slug}.** {record['note']}")
    return "\n".join(rows) + "\n\n" + "\n\n".join(notes)


def method_table() -> str:
    """{{ methods }} -> every module with a paper, by room."""
    rows = ["| room | method | what you get | paper |", "| --- | --- | --- | --- |"]
    for entry in sorted(catalogue(), key=lambda e: (e.room, e.slug)):
        if entry.room == "claims":
            continue
        module = importlib.import_module(entry.module)
        owned = [
            one
            for name, one in vars(module).items()
            if (inspect.isclass(one) or inspect.isfunction(one))
            and one.__module__ == entry.module
            and not name.startswith("_")
        ]
        cited = [one for one in owned if "Reference:" in (one.__doc__ or "")]  # what the paper is about comes first
        for owner in (cited or owned)[:1]:
            first = (owner.__doc__ or "").strip().splitlines()[0]
            link = (
                f"[{entry.paper.title}](https://arxiv.org/abs/{entry.paper.arxiv})"
                if entry.paper.arxiv
                else entry.paper.title
            )
            rows.append(f"| {entry.room} | `{owner.__name__}` | {first} | {link}, {entry.paper.year} |")
    return "\n".join(rows)


def build() -> dict[Path, str]:
    """Every generated page with its text."""
    pages = {}
    for template in sorted((DOCS / "templates").glob("*.md")):
        text = template.read_text(encoding="utf-8")
        text = re.sub(r"\{\{ source (\S+) \}\}", quoted, text)
        for word, make in (("claims", claims_table), ("methods", method_table)):
            if f"{{{{ {word} }}}}" in text:
                text = text.replace(f"{{{{ {word} }}}}", make())
        pages[DOCS / template.name] = f"<!-- made by docs/build.py from docs/templates/{template.name} -->\n\n{text}"
    return pages


def main() -> int:
    """Write the pages, or with --check say which differ."""
    stale = []
    for path, text in build().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run python docs/build.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
