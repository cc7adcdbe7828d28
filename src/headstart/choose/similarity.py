"""Which source's soft prompt helps a target, told from what the model says under each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.validate import finite, one_of, require

_EMBEDDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "outputs": lambda h: (h - h.mean(0)).flatten(),
    "mean": lambda h: h.mean(0),
    "tokens": lambda p: p.mean(0),
    "pairs": lambda p: F.normalize(p, dim=1, eps=1e-300).mean(0),
    "neurons": lambda a: (a > 0).double().flatten(),
}


def prompt_similarity(said: Sequence[Tensor], kind: str = "outputs") -> Tensor:
    """How alike tasks are, told from what a frozen model says under each task's prompt: a matrix in [-1, 1].

    Args:
        said: one tensor for each prompt. For "outputs" and "mean" the features (n, d) of the same probe inputs,
            `extract(model, inputs).features`; no labels are needed, a few hundred inputs do. For "tokens" and
            "pairs" the prompts (P, d), of any lengths. For "neurons" what feed-forward neurons put out at the first
            token of the same inputs, (n, neurons), with > 0 for active.
        kind: "outputs": cosine of the outputs, centred over the inputs and laid end to end (follows zero-shot
            transfer best); "mean": cosine of mean outputs; "tokens": cosine of mean prompt tokens; "pairs": mean
            cosine of all pairs of tokens; "neurons": cosine of the two patterns of active neurons.

    Shape: k tensors -> (k, k), float64, symmetric; the diagonal is 1 but for "pairs", which has no such scale.

    Use it when: choosing the source of a prompt, or the weight of `PANDA`. Take several prompts of the target from
        different seeds and average their rows: with few labels one is noisy.
    Not when: the prompts were tuned on different backbones.

    Cost: O(k² n d); two forward passes over the inputs for each prompt before it, which may be kept.

    Notes: scaling all outputs of a prompt by a positive number changes nothing; adding a constant vector changes
    nothing for "outputs". Tokens have no order that two prompts share, so "tokens" and "pairs" mean little between
    prompts that did not start alike. A prompt under which all inputs look the same has similarity 0, with a warning.

    Raises:
        Refused: an unknown kind, shapes that do not fit together, NaN.

    Reference: Zhong et al. 2024, section 3 (the idea); the prior measures as in Su et al. 2022 (arXiv 2111.06719).

    >>> h = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
    >>> prompt_similarity([h, 3 * h + 7, -h])[0]
    tensor([ 1.,  1., -1.], dtype=torch.float64)
    """
    one_of("kind", kind, _EMBEDDINGS)
    require(len(said) > 0, "prompt_similarity needs at least one prompt", "none", "Pass one tensor for each.")
    shapes = [tuple(each.shape) for each in said]
    same = [shape[-1:] for shape in shapes] if kind in ("tokens", "pairs") else shapes
    fits = len(set(same)) == 1 and all(
        each.ndim == 2 and each.numel() > 0 and each.is_floating_point() for each in said
    )
    alike = "width" if kind in ("tokens", "pairs") else "shape"
    require(fits, f"kind={kind!r} compares floating matrices of one {alike}", shapes, "Use one probe set and backbone.")
    rows = []
    for k, raw in enumerate(said):
        finite(f"What prompt {k} says", raw, "Tune it again at a lower learning rate.")
        exact = raw.detach().double().cpu()
        exact = exact / exact.abs().amax().clamp(min=1e-300)  # squares neither vanish nor overflow
        vector = _EMBEDDINGS[kind](exact)
        if vector.square().mean() <= (4 * torch.finfo(raw.dtype).eps) ** 2 * exact.square().mean():  # rounding only
            warnings.warn(f"Prompt {k} has collapsed: kind={kind!r} sees nothing in it; similarity 0.", stacklevel=2)
            vector = torch.zeros_like(vector)
        rows.append(vector if kind == "pairs" else F.normalize(vector, dim=0, eps=1e-300))
    gram = torch.stack(rows) @ torch.stack(rows).T
    return ((gram + gram.T) / 2).clamp(-1, 1)  # a product need not be symmetric in its last bit
