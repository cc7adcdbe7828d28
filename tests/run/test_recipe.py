"""mergekit files become rules that mean what they mean there, restated slowly here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headstart.core.validate import Refused
from headstart.merge import Dare, Della
from headstart.merge.mergekit import parse_mergekit
from headstart.run.recipe import RULES, rule_of

SHAPES = {"a.weight": (9, 7), "a.bias": (9,), "scale": (1,)}


def random_models(k: int = 3) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return [{n: w + torch.randn(w.shape, generator=g) for n, w in base.items()} for _ in range(k)], base


def text(method: str, parameters: str, own: list[str], *more: str) -> str:
    models = "".join(f"- model: m{k}\n  parameters: {{{one}}}\n" for k, one in enumerate(own))
    return f"merge_method: {method}\nbase_model: base\nparameters: {{{parameters}}}\nmodels:\n{models}" + "\n".join(
        more
    )


def trimmed(change: Tensor, density: float, gamma: float = 0.0) -> Tensor:
    flat = change.flatten().double()
    order = flat.abs().argsort(descending=True)
    top, kept = int(gamma * len(flat)), max(1, int(density * len(flat)))
    rows = order[top : top + kept]
    return torch.zeros_like(flat).scatter(0, rows, flat[rows]).view_as(change)


def elected(changes: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    weighed = torch.stack([w * c for w, c in zip(weights, changes, strict=True)])
    agree = (weighed.sign() == torch.where(weighed.sum(0) >= 0, 1.0, -1.0)).double()
    total = (weighed * agree).sum(0)
    if not normalize:
        return total
    mass = (torch.tensor(weights).view(-1, *[1] * changes[0].ndim) * agree).sum(0)
    return total / torch.where(mass == 0, 1.0, mass)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_trims_by_tensor_and_weighs_before_the_election(normalize):
    models, base = random_models()
    own = ["weight: 0.5, density: 0.3", "weight: 1.5, density: 0.6", "weight: 1.0, density: 1.0"]
    settings = parse_mergekit(text("ties", f"lambda: 0.7, normalize: {str(normalize).lower()}", own))
    merged = rule_of(settings).merge(models, base=base)
    for name, start in base.items():
        changes = [trimmed(m[name] - start, d) for m, d in zip(models, (0.3, 0.6, 1.0), strict=True)]
        expected = start + 0.7 * elected(changes, [0.5, 1.5, 1.0], normalize)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic_and_linear(normalize):
    models, base = random_models()
    own = ["weight: 0.5", "weight: 1.5", "weight: 1.0"]
    settings = parse_mergekit(text("task_arithmetic", f"lambda: 0.7, normalize: {str(normalize).lower()}", own))
    merged = rule_of(settings).merge(models, base=base)
    linear = rule_of(parse_mergekit(text("linear", "normalize: true", own))).merge(models)
    for name, start in base.items():
        total = sum(w * (m[name] - start).double() for w, m in zip((0.5, 1.5, 1.0), models, strict=True))
        expected = start + 0.7 * total / (3.0 if normalize else 1.0)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(linear[name].double(), start + total / 3.0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_drop_the_largest_too(method):
    models, base = random_models()
    settings = parse_mergekit(text(method, "density: 0.4, gamma: 0.1, normalize: false", ["weight: 1.0"] * 3))
    merged = rule_of(settings).merge(models, base=base)
    for name, start in base.items():
        changes = [trimmed(m[name] - start, 0.4, 0.1) for m in models]
        total = elected(changes, [1.0] * 3, False) if method.endswith("ties") else sum(changes)
        torch.testing.assert_close(merged[name].double(), start + total, rtol=1e-5, atol=1e-6)


def test_slerp_goes_from_the_base_to_the_other():
    models, base = random_models(1)
    settings = parse_mergekit("merge_method: slerp\nbase_model: base\nmodels: [{model: m}]\nparameters: {t: 0.0}")
    assert [one.model for one in settings.models] == ["base", "m"]
    merged = rule_of(settings).merge([base, models[0]])
    torch.testing.assert_close(merged["a.weight"], base["a.weight"])


def test_lots_are_drawn_by_the_seed():
    dare = parse_mergekit(text("dare_ties", "density: 0.5, normalize: true", ["weight: 2.0"] * 2))
    expected = Dare(density=0.5, elect="total", normalise=True, weights=(2.0, 2.0), seed=7)
    assert rule_of(dare, seed=7) == expected
    della = parse_mergekit(text("della_linear", "density: 0.5, epsilon: 0.1", ["weight: 1.0"]))
    assert rule_of(della) == Della(density=0.5, spread=0.1, elect=None, normalise=False, weights=(1.0,))


@pytest.mark.parametrize(("recipe", "message"), [
    (text("dare_ties", "", ["weight: 1.0, density: 0.5", "weight: 1.0, density: 0.6"]), "one density for all models"),
    (text("ties", "rescale: true", ["weight: 1.0"]), "Only dare and della enlarge"),
    (text("linear", "normalize: false", ["weight: 1.0", "weight: 1.0"]), "weights that sum to 1; got 2.0"),
])  # fmt: skip
def test_what_both_do_not_have_is_refused(recipe, message):
    with pytest.raises(Refused, match=message):
        rule_of(parse_mergekit(recipe))


def test_every_rule_has_a_first_line_and_defaults():
    for name, kind in RULES.items():
        assert kind.__doc__.splitlines()[0].endswith("."), name
        kind()
