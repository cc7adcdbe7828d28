"""`headstart attack`: the matrix of real runs, each with its own preprocessing, and everything it refuses."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from headstart import load_task
from headstart.cli import main
from headstart.core.validate import Refused
from headstart.measure import load_perturbed
from headstart.run.attack_records import answer, records
from headstart.run.attacking import attack_task, silent
from headstart.run.attacks import RandomSigns, attacks_named, known_attacks, radius_of
from headstart.run.pixels import as_input, common_size, followed, sampled
from headstart.run.predict import Predictor, load
from headstart.zoo import Source
from headstart.zoo.export import export_model
from headstart.zoo.mini import Squared

RADIUS = "60/255"
NEED = {"vitensemble": "needs a model with attention"}
"""Attacks that a perceptron cannot serve, and what they say."""


def exported(folder, classes, *, side, mean, architecture="resnet"):
    """A model folder of an untrained network that reads pictures of another size, in other units."""
    from headstart import nets

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nets.build(architecture, len(classes)).eval()
    source = Source(
        name="test:other", modality="image", load=lambda: model,
        preprocess=Squared(size=side, mean=(mean,) * 3, std=(0.25,) * 3),
        head="head", classes=classes, licence="Apache-2.0", fingerprint="0" * 64, kind="mini",
        facts={"architecture": architecture, "family": architecture},
    )  # fmt: skip
    return export_model(model, folder, source=source, classes=classes)


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """Two finished runs on the bright and dark pictures, of different seeds."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSTART_CACHE", str(place / "cache"))
        for name, route in (("a", "full"), ("b", "probe")):
            words = ["fit", place / "data", "--zoo", f"dir:{place / 'zoo'}", "--routes", route, "--folds", "2"]
            main([*map(str, words), "--out", str(root / name), "--quiet"])
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs `headstart attack ...` in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, code: int = 0):
        capsys.readouterr()
        try:
            got = main(["attack", *map(str, words)])
        except SystemExit as stop:
            got = int(stop.code or 0)
        done = capsys.readouterr()
        assert got == code, done.out + done.err
        assert "Traceback" not in done.out + done.err
        assert "unexpected" not in done.err
        return done

    return run


def test_the_matrix_of_two_runs_in_a_process_of_its_own(headstart, runs, place, tmp_path):
    done = headstart("attack", place / "data", "--surrogates", f"{runs / 'a'},{runs / 'b'}", "--attacks", "mifgsm",
                     "--radius", RADIUS, "--ensemble", "--out", tmp_path / "out")  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Changes of at most 60/255 at worst carry over from ")
    assert "95 % interval" in lines[2]
    assert "clean accuracy" in lines[2]
    rows = [line for line in lines if re.match(r"random signs|mifgsm", line)]
    assert len(rows) == 8  # the control, two surrogates and both together, on two victims
    assert sum(" * " in line for line in rows) == 4
    assert "mifgsm on a + b" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "attack.json", "perturbed.safetensors", "report.html",
    ]  # fmt: skip


def test_what_is_kept_says_the_same_and_gives_the_rates_again(here, runs, place, tmp_path):
    words = (place / "data", "--surrogates", runs / "a", "--victims", f"{runs / 'b'},{runs / 'a'}", "--radius", RADIUS)
    said = json.loads(here(*words, "--json", "--out", "out", "--quiet").out)
    kept = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert said == kept
    assert [(row["attack"], row["made_on"]) for row in kept["rows"]] == [
        ("random signs", []), ("pgd", ["a"]), ("mifgsm", ["a"]),
    ]  # fmt: skip
    assert (kept["size"], kept["examples"], kept["of"], kept["looks"]) == ([12, 12], 8, 8, 1)
    moved, x, y = load_perturbed(tmp_path / "out" / "perturbed.safetensors")
    assert list(moved) == ["random signs", "pgd on a", "mifgsm on a"]
    assert y.tolist() == kept["labels"]
    grey = (x * 255).round()
    assert torch.equal(x, grey / 255)
    assert not torch.equal(moved["pgd on a"] * 255, (moved["pgd on a"] * 255).round())  # not rounded to grey levels
    assert max(float((one - x).abs().max()) for one in moved.values()) <= 60 / 255 + 1e-7
    for k, name in enumerate(("b", "a")):
        predictor = load(runs / name)
        own = predictor.preprocess
        size, mean, std = own.size, own.mean[0], own.std[0]
        for row, one in zip(kept["rows"], moved.values(), strict=True):
            inside = nn.functional.interpolate(one, (size, size), mode="bilinear", antialias=True)
            with torch.no_grad():
                after = predictor.model((inside - mean) / std).argmax(1)
            before = predictor.logits(list(grey.byte().permute(0, 2, 3, 1).numpy())).argmax(1)
            counted = before == y
            cell = row["cells"][k]
            assert cell["victim"] == name
            assert kept["victims"][k] == {"name": name, "accuracy": float(counted.float().mean()),
                                          "counted": int(counted.sum())}  # fmt: skip
            assert cell["success"] == pytest.approx(float((after != y)[counted].float().mean()))
            assert cell["error"] == pytest.approx(float((after != y).float().mean()))
            assert 0 <= cell["interval"][0] <= cell["success"] <= cell["interval"][1] <= 1
            assert cell["white_box"] == (name in row["made_on"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert html.escape(kept["answer"]) in page
    assert page.count("<img") == 3 * 8
    assert not re.search(r'(src|href)="(?!data:|#)[^"]', page)


def test_white_box_beats_the_control_and_radius_zero_changes_nothing(here, runs, place):
    words = (place / "data", "--surrogates", runs / "a", "--json", "--quiet")
    strong = json.loads(here(*words, "--radius", "100/255").out)
    control, pgd, mifgsm = (row["cells"][0]["success"] for row in strong["rows"])
    assert min(pgd, mifgsm) >= 0.9
    assert control < pgd
    nothing = json.loads(here(*words, "--radius", "0").out)
    assert [row["cells"][0]["success"] for row in nothing["rows"]] == [0, 0, 0]


def test_l2_bounds_the_length_of_all_changes(here, runs, place, tmp_path):
    here(place / "data", "--surrogates", runs / "a", "--norm", "l2", "--radius", "0.5", "--out", "out")
    moved, x, _ = load_perturbed(tmp_path / "out" / "perturbed.safetensors")
    assert next(iter(moved)) == "random directions"
    for one in moved.values():
        assert float((one - x).flatten(1).norm(dim=1).max()) <= 0.5 + 1e-5


def test_models_of_other_sizes_units_and_order_of_classes_live_together(here, runs, place, tmp_path):
    other = exported(tmp_path / "other", ("dark", "bright"), side=24, mean=0.1)
    said = json.loads(here(place / "data", "--surrogates", f"{runs / 'a'},{other}", "--ensemble", "--json",
                           "--attacks", "mifgsm").out)  # fmt: skip
    assert [row["made_on"] for row in said["rows"]] == [[], ["a"], ["other"], ["a", "other"]]
    predictor, task = load(other), load_task(str(place / "data"))
    told = predictor.predict([task.test.inputs[k] for k in range(8)])
    right = np.mean([word == task.classes[label] for word, label in zip(told, said["labels"], strict=True)])
    assert said["victims"][1]["accuracy"] == right


def test_a_model_that_does_not_take_its_own_preprocessing_is_named(here, place, tmp_path):
    wrong = exported(tmp_path / "wrong", ("dark", "bright"), side=24, mean=0.1, architecture="mlp")
    assert "got wrong: mat1 and mat2" in here(place / "data", "--surrogates", wrong, code=2).err


def test_notes_on_training_examples_among_the_test_pictures(here, runs, place):
    assert "flatters" not in here(place / "data", "--surrogates", runs / "a").err
    said = here(place / "data", "--surrogates", runs / "a", "--seed", "3").err
    assert re.search(r"a was fitted on [1-8] of the test pictures, which flatters it", said)
    assert f"--split {runs / 'a' / 'split.json'}" in said
    assert "flatters" not in here(place / "data", "--surrogates", runs / "a", "--seed", "3", "--split",
                                  runs / "a" / "split.json").err  # fmt: skip


def test_a_victim_right_on_nothing_is_unknown(here, runs, place, tmp_path):
    """Of two classes whose names were swapped, a model that was always right is always wrong."""
    swapped = tmp_path / "swapped"
    shutil.copytree(runs / "a" / "model", swapped)
    labels = json.loads((swapped / "labels.json").read_text())
    (swapped / "labels.json").write_text(json.dumps({"classes": labels["classes"][::-1]}))
    plain = json.loads(here(place / "data", "--surrogates", runs / "a", "--json").out)
    assert plain["victims"][0]["accuracy"] == 1.0  # or the rest shows nothing
    done = here(place / "data", "--surrogates", runs / "a", "--victims", swapped, "--out", "out", code=1)
    assert done.out.startswith("No victim is right on any of the pictures")
    assert "unknown" in done.out
    assert "swapped is right on none of the pictures" in done.out
    assert "nan" not in done.out.lower()
    assert "unknown" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--radius", "8"], "if 8 is in grey levels, write 8/255"),
        (["--radius", "300/255"], "at most 1"),
        (["--radius", "-1/255"], "must not be negative"),
        (["--radius", "nan"], "a number or a fraction"),
        (["--radius", "8/0"], "a number or a fraction"),
        (["--radius", "small"], "Write 8/255"),
        (["--attacks", "mifgms"], "Did you mean 'mifgsm'?"),
        (["--attacks", ","], "at least one attack"),
        (["--ensemble"], "two or more surrogates"),
        (["--examples", "0"], "at least 1"),
        (["--norm", "l1"], "--norm"),
        (["--victims", "nowhere"], "nowhere"),
        (["--victims", ","], "--victims needs models"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_make_no_sense(words, says, here, runs, place, tmp_path):
    done = here(place / "data", "--surrogates", runs / "a", "--out", "out", *words, code=2)
    assert says in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_targets_and_models_that_do_not_fit(here, runs, place, tmp_path):
    a = runs / "a"
    assert "wine, which is numeric" in here("wine", "--surrogates", a, code=2).err
    said = here("digits", "--surrogates", a, code=2).err
    assert "a, which lacks 0, 1, 2, 3, 4; has also bright, dark" in said
    assert "attack needs models that can be loaded" in here(place / "data", "--surrogates", place / "data", code=2).err
    assert "Did you mean 'digits'?" in here("digts", "--surrogates", a, code=2).err
    assert "--surrogates" in here(place / "data", code=2).err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert "nothing is overwritten" in here(place / "data", "--surrogates", a, "--out", "full", code=2).err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_weights_with_nan_are_named(here, runs, place, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(runs / "a" / "model", broken)
    weights = load_file(broken / "model.safetensors")
    save_file({name: w * math.nan for name, w in weights.items()}, broken / "model.safetensors", {"format": "pt"})
    said = here(place / "data", "--surrogates", runs / "a", "--victims", broken, code=2).err
    assert "logits of broken must be finite" in said


class Kink(nn.Module):
    """Finite everywhere, with a gradient that is not: the square root at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x):
        return self.layer((x.flatten(1).mean(1, keepdim=True) * 0).sqrt())


def predictor(model, classes=("bright", "dark"), side=12):
    return Predictor(model=model, preprocess=Squared(size=side, mean=(0.5,) * 3, std=(0.5,) * 3), classes=classes,
                     modality="image")  # fmt: skip


def attacked(task, surrogates, **more):
    control = RandomSigns(radius=0.1)
    attacks = attacks_named("mifgsm", radius=0.1, norm="linf", seed=0)
    return attack_task(task, surrogates, more.pop("victims", surrogates), attacks, control, **more), attacks, control


def test_a_gradient_that_is_not_finite_names_the_row(place):
    with pytest.raises(Refused, match="mifgsm on kink: gradient must be finite"):
        attacked(load_task(str(place / "data")), {"kink": predictor(Kink())})


def test_models_are_left_as_they_were_found(place):
    """Train mode, running statistics, gradients and requires_grad, also after a refusal."""
    task = load_task(str(place / "data"))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 12, 12))
    model.train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found, attacks, control = attacked(task, {"one": predictor(model)})
    again, _, _ = attacked(task, {"one": predictor(model)})
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(found.moved["mifgsm on one"], again.moved["mifgsm on one"])  # eval mode: no dropout
    assert records(task, found, attacks, control)["looks"] == 2
    with pytest.raises(Refused):
        attacked(task, {"one": predictor(model), "kink": predictor(Kink())})
    assert [module.training for module in model] == [True, True, False, True, True]


def test_another_kind_of_model_is_refused_before_the_labels_are_looked_at(place):
    task = load_task(str(place / "data"))
    text = dataclasses.replace(predictor(nn.Linear(1, 2)), modality="text")
    for wrong in (text, predictor(nn.Linear(1, 2), ("bright", "grey"))):
        with pytest.raises(Refused, match="Models"):
            attacked(task, {"one": wrong})
    assert task.looks == 0


def test_random_signs_have_the_size_and_do_not_depend_on_the_batch():
    x = torch.full((5, 3, 4, 4), 0.5)
    control = RandomSigns(radius=0.25)
    moved = control.perturb(x, [])
    assert set((moved - x).unique().tolist()) == {-0.25, 0.25}
    assert torch.equal(moved[3:], dataclasses.replace(control, first=3).perturb(x[3:], []))
    assert not torch.equal(moved, dataclasses.replace(control, seed=1).perturb(x, []))
    lengths = RandomSigns(radius=0.25, norm="l2").perturb(x, []).sub(x).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((5,), 0.25))
    assert torch.equal(RandomSigns(radius=0.5).perturb(torch.ones(1, 3, 4, 4), []).unique(), torch.tensor([0.5, 1.0]))


def test_attacks_by_name_take_radius_norm_and_seed():
    assert {"fgsm", "pgd", "mifgsm", "difgsm"} <= set(known_attacks())
    made = attacks_named("PGD, fgsm", radius=0.1, norm="l2", seed=7)
    assert list(made) == ["pgd", "fgsm"]
    assert (made["pgd"].radius, made["pgd"].norm, made["pgd"].seed, made["fgsm"].norm) == (0.1, "l2", 7, "l2")
    assert radius_of("8/255") == 8 / 255


def pictures(n, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("size", "side"), [((12, 12), 32), ((40, 28), 16), ((20, 20), 20)])
def test_a_preprocessing_is_followed_exactly_and_differentiably(size, side):
    raw, preprocess = pictures(20, *size), Squared(size=side, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    way = followed("x", preprocess, raw)
    x = as_input(raw).requires_grad_()
    torch.testing.assert_close(way(x), preprocess(list(raw)), atol=1e-5, rtol=1e-5)
    [gradient] = torch.autograd.grad(way(x).sum(), x)
    assert bool((gradient > 0).all())


def test_crops_of_transformers_are_followed_and_swapped_colours_refused(tmp_path):
    pytest.importorskip("transformers")
    from headstart.zoo.hf_model import Pixels

    clip = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32},
            "crop_size": {"height": 28, "width": 28}, "do_center_crop": True, "resample": 3, "do_rescale": True,
            "do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip))
    raw, preprocess = pictures(14, 48, 40), Pixels(folder=str(tmp_path))
    gap = (followed("clip", preprocess, raw)(as_input(raw)) - preprocess(list(raw))).abs().mean()
    assert 0 < float(gap) * 0.25 < 1 / 255  # Pillow rounds to grey levels on the way
    with pytest.raises(Refused, match=r"blue, .* grey levels from the nearest"):
        followed("blue", lambda many: preprocess([one[..., ::-1].copy() for one in many]), raw)


def test_samples_are_drawn_by_seed_and_brought_to_one_size():
    mixed = [*pictures(3, 12, 12), *pictures(3, 20, 10)]
    one = sampled(mixed, [16], asked=4, seed=0)
    assert one.pictures.shape == (4, 16, 16, 3)
    assert one.rows == tuple(sorted(one.rows))
    assert one.resized
    assert one.notes[0] == "4 of 6 test pictures, drawn by lot"
    assert (
        sampled(mixed, [16], asked=4, seed=1).rows != one.rows or sampled(mixed, [16], asked=4, seed=2).rows != one.rows
    )
    plain = sampled(pictures(6, 12, 14), [16])
    assert (plain.pictures.shape, plain.notes) == ((6, 12, 14, 3), [])
    assert np.array_equal(plain.pictures, pictures(6, 12, 14))
    assert common_size([(600, 400, 3)], [32, 64]) == (64, 64)
    assert common_size([(6, 6, 3)], [4]) == (8, 8)


def test_the_answer_prefers_what_carried_over():
    cell = {"victim": "a", "white_box": True, "success": 0.9, "error": 0.9, "interval": [0.8, 1.0]}
    over = {**cell, "victim": "b", "white_box": False, "success": 0.2, "interval": [0.1, 0.3]}
    none = [{**cell, "success": 0.0}, {**over, "success": 0.05}]
    result = {"victims": [{"name": "a", "counted": 9}, {"name": "b", "counted": 8}], "radius": 8 / 255, "norm": "linf",
              "rows": [{"attack": "random signs", "made_on": [], "cells": none},
                       {"attack": "pgd", "made_on": ["a"], "cells": [cell, over]}]}  # fmt: skip
    assert answer(result) == (
        "Changes of at most 8/255 at worst carry over from a to b on 20.0% of the 8 pictures it first gets right "
        "(95 % interval 10.0% to 30.0%, by pgd); random signs of that size on 5.0%."
    )
    result["victims"][1]["counted"] = 0
    assert "fool a, which they are made on, on 90.0% of the 9" in answer(result)


@pytest.mark.parametrize("attack", sorted(known_attacks()))
def test_every_attack_runs_or_says_what_it_needs(attack, here, runs, place):
    words = (place / "data", "--surrogates", f"{runs / 'a'},{runs / 'b'}", "--ensemble", "--attacks", attack,
             "--examples", "2", "--quiet")  # fmt: skip
    capable = attack not in NEED
    said = here(*words, code=0 if capable else 2)
    assert f"\n{attack}  " in said.out if capable else NEED[attack] in said.err


def test_what_an_attack_warns_of_becomes_a_note(here, runs, place):
    said = here(place / "data", "--surrogates", runs / "a", "--attacks", "cwa,fgsm", "--examples", "2", "--quiet").out
    [note] = [line for line in said.splitlines() if line.startswith("note       cwa")]
    assert "CWA was given one surrogate" in note


def test_a_model_without_a_gradient_is_not_called_robust():
    class Steps(nn.Module):
        """Says the same of all pictures that are alike to a tenth."""

        def forward(self, x):
            return (10 * x).round().flatten(1)[:, :2]

    x, y = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0])
    (note,) = silent({"steps": Steps(), "sound": nn.Sequential(nn.Flatten(), nn.Linear(16, 2))}, x, y)
    assert "steps gives 3 of 3 pictures no gradient" in note
