"""The rules of the source, read from the source: one training loop, rooms that import downwards, short files."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import headstart
from headstart.core.catalogue import claim_modules, modules_with
from headstart.testing.rooms import MODULE_LINES, ROOMS, VERBS, forbidden_imports

ROOT = Path(headstart.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LOOP = "core/loop.py"
ASCENT = "core/ascent.py"
INNER_SOLVERS = {
    ASCENT: "the one attack loop",
    "choose/risk_learner.py": "three Adam steps a round on 3,000 weights; their state belongs to the sampler's state",
    "testing/term.py": "compares gradients with differences, trains nothing",
}
"""Files that may call autograd.grad in a loop or for themselves, each with its reason."""

LINES = {LOOP: 150}
FILE_LINES, CLAIM_LINES = 250, 150

Rule = Callable[[ast.Module, str], Iterator[str]]


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted name that is called ('' before the first dot that is not a name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, at = [], node.func
            while isinstance(at, ast.Attribute):
                parts.append(at.attr)
                at = at.value
            yield node, ".".join([at.id if isinstance(at, ast.Name) else "", *reversed(parts)])


def training_only_in_the_loop(tree: ast.Module, file: str) -> Iterator[str]:
    """`x.backward(`, `x.zero_grad(`, and `x.step()` without arguments or on something named like an optimizer."""
    for node, name in calls(tree):
        owner, _, method = name.rpartition(".")
        optimizer = bool(re.search(r"optim|(^|\.|_)opt($|_)", owner))
        stepping = method == "step" and (not (node.args or node.keywords) or optimizer)
        if "." in name and (method in ("backward", "zero_grad") or stepping) and file != LOOP:
            yield f"{name}( belongs in {LOOP}"


def gradients_only_in_ascent(tree: ast.Module, file: str) -> Iterator[str]:
    """`autograd.grad(` inside a loop, anywhere but in the attack loop and named inner solvers."""
    loops = [n for n in ast.walk(tree) if isinstance(n, ast.For | ast.While | ast.comprehension | ast.ListComp)]
    names = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and node.module == "torch.autograd" for alias in node.names if alias.name == "grad"}  # fmt: skip
    for loop in loops:
        for _, name in calls(loop):
            if (name.endswith("autograd.grad") or name in names) and file not in INNER_SOLVERS:
                yield f"a loop over {name}( belongs in {ASCENT}, or in INNER_SOLVERS with a reason"


def forbidden_calls(tree: ast.Module, _file: str) -> Iterator[str]:
    """`.cuda(`, `print(`, `hasattr(`, seeds of the global generators, pickle, unsafe loading."""
    seeds = ("torch.manual_seed", "torch.seed", "np.random.seed", "numpy.random.seed", "random.seed")
    for node, name in calls(tree):
        own = _file == "core/rng.py"  # seeds inside a block that gives the state back
        if name in ("print", "hasattr") or (name.endswith(".cuda") and "." in name):
            yield f"{name}("
        if name in seeds and not own:
            yield f"{name}( seeds the caller's generator"
        settings = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if settings.get("weights_only") is False or settings.get("trust_remote_code") is True:
            yield f"{name}( with weights_only=False or trust_remote_code=True"
        if name == "torch.load" and settings.get("weights_only") is not True:
            yield "torch.load( without weights_only=True"


def forbidden_imports_anywhere(tree: ast.Module, _file: str) -> Iterator[str]:
    """Star imports and pickle."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if "*" in names:
            yield f"from {module} import *"
        for name in (*names, module):
            if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib"):
                yield f"import of {name}: a pickle can run code"


def no_public_kwargs(tree: ast.Module, _file: str) -> Iterator[str]:
    """`**name` in a public function swallows misspelt arguments (`**terms: Term`, named by the caller, is data)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
            public = not node.name.startswith("_")
            if public and node.args.kwarg.arg in ("kwargs", "kw", "options", "kwds", "params"):
                yield f"def {node.name}(**{node.args.kwarg.arg})"
            elif public and node.args.kwarg.annotation is None:
                yield f"def {node.name}(**{node.args.kwarg.arg}) without a type"


def no_paths_of_a_machine(tree: ast.Module, _file: str) -> Iterator[str]:
    """String constants that hold somebody's absolute path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.search(r"(?<![\w.])/(home|Users|root|work|mnt)/\w+", node.value)
            if found:
                yield f"the path {found.group()}"


def rooms_import_downwards(tree: ast.Module, file: str) -> Iterator[str]:
    """A room imports the rooms below it only (testing/rooms.py has the table)."""
    room = file.split("/")[0] if "/" in file else ""
    if not room:  # the package's own front door
        return
    if room not in ROOMS:
        yield f"{room} is no room of the design"
        return
    package = "headstart." + ".".join(file.split("/")[:-1])
    yield from (f"{room} may not import {other}" for other in forbidden_imports(tree, package, ROOMS[room]))


RULES: tuple[Rule, ...] = (
    training_only_in_the_loop, gradients_only_in_ascent, forbidden_calls, forbidden_imports_anywhere,
    no_public_kwargs, no_paths_of_a_machine, rooms_import_downwards,
)  # fmt: skip

BAD: dict[Rule, list[tuple[str, str]]] = {
    training_only_in_the_loop: [
        ("merge/x.py", "loss.backward()"), ("merge/x.py", "self.optimizer.step(closure)"), ("x/y.py", "sgd.step()"),
        ("merge/x.py", "loss.sum().backward(retain_graph=True)"), ("merge/x.py", "model.zero_grad(set_to_none=True)"),
    ],
    gradients_only_in_ascent: [
        ("attack/x.py", "for k in range(3):\n    g = torch.autograd.grad(f(x), x)"),
        ("attack/x.py", "while True:\n    if a:\n        autograd.grad(f(x), x)"),
        ("attack/x.py", "from torch.autograd import grad as slope\nall = [slope(f(v), v) for v in xs]"),
    ],
    forbidden_calls: [
        ("x/y.py", "model.cuda()"), ("x/y.py", "print(1)"), ("x/y.py", "hasattr(a, 'b')"),
        ("x/y.py", "torch.manual_seed(0)"), ("x/y.py", "np.random.seed(0)"), ("x/y.py", "random.seed(0)"),
        ("x/y.py", "torch.load(p)"), ("x/y.py", "torch.load(p, weights_only=False)"),
        ("x/y.py", "AutoModel.from_pretrained(n, trust_remote_code=True)"),
    ],
    forbidden_imports_anywhere: [
        ("x/y.py", "from torch import *"), ("x/y.py", "import pickle"), ("x/y.py", "from pickle import loads"),
        ("x/y.py", "def f():\n    import joblib"),
    ],
    no_public_kwargs: [("x/y.py", "def f(a, **kwargs): ..."), ("x/y.py", "class A:\n    def f(self, **more): ...")],
    no_paths_of_a_machine: [
        ("x/y.py", "WHERE = '/home/me/data'"), ("x/y.py", "f('see /Users/me for it')"), ("x/y.py", "p = f'/mnt/x{y}'"),
    ],
    rooms_import_downwards: [
        ("merge/x.py", "from ..attack.mifgsm import MIFGSM"), ("core/x.py", "import headstart.merge.ties"),
        ("core/x.py", "def f():\n    from headstart import zoo"), ("tasks/x.py", "from ..zoo import resolve"),
        ("claims/x.py", "from headstart.run import fit_task"), ("elsewhere/x.py", "x = 1"),
        ("testing/x.py", "from ..claims.ties import CLAIMS"),
    ],
}  # fmt: skip

GOOD = [
    ("core/loop.py", "loss.backward(); optimizer.step(); optimizer.zero_grad()"),
    ("attack/x.py", "moved = ball.step(gradient)\nepoch.step(3)"),
    ("attack/x.py", "g = torch.autograd.grad(f(x), x)"),
    ("core/ascent.py", "for k in range(3):\n    g = torch.autograd.grad(f(x), x)"),
    ("core/x.py", "generator.manual_seed(0)\ntorch.Generator().manual_seed(1)\ntorch.load(p, weights_only=True)"),
    ("core/x.py", "def plus(self, **terms: Term): ...\ndef _private(**kwargs): ..."),
    ("merge/x.py", "from ..core.weights import by_tensor\nfrom .sparsify import sparsify\nimport torch, os.path"),
    ("claims/x.py", "from ..worlds import moons\nfrom headstart.merge import Ties"),
    ("core/x.py", "URL = 'https://example.org/data/x'\nshape = 'a/work/b'"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_follows(rule: Rule) -> None:
    found = []
    for path in FILES:
        file = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{file}: {offence}" for offence in rule(tree, file)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("rule", "file", "text"), [(r, *bad) for r in RULES for bad in BAD[r]],
                         ids=lambda v: v.__name__ if callable(v) else None)  # fmt: skip
def test_each_rule_can_fail(rule: Rule, file: str, text: str) -> None:
    assert list(rule(ast.parse(text), file))


@pytest.mark.parametrize(("file", "text"), GOOD)
def test_the_rules_let_good_source_pass(file: str, text: str) -> None:
    assert [offence for rule in RULES for offence in rule(ast.parse(text), file)] == []


def too_long(file: str, lines: int, is_method: bool) -> str:
    """'' or what is wrong with the length of a file."""
    room = file.split("/")[0]
    most = LINES.get(file, MODULE_LINES if is_method else CLAIM_LINES if room == "claims" else FILE_LINES)
    return f"{file} has {lines} lines; at most {most}" if lines > most else ""


def test_files_are_short() -> None:
    methods = {name.replace(".", "/").removeprefix("headstart/") + ".py" for name in modules_with("PAPER")}
    found = []
    for path in FILES:
        file = path.relative_to(ROOT).as_posix()
        found.append(too_long(file, len(path.read_text(encoding="utf-8").splitlines()), file in methods))
    assert not list(filter(None, found))


@pytest.mark.parametrize(
    ("file", "lines", "is_method", "refused"),
    [
        ("core/loop.py", 150, False, False), ("core/loop.py", 151, False, True), ("merge/ties.py", 200, True, False),
        ("merge/ties.py", 201, True, True), ("claims/ties.py", 151, False, True), ("run/x.py", 251, False, True),
        ("run/x.py", 250, False, False),
    ],
)  # fmt: skip
def test_the_length_rule_can_fail(file: str, lines: int, is_method: bool, refused: bool) -> None:
    assert bool(too_long(file, lines, is_method)) == refused


def missing_of(room: str, slug: str, tests: set[str], claimed: set[str], exports: list[str]) -> list[str]:
    """What a method lacks: a test file, a claim of its own or one that lists it in METHODS, an export line."""
    lacking = []
    if f"{room}/test_{slug}.py" not in tests:
        lacking.append(f"tests/{room}/test_{slug}.py")
    if f"{room}.{slug}" not in claimed and slug not in claimed:
        lacking.append(f'claims/{slug}.py, or METHODS = ("{room}.{slug}",) in another claim')
    if slug not in exports:
        lacking.append(f"from .{slug} import Name as Name in {room}/__init__.py")
    return lacking


def claims_name(sources: dict[str, str]) -> set[str]:
    """Slugs of the claims, and what their METHODS list as "room.slug"."""
    named = set(sources)
    for text in sources.values():
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "METHODS" for t in node.targets
            ):
                named |= set(ast.literal_eval(node.value))
    return named


def exported(text: str) -> list[str]:
    """The modules that an __init__ re-exports from, in the order of its lines."""
    return [n.module or "" for n in ast.parse(text).body if isinstance(n, ast.ImportFrom) and n.level == 1]


def test_each_method_has_a_test_a_claim_and_an_export() -> None:
    tests = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    claims = {name.rsplit(".", 1)[1]: (ROOT / "claims" / f"{name.rsplit('.', 1)[1]}.py").read_text(encoding="utf-8")
              for name in claim_modules().values()}  # fmt: skip
    claimed = claims_name(claims)
    lacking = []
    for name in modules_with("PAPER"):
        _, room, slug = name.split(".")
        if room in VERBS:
            exports = exported((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
            lacking += [f"{name} needs {what}" for what in missing_of(room, slug, tests, claimed, exports)]
    assert not lacking, "\n".join(lacking)


def test_the_completeness_rule_can_fail() -> None:
    good = ({"merge/test_ties.py"}, {"ties"}, ["ties"])
    assert missing_of("merge", "ties", *good) == []
    assert missing_of("merge", "ties", good[0], {"merge.ties"}, good[2]) == []
    assert len(missing_of("merge", "ties", {"adapt/test_ties.py"}, {"adapt.ties"}, ["tie"])) == 3
    assert claims_name({"ties": 'METHODS = ("merge.dare",)\nOTHER = ("merge.x",)'}) == {"ties", "merge.dare"}


@pytest.mark.parametrize("room", [room for room in VERBS if (ROOT / room / "__init__.py").exists()])
def test_exports_are_alphabetical(room: str) -> None:
    names = exported((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
    assert names == sorted(names)


def test_exports_are_read_in_order() -> None:
    text = '"""Doc."""\nfrom .ties import Ties as Ties\nfrom .average import Average as Average\nimport torch\n'
    assert exported(text) == ["ties", "average"]
