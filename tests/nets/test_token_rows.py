"""Token tables of language models: what is read, what is replaced, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from headstart.core.rng import random_state, seeded
from headstart.core.validate import Refused
from headstart.nets.token_rows import token_rows, with_token_rows
from headstart.testing.subject import difference


def models() -> dict[str, nn.Module]:
    with seeded(0):
        return {
            "tied": GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)),
            "untied": LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=4, intermediate_size=8, num_hidden_layers=1,
                                                   num_attention_heads=1)),
            "no output": BertModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
                                              intermediate_size=8)),
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["tied", "untied", "no output"])
@pytest.mark.parametrize("size", [5, 9, 12])
def test_tables_are_replaced_and_nothing_else(kind, size):
    model, state = models()[kind], random_state()
    old, output, bias = token_rows(model)
    assert old.shape == (9, 4)
    assert (output is not None) == (kind == "untied")
    assert bias is None
    rows = torch.arange(4.0 * size).view(size, 4)
    new = with_token_rows(model, rows, None if output is None else -rows)
    assert not difference(state, random_state())
    assert torch.equal(new.get_input_embeddings().weight, rows)
    if kind != "no output":
        assert torch.equal(new.get_output_embeddings().weight, rows if kind == "tied" else -rows)
    rest = [n for n in model.state_dict() if model.state_dict()[n].shape[0] != 9]
    assert rest
    assert all(torch.equal(model.state_dict()[n], new.state_dict()[n]) for n in rest)
    assert torch.equal(token_rows(model)[0], models()[kind].get_input_embeddings().weight)
    assert all(p.requires_grad for p in new.parameters())


def test_tables_that_do_not_fit_are_refused():
    found = models()
    with pytest.raises(Refused, match="where the model has its own"):
        with_token_rows(found["untied"], torch.zeros(5, 4))
    with pytest.raises(Refused, match="where the model has its own"):
        with_token_rows(found["tied"], torch.zeros(5, 4), torch.zeros(5, 4))
    with pytest.raises(Refused, match="where the model has its own"):
        with_token_rows(found["tied"], torch.zeros(5, 4), bias=torch.zeros(5))
    with pytest.raises(Refused, match="get_input_embeddings"):
        token_rows(nn.Linear(2, 2))
