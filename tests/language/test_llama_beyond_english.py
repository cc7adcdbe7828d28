"""Language transfer: known answers of the card on tiny models of transformers and a tokenizer trained on the spot."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from headstart.core.loop import fit
from headstart.core.plan import Batch, Plan, Step, sgd
from headstart.core.rng import random_state, seeded
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.language import (
    Mixed,
    NextToken,
    code_switching_rate,
    continue_pretraining,
    extend_model,
    extend_tokenizer,
    fertility,
    instructions,
    language_report,
    resegmented,
    windows,
)  # fmt: skip
from headstart.language.bits import bits, encoded, nats
from headstart.language.extension import new_rows
from headstart.testing import contract
from headstart.testing.subject import difference

ENGLISH = [
    "the small house stands near the river and the old tree",
    "a tree near the house stands taller than the small house itself",
    "they stand near the river there and then the others rest",
] * 4  # fmt: skip
GERMAN = [
    "das kleine häuschen steht am fluß und der alte baum daneben",
    "der alte baum steht am häuschen und das kleine häuschen steht am baum",
    "daneben steht der kleine baum und am fluß steht das alte häuschen",
] * 4  # fmt: skip
END = "<|end|>"


@cache
def byte_level() -> Tokenizer:
    """As GPT-2's: bytes, with a special token after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ENGLISH, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([END])
    return tokenizer


@cache
def sentencepiece() -> Tokenizer:
    """As LLaMA's: spaces as "▁", words cut by the merges alone, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    byte = ["<unk>", END, *(f"<0x{k:02X}>" for k in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=byte, show_progress=False)
    tokenizer.train_from_iterator(ENGLISH, trainer)
    layout = json.loads(tokenizer.to_str())
    layout["pre_tokenizer"] = None
    layout["added_tokens"] = layout["added_tokens"][:2]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])  # fmt: skip
    return tokenizer


@cache
def fast() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=END, clean_up_tokenization_spaces=False)


MAKES = [byte_level, sentencepiece, fast]


def plain(tokenizer):
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def ids(tokenizer, text: str) -> list[int]:
    return encoded(tokenizer, [text])[0][0]


def start(tokenizer) -> int:
    return plain(tokenizer).token_to_id(END)


def gpt2(tokens: int) -> GPT2LMHeadModel:
    with seeded(0):
        config = GPT2Config(vocab_size=tokens, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                            initializer_range=0.3)  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def llama(tokens: int) -> LlamaForCausalLM:
    with seeded(0):
        config = LlamaConfig(vocab_size=tokens, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
        return LlamaForCausalLM(config).eval()


class WithBias(nn.Module):
    """An untied language model with an output bias; not of transformers, but with its methods."""

    def __init__(self, tokens: int, bias: bool = True) -> None:
        super().__init__()
        with seeded(3):
            self.embed, self.say = nn.Embedding(tokens, 8), nn.Linear(8, tokens, bias=bias)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.say

    def resize_token_embeddings(self, tokens, mean_resizing=True):
        self.embed, self.say = nn.Embedding(tokens, 8), nn.Linear(8, tokens, bias=self.say.bias is not None)

    def forward(self, x):
        return self.say(self.embed(x))


def size_of(tokenizer) -> int:
    return plain(tokenizer).get_vocab_size(with_added_tokens=True)


test_contract = contract(
    NextToken,
    model=lambda: WithBias(12).say,
    batch=lambda: Batch(torch.linspace(-1, 1, 192).view(4, 6, 8) ** 3, torch.arange(24).view(4, 6) % 12),
)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("model_of", [gpt2, llama])
def test_1_extending_by_nothing_changes_nothing(make, model_of):
    tokenizer = make()
    same = extend_tokenizer(tokenizer, GERMAN, 0)
    assert type(same) is type(tokenizer)
    assert plain(same).get_vocab() == plain(tokenizer).get_vocab()
    for text in (*GERMAN, *ENGLISH, "naïve 語 x" + END):
        assert ids(same, text) == ids(tokenizer, text)
    model = model_of(size_of(tokenizer))
    x = torch.tensor([ids(tokenizer, GERMAN[0])])
    extended, unknown = extend_model(model, tokenizer, same)
    assert unknown == 0
    assert torch.equal(extended(x).logits, model(x).logits)


@pytest.mark.parametrize("init", ["subtoken_mean", "mean", "random"])
@pytest.mark.parametrize("model_of", [gpt2, llama])
def test_2_old_text_keeps_hidden_states_and_logits_and_loses_what_new_tokens_take(model_of, init, tmp_path):
    old = byte_level()
    new = extend_tokenizer(old, GERMAN, 20)
    model = model_of(size_of(old))
    before, state = copy.deepcopy(model), random_state()
    extended, _ = extend_model(model, old, new, init=init)
    assert not difference(before, model)
    assert not difference(state, random_state())
    x = torch.tensor([ids(old, "the house")])
    assert x.tolist() == [ids(new, "the house")]
    with torch.no_grad():
        was, now = model(x, output_hidden_states=True), extended(x, output_hidden_states=True)
    n = size_of(old)
    assert torch.equal(now.hidden_states[-1], was.hidden_states[-1])
    torch.testing.assert_close(now.logits[..., :n], was.logits, rtol=1e-6, atol=1e-6)
    taken = torch.log1p(now.logits[..., n:].exp().sum(-1) / now.logits[..., :n].exp().sum(-1))
    assert bool((taken > 0).all())
    torch.testing.assert_close(was.logits.log_softmax(-1) - now.logits.log_softmax(-1)[..., :n],
                               taken[..., None].expand(-1, -1, n), rtol=1e-4, atol=1e-5)  # fmt: skip
    assert extended.config.vocab_size == size_of(new)
    assert (extended.get_output_embeddings().weight is extended.get_input_embeddings().weight) == (model_of is gpt2)
    extended.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(x).logits, extended(x).logits)


def test_3_a_token_of_one_old_piece_gets_its_row_and_others_the_mean_of_theirs():
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    made = new_rows(rows, [[4], [], [1, 2, 2]])
    assert torch.equal(made[0], rows[4])
    assert torch.equal(made[1], rows.float().mean(0).bfloat16())
    torch.testing.assert_close(made[2], ((rows[1] + 2 * rows[2].float()) / 3).bfloat16())
    spread = new_rows(rows.double(), [[]] * 20000, "random", seed=1)
    torch.testing.assert_close(spread.mean(0), rows.double().mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(spread.std(0), rows.double().std(0, unbiased=False), rtol=0.05, atol=0)


@pytest.mark.parametrize("make", MAKES)
def test_3_new_rows_and_their_bias_are_those_of_the_old_pieces(make):
    old = make()
    new = extend_tokenizer(old, GERMAN, 15)
    names = {row: token for token, row in plain(new).get_vocab().items()}
    model = WithBias(size_of(old) + 5)  # padded, as checkpoints are
    extended, unknown = extend_model(model, old, new)
    assert unknown == 0
    assert len(extended.embed.weight) == size_of(new)
    for row in range(size_of(old), size_of(new)):
        pieces = [piece.id for piece in plain(old).model.tokenize(names[row])]
        assert pieces
        for table in ("embed.weight", "say.weight", "say.bias"):
            before, after = model.get_parameter(table), extended.get_parameter(table)
            torch.testing.assert_close(after[row], before[pieces].mean(0))
            assert torch.equal(after[: size_of(old)], before[: size_of(old)])
    average, _ = extend_model(model, old, new, init="random")
    torch.testing.assert_close(average.say.bias[size_of(old) :], model.say.bias[: size_of(old)].mean().expand(15))


class Uniform(nn.Module):
    """All tokens are alike to it."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((tokens,), 0.3))

    def forward(self, x):
        return self.logits.expand(*x.shape, -1)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(("length", "overlap"), [(7, 1), (3, 4), (200, 1)])
def test_4_bits_of_a_uniform_model_are_fertility_times_log_of_its_tokens(make, length, overlap):
    tokenizer = make()
    model = Uniform(400).train()
    found = language_report(
        model, tokenizer, {"en": ENGLISH[:2], "de": GERMAN[:3]}, start=0, length=length, overlap=overlap
    )
    for name, texts in (("en", ENGLISH[:2]), ("de", GERMAN[:3])):
        figures = found[name]
        assert figures.bits_per_character == pytest.approx(figures.fertility * math.log2(400), rel=1e-6)
        assert figures.fertility == sum(len(ids(tokenizer, t)) for t in texts) / sum(map(len, texts))
        assert figures.bits_per_byte * sum(len(t.encode()) for t in texts) == pytest.approx(
            figures.bits_per_character * figures.characters
        )
        assert figures.round_trip == 1
        assert figures.scripts == {"LATIN": 1.0}
    assert model.training


@pytest.mark.parametrize("make", MAKES)
@given(new=st.integers(0, 40))
def test_5_both_tokenizers_round_trip_and_the_extended_one_takes_no_more_tokens(make, new):
    old = make()
    longer = extend_tokenizer(old, GERMAN, new)
    assert size_of(longer) == size_of(old) + new
    before, after = plain(old).get_vocab(), plain(longer).get_vocab()
    assert all(after[token] == row for token, row in before.items())
    assert sorted(after.values()) == list(range(len(after)))
    for text in (*GERMAN[:3], *ENGLISH[:3], "Grüße, 語! baum"):
        for tokenizer in (old, longer):
            assert plain(tokenizer).decode(ids(tokenizer, text), skip_special_tokens=False) == text
        assert len(ids(longer, text)) <= len(ids(old, text))
    if new >= 10:
        assert fertility(longer, GERMAN) < fertility(old, GERMAN)


@pytest.mark.parametrize("make", MAKES)
def test_5_old_cuts_only_join(make):
    """Where an extended tokenizer cuts, the old one cut as well: new merges come last."""
    old = make()
    longer = extend_tokenizer(old, GERMAN, 30)
    for text in (*GERMAN[:3], *ENGLISH[:3], "steht the häuschen"):
        ends = [{end for _, end in encoded(t, [text])[0][1]} for t in (old, longer)]
        assert ends[1] <= ends[0]
    assert resegmented(old, longer, GERMAN) > 0.3
    assert resegmented(old, longer, ENGLISH) < 0.2
    assert resegmented(old, old, GERMAN) == 0
    assert resegmented(old, longer, ["qqq"]) == 0


def test_learnt_merges_are_those_of_a_slow_restatement():
    old = byte_level()
    words: dict[tuple[str, ...], int] = {}
    for text in GERMAN:
        for word, _ in old.pre_tokenizer.pre_tokenize_str(text):
            cut = tuple(piece.value for piece in old.model.tokenize(word))
            words[cut] = words.get(cut, 0) + 1
    expected = []
    for _ in range(25):
        pairs: dict[tuple[str, str], int] = {}
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        expected.append("".join(best))
        merged: dict[tuple[str, ...], int] = {}
        for word, count in words.items():
            k, joined = 0, []
            while k < len(word):
                both = word[k : k + 2] == best
                joined.append("".join(best) if both else word[k])
                k += 2 if both else 1
            merged[tuple(joined)] = merged.get(tuple(joined), 0) + count
        words = merged
    longer = extend_tokenizer(old, GERMAN, 25)
    assert [longer.id_to_token(size_of(old) + k) for k in range(25)] == expected


def test_unknown_letters_become_tokens_and_unknown_pieces_the_mean_row():
    old = sentencepiece()
    letters = Counter("".join(GERMAN).replace(" ", ""))
    unseen = [letter for letter, _ in letters.most_common() if letter not in old.get_vocab()]
    assert {"ä", "ß"} < set(unseen)
    longer = extend_tokenizer(old, GERMAN, len(unseen) + 3)
    added = [longer.id_to_token(size_of(old) + k) for k in range(len(unseen) + 3)]
    assert sorted(added[:-3]) == sorted(unseen)
    assert [letters[letter] for letter in added[:-3]] == [letters[letter] for letter in unseen]
    assert all(len(token) > 1 and "<0x" not in token for token in added[-3:])
    assert longer.encode("ä語", add_special_tokens=False).tokens == ["▁", "ä", "<0xE8>", "<0xAA>", "<0x9E>"]
    bare = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1, "b": 2}, merges=[], unk_token="<unk>"))
    model = WithBias(3, bias=False)
    extended, unknown = extend_model(model, bare, extend_tokenizer(bare, ["aéé"], 1))
    assert unknown == 1
    torch.testing.assert_close(extended.embed.weight[3], model.embed.weight.mean(0))


def test_a_fast_tokenizer_is_saved_and_loaded_with_its_new_tokens(tmp_path):
    longer = extend_tokenizer(fast(), GERMAN, 20)
    assert longer.eos_token_id == fast().eos_token_id
    longer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in GERMAN[:3]:
        assert again(text)["input_ids"] == ids(longer, text) != ids(fast(), text)


def test_given_rows_are_used():
    old = byte_level()
    new = extend_tokenizer(old, GERMAN, 4)
    rows, out = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    tied, _ = extend_model(gpt2(size_of(old)), old, new, rows=rows)
    assert torch.equal(tied.get_output_embeddings().weight[-4:], rows)
    free, _ = extend_model(llama(size_of(old)), old, new, rows=rows, output_rows=out)
    assert torch.equal(free.get_input_embeddings().weight[-4:], rows)
    assert torch.equal(free.get_output_embeddings().weight[-4:], out)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_windows_score_each_token_once_after_enough_context(n, length, overlap):
    text = list(range(1, n + 1))
    x, y = windows(text, start=0, length=length, overlap=overlap)
    assert x.shape == y.shape
    assert y[y != -100].tolist() == text
    for row, col in (y != -100).nonzero().tolist():
        seen = int(y[row, col]) - 1
        assert col + 1 >= overlap
        assert x[row, : col + 1].tolist()[::-1] == [max(seen - k, 0) for k in range(col + 1)]


def test_bits_are_the_models_own_log_likelihood():
    model = gpt2(size_of(byte_level()))
    text = ids(byte_level(), GERMAN[0])
    with torch.no_grad():
        logits = model(torch.tensor([[5, *text[:-1]]])).logits[0].double().log_softmax(-1)
    expected = -logits[torch.arange(len(text)), torch.tensor(text)].sum().item() / math.log(2)
    assert bits(model, [windows(text, start=5, length=60)]) == pytest.approx(expected, rel=1e-5)


def text_stream(seed: int = 0, n: int = 40, batch_size: int = 8) -> Batches:
    x = torch.randint(12, (n, 6), generator=torch.Generator().manual_seed(seed))
    return Batches(x=x, y=x.roll(-1, 1), batch_size=batch_size, seed=seed)


def test_6_a_ratio_of_0_is_the_target_alone():
    target, source = text_stream(0), text_stream(1)
    for position in (0, 3, 12):
        alone, mixed = (s.start(position) for s in (target, Mixed(target=target, source=source, ratio=0.0)))
        for _ in range(7):
            assert not difference(next(alone), next(mixed))
    plan = Plan(model=WithBias(12), stream=target, terms={"text": NextToken()}, steps=9, optimizer=sgd(0.1))
    mixed = Plan(model=WithBias(12), stream=Mixed(target=target, source=source, ratio=0.0),
                 terms={"text": NextToken()}, steps=9, optimizer=sgd(0.1))  # fmt: skip
    assert torch.equal(fit(plan, device="cpu").losses, fit(mixed, device="cpu").losses)


@pytest.mark.parametrize(("ratio", "shares"), [(0.5, (4, 4)), (0.25, (6, 2)), (1.0, (0, 8)), (0.9, (1, 7))])
def test_batches_hold_both_languages_and_can_be_resumed(ratio, shares):
    target, source = text_stream(0), text_stream(1)
    mixed = Mixed(target=target, source=source, ratio=ratio)
    assert mixed.shares == shares
    running = iter(mixed)
    seen = [next(running) for _ in range(12)]
    ours = {tuple(row) for row in target.x.tolist()}
    for batch in seen:
        assert [tuple(row) in ours for row in batch.x.tolist()] == [True] * shares[0] + [False] * shares[1]
        assert torch.equal(batch.y, batch.x.roll(-1, 1))
    resumed = mixed.start(10)
    assert not difference(seen[10:], [next(resumed), next(resumed)])


def test_7_only_the_response_is_learnt():
    tokenizer = fast()
    pairs = [("ask: the house", " stands"), ("ask: a rather longer question about trees", " no")]
    x, y = instructions(tokenizer, pairs, end=start(tokenizer))
    model = gpt2(size_of(tokenizer))
    loss = NextToken()(Step(model, Batch(x, y)))
    total, count = 0.0, 0
    for prompt, response in pairs:
        a, b = ids(tokenizer, prompt), [*ids(tokenizer, response), start(tokenizer)]
        logits = model(torch.tensor([a + b])).logits[0, len(a) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(b), reduction="sum")
        count += len(b)
    torch.testing.assert_close(loss, total / count)
    _, every = instructions(tokenizer, pairs, end=start(tokenizer), mask_prompt=False)
    assert int((every != -100).sum()) == count + sum(len(ids(tokenizer, p)) - 1 for p, _ in pairs)
    assert torch.equal(every[y != -100], y[y != -100])


def test_7_an_example_without_a_response_adds_nothing():
    model, x = WithBias(12), torch.arange(12).view(2, 6)
    y = x.roll(-1, 1)
    half = torch.where(torch.tensor([[True], [False]]), y, -100)
    loss = NextToken()(Step(model, Batch(x, half)))
    torch.testing.assert_close(loss, NextToken()(Step(model, Batch(x[:1], y[:1]))))
    none = NextToken()(Step(model, Batch(x, torch.full_like(x, -100))))
    assert none == 0
    (slope,) = torch.autograd.grad(none, model.say.weight)
    assert bool((slope == 0).all())
    short, masked = instructions(fast(), [("a b", "c"), (ENGLISH[0], "d")], end=0, length=4)
    assert short.shape == (2, 4)
    assert (masked[1] == -100).all()
    assert (masked[0] != -100).any()


def test_8_code_switching():
    assert code_switching_rate(["дом стоит", "река, 42!"], {"CYRILLIC"}) == 0
    assert code_switching_rate(["дом house", "a река"], {"CYRILLIC"}) == 1
    assert code_switching_rate(["日本語です", "日本 Japan"], {"CJK", "HIRAGANA", "KATAKANA"}) == 0.5


def test_pretraining_learns_the_target_and_mixing_keeps_the_source():
    tokenizer = byte_level()
    model = gpt2(size_of(tokenizer))
    settings = {"start": start(tokenizer), "lr": 3e-3, "length": 16, "batch_size": 8, "device": "cpu"}
    base = continue_pretraining(model, tokenizer, ENGLISH, steps=120, **settings)
    before, state = copy.deepcopy(base.model), random_state()

    def source_bits(of) -> float:
        found = language_report(of, tokenizer, {"en": ENGLISH[:3]}, start=start(tokenizer), length=16)
        return found["en"].bits_per_character

    alone = continue_pretraining(base.model, tokenizer, GERMAN, steps=60, **settings)
    mixed = continue_pretraining(base.model, tokenizer, GERMAN, ENGLISH, steps=120, **settings)
    assert not difference(before.state_dict(), base.model.state_dict())
    assert not difference(state, random_state())
    assert source_bits(alone.model) > source_bits(base.model) + 0.5 > source_bits(mixed.model) + 0.4
    assert alone.characters == sum(map(len, GERMAN))
    assert alone.tokens == sum(len(ids(tokenizer, t)) for t in GERMAN)
    assert alone.steps == 60
    assert alone.passes == mixed.passes == 60 * 8 * 16 / alone.tokens
    again = continue_pretraining(base.model, tokenizer, GERMAN, steps=60, **settings)
    assert not difference(again.model.state_dict(), alone.model.state_dict())


def test_a_source_that_is_lost_ends_training_or_raises_the_ratio():
    tokenizer = byte_level()
    settings = {"start": start(tokenizer), "lr": 3e-3, "length": 16, "batch_size": 8, "device": "cpu", "held": ENGLISH[:2],
                "rounds": 3}  # fmt: skip
    base = continue_pretraining(gpt2(size_of(tokenizer)), tokenizer, ENGLISH, steps=60, bound=100.0, **settings)
    assert [ratio for ratio, _ in base.watched] == [0.0] * 4
    assert base.watched[-1][1] < base.watched[0][1]
    stopped = continue_pretraining(base.model, tokenizer, GERMAN, steps=60, **settings)
    assert stopped.steps == 20
    assert len(stopped.watched) == 2
    assert stopped.watched[1][1] > stopped.watched[0][1] + 0.15
    raised = continue_pretraining(base.model, tokenizer, GERMAN, ENGLISH, steps=60, ratio=0.25, bound=0.0, **settings)
    ratios = [ratio for ratio, _ in raised.watched]
    assert ratios[:2] == [0.25, 0.25]
    assert raised.steps == 60
    for k in (1, 2):
        lost = raised.watched[k][1] > raised.watched[0][1]
        assert ratios[k + 1] == ((1 + ratios[k]) / 2 if lost else ratios[k])
    assert ratios[-1] > 0.25


def moved_ids():
    other = Tokenizer(models.BPE(vocab={"b": 0, "a": 1}, merges=[]))
    return extend_model(WithBias(2), Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), other)


def untied(**rows):
    old = byte_level()
    return lambda: extend_model(rows.pop("model", llama)(size_of(old)), old, extend_tokenizer(old, GERMAN, 4), **rows)


def pretrained(**changes):
    given = {"start": 0, "steps": 4, "device": "cpu"} | changes
    return lambda: continue_pretraining(gpt2(300), byte_level(), given.pop("target", GERMAN), GERMAN, **given)


STREAM = text_stream()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extend_tokenizer(byte_level(), [], 3), "needs texts"),
        (lambda: extend_tokenizer(byte_level(), ["", ""], 3), "needs texts"),
        (lambda: extend_tokenizer(byte_level(), GERMAN, -1), "new >= 0"),
        (lambda: extend_tokenizer(byte_level(), ["baum baum"], 50), r"repeat enough for 50 tokens; got \d+ found"),
        (lambda: extend_tokenizer(Tokenizer(models.Unigram()), GERMAN, 3), "byte-pair encoding"),
        (lambda: extend_tokenizer("gpt2", GERMAN, 3), "fast one of transformers"),
        (moved_ids, "must keep old ids"),
        (lambda: extend_model(gpt2(100), byte_level(), byte_level()), "row for each of"),
        (untied(init="zeros"), "init must be a known name"),
        (untied(rows=torch.zeros(4, 16)), "needs output_rows= as well"),
        (untied(rows=torch.zeros(3, 16), output_rows=torch.zeros(4, 16)), r"must be \(4, 16\)"),
        (untied(rows=torch.full((4, 16), math.nan), output_rows=torch.zeros(4, 16)), "new rows must be finite"),
        (untied(model=gpt2, rows=torch.zeros(4, 16), output_rows=torch.zeros(4, 16)), "untied output rows"),
        (lambda: extend_model(nn.Linear(2, 2), byte_level(), byte_level()), "get_input_embeddings"),
        (lambda: Mixed(target=STREAM, source=STREAM, ratio=1.5), "0 <= ratio <= 1"),
        (lambda: Mixed(target=STREAM, source=STREAM, ratio=-0.1), "0 <= ratio <= 1"),
        (lambda: Mixed(target=STREAM, source=STREAM, ratio=math.nan), "0 <= ratio <= 1"),
        (lambda: Mixed(target=STREAM, source=STREAM, ratio=0.01), "both languages"),
        (lambda: Mixed(target=STREAM, source=Batches(x=STREAM.x)), "tokens that follow"),
        (lambda: instructions(fast(), [("", "a")], end=0), "must not be empty"),
        (lambda: instructions(fast(), [("a", "")], end=0), "must not be empty"),
        (lambda: instructions(fast(), [(ENGLISH[0], "a")], end=0, length=3), "room for a response"),
        (lambda: instructions(fast(), [], end=0), "needs pairs"),
        (pretrained(steps=0), "steps >= rounds >= 1"),
        (pretrained(rounds=0), "steps >= rounds >= 1"),
        (pretrained(bound=-1.0), "bound >= 0"),
        (pretrained(warmup=1.0), "warmup < 1"),
        (pretrained(target=[]), "must not be empty"),
        (pretrained(ratio=2.0), "0 <= ratio <= 1"),
        (lambda: windows([], start=0), "needs tokens"),
        (lambda: windows([1], start=0, length=0), "length >= 1"),
        (lambda: nats(torch.zeros(1, 2, 5), torch.ones(1, 3, dtype=torch.int64)), "Raise overlap"),
        (lambda: fertility(byte_level(), []), "must not be empty"),
        (lambda: code_switching_rate([], {"LATIN"}), "needs responses"),
        (lambda: code_switching_rate(["a"], "LATIN"), "set of names"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(Refused, match=message):
        call()
