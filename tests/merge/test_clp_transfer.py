"""CLP-Transfer: known answers of the card, an independent restatement, and models of transformers after a reload."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from headstart.core.rng import random_state, seeded
from headstart.core.validate import Refused
from headstart.merge.clp_transfer import clp_embeddings, clp_transfer
from headstart.merge.vocabulary import marker_of
from headstart.testing.subject import difference

CONVEX = ["topk", "relu", "softmax"]
SOURCE = [f"s{i}" for i in range(40)]
HELPER = [f"s{i}" for i in range(0, 40, 2)] + [f"t{i}" for i in range(15)]  # 20 shared, 15 missing


def tables(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Source rows (40, 6), helper rows (35, 5) with a common direction, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    helper = torch.randn(35, 5, generator=generator, dtype=torch.float64) + 1.5
    return source.to(dtype), helper.to(dtype)


def test_1_the_same_strings_permuted_give_the_rows_permuted_bit_for_bit():
    source, helper = tables(dtype=torch.bfloat16)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    rows, report = clp_embeddings(source, SOURCE, helper[:1].expand(40, -1), [SOURCE[i] for i in order])
    assert torch.equal(rows, source[order])
    assert (report.overlap, report.missing, report.contributors) == (40, 0, 0)


@pytest.mark.parametrize("weighting", [*CONVEX, "paper"])
def test_2_one_overlapping_token_is_every_missing_row(weighting):
    source, helper = tables()
    rows, report = clp_embeddings(source, SOURCE, helper.abs(), ["s7", *HELPER[20:], *"abcdefghijklmnopqrs"],
                                  weighting=weighting)  # fmt: skip
    assert torch.equal(rows, source[7].expand(35, -1))
    assert report.contributors == 1


@pytest.mark.parametrize("weighting", ["relu", "softmax", "paper"])
def test_3_equal_helper_rows_give_the_mean_of_the_overlapping_rows(weighting):
    source, helper = tables()
    rows, report = clp_embeddings(source, SOURCE, helper[:1].expand(35, -1), HELPER, weighting=weighting)
    torch.testing.assert_close(rows[20:], source[::2].mean(0).expand(15, -1))
    assert report.contributors == pytest.approx(20)


@pytest.mark.parametrize("weighting", ["topk", "relu", "paper"])
def test_4_a_twin_with_all_others_orthogonal_gets_its_row_bit_for_bit(weighting):
    source = tables()[0]
    helper = torch.cat([torch.eye(4), 3.7 * torch.eye(4)[2:3]])
    rows, _ = clp_embeddings(source, SOURCE, helper, [*SOURCE[:4], "new"], weighting=weighting)
    assert torch.equal(rows[4], source[2])


@pytest.mark.parametrize("weighting", [*CONVEX, "paper"])
def test_5_helper_scale_and_rotation_change_nothing_and_linear_maps_of_the_source_carry_over(weighting):
    source, helper = tables()
    generator = torch.Generator().manual_seed(5)
    plain, _ = clp_embeddings(source, SOURCE, helper, HELPER, weighting=weighting)
    scale = 10.0 ** torch.randint(-30, 30, (35, 1), generator=generator).double()
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    for other in (helper * scale, helper @ turn):
        torch.testing.assert_close(clp_embeddings(source, SOURCE, other, HELPER, weighting=weighting)[0], plain)
    linear = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    mapped, _ = clp_embeddings(source @ linear, SOURCE, helper, HELPER, weighting=weighting)
    torch.testing.assert_close(mapped, plain @ linear)


@given(st.sampled_from(CONVEX), st.integers(1, 30), st.integers(0, 2**16))
def test_6_missing_rows_are_convex_combinations_of_the_overlapping_ones(weighting, k, seed):
    source, helper = tables(seed)
    helper = helper - helper.mean(0)  # centred: the paper's weights would explode here
    rows, report = clp_embeddings(source, SOURCE, helper, HELPER, weighting=weighting, k=k, block=4)
    assert report.fallback == 0
    low, high = source[::2].amin(0) - 1e-12, source[::2].amax(0) + 1e-12
    assert bool(((rows[20:] >= low) & (rows[20:] <= high)).all())
    assert 1 - 1e-9 <= report.contributors <= (k if weighting == "topk" else 20) + 1e-9
    one = torch.eye(40, dtype=torch.float64)  # rows are then the weights themselves
    weights, _ = clp_embeddings(one, SOURCE, helper, HELPER, weighting=weighting, k=k)
    assert bool((weights[20:] >= 0).all())
    torch.testing.assert_close(weights[20:, ::2].sum(1), torch.ones(15, dtype=torch.float64))


def test_7_top_of_all_is_relu():
    source, helper = tables()
    helper = helper - helper.mean(0)
    every, _ = clp_embeddings(source, SOURCE, helper, HELPER, weighting="topk", k=20)
    relu, _ = clp_embeddings(source, SOURCE, helper, HELPER, weighting="relu")
    assert torch.equal(every, relu)
    ten, _ = clp_embeddings(source, SOURCE, helper, HELPER, weighting="topk", k=3)
    assert not torch.allclose(ten, relu)


@pytest.mark.parametrize("weighting", [*CONVEX, "paper"])
@pytest.mark.parametrize("block", [1, 4, 1024])
def test_7_it_equals_scikit_learns_cosines_and_numpys_average(weighting, block):
    source, helper = tables()
    cosines = cosine_similarity(helper[20:], helper[:20])
    for row, cosine in enumerate(cosines):
        if weighting == "topk":
            cosine[np.argsort(cosine)[:-10]] = 0
        if weighting == "softmax":
            cosines[row] = np.exp(cosine / 0.1)
        elif weighting != "paper":
            cosines[row] = np.maximum(cosine, 0)
    expected = np.stack([np.average(source[::2], axis=0, weights=weights) for weights in cosines])
    found, report = clp_embeddings(source, SOURCE, helper, HELPER, weighting=weighting, block=block)
    np.testing.assert_allclose(found[20:], expected, rtol=1e-10)
    assert torch.equal(found[:20], source[::2])
    weights = cosines / cosines.sum(1, keepdims=True)
    assert report.contributors == pytest.approx((1 / (weights**2).sum(1)).mean())
    lengths = np.linalg.norm(expected, axis=1).mean() / source[::2].norm(dim=1).mean().item()
    assert report.norm_ratio == pytest.approx(lengths)


@pytest.mark.parametrize("weighting", ["paper", "relu", "topk"])
def test_8_weights_worked_by_hand(weighting):
    helper = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    rows, report = clp_embeddings(torch.eye(2), ["a", "b"], helper, ["a", "b", "c"], weighting=weighting)
    torch.testing.assert_close(rows[2], torch.tensor([3 / 7, 4 / 7]))
    assert report.contributors == pytest.approx(49 / 25)


def test_the_papers_weights_are_refused_where_cosines_cancel_and_not_where_they_do_not():
    source, helper = tables()
    with pytest.raises(Refused, match=r"mostly positive; got \d+ of 15 tokens.*topk"):
        clp_embeddings(source, SOURCE, helper - helper.mean(0), HELPER, weighting="paper")
    assert clp_embeddings(source, SOURCE, helper, HELPER, weighting="paper")[1].fallback == 0


@pytest.mark.parametrize("weighting", [*CONVEX, "paper"])
def test_a_token_that_resembles_none_keeps_its_random_row_and_is_counted(weighting):
    source, helper = tables()
    helper[30] = 0
    rows, report = clp_embeddings(source, SOURCE, helper, HELPER, weighting=weighting, seed=3)
    again, _ = clp_embeddings(source, SOURCE, helper, HELPER, weighting=weighting, seed=4)
    assert report.fallback == 1
    assert [i for i in range(35) if not torch.equal(rows[i], again[i])] == [30]
    noise = torch.randn(35, 6, generator=torch.Generator().manual_seed(3))[30].double()
    np.testing.assert_allclose(rows[30], source.numpy().mean(0) + noise.numpy() * source.numpy().std(0))


@pytest.mark.parametrize("weighting", CONVEX)
def test_rows_are_stretched_to_their_contributors_mean_length(weighting):
    source, helper = tables()
    plain, _ = clp_embeddings(source, SOURCE, helper, HELPER, weighting=weighting)
    long, report = clp_embeddings(source, SOURCE, helper, HELPER, weighting=weighting, match_norm=True)
    lengths, _ = clp_embeddings(source.norm(dim=1, keepdim=True), SOURCE, helper, HELPER, weighting=weighting)
    torch.testing.assert_close(torch.cosine_similarity(plain, long), torch.ones(35, dtype=torch.float64))
    torch.testing.assert_close(long[20:].norm(dim=1), lengths[20:, 0])
    assert report.norm_ratio == pytest.approx(float(lengths[20:].mean() / lengths[:20].mean()))


def test_special_tokens_go_by_role_and_contribute_to_no_row():
    source, helper = tables()
    names = [*HELPER[:34], "<pad>"]
    roles = {"eos": ("s1", "t0"), "bos": ("s3", "t0"), "pad": (None, "<pad>"), "unk": ("s5", "s6")}
    rows, report = clp_embeddings(source, SOURCE, helper, names, roles=roles, weighting="relu")
    assert torch.equal(rows[20], source[1])  # the first role counts
    assert torch.equal(rows[3], source[5])  # although "s6" is shared
    assert (report.overlap, report.by_role, report.missing) == (19, 2, 14)
    loud = source.clone()
    loud[6] = 1e6
    assert torch.equal(clp_embeddings(loud, SOURCE, helper, names, roles=roles, weighting="relu")[0][20:], rows[20:])


def test_word_starts_are_respelt_or_refused():
    source, helper = tables()
    theirs, ours = ["Ġa", "b", "Ġc"], ["▁a", "b", "▁d"]
    with pytest.raises(Refused, match=r"mark word starts alike.*got \('Ġ', '▁'\)"):
        clp_embeddings(source[:3], theirs, helper[:3], ours)
    rows, report = clp_embeddings(source[:3], theirs, helper[:3], ours, spelling=lambda t: t.replace("▁", "Ġ"))
    assert report.frequent == ("▁a", "b")
    assert torch.equal(rows[:2], source[:2])
    assert marker_of({"##a": 0, "▁": 1, "##b": 2}) == "##"


def test_the_report_counts_the_text_and_names_frequent_tokens():
    source, helper = tables()
    counts = {"s2": 5, "s0": 3, "t1": 2, "elsewhere": 1000}
    _, report = clp_embeddings(source, SOURCE, helper, HELPER, counts=counts)
    assert report.covered == 0.8
    assert report.frequent[:2] == ("s2", "s0")
    assert clp_embeddings(source, SOURCE, helper, HELPER)[1].covered is None


def test_padded_rows_are_not_looked_at_and_gaps_are_filled():
    source, helper = tables()
    padded = torch.cat([source, torch.full((3, 6), torch.nan)])
    ours = {name: row + (row > 10) for row, name in enumerate(HELPER[:34])}
    wide = torch.cat([helper, torch.full((2, 5), torch.nan)])
    rows, _ = clp_embeddings(padded, SOURCE, wide, ours)
    assert rows.shape == (35, 6)
    assert bool(rows.isfinite().all())
    torch.testing.assert_close(rows[:10], source[0:20:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept_and_rounded_once_inputs_and_random_state_stay(dtype):
    source, helper = tables(dtype=dtype)
    before, state = copy.deepcopy((source, helper)), random_state()
    rows, _ = clp_embeddings(source, SOURCE, helper, HELPER)
    assert rows.dtype == dtype
    exact, _ = clp_embeddings(source.double(), SOURCE, helper.double(), HELPER)
    if dtype.itemsize == 2:
        assert int((exact.to(dtype) != rows).sum()) <= rows.numel() / 20
    torch.testing.assert_close(rows, exact.to(dtype))
    assert not difference(before, (source, helper))
    assert not difference(state, random_state())


def gpt2() -> GPT2LMHeadModel:
    with seeded(0):
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2,
                                          bos_token_id=4, eos_token_id=4)).eval()  # fmt: skip


def llama() -> LlamaForCausalLM:
    with seeded(0):
        config = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=2, pad_token_id=3,
                             num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=[2, 5, 6])  # fmt: skip
        return LlamaForCausalLM(config).eval()


def gptj() -> GPTJForCausalLM:
    with seeded(0):
        model = GPTJForCausalLM(GPTJConfig(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=2,
                                           bos_token_id=4, eos_token_id=4)).eval()  # fmt: skip
        torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("make", [gpt2, llama, gptj])
@pytest.mark.parametrize("size", [35, 40, 60])
def test_a_model_of_transformers_is_transferred_and_survives_a_reload(make, size, tmp_path):
    model, helper = make(), torch.rand(size, 5, generator=torch.Generator().manual_seed(2))
    names = [*HELPER, *(f"u{i}" for i in range(25))][:size]
    before, state = copy.deepcopy(model), random_state()
    new, report = clp_transfer(model, SOURCE, helper, names)
    assert not difference(before, model)
    assert not difference(state, random_state())
    assert report.overlap == 20
    rows, _ = clp_embeddings(model.get_input_embeddings().weight.detach(), SOURCE, helper, names)
    assert torch.equal(new.get_input_embeddings().weight, rows)
    tied = make is gpt2
    assert (new.get_output_embeddings().weight is new.get_input_embeddings().weight) == tied
    if not tied:
        out, _ = clp_embeddings(model.lm_head.weight.detach(), SOURCE, helper, names, seed=43)
        assert torch.equal(new.lm_head.weight, out)
    if make is gptj:
        assert torch.equal(new.lm_head.bias[:20], model.lm_head.bias[::2])
        assert not new.lm_head.bias[20:].any()
    body = [n for n in model.state_dict() if "wte" not in n and "embed_tokens" not in n and "lm_head" not in n]
    assert all(torch.equal(model.state_dict()[n], new.state_dict()[n]) for n in body)
    assert len(body) > 5

    shared = torch.tensor([[0, 3, 7, 19]])  # in shared tokens it says what the source says
    with torch.no_grad():
        torch.testing.assert_close(new(shared).logits[..., :20], model(2 * shared).logits[..., ::2])
        new.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(again(shared).logits, new(shared).logits)
    assert again.config.vocab_size == size
    assert again(shared).logits.shape[-1] == size


def test_the_configuration_points_to_the_helpers_special_tokens():
    helper = torch.rand(35, 5, generator=torch.Generator().manual_seed(2))
    new, _ = clp_transfer(
        llama(), SOURCE, helper, HELPER
    )  # "s1", "s3" and "s5" are not the helper's, "s2" and "s6" are
    assert (new.config.bos_token_id, new.config.eos_token_id, new.config.pad_token_id) == (None, [1, 3], None)
    roles = {"bos": ("s1", "t3"), "eos": ("s2", "t4"), "pad": ("s3", "t5")}
    new, report = clp_transfer(llama(), SOURCE, helper, HELPER, roles=roles)
    for config in (new.config, new.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (23, 24, 25)
    assert new.get_input_embeddings().padding_idx == 25
    assert torch.equal(new.get_input_embeddings().weight[23], llama().get_input_embeddings().weight[1])
    assert report.by_role == 3


def test_a_transferred_model_trains_and_stays_tied():
    helper = torch.rand(35, 5, generator=torch.Generator().manual_seed(2))
    new, _ = clp_transfer(gpt2(), SOURCE, helper, HELPER)
    x = torch.randint(35, (4, 8), generator=torch.Generator().manual_seed(0))
    new(input_ids=x, labels=x).loss.backward()
    gradient = new.get_input_embeddings().weight.grad
    assert gradient is not None
    assert bool((gradient != 0).any(1).all())  # the output layer reaches each row


def bad(**changes):
    given = {"source": tables()[0], "source_vocabulary": SOURCE, "helper": tables()[1], "helper_vocabulary": HELPER}
    given.update(changes)
    positional = [given.pop(name) for name in list(given)[:4]]
    return lambda: clp_embeddings(*positional, **given)


NAN = torch.full((40, 6), math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(helper_vocabulary=[f"x{i}" for i in range(35)]), "share tokens; got no token"),
        (bad(helper_vocabulary=[*HELPER[:34], "s0"]), "token of the helper vocabulary must occur once"),
        (bad(helper_vocabulary={"s0": 1, "s1": 1}), "row of the helper vocabulary must occur once"),
        (bad(source_vocabulary={"s0": 40}), r"source vocabulary must name rows 0..39; got \['s0'\]"),
        (bad(source_vocabulary={"s0": -1}), "must name rows"),
        (bad(helper_vocabulary=[*HELPER, "more"]), "helper vocabulary must name rows"),
        (bad(source_vocabulary=[]), "must have tokens"),
        (bad(source=NAN), "source rows must be finite"),
        (bad(helper=NAN), "helper rows must be finite"),
        (bad(source=torch.zeros(40)), "floating table"),
        (bad(source=torch.zeros(40, 2, dtype=torch.int64)), "floating table"),
        (bad(weighting="top"), "weighting must be a known name"),
        (bad(k=0), "k >= 1"),
        (bad(temperature=0.0), "temperature > 0"),
        (bad(temperature=math.nan), "temperature > 0"),
        (bad(block=0), "block >= 1"),
        (bad(roles={"end": ("s0", "t0")}), "A role"),
        (bad(roles={"eos": ("zz", "t0")}), "Roles must name tokens that exist"),
        (bad(roles={"eos": ("s0", "zz")}), "Roles must name tokens that exist"),
        (bad(counts={"zz": 3}), "counts must count"),
        (lambda: clp_transfer(torch.nn.Linear(2, 2), SOURCE, tables()[1], HELPER), "get_input_embeddings"),
        (lambda: clp_transfer(copy.deepcopy(gpt2()), [*SOURCE[:39], "s0"], tables()[1], HELPER), "must occur once"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(Refused, match=message):
        call()
