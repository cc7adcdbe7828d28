"""SGA: plain ascent on a cosine in its simplest form, sums of captions, views as stated, transformers' CLIP."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import PGD, SGA, mismatch
from headstart.attack.draws import generators
from headstart.core.ascent import goal_gradient
from headstart.core.encode import unit, units
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.measure import matcher, retrieval_attack
from headstart.testing import contract
from headstart.testing.subject import difference, snapshot

TABLE = {"red": ["blue", "green"], "dog": ["cat", "cow"], "big": ["small"]}
WORDS = ["a", "red", "blue", "green", "dog", "cat", "cow", "big", "small", "[UNK]"]
CAPTIONS = ["a red dog", "a big dog", "red", "a big red cow", "nothing here"]
OF = torch.tensor([0, 0, 1, 2, 2])
VIEWED = {"optimum_of_a_linear_model": "It follows the gradient through resized views, by design."}


class Texts(nn.Module):
    """Sums of word vectors, bent; unknown words count nothing."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(1):
            self.vectors, self.drop = nn.Parameter(torch.randn(len(WORDS), 6)), nn.Dropout(0.5)

    def forward(self, texts: list[str]) -> Tensor:
        rows = [[float(text.split().count(word)) for word in WORDS] for text in texts]
        return torch.tanh(self.drop(torch.tensor(rows, dtype=self.vectors.dtype) @ self.vectors)) + 0.1


def images(channels: int = 3) -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Conv2d(channels, 5, 3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(6))


def pair(side: int = 9) -> tuple[nn.Module, nn.Module, Tensor]:
    image, text = images().double(), Texts().double()
    x = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad(), seeded(0):
        image(x)
    return image.eval(), text.eval(), x


def sga(image: nn.Module, text: nn.Module, radius: float = 0.05, seed: int = 0, words: int = 1) -> SGA:
    return SGA(encode_image=image, encode_text=text, candidates=TABLE, radius=radius, seed=seed, words=words)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


test_contract = contract(
    SGA(encode_image=flat, encode_text=Texts(), radius=0.05),
    refuses=[lambda: SGA(encode_image=flat, encode_text=flat, scales=(0.0,)),
             lambda: SGA(encode_image=flat, encode_text=flat, scales=(0.5, math.nan)),
             lambda: SGA(encode_image=flat, encode_text=flat, noise=-0.1),
             lambda: SGA(encode_image=flat, encode_text=flat, words=-1),
             lambda: SGA(encode_image=flat, encode_text=flat, steps=-1),
             lambda: SGA(encode_image=flat, encode_text=flat, at_once=0)],
)  # fmt: skip
test_contract_one_size = contract(SGA(encode_image=flat, encode_text=Texts(), radius=0.05, scales=(), step_size=0.1))
test_contract_l2 = contract(SGA(encode_image=flat, encode_text=Texts(), radius=0.5, norm="l2"), known_failures=VIEWED)


def test_without_scales_one_caption_is_ascent_on_minus_the_cosine():
    image, text, x = pair()
    features = units(text, CAPTIONS[:3])
    found = replace(sga(image, text, words=0), scales=()).perturb_pairs(x, CAPTIONS[:3], torch.arange(3)).x
    plain = PGD(radius=0.05, steps=10, step_size=0.05 / 4)
    assert torch.equal(found, plain.perturb(x, [lambda a: -F.cosine_similarity(image(a), features)]))


def restated(image: nn.Module, features: Tensor, x: Tensor, attack: SGA) -> Tensor:
    """The image stage one picture, one view and one caption at a time."""
    found = []
    for b, generator in enumerate(generators(attack.seed, attack.first, len(x))):
        v, shape = x[b : b + 1], x[b : b + 1].shape
        start = torch.empty(shape, dtype=x.dtype).uniform_(-attack.radius, attack.radius, generator=generator)
        a = (v + start).clamp(0, 1)
        for _ in range(attack.steps):
            a = a.detach().requires_grad_()
            loss = -sum(image(a)[0] @ t / image(a).norm() for t in features[OF.eq(b)])
            noise = torch.empty(len(attack.scales), *shape[1:], dtype=x.dtype)
            noise.normal_(0, attack.noise, generator=generator)
            for scale, away in zip(attack.scales, noise, strict=True):
                size = (int(scale * shape[2]), int(scale * shape[3]))
                view = F.interpolate(a + away, size, mode="bicubic").clamp(0, 1)
                seen = image(F.interpolate(view, shape[2:], mode="bicubic"))[0]
                loss = loss - sum(seen @ t / seen.norm() for t in features[OF.eq(b)])
            step = torch.autograd.grad(loss, a)[0].sign() * attack.radius / 4
            a = (v + (a.detach() + step - v).clamp(-attack.radius, attack.radius)).clamp(0, 1)
        found.append(a)
    return torch.cat(found)


@pytest.mark.parametrize("side", [9, 12])
def test_it_is_the_loop_over_pictures_views_and_captions(side):
    image, text, x = pair(side)
    attack = sga(image, text, seed=3)
    found = attack.perturb_pairs(x, CAPTIONS, OF)
    torch.testing.assert_close(found.x, restated(image, units(text, found.guides.captions), x, attack))


def test_the_sum_over_captions_is_the_inner_product_with_their_sum():
    image, text, x = pair()
    features = units(text, CAPTIONS)
    sets = torch.zeros(3, 6, dtype=x.dtype).index_add(0, OF, features)
    one_by_one = goal_gradient([lambda a: -(unit(image, a)[OF] * features).sum(1)], x)
    torch.testing.assert_close(goal_gradient([mismatch(image, sets)], x), one_by_one)
    attack = replace(sga(image, text), steps=3)
    mean = sets / torch.bincount(OF)[:, None]  # of unequal counts
    torch.testing.assert_close(attack.perturb(x, [mismatch(image, sets)]), attack.perturb(x, [mismatch(image, mean)]))


def test_its_own_size_twice_doubles_the_gradient_and_changes_nothing():
    image, text, x = pair()
    alone = replace(sga(image, text), scales=())
    twice = replace(alone, scales=(1.0,), noise=0.0)
    assert torch.equal(alone.perturb_pairs(x, CAPTIONS, OF).x, twice.perturb_pairs(x, CAPTIONS, OF).x)
    assert not torch.equal(alone.perturb_pairs(x, CAPTIONS, OF).x, sga(image, text).perturb_pairs(x, CAPTIONS, OF).x)


def test_nothing_to_spend_changes_nothing_on_that_side():
    image, text, x = pair()
    still = sga(image, text, radius=0.0).perturb_pairs(x, CAPTIONS, OF)
    assert torch.equal(still.x, x)
    assert still.text.changed.sum() > 0
    mute = sga(image, text, words=0).perturb_pairs(x, CAPTIONS, OF)
    assert mute.text.captions == tuple(CAPTIONS)
    assert not torch.equal(mute.x, x)
    assert torch.equal(replace(sga(image, text), steps=0).perturb_pairs(x, CAPTIONS, OF).x, x)
    without = replace(sga(image, text), candidates={}).perturb_pairs(x, CAPTIONS, OF)
    assert without.text.captions == tuple(CAPTIONS)
    assert not without.text.replaceable.any()


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 9))
def test_the_order_of_captions_is_nothing_to_the_pictures(order, seed):
    image, text, x = pair()
    attack = replace(sga(image, text, seed=seed), steps=3)
    one = attack.perturb_pairs(x, CAPTIONS, OF)
    two = attack.perturb_pairs(x, [CAPTIONS[k] for k in order], OF[list(order)])
    torch.testing.assert_close(one.x, two.x)
    assert two.text.captions == tuple(one.text.captions[k] for k in order)


def test_every_stage_lowers_the_match_and_the_last_begins_from_the_original_captions():
    image, text, x = pair()
    found = sga(image, text).perturb_pairs(x, CAPTIONS, OF)

    def match(pictures: Tensor, captions: tuple[str, ...]) -> Tensor:
        return (units(image, pictures)[OF] * units(text, captions)).sum(1)

    assert (match(x, found.guides.captions) <= match(x, tuple(CAPTIONS))).all()
    guided = torch.zeros(3, dtype=x.dtype).index_add(0, OF, match(x, found.guides.captions))
    moved = torch.zeros(3, dtype=x.dtype).index_add(0, OF, match(found.x, found.guides.captions))
    assert (moved < guided).all()
    assert (match(found.x, found.text.captions) <= match(found.x, tuple(CAPTIONS))).all()
    for before, after in zip(CAPTIONS, found.text.captions, strict=True):  # one word, not one a stage
        assert sum(a != b for a, b in zip(before.split(), after.split(), strict=True)) <= 1


def test_batches_change_nothing():
    image, text, x = pair()
    whole = sga(image, text).perturb_pairs(x, CAPTIONS, OF).x
    torch.testing.assert_close(replace(sga(image, text), at_once=1).perturb_pairs(x, CAPTIONS, OF).x, whole)
    last = replace(sga(image, text), first=2).perturb_pairs(x[2:], CAPTIONS[3:], torch.tensor([0, 0])).x
    torch.testing.assert_close(last, whole[2:])
    assert not torch.equal(sga(image, text, seed=1).perturb_pairs(x, CAPTIONS, OF).x, whole)


def test_models_in_training_mode_are_judged_in_eval_mode_and_left_as_found():
    image, text, x = pair()
    expected = sga(image, text).perturb_pairs(x, CAPTIONS, OF)
    image.train(), text.train()
    before = snapshot((image, text))
    found = sga(image, text).perturb_pairs(x, CAPTIONS, OF)
    assert torch.equal(found.x, expected.x)
    assert found.text.captions == expected.text.captions
    assert not difference(before, snapshot((image, text)))
    method = replace(sga(image, text), encode_image=image.forward)  # a method of a module is the module
    assert torch.equal(method.perturb_pairs(x, CAPTIONS, OF).x, expected.x)
    with pytest.raises(ZeroDivisionError):
        replace(sga(image, text), candidates=lambda caption, k: 1 / 0).perturb_pairs(x, CAPTIONS, OF)
    assert not difference(before, snapshot((image, text)))


def test_it_runs_on_clip_of_transformers():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: k for k, word in enumerate(["[PAD]", "<s>", "</s>", *WORDS])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with seeded(0):
        clip = transformers.CLIPModel(transformers.CLIPConfig(
            text_config={**shape, "vocab_size": len(vocabulary), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
            vision_config={**shape, "image_size": 16, "patch_size": 8}, projection_dim=8,
        ))  # fmt: skip

    def texts(captions: list[str]) -> Tensor:
        found = tokenizer(captions, padding=True, return_tensors="pt", return_token_type_ids=False)
        return clip.get_text_features(**found)

    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    attack = SGA(encode_image=clip.get_image_features, encode_text=texts, candidates=TABLE, radius=8 / 255)
    found = attack.perturb_pairs(x, CAPTIONS, OF)
    match = matcher(clip.get_image_features, texts)
    before, after = match(x, CAPTIONS), match(found.x, found.text.captions)
    rows = torch.arange(5)
    assert (after[OF, rows] < before[OF, rows])[:4].all()
    assert found.text.replaceable.tolist() == [True, True, True, True, False]
    judged = retrieval_attack({"clip": match}, x, CAPTIONS, OF, found.x, found.text.captions, at=[1])
    assert judged.texts.counted.shape == (1, 1)


def test_bad_input_is_refused():
    image, text, x = pair()
    attack = sga(image, text)
    for pictures, captions, of, says in (
        (x, CAPTIONS, torch.tensor([0, 0, 1, 1, 1]), "Each of 3 pictures"),
        (x, CAPTIONS, torch.tensor([0, 1, 2, 3, 3]), "Each of 3 pictures"),
        (x, CAPTIONS, OF[:4], "each of 5 captions"),
        (x, CAPTIONS, OF.double(), "each of 5 captions"),
        (x, "a red dog", OF, "list of texts"),
        (x, [1, 2, 3, 4, 5], OF, "list of texts"),
        (x[..., :1], CAPTIONS, OF, "keep a pixel"),
        (255 * x, CAPTIONS, OF, "must lie in"),
    ):
        with pytest.raises(Refused, match=says):
            attack.perturb_pairs(pictures, captions, of)
    with pytest.raises(Refused, match="keep a pixel"):
        attack.perturb(x.flatten(1), [flat])
    for wrong in (lambda a: a, lambda a: a.flatten(1).long(), lambda a: a.flatten(1)[:1], lambda a: "none"):
        with pytest.raises(Refused, match="An encoder gives features"):
            replace(attack, encode_image=wrong).perturb_pairs(x, CAPTIONS, OF)
    with pytest.raises(Refused, match="finite"):
        replace(attack, encode_image=lambda a: a.flatten(1) / 0).perturb_pairs(x, CAPTIONS, OF)
