"""The command line: `headstart VERB ...`; exit codes 0 done, 1 the run says no, 2 wrong use, 130 interrupted."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "fit": "choose a source, move what it knows to your data, judge, write a model and a report",
    "choose": "rank the sources for your data, without tuning",
    "merge": "several models into one, judged if you like",
    "attack": "how far your own models err together under small changes to their pictures",
    "predict": "the class of new inputs, by a finished run",
    "doctor": "look at your data before spending time on it",
    "zoo": "what there is to start from; build the embedded models again",
    "claims": "what each method's paper says, and whether it held here",
    "report": "write the report of a finished run again",
    "cite": "BibTeX of methods, or of a run",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    >>> main(["fitt"])
    2
    """
    from .shell import Shell

    given = list(sys.argv[1:] if arguments is None else arguments)
    shell = Shell(quiet="--quiet" in given)
    if not given or given[0] in ("-h", "--help", "help"):
        shell.say(usage())
        return 0 if given else 2
    if given[0] == "--version":
        from headstart import __version__

        shell.say(__version__)
        return 0
    verb, rest = given[0], given[1:]
    return shell.guarded(verb, lambda: _dispatch(verb, rest, shell))


def usage() -> str:
    """What `headstart --help` says."""
    rows = "\n".join(f"  {verb:<9}{says}" for verb, says in VERBS.items())
    return (
        f"headstart VERB ...\n\n{rows}\n\nheadstart VERB --help explains one.\n"
        "Try: headstart fit digits --labels-per-class 10 --out runs/digits"
    )


def _dispatch(verb: str, rest: list[str], shell: object) -> int:
    from headstart.core.validate import one_of

    one_of("The verb", verb, VERBS)
    code: int = importlib.import_module(f"headstart.cli.{verb}").run(rest, shell)
    return code
