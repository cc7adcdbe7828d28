"""Fused generation: tiny models of transformers write together, against the same arithmetic without any cache."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.core.rng import random_state, seeded
from headstart.core.validate import Refused
from headstart.merge import FusionProcessor, common_vocabulary, fuse_logits
from headstart.testing.subject import difference, snapshot


def llama(
    seed: int, width: int = 16, vocabulary: int = 40, base: Any = None, dtype: torch.dtype = torch.float32
) -> Any:
    """A tiny LLaMA with weights large enough that its next tokens differ; `base` gives a fine-tuned neighbour."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return _moved(LlamaForCausalLM(config), seed, base).to(dtype).eval()


def gpt2(seed: int, width: int = 16, vocabulary: int = 40, base: Any = None) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=2, n_head=2, n_positions=128, bos_token_id=1,
                        eos_token_id=None, pad_token_id=0)  # fmt: skip
    return _moved(GPT2LMHeadModel(config), seed, base).eval()


def _moved(model: Any, seed: int, base: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * (0.35 if p.ndim > 1 else 0.1)
            p.copy_(noise + (p if p.ndim == 1 else 0) if base is None else base.get_parameter(name) + 0.5 * noise)
    return model


PROMPTS = torch.tensor([[0, 0, 1, 7, 9], [1, 4, 3, 2, 8], [0, 1, 12, 30, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
WRITE = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
families = pytest.mark.parametrize("make", [llama, gpt2])


def written(large: Any, small: Any, experts: list[Any], ids: Tensor = PROMPTS, mask: Tensor | None = MASK,
            processor: dict[str, Any] | None = None, **how: Any) -> tuple[Tensor, FusionProcessor]:  # fmt: skip
    fusion = FusionProcessor(small, experts, attention_mask=mask, **(processor or {}))
    given = {} if mask is None else {"attention_mask": mask}
    return large.generate(ids, logits_processor=[fusion], **given, **(WRITE | how)), fusion


def by_hand(large: Any, small: Any, experts: list[Any], prompt: Tensor, steps: int, **settings: Any) -> Tensor:
    """Greedy text of one sequence, every model reading the whole prefix alone and without padding at every token."""
    ids = prompt[None]
    for _ in range(steps):
        with torch.no_grad():
            big, base, *tuned = (model(input_ids=ids).logits[:, -1] for model in (large, small, *experts))
        fused, _ = fuse_logits(big, base, tuned, **settings)
        ids = torch.cat([ids, fused.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :]


@families
def test_text_of_a_padded_batch_is_that_of_each_sequence_alone_cached_or_not(make):
    large, small = make(0, width=32), make(1)
    experts = [make(2, base=small), make(3, base=small)]
    ids, fusion = written(large, small, experts)
    uncached, again = written(large, small, experts, processor={"cached": False}, use_cache=False)
    assert torch.equal(ids, uncached)
    for row, mask, text in zip(PROMPTS, MASK, ids, strict=True):
        assert torch.equal(text[5:], by_hand(large, small, experts, row[mask == 1], 12))
    # an alpha for every token and sequence, found anew
    weights = torch.stack(fusion.weights)
    assert weights.shape == (12, 3, 2)
    torch.testing.assert_close(weights, torch.stack(again.weights), atol=1e-3, rtol=1e-3)
    assert weights.sum(-1).std(0).min() > 0.01
    assert weights.sum(-1).std(1).min() > 0.001
    plain = large.generate(PROMPTS, attention_mask=MASK, **WRITE)
    assert not torch.equal(ids, plain)


@families
def test_a_large_model_that_is_the_small_one_writes_the_experts_text(make):
    small = make(1)
    expert = make(2, base=small)
    own = expert.generate(PROMPTS, attention_mask=MASK, **WRITE)
    assert torch.equal(written(small, small, [expert])[0], own)
    assert not torch.equal(small.generate(PROMPTS, attention_mask=MASK, **WRITE), own)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(written(small, small, [expert], **beams)[0],
                       expert.generate(PROMPTS, attention_mask=MASK, **(WRITE | beams)))  # fmt: skip


@families
def test_an_expert_that_is_its_base_leaves_the_large_models_text(make):
    large, small = make(0, width=32), make(1)
    ids, fusion = written(large, small, [small])
    assert torch.equal(ids, large.generate(PROMPTS, attention_mask=MASK, **WRITE))
    assert torch.stack(fusion.weights).abs().max() == 0


@families
@pytest.mark.parametrize("settings", [{"mode": "uniform"}, {"direction": "forward"}, {"grid": [0.0, 0.5, 1.0, 1.5]}])
def test_settings_reach_every_token(make, settings):
    large, small = make(0, width=32), make(1)
    experts = [make(2, base=small), make(3, base=small)]
    ids, _ = written(large, small, experts, ids=PROMPTS[1:2], mask=None, processor=settings)
    assert torch.equal(ids[0, 5:], by_hand(large, small, experts, PROMPTS[1], 12, **settings))


@families
def test_beams_take_their_caches_along(make):
    large, small = make(0, width=32), make(1)
    expert = make(2, base=small)
    beams = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    cached, fusion = written(large, small, [expert], **beams)
    assert [cache.get_seq_length() for cache in fusion._caches] == [16, 16]
    read, _ = written(large, small, [expert], processor={"cached": False}, use_cache=False, **beams)
    assert torch.equal(cached.sequences, read.sequences)
    torch.testing.assert_close(cached.sequences_scores, read.sequences_scores, atol=1e-3, rtol=1e-3)
    assert bool((cached.beam_indices[:, 1:] != cached.beam_indices[:, :-1]).any())  # beams did change places


def test_beams_of_prompts_that_differ_in_their_mask_alone_stay_apart():
    large, small = gpt2(0, width=32, vocabulary=4), gpt2(1, vocabulary=4)  # few tokens, so the texts often agree
    expert = gpt2(2, base=small, vocabulary=4)
    prompts, masks = torch.tensor([[0, 3, 1, 2]] * 2), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    beams = {"num_beams": 4, "num_return_sequences": 4, "output_scores": True, "return_dict_in_generate": True}
    both, _ = written(large, small, [expert], ids=prompts, mask=masks, **beams)
    for k in range(2):
        one, _ = written(large, small, [expert], ids=prompts[k : k + 1], mask=masks[k : k + 1], **beams)
        rows = slice(4 * k, 4 * k + 4)
        assert torch.equal(both.sequences[rows], one.sequences)
        torch.testing.assert_close(both.sequences_scores[rows], one.sequences_scores, atol=1e-4, rtol=1e-4)


def test_a_beams_score_is_the_sum_of_fused_log_probabilities():
    large, small = llama(0, width=32), llama(1)
    expert = llama(2, base=small)
    out, _ = written(large, small, [expert], ids=PROMPTS[1:2], mask=None, num_beams=3, length_penalty=0.0,
                     output_scores=True, return_dict_in_generate=True)  # fmt: skip
    total, ids = 0.0, out.sequences
    for at in range(5, 17):
        with torch.no_grad():
            fused, _ = fuse_logits(*(model(input_ids=ids[:, :at]).logits[:, -1] for model in (large, small)),
                                   [expert(input_ids=ids[:, :at]).logits[:, -1]])  # fmt: skip
        total += fused.log_softmax(-1)[0, ids[0, at]].item()
    assert out.sequences_scores.item() == pytest.approx(total, abs=1e-3)


def test_sampling_is_repeatable_and_follows_the_fused_probabilities():
    large, small = llama(0, width=32), llama(1)
    expert = llama(2, base=small)
    prompt = PROMPTS[1:2]
    draws = []
    for _ in range(2):
        with seeded(3):
            draws.append(written(large, small, [expert], ids=prompt, mask=None, do_sample=True, top_k=0, temperature=0.5,
                                 num_return_sequences=4000, max_new_tokens=1)[0][:, -1])  # fmt: skip
    assert torch.equal(*draws)
    with torch.no_grad():
        fused, _ = fuse_logits(*(model(input_ids=prompt).logits[:, -1] for model in (large, small)),
                               [expert(input_ids=prompt).logits[:, -1]])  # fmt: skip
    wanted = (fused / 0.5).softmax(-1)[0]  # the temperature comes after fusion
    seen = torch.bincount(draws[0], minlength=40) / 4000
    assert (seen - wanted).abs().max() < 5 * math.sqrt(0.25 / 4000)
    assert (seen - (fused.softmax(-1)[0])).abs().max() > 5 * math.sqrt(0.25 / 4000)


def test_several_sampled_sequences_keep_to_their_own_prefixes():
    large, small = llama(0, width=32), llama(1)
    expert = llama(2, base=small)
    texts = []
    for cached in (True, False):
        with seeded(5):
            how = {"do_sample": True, "num_return_sequences": 3, "use_cache": cached}
            texts.append(written(large, small, [expert], processor={"cached": cached}, **how)[0])
    assert torch.equal(*texts)
    assert len({tuple(row) for row in texts[0].tolist()}) > 3


def test_finished_sequences_do_not_disturb_the_others():
    large, small = llama(0, width=32), llama(1)
    expert = llama(2, base=small)
    alone, _ = written(large, small, [expert])
    last = int(alone[0, 7])  # the first sequence ends here
    ids, _ = written(large, small, [expert], eos_token_id=last)
    for row, free in zip(ids, alone, strict=True):
        length = 5 + (free[5:] == last).int().argmax().item() + 1 if bool((free[5:] == last).any()) else 17
        assert torch.equal(row[:length], free[:length])
        assert not row[length:].any()


def test_penalties_listed_after_it_apply_to_the_fused_scores():
    from transformers import RepetitionPenaltyLogitsProcessor

    large, small = llama(0, width=32), llama(1)
    expert = llama(2, base=small)
    prompt, ids = PROMPTS[1:2], PROMPTS[1:2]
    penalty = RepetitionPenaltyLogitsProcessor(5.0)
    text = large.generate(prompt, logits_processor=[FusionProcessor(small, [expert]), penalty], **WRITE)
    for _ in range(12):
        with torch.no_grad():
            fused, _ = fuse_logits(*(model(input_ids=ids).logits[:, -1] for model in (large, small)),
                                   [expert(input_ids=ids).logits[:, -1]])  # fmt: skip
        ids = torch.cat([ids, penalty(ids, fused.log_softmax(-1)).argmax(-1, keepdim=True)], 1)
    assert torch.equal(text, ids)
    assert not torch.equal(text, written(large, small, [expert], ids=prompt, mask=None)[0])


def test_padded_vocabularies_are_cut_and_never_written():
    large, small = llama(0, width=32, vocabulary=48), llama(1, vocabulary=40)
    expert = llama(2, base=small)
    with pytest.raises(Refused, match="vocabulary="):
        written(large, small, [expert])
    ids, _ = written(large, small, [expert], processor={"vocabulary": 36}, do_sample=True, temperature=9.0, top_k=0)
    assert ids.max() < 36


def test_half_precision_models_write():
    large, small = llama(0, width=32, dtype=torch.bfloat16), llama(1, dtype=torch.bfloat16)
    expert = llama(2, base=small, dtype=torch.bfloat16)
    ids, _ = written(small, small, [expert])
    assert torch.equal(ids, expert.generate(PROMPTS, attention_mask=MASK, **WRITE))
    assert written(large, small, [expert])[1].weights[0].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name
def test_adapters_of_peft_serve_as_experts():
    peft = pytest.importorskip("peft")
    large, small = gpt2(0, width=32), gpt2(1)
    with seeded(0):
        config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        expert = peft.get_peft_model(copy.deepcopy(small), config).eval()
        merged = copy.deepcopy(expert).merge_and_unload()
    assert torch.equal(written(large, small, [expert])[0], written(large, small, [merged])[0])


def test_one_processor_goes_on_with_a_conversation_and_begins_again():
    large, small = llama(0, width=32), llama(1)
    expert = llama(2, base=small)
    fusion = FusionProcessor(small, [expert])
    first = large.generate(PROMPTS[1:2], logits_processor=[fusion], **WRITE)
    longer = torch.cat([first, PROMPTS[1:2]], 1)
    for prompt in (longer, PROMPTS[1:2], torch.tensor([[1, 33]])):
        text = large.generate(prompt, logits_processor=[fusion], **WRITE)
        assert torch.equal(text, written(large, small, [expert], ids=prompt, mask=None)[0])
    assert len(fusion.weights) == 12


def test_models_and_random_state_are_left_as_they_were():
    large, small = llama(0, width=32), llama(1)
    expert = llama(2, base=small)
    before, state = snapshot([large, small, expert]), random_state()
    written(large, small, [expert])
    assert not difference(before, snapshot([large, small, expert]))
    assert not difference(state, random_state())


def test_refuses_prompts_and_models_that_it_would_misread():
    large, small = llama(0, width=32), llama(1)
    expert = llama(2, base=small)
    with pytest.raises(Refused, match="Prompts that differ need attention_mask="):
        written(large, small, [expert], mask=None)
    with pytest.raises(Refused, match="padded on the left"):
        FusionProcessor(small, [expert], attention_mask=MASK.flip(1))
    with pytest.raises(Refused, match="attention_mask must be the prompts'"):
        large.generate(PROMPTS, logits_processor=[FusionProcessor(small, [expert], attention_mask=MASK[:2])], **WRITE)
    _, fusion = written(large, small, [expert])
    large.generate(PROMPTS, attention_mask=MASK, logits_processor=[fusion], **WRITE)  # the same prompts again
    with pytest.raises(Refused, match="one batch of prompts"):
        large.generate(PROMPTS + 1, attention_mask=MASK, logits_processor=[fusion], **WRITE)
    with pytest.raises(Refused, match="eval mode"):
        FusionProcessor(small, [copy.deepcopy(expert).train()])
    with pytest.raises(Refused, match="needs an expert"):
        FusionProcessor(small, [])
    with pytest.raises(Refused, match="most > 0"):
        FusionProcessor(small, [expert], most=-1.0)
    fusion = FusionProcessor(small, [expert])
    with pytest.raises(Refused, match="prompt of token ids"):
        large.generate(inputs_embeds=torch.zeros(1, 3, 32), logits_processor=[fusion], **WRITE)
    encoder = copy.deepcopy(expert)
    encoder.config.is_encoder_decoder = True
    with pytest.raises(Refused, match="without an encoder"):
        FusionProcessor(small, [encoder])


def test_common_vocabulary_counts_ids_that_mean_the_same():
    assert common_vocabulary([{"a": 0, "b": 1, "c": 2}, {"b": 1, "a": 0}]) == 2
    with pytest.raises(Refused, match="Id 1 must be the same token"):
        common_vocabulary([{"a": 0, "b": 1}, {"a": 0, "c": 1}])
    for few in ([{"a": 0}], [{"a": 0}, {}]):
        with pytest.raises(Refused, match="two vocabularies"):
            common_vocabulary(few)
