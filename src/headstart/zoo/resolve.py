"""From what the user typed to sources: `mini`, `mini:NAME`, `timm:NAME`, `hf:ORG/NAME`, `dir:PATH`."""

from __future__ import annotations

from collections.abc import Sequence

from headstart.core.validate import Refused, one_of, require

from .source import Skipped, Source

PREFIXES = ("mini", "timm", "hf", "dir")


def resolve(zoo: str | Sequence[str | Source]) -> tuple[list[Source], list[Skipped]]:
    """The sources a zoo names, and those that cannot be used here with the reason; no weights are loaded.

    Args:
        zoo: names joined by commas, or a sequence of names and sources. "mini" is every embedded model, "mini:NAME"
            one of them, "timm:NAME" and "hf:ORG/NAME" what those libraries load, "dir:PATH" a folder of models.

    Returns:
        sources in the order given, each name once; and what was skipped. `Source.load` may still refuse later.

    Raises:
        Refused: an unknown prefix or an unknown `mini:` name (with the nearest known one), or nothing named.

    >>> resolve("minni:cnn")
    Traceback (most recent call last):
    headstart.core.validate.Refused: The zoo in 'minni:cnn' must be a known name; got 'minni'. Did you mean 'mini'?
    """
    asked = [part.strip() for part in zoo.split(",")] if isinstance(zoo, str) else list(zoo)
    asked = [part for part in asked if part != ""]
    require(
        bool(asked),
        "A zoo must name at least one source",
        repr(zoo),
        "Pass 'mini', 'timm:NAME', 'hf:ORG/NAME' or 'dir:PATH'.",
    )
    found: dict[str, Source] = {}
    skipped: dict[str, Skipped] = {}
    for part in asked:
        sources, left = ([part], []) if isinstance(part, Source) else _named(part)
        found.update((source.name, source) for source in sources if source.name not in found)
        skipped.update((one.name, one) for one in left)
    return list(found.values()), list(skipped.values())


def _named(part: str) -> tuple[list[Source], list[Skipped]]:
    prefix, _, rest = part.partition(":")
    one_of(f"The zoo in {part!r}", prefix, PREFIXES)
    if prefix == "mini":
        return _mini(rest), []
    require(bool(rest), f"{prefix}: needs a name after the colon", repr(part), f"Write {prefix}:NAME.")
    try:
        if prefix == "dir":
            from .directory import sources_in

            return sources_in(rest)
        if prefix == "hf":
            from .hf_source import hf_source

            return [hf_source(rest)], []
        from .timm_source import timm_source

        return [timm_source(rest)], []
    except (Refused, ImportError, OSError) as problem:
        return [], [Skipped(name=part, why=str(problem))]


def _mini(name: str) -> list[Source]:
    from .mini import mini_sources

    sources = list(mini_sources())
    if name in ("", "*"):
        return sources
    known = {source.name.partition(":")[2]: source for source in sources}
    one_of("The mini: model", name, known)
    return [known[name]]
