"""Vocabularies read as tokenizers reads them, and rows brought together: by hand, token by token, and in a model."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.core.validate import Refused
from headstart.core.weights import LazyWeights, merge_streaming, save_weights
from headstart.merge import Average, Ties
from headstart.merge.align_vocabularies import Counts, align_vocabularies, vocabulary_tensors
from headstart.merge.read_vocabulary import read_vocabulary


def rows(*values: float) -> Tensor:
    return torch.tensor([[value, -value] for value in values])


def column(weights, name: str = "embed_tokens.weight") -> list[float]:
    return weights[name][:, 0].tolist()


BASE, KNOWN = {"embed_tokens.weight": rows(1, 2, 3, 4), "norm.weight": torch.ones(2)}, {"a": 0, "b": 1, "c": 2}
ONE, OWN = {"embed_tokens.weight": rows(11, 12, 13, 14), "norm.weight": torch.ones(2) * 2}, KNOWN | {"<x>": 3}
TWO, OTHER = {"embed_tokens.weight": rows(23, 21, 25, 26), "norm.weight": torch.ones(2) * 3}, {"c": 0, "a": 1, "<y>": 3}


def test_policy_base_by_hand():
    found = align_vocabularies([ONE, TWO], [OWN, OTHER], base=BASE, base_vocabulary=KNOWN)
    assert (found.vocabulary, found.rows, found.averaged) == (KNOWN, 4, ())
    assert found.base is BASE  # nothing to change in it
    assert column(found.models[0]) == [11, 12, 13, 4]  # <x> goes, the base's padding comes
    assert column(found.models[1]) == [21, 2, 23, 4]  # it has no b
    assert found.counts == (Counts(3, 0, 0, 1), Counts(2, 2, 1, 1))
    assert found.models[1]["norm.weight"] is TWO["norm.weight"]


def test_policy_union_by_hand_with_two_special_tokens_of_one_id():
    found = align_vocabularies([ONE, TWO], [OWN, OTHER], base=BASE, base_vocabulary=KNOWN, policy="union")
    assert found.vocabulary == {"a": 0, "b": 1, "c": 2, "<x>": 4, "<y>": 5}
    assert (found.rows, found.averaged) == (6, ("<x>", "<y>"))
    assert column(found.base) == [1, 2, 3, 4, 14, 26]
    assert column(found.models[0]) == [11, 12, 13, 4, 14, 26]
    assert column(found.models[1]) == [21, 2, 23, 4, 14, 26]
    assert found.counts == (Counts(3, 0, 1, 0), Counts(2, 2, 2, 0))
    # whatever the rule, each special token keeps the row of the one model that has it
    for rule in (Average(), Ties(density=0.6)):
        merged = rule.merge(list(found.models), base=found.base)
        assert column(merged)[4:] == [14, 26]


def test_a_token_that_only_models_have_starts_from_their_mean():
    three = ({"wte": rows(5, 7)}, {"a": 0, "<x>": 1})
    found = align_vocabularies(
        [{"wte": rows(1)}, *[m for m, _ in (three, three)], {"wte": rows(0, 1, 4)}],
        [{"a": 0}, three[1], three[1], {"a": 0, "b": 1, "<x>": 2}],
        policy="union",
    )
    assert found.vocabulary == {"a": 0, "<x>": 1, "b": 2}
    assert found.base is None
    assert column(found.models[0], "wte") == [1, 6, 1]  # (7 + 7 + 4) / 3
    assert column(found.models[3], "wte") == [0, 4, 1]


def test_models_that_agree_are_left_as_they_are():
    odd = {"embed_tokens.weight": rows(1, 2), "mixing.weight": torch.eye(2)}  # as long as the vocabulary by accident
    found = align_vocabularies([odd, odd], [{"a": 0}, {"a": 0}])
    assert found.models == (odd, odd)


@given(data=st.data(), policy=st.sampled_from(["base", "union"]), with_base=st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_token_by_token(data, policy, with_base):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    models, vocabularies = [], []
    for _ in range(data.draw(st.integers(2, 4))):
        tokens = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True))
        length = len(tokens) + data.draw(st.integers(0, 3))
        places = torch.randperm(length, generator=g)[: len(tokens)].tolist()
        models.append({"wte": torch.randn(length, 3, generator=g), "lm_head.bias": torch.randn(length, generator=g)})
        vocabularies.append(dict(zip(tokens, places, strict=True)))
    pairs = {"base": models[0], "base_vocabulary": vocabularies[0]} if with_base else {}
    used = slice(1, None) if with_base else slice(0, None)
    found = align_vocabularies(models[used], vocabularies[used], policy=policy, **pairs)
    views = [found.base, *found.models] if with_base else list(found.models)
    everyone = list(zip(models, vocabularies, strict=True))
    expected = set(vocabularies[0]).union(*vocabularies[used]) if policy == "union" else set(vocabularies[0])
    assert set(found.vocabulary) == expected
    assert len(set(found.vocabulary.values())) == len(expected)
    assert {t: found.vocabulary[t] for t in vocabularies[0]} == vocabularies[0]
    for name in ("wte", "lm_head.bias"):
        for view, (weights, vocabulary) in zip(views, everyone, strict=True):
            assert len(view[name]) == found.rows
            for token, row in found.vocabulary.items():
                if token in vocabulary:
                    right = weights[name][vocabulary[token]]
                elif token in vocabularies[0]:
                    right = models[0][name][vocabularies[0][token]]
                else:
                    right = torch.stack([w[name][v[token]] for w, v in everyone if token in v]).mean(0)
                torch.testing.assert_close(view[name][row], right)
            nameless = sorted(set(range(found.rows)) - set(found.vocabulary.values()))
            for row in nameless:
                padding = row < len(weights[name]) and row not in vocabulary.values()
                assert torch.equal(view[name][row], (weights if padding else models[0])[name][row])


@pytest.mark.parametrize("policy", ["base", "union"])
def test_read_from_disk_in_parts_it_is_the_same(tmp_path, policy):
    g = torch.Generator().manual_seed(0)
    models, vocabularies, folders = [], [], []
    for k in range(3):
        order = torch.randperm(9, generator=g).tolist()
        vocabularies.append({f"t{token}": row for row, token in enumerate(order[: 9 - k])} | {f"<{k}>": 9})
        models.append({"wte": torch.randn(12 + k, 3, generator=g).bfloat16(), "norm": torch.randn(5, generator=g)})
        folders.append(LazyWeights(saved(models[-1], tmp_path / str(k))))
    memory = align_vocabularies(
        models[1:], vocabularies[1:], base=models[0], base_vocabulary=vocabularies[0], policy=policy
    )
    disk = align_vocabularies(
        folders[1:], vocabularies[1:], base=folders[0], base_vocabulary=vocabularies[0], policy=policy
    )
    for a, b in zip((memory.base, *memory.models), (disk.base, *disk.models), strict=True):
        assert set(a) == set(b) == {"wte", "norm"}
        assert len(a) == len(b) == 2
        assert torch.equal(a["wte"], b["wte"])
        assert a["wte"].dtype == torch.bfloat16
        if not isinstance(b, LazyWeights):
            assert b.spec("wte").shape == a["wte"].shape
            assert b.spec("norm").shape == (5,)
            for start, stop in ((0, 5), (4, 4), (7, 31), (0, a["wte"].numel())):
                assert torch.equal(b.part("wte", start, stop), a["wte"].flatten()[start:stop])
            assert torch.equal(b.part("norm", 1, 3), a["norm"][1:3])
    streamed = dict(merge_streaming(Average(), list(disk.models), base=disk.base))
    whole = Average().merge(list(memory.models), base=memory.base)
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)


def saved(weights, folder):
    save_weights(weights, folder)
    return folder


def test_inputs_and_random_state_are_untouched():
    before, state = {k: v.clone() for k, v in TWO.items()}, torch.get_rng_state()
    found = align_vocabularies([ONE, TWO], [OWN, OTHER], base=BASE, base_vocabulary=KNOWN, policy="union")
    column(found.models[1])
    assert all(torch.equal(before[k], TWO[k]) for k in TWO)
    assert torch.equal(state, torch.get_rng_state())
    assert KNOWN == {"a": 0, "b": 1, "c": 2}


# which tensors


def test_the_tensors_are_found_by_name_and_length():
    weights = {name: torch.zeros(shape) for name, shape in {
        "roberta.embeddings.word_embeddings.weight": (20, 4), "roberta.embeddings.position_embeddings.weight": (6, 4),
        "lm_head.dense.weight": (4, 4), "lm_head.layer_norm.weight": (4,), "lm_head.bias": (20,), "lm_head.decoder.weight": (20, 4),
        "roberta.encoder.layer.0.weight": (20, 4)}.items()}  # fmt: skip
    names = ["roberta.embeddings.word_embeddings.weight", "lm_head.bias", "lm_head.decoder.weight"]
    assert vocabulary_tensors(weights, {"a": 0}) == names
    permuted = [{"a": 0, "b": 1}, {"a": 1, "b": 0}]
    with pytest.raises(Refused, match=r"'roberta.encoder.layer.0.weight'\] of size 20 too. Name all that have"):
        align_vocabularies([weights, weights], permuted)
    found = align_vocabularies([weights, weights], permuted, tensors=names)
    assert found.counts[1].moved == 2
    with pytest.raises(Refused, match="a row for each of 31 tokens; got 20"):
        vocabulary_tensors(weights, {"z": 30})
    with pytest.raises(Refused, match=r"got 0 in \[\]"):
        vocabulary_tensors({"w": torch.zeros(3, 3)}, {"a": 0})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_model_computes_the_same_with_its_vocabulary_in_another_order(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}

    def build(size: int) -> torch.nn.Module:
        if kind == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=size, **small)).eval()
        if kind == "bert":
            return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=size, **small)).eval()
        config = transformers.GPT2Config(vocab_size=size, n_embd=8, n_layer=1, n_head=2, n_positions=9)
        return transformers.GPT2LMHeadModel(config).eval()

    base, model = build(20), build(23)
    words = [f"w{k}" for k in range(18)]
    known = {word: row for row, word in enumerate(words)}
    own = {word: row for row, word in enumerate(["<x>", *reversed(words), "<y>"])}
    found = align_vocabularies(
        [model.state_dict()], [own], base=base.state_dict(), base_vocabulary=known, policy="union"
    )
    merged = build(found.rows)
    merged.load_state_dict(dict(found.models[0]))
    text = ["w3", "<y>", "w17", "w0", "<x>"]
    with torch.no_grad():
        before = model(torch.tensor([[own[word] for word in text]])).logits[0]
        after = merged(torch.tensor([[found.vocabulary[word] for word in text]])).logits[0]
    torch.testing.assert_close(after[:, [found.vocabulary[w] for w in own]], before[:, list(own.values())])


# reading


@pytest.mark.parametrize("kind", ["words", "pairs", "unigram"])
def test_reads_what_tokenizers_reads(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"a": 0, "b": 1, "ab": 2, "[UNK]": 3}
    model = {
        "words": lambda: tokenizers.models.WordLevel(words, unk_token="[UNK]"),
        "pairs": lambda: tokenizers.models.BPE(words, [("a", "b")]),
        "unigram": lambda: tokenizers.models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("▁", -2.0)], unk_id=0),
    }[kind]()
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<tool>", "<|end|>"])
    tokenizer.add_tokens(["Ünïcode"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = read_vocabulary(tmp_path)
    assert found == tokenizer.get_vocab(with_added_tokens=True)
    assert list(found.values()) == sorted(found.values())


def test_reads_the_older_files(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"b": 1, "a": 0}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 5}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"5": {"content": "<x>"}, "6": {"content": "<y>"}}, "model_max_length": 9})
    )
    assert read_vocabulary(tmp_path) == {"a": 0, "b": 1, "<x>": 5, "<y>": 6}
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.txt").write_bytes("[PAD]\r\nthé\r\n ".encode())
    assert read_vocabulary(tmp_path) == {"[PAD]": 0, "thé": 1, " ": 2, "<x>": 5, "<y>": 6}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("merges.txt", "", r"needs tokenizer.json, vocab.json or vocab.txt; got \['merges.txt'\]"),
        ("vocab.json", "[1]", "vocab.json must hold a JSON object; got list"),
        ("vocab.json", "{", "vocab.json must hold a JSON object; got JSONDecodeError"),
        ("vocab.json", '{"a": 0, "b": 0}', "must have one token; got 'a' and 'b' at 0"),
        ("vocab.json", '{"a": "0"}', "must map tokens to rows; got 'a' -> '0'"),
        ("vocab.txt", "a\nb\na\n", "must have one row; got 'a' at 0 and 2"),
        ("tokenizer.json", '{"model": {"type": "X"}}', "must hold a vocabulary; got a model of type 'X'"),
    ],
)
def test_refuses_files_it_cannot_read(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(Refused, match=message):
        read_vocabulary(tmp_path)


def test_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(Refused, match="no such folder"):
        read_vocabulary(tmp_path / "none")


# refusals of the alignment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabularies": [OWN]}, "1 for 2 models"),
        ({"models": [], "vocabularies": []}, "0 for 0 models"),
        ({"base_vocabulary": None}, "one without the other"),
        ({"policy": "all"}, "policy must be a known name"),
        ({"vocabularies": [OWN, {"a": 1, "b": 1}]}, "of model 1 must have a row of its own; got 1 rows for 2 tokens"),
        ({"vocabularies": [OWN, {"a": -1}]}, "of model 1 must have a row of its own"),
        ({"vocabularies": [OWN, {}]}, "0 tokens of model 1"),
        ({"tensors": []}, "0 tensors"),
        ({"vocabularies": [OWN | {"z": 9}, OTHER]}, "4 rows in model 0 and row 9"),
        ({"models": [ONE, {"norm.weight": torch.ones(2)}]}, "model 1 without it"),
        ({"models": [ONE, {"embed_tokens.weight": torch.ones(4, 3)}]}, r"got \(3,\) in model 1"),
        ({"tensors": ["embed_tokens.weight", "norm.weight"]}, "2 rows in the base and row 2"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    given = {"models": [ONE, TWO], "vocabularies": [OWN, OTHER], "base": BASE, "base_vocabulary": KNOWN} | change
    with pytest.raises(Refused, match=message):
        align_vocabularies(**given)
