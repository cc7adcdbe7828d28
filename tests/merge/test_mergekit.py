"""Files for mergekit: each method with its defaults, precedence, and what is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core.validate import Refused
from headstart.merge.mergekit import OWN, MergeSettings, ModelSettings, parse_mergekit

CHANGES = sorted(set(OWN) - {"linear", "slerp"})


def text(method: str = "ties", parameters: str = "{weight: 0.5}", common: str = "{}", more: str = "") -> str:
    return f"""
merge_method: {method}
base_model: org/base
models:
  - model: org/base
  - model: org/one
    parameters: {parameters}
parameters: {common}
{more}
"""


# each method, and mergekit's defaults


@pytest.mark.parametrize("method", CHANGES)
def test_defaults_of_the_methods_on_changes(method):
    assert parse_mergekit(text(method)) == MergeSettings(
        method=method,
        models=(ModelSettings(model="org/one", weight=0.5, density=1.0, gamma=0.01, epsilon=0.15),),
        base="org/base",  # left out of the models: its change is zero
        scale=1.0,
        normalize=method in ("ties", "della"),
        rescale=method in ("dare_linear", "dare_ties", "della", "della_linear"),
        t=None,
        dtype=None,
        vocabulary=None,
    )


def test_linear_needs_no_base_and_keeps_it_among_the_models():
    models = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]"
    found = parse_mergekit(f"merge_method: linear\n{models}")
    assert (found.base, found.normalize) == (None, True)
    assert [(one.model, one.weight) for one in found.models] == [("a", 1.0), ("b", 3.0)]
    found = parse_mergekit(f"merge_method: linear\nbase_model: a\n{models}\nparameters: {{normalize: false}}")
    assert (found.base, found.normalize, len(found.models)) == ("a", False, 2)


@pytest.mark.parametrize("listed", ["[{model: a}, {model: b}]", "[{model: b}, {model: a}]", "[{model: b}]"])
def test_slerp_goes_from_the_base_to_the_other(listed):
    found = parse_mergekit(f"merge_method: slerp\nbase_model: a\nmodels: {listed}\nparameters: {{t: 0.3}}")
    assert [one.model for one in found.models] == ["a", "b"]
    assert (found.base, found.t) == ("a", 0.3)


def test_everything_said():
    found = parse_mergekit("""
merge_method: della
base_model: ./base
name: my merge
models:
  - model: ./one+./lora
    parameters: {weight: -0.2, density: 0.6, epsilon: 0.1, int8_mask: true}
  - model: ./two
    parameters: {weight: [0.4]}
parameters: {weight: 9, density: 0.7, lambda: 1e-1, normalize: false, rescale: false, int8_mask: true}
dtype: float32
out_dtype: bfloat16
tokenizer_source: union
slices:
""")
    assert found == MergeSettings(
        method="della",
        models=(
            ModelSettings(model="./one", adapter="./lora", weight=-0.2, density=0.6, epsilon=0.1),
            ModelSettings(model="./two", weight=0.4, density=0.7),  # its own weight, the common density
        ),
        base="./base",
        scale=0.1,
        normalize=False,
        rescale=False,
        dtype="bfloat16",
        vocabulary="union",
    )


@pytest.mark.parametrize("value", ["0.25", "[0.25]", "[{value: 0.25}]", "{value: 0.25}", "2.5e-1", "'0.25'"])
def test_one_value_however_it_is_written(value):
    assert parse_mergekit(text(parameters=f"{{weight: {value}}}")).models[0].weight == 0.25


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(CHANGES))
@settings(max_examples=40, deadline=None)
def test_any_finite_number_is_taken_as_it_is(value, method):
    assert parse_mergekit(text(method, f"{{weight: {value!r}}}")).models[0].weight == value


@pytest.mark.parametrize(
    ("more", "policy"),
    [("tokenizer_source: base", "base"), ("tokenizer: {source: union}", "union"), ("tokenizer:", None)],
)
def test_the_tokenizers_source_is_the_policy_of_vocabularies(more, policy):
    assert parse_mergekit(text(more=more)).vocabulary == policy


def test_settings_do_not_change_and_print_as_code():
    found = parse_mergekit(text())
    assert eval(repr(found)) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.scale = 2.0


# refusals


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("", r"merge_method must be a known name; got 'None'"),
        ("- a", r"a merge file must hold keys and values; got \['a'\]"),
        ("a: [1", r"must be YAML; got .*line 1"),
        ("!!python/object/apply:os.getcwd []", "must be YAML"),
        (text("tis"), "got 'tis'. Did you mean 'ties'"),
        (text("passthrough"), "merge_method must be a known name; got 'passthrough'"),
        (text(more="merge_methods: ties"), "got 'merge_methods'. Did you mean 'merge_method'"),
        (text(more="slices: [{sources: []}]"), "must do without slices; got slices. List whole models"),
        (text(more="modules: {a: {}}"), "must do without modules"),
        (text(more="chat_template: auto"), "must do without chat_template; .*tokenizer_config.json"),
        (text(more="dtype: bf16"), "dtype must be a known name; got 'bf16'. Did you mean 'bfloat16'"),
        (text(more="tokenizer_source: org/one"), "must be base or union; got 'org/one'"),
        (text(more="tokenizer: {source: base, tokens: {}}"), "tokenizer must have known keys; got 'tokens'"),
        (
            text(parameters="{weight: [0, 0.5, 1]}"),
            r"weight of org/one must be one value .*gradient over layers, \[0, 0.5, 1\]",
        ),
        (
            text(parameters="{weight: 1, density: [{filter: mlp, value: 0.5}, {value: 1}]}"),
            "density of org/one .*values by filter",
        ),
        (text(parameters="{weight: {filter: mlp, value: 0.5}}"), "values by filter"),
        (text(parameters="{density: 0.5}"), "ties needs a weight for each model; got org/one"),
        (text(parameters="{weight: half}"), "weight of org/one must be a finite number; got 'half'"),
        (text(parameters="{weight: .nan}"), "must be a finite number; got nan"),
        (text(parameters="{weight: true}"), "must be a finite number; got True"),
        (text(parameters="{weight: 1, gamma: 0.1}"), "ties's parameters of org/one must have known keys; got 'gamma'"),
        (text(parameters="{weight: 1, lambda: 0.1}"), "parameters of org/one must have known keys; got 'lambda'"),
        (text(parameters="{weigth: 1}"), "got 'weigth'. Did you mean 'weight'"),
        (text(common="{normalise: true}"), "got 'normalise'. Did you mean 'normalize'"),
        (text(common="{normalize: maybe}"), "normalize must be true or false; got 'maybe'"),
        (text(common="{t: 0.5}"), "ties's parameters must have known keys; got 't'"),
        (text("linear", common="{lambda: 1}"), "linear's parameters must have known keys; got 'lambda'"),
        ("merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]", "ties needs base_model"),
        ("merge_method: ties\nbase_model: a+b\nmodels: [{model: a}]", "base_model must be a model's name; got a\\+b"),
        ("merge_method: ties\nbase_model: a", "A merge needs models; got None"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", "beside the base; got a"),
        ("merge_method: ties\nbase_model: a\nmodels: [b]", "an entry of models must hold keys"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: 3}]", "must be a name; got 3"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: a+b+c}]", r"MODEL or MODEL\+ADAPTER; got a\+b\+c"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: b+}]", r"MODEL or MODEL\+ADAPTER; got b\+"),
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: b, weight: 1}]",
            "A model must have known keys; got 'weight'",
        ),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", "slerp needs t"),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 1}",
            r"one other model; got \['b', 'c'\]",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [0, 1]}",
            "t must be one value .*gradient",
        ),
    ],
)
def test_refuses_by_name(file, message):
    with pytest.raises(Refused, match=message):
        parse_mergekit(file)
