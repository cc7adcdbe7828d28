"""Robustness of a run: the same figures as the measures give with labels, though none was opened; kept, drawn, said."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import headstart.run.robustness as robustness
from headstart import load_task, nets
from headstart.attack import MIFGSM, PGD
from headstart.cli import main
from headstart.core.validate import Refused
from headstart.measure import accuracy_by_corruption, perturbed, transfer_matrix
from headstart.run.attacks import RandomSigns
from headstart.run.directory import RunDirectory
from headstart.run.pixels import as_input, seen_by
from headstart.run.predict import Predictor
from headstart.run.robustness import OTHER, OWN, Strained, check_followed, check_possible, rates, strained
from headstart.run.settings import Reading, Tuning, command
from headstart.zoo import Source
from headstart.zoo.export import export_model
from headstart.zoo.mini import Squared

PREPROCESS = Squared(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
TUNING = Tuning(robustness=True, radius="27/255")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """zoo/tiny: an untrained mlp; data/: 2 classes of 16 pictures, some just brighter or darker than grey, some far."""
    root = tmp_path_factory.mktemp("place")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nets.build("mlp", 4).eval()
    source = Source(
        name="test:tiny", modality="image", load=lambda: model, preprocess=PREPROCESS, head="head", licence="CC0-1.0",
        classes=("a", "b", "c", "d"), fingerprint="0" * 64, kind="mini", facts={"architecture": "mlp", "family": "mlp"},
    )  # fmt: skip
    export_model(model, root / "zoo" / "tiny", source=source, classes=source.classes)
    random = np.random.default_rng(0)
    for name, step in (("bright", 3), ("dark", -3)):
        (root / "data" / name).mkdir(parents=True)
        for i in range(16):
            pixels = np.clip(random.normal(128 + step * (i + 1), 25, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "data" / name / f"{i}.png")
    return root


class Mean(nn.Module):
    """Bright or dark by the mean of some pixels, and so differently for each `step`."""

    def __init__(self, step: int = 1) -> None:
        super().__init__()
        self.weight, self.step = nn.Parameter(torch.tensor([1.0, -1.0])), step
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(x[..., :: self.step]).flatten(1).mean(1, keepdim=True) * self.weight


class Kink(nn.Module):
    """Finite everywhere, with a gradient that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, x):
        return (x.flatten(1).mean(1, keepdim=True) * 0).sqrt() * self.weight


@pytest.fixture
def made(place, tmp_path):
    """As much of a run as the measurement looks at, and its model, which is in train mode."""
    task = load_task(str(place / "data"), test_share=0.5)
    model = Predictor(model=Mean(), preprocess=PREPROCESS, classes=task.classes, modality="image")
    directory = RunDirectory(tmp_path / "run", "digest", {})
    yield SimpleNamespace(task=task, baselines={"patient": SimpleNamespace(model=Mean(step=7))}, tuning=TUNING,
                          directory=directory, progress=None), model  # fmt: skip
    directory.close()


def test_rates_by_hand():
    sample = SimpleNamespace(rows=(0, 2, 3, 5), of=6, pictures=np.zeros((4, 9, 8, 3), np.uint8), notes=["4 of 6"])
    seen = Strained(
        sample=sample, clean=[0, 1, 1, 0], corrupted={"fog": [[0, 1, 1, 1], [0, 0, 0, 0]]}, before=[0, 1, 1, 1],
        perturbed={"random signs": ("", [0, 1, 1, 1]), "own": ("pgd", [1, 0, 1, 0])}, other=[1, 1, 0, 0], refused="",
    )  # fmt: skip
    found = rates(seen, torch.tensor([0, 9, 1, 1, 9, 0]), TUNING)
    assert (found["clean"], found["examples"], found["of"], found["size"]) == (1.0, 4, 6, [9, 8])
    assert found["corruptions"] == {"severities": [1, 2, 3, 4, 5], "accuracy": {"fog": [0.75, 0.5]}, "mean": 0.625}
    changes = found["perturbations"]
    assert (changes["counted"], changes["other"], changes["radius"]) == (3, 0.5, "27/255")
    assert [(row["accuracy"], row["success"]) for row in changes["rows"]] == [(0.75, 0.0), (0.25, pytest.approx(2 / 3))]
    assert all(
        low - 1e-12 <= row["success"] <= high for row in changes["rows"] for low, high in [row["success_interval"]]
    )


def test_a_model_right_on_nothing_is_unknown():
    sample = SimpleNamespace(rows=(0,), of=1, pictures=np.zeros((1, 8, 8, 3), np.uint8), notes=[])
    seen = Strained(sample=sample, clean=[1], corrupted={"fog": [[1]]}, perturbed={"own": ("pgd", [1])}, before=[1],
                    other=[1], refused="")  # fmt: skip
    [row] = rates(seen, torch.tensor([0]), TUNING)["perturbations"]["rows"]
    assert (row["success"], row["success_interval"], row["accuracy"]) == (0, [0.0, 1.0], 0)


def test_it_measures_what_the_measures_do_without_a_look_at_the_labels(made):
    """Labels are what the model says where it is right, so perturbations of counted examples are the same ones."""
    run, model = made
    seen = strained(run, model)
    assert run.task.looks == 0
    assert run.baselines["patient"].model.drop.training  # the baseline is as it was
    labels = run.task.judge(torch.zeros(len(run.task.test)).long()).labels
    found, pictures = rates(seen, labels, TUNING), seen.sample.pictures
    y = labels[list(seen.sample.rows)]

    def predict(some):
        return np.array(robustness.said(model, some))

    plain = accuracy_by_corruption(predict, pictures, y.numpy(), seed=TUNING.seed)
    assert found["corruptions"]["accuracy"] == {name: list(each) for name, each in plain.corrupted.items()}
    assert found["corruptions"]["mean"] == pytest.approx(plain.mean)
    assert found["clean"] == plain.clean
    own, other = (
        seen_by("x", one, run.task.classes, pictures)
        for one in (
            model,
            Predictor(model=Mean(step=7), preprocess=PREPROCESS, classes=run.task.classes, modality="image"),
        )
    )
    x, radius = as_input(pictures), 27 / 255
    moved = {
        "random signs": RandomSigns(radius=radius).perturb(x, []),
        OTHER: perturbed({"other": other}, x, y, MIFGSM(radius=radius).perturb)["other"],
        OWN: perturbed({"own": own}, x, y, PGD(radius=radius).perturb)["own"],
    }
    matrix = transfer_matrix(moved, {"own": own}, x, y)
    rows = {row["name"]: row for row in found["perturbations"]["rows"]}
    assert list(rows) == list(moved)
    assert found["perturbations"]["counted"] == int(matrix.counted)
    for name, success in zip(moved, matrix.success[:, 0].tolist(), strict=True):
        assert rows[name]["success"] == pytest.approx(success)
    assert rows["random signs"]["success"] < rows[OTHER]["success"] < rows[OWN]["success"]  # or it showed nothing


def test_a_killed_measurement_goes_on_where_it_was(made, monkeypatch):
    run, model = made
    real, calls = robustness.corrupt, []

    def until_the_third(pictures, name, severity, *, seed):
        calls.append(name)
        if len(calls) == 2 * 5 + 3:
            raise KeyboardInterrupt
        return real(pictures, name, severity, seed=seed)

    monkeypatch.setattr(robustness, "corrupt", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        strained(run, model)
    again = strained(run, model)
    assert len(calls) == 13 + 13 * 5
    assert again.corrupted == strained(run, model).corrupted
    assert len(calls) == 13 + 13 * 5


def test_a_gradient_that_fails_at_the_end_does_not_cost_the_run(made):
    run, model = made
    kink = Predictor(model=Kink(), preprocess=PREPROCESS, classes=model.classes, modality="image")
    seen = strained(run, kink)
    assert "gradient must be finite" in seen.refused
    assert set(seen.corrupted) == set(robustness.CORRUPTIONS)
    found = rates(seen, torch.zeros(len(run.task.test)).long(), TUNING)
    assert found["perturbations"]["rows"] == []
    assert "corruptions" in robustness.in_words(found)


def test_only_pictures_and_only_a_preprocessing_that_can_be_followed(place):
    with pytest.raises(Refused, match="wine, which is numeric"):
        check_possible(load_task("wine"), TUNING)
    check_possible(load_task("wine"), Tuning())
    task = load_task(str(place / "data"))

    def odd(raw):
        return PREPROCESS([one[::-1].copy() for one in raw])

    start = SimpleNamespace(source=SimpleNamespace(name="odd", preprocess=odd))
    with pytest.raises(Refused, match=r"odd, .* grey levels"):
        check_followed(task, start, TUNING)
    check_followed(task, start, Tuning())
    check_followed(task, SimpleNamespace(source=SimpleNamespace(name="even", preprocess=PREPROCESS)), TUNING)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["wine", "--robustness"], "wine, which is numeric"),
        (["wine", "--robustness", "--dry-run"], "wine, which is numeric"),
        (["digits", "--robustness", "--radius", "8"], "if 8 is in grey levels, write 8/255"),
        (["digits", "--robustness", "--radius", "-0.1"], "must not be negative"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_before_any_work(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    assert main(["fit", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


def test_a_whole_run_keeps_draws_and_says_it(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    words = ["fit", str(place / "data"), "--zoo", f"dir:{place / 'zoo'}", "--routes", "probe", "--folds", "2",
             "--robustness", "--radius", "20/255"]  # fmt: skip
    code = main([*words, "--out", str(tmp_path / "run")])
    done = capsys.readouterr()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert code == (0 if results["answer"]["verdict"] == "yes" else 1), done.err
    assert results["answer"]["looks"] == 1
    found = results["robustness"]
    assert len(found["corruptions"]["accuracy"]) == 15
    assert all(len(each) == 5 for each in found["corruptions"]["accuracy"].values())
    assert [row["name"] for row in found["perturbations"]["rows"]] == ["random signs", OTHER, OWN]
    assert (found["examples"], found["perturbations"]["radius"]) == (8, "20/255")
    assert found["clean"] == results["answer"]["accuracy"]
    assert {"corruptions", "mifgsm", "pgd"} <= set(results["methods"])
    assert results["cost"]["seconds"]["robustness"] > 0
    [line] = [line for line in done.out.splitlines() if line.startswith("robustness")]
    assert f"{found['corruptions']['mean']:.1%} under 15 corruptions" in line
    assert "under changes of 20/255" in line
    assert "corrupting pictures" in done.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Robustness</h2>" in page
    assert "jpeg compression" in page
    assert OTHER in page
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["tuning"]["robustness"], settings["tuning"]["radius"]) == (True, "20/255")
    main([*words, "--out", str(tmp_path / "again"), "--quiet"])
    assert json.loads((tmp_path / "again" / "results.json").read_text())["robustness"] == found


def test_the_command_says_it():
    assert command("digits", Reading(), TUNING, "out") == "headstart fit digits --robustness --radius 27/255 --out out"
