"""`headstart merge` as a stranger runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from headstart.cli import main
from headstart.core.weights import LazyWeights, save_weights
from headstart.merge import Average, Ties


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs `headstart ...` in this process, in an empty folder, which takes a tenth of the time."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, code: int = 0):
        capsys.readouterr()
        try:
            got = main([str(word) for word in words])
        except SystemExit as stop:  # tyro's own, after --help
            got = int(stop.code or 0)
        done = capsys.readouterr()
        assert got == code, done.out + done.err
        return done

    return run


@pytest.fixture(scope="module")
def models(place, tmp_path_factory) -> Path:
    """base, a, b: the tiny model and two a little away from it; stranger: another start."""
    root = tmp_path_factory.mktemp("models")
    for k, name in enumerate(("base", "a", "b", "stranger")):
        shutil.copytree(place / "zoo" / "tiny", root / name)
        g = torch.Generator().manual_seed(k)
        weights = LazyWeights(place / "zoo" / "tiny")
        spread = {"base": 0.0, "stranger": 1.0}.get(name, 0.01)
        moved = {n: w + spread * torch.randn(w.shape, generator=g) if w.is_floating_point() else w
                 for n, w in weights.items()}  # fmt: skip
        save_weights(moved, root / name)
    return root


def test_merges_judges_and_predicts(headstart, models, place, tmp_path):
    done = headstart("merge", "ties", models / "a", models / "b", "--base", models / "base", "--density", "0.4",
                     "--out", "out", "--judge", place / "data", code=1)  # fmt: skip
    assert "Not worth it." in done.stdout
    assert "these examples cannot show a difference" in done.stdout
    assert "a logistic head on frozen features" in done.stdout
    every = [LazyWeights(models / name) for name in ("base", "a", "b")]
    expected = Ties(density=0.4).merge(every[1:], base=every[0])
    merged = LazyWeights(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["judged"]["tasks"] == ["data"]
    assert len(record["judged"]["rows"]) == 4
    assert record["total"]["trimmed"][0] == pytest.approx(0.6, abs=0.01)
    said = headstart("predict", "out", place / "data" / "dark" / "0.png").stdout
    assert said.splitlines()[1].split()[1] in "abcd"


def test_progress_is_a_few_plain_lines_when_piped(headstart, models):
    done = headstart("merge", "average", models / "a", models / "b", "--out", "out")
    assert 1 <= len(done.stderr.splitlines()) <= 4
    assert headstart("merge", "average", models / "a", "--out", "two", "--quiet").stderr == ""


def test_a_recipe_of_mergekit(here, models, tmp_path):
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: linear\nmodels:\n- model: {models / 'a'}\n  parameters: {{weight: 3}}\n"
        f"- model: {models / 'b'}\n  parameters: {{weight: 1}}\ndtype: float16\n"
    )
    here("merge", "recipe.yml", "--out", "out")
    expected = Average(weights=(3.0, 1.0)).merge([LazyWeights(models / name) for name in "ab"])
    merged = LazyWeights(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name].half()) for name in expected)


def test_strangers_are_warned_of(here, models):
    done = here("merge", "average", models / "a", models / "stranger", "--out", "out")
    assert "no common ancestor" in done.out


@pytest.mark.parametrize(("words", "message"), [
    (("tis", "A"), "Did you mean 'ties'?"),
    (("ties", "A", "B", "--out", "o"), "ties needs --base"),
    (("average", "nowhere", "--out", "o"), "file or folder that exists"),
    (("average", "A", "--out", "A"), "new or empty folder"),
    (("slerp", "A", "--out", "o"), "from one model to another; got 1 models"),
    (("ties", "A", "B", "--base", "BASE", "--density", "0", "--out", "o"), "0 < density <= 1; got 0.0"),
    (("ties", "A", "B", "--base", "BASE", "--density", "1.5", "--out", "o"), "0 < density <= 1; got 1.5"),
    (("average", "A", "B", "--weights", "1", "--out", "o"), "one weight for each of 2 models; got 1"),
    (("average", "A", "--data", "digits", "--out", "o"), "--data goes with fisher and regmean"),
    (("none.yaml", "--out", "o"), "A recipe must be a file"),
    (("average", "PICKLE", "--out", "o"), "pickled; not loaded"),
    (("average", "A", "OTHER", "--out", "o"), "--on-mismatch skip"),
])  # fmt: skip
def test_wrong_use_is_told_in_a_line_and_leaves_nothing(here, models, tmp_path, words, message):
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    save_weights({"w": torch.ones(1)}, tmp_path / "other")
    named = {"A": models / "a", "B": models / "b", "BASE": models / "base", "PICKLE": "pickle", "OTHER": "other"}
    before = sorted(p.name for p in tmp_path.iterdir())
    done = here("merge", *(named.get(word, word) for word in words), code=2)
    assert message in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_help_lists_the_rules_and_their_settings(here):
    assert "task-arithmetic" in here("merge", "--help").out
    shown = here("merge", "ties", "--help").out.replace("│", "")
    assert "share of its largest changes" in " ".join(shown.split())
    assert here("merge", code=2).out.startswith("usage: headstart merge RULE")


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_adapters_alone_are_summed_and_on_a_base_folded(here, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=24)  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "base")
        for name in "ab":
            tuned = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"),
                                        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))  # fmt: skip
            for n, p in tuned.named_parameters():
                if "lora_B" in n:
                    p.data.normal_(0, 0.1)
            tuned.save_pretrained(tmp_path / name)
    done = here("merge", "task-arithmetic", "a", "b", "--scale", "1", "--out", "sum")
    assert "rank 4, exact" in done.out
    here("merge", "task-arithmetic", "a", "b", "--base", "base", "--scale", "1", "--out", "whole")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    summed = peft.PeftModel.from_pretrained(base, tmp_path / "sum")
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "whole")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(summed(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    refused = here("merge", "ties", "a", "b", "--out", "no", code=2)
    assert "Without --base, adapters can be merged by a rule that sums them" in refused.err
