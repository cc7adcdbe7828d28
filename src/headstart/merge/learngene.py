"""A model stored as two blocks, from which models of any depth are made."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from headstart.core.surgery import clone
from headstart.core.taps import layer_of
from headstart.core.validate import require, suggestion
from headstart.core.weights import wider


class Learngene(nn.Module):
    """Two blocks, `base` and `slope`, and the parts all depths share: made by `TLEG`, trained by `fit`, then expanded.

    Block l of L, counted from 0, is base + l / L · slope, tensor by tensor. Called, it is the model of its own depth:
    the blocks are made anew in each forward pass, and gradients reach both.

    Args:
        model: whose blocks give the structure, and whose other parts are shared by all depths.
        blocks: dotted name of its list of blocks.
        base: name within a block -> tensor.
        slope: the same names and shapes.

    Attributes:
        model: the given one without the tensors of its blocks; do not call it.
        base: the first block of every depth.
        slope: what is added along the depth.

    Cost: two operations on each entry of each block in a forward pass; stores two blocks and the shared parts.

    Notes: `state_dict()` is what to keep: it loads into the learngene of a model of another depth. Gradient
    checkpointing inside the model would look for blocks that are no longer there; switch it off.
    """

    def __init__(self, model: nn.Module, blocks: str, base: Mapping[str, Tensor], slope: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.blocks, self.training = blocks, model.training
        self.base, self.slope = _held(base), _held(slope)
        memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        memo.update({id(p): None for p in layer_of(model, blocks).parameters()})
        self.model = copy.deepcopy(model, memo)  # every parameter of a block becomes None

    @property
    def depth(self) -> int:
        """Blocks of the model that a call computes."""
        return len(list(layer_of(self.model, self.blocks).children()))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return functional_call(self.model, self._tensors(self.model), inputs, named, tie_weights=False)

    @torch.no_grad()
    def expand(self, depth: int, *, into: nn.Module | None = None, keep: Sequence[str] = ()) -> nn.Module:
        """An ordinary model of `depth` blocks that no longer depend on each other, ready for a short fine-tuning.

        Args:
            depth: blocks, >= 1; depth 1 is `base` alone.
            into: a model of that depth to fill (a copy of it), where depth shows in more than the number of blocks
                (stochastic depth) or the head is another. By default this model, cut or with copies of its last block;
                numbers that blocks carry go on, and a configuration of transformers counts the new depth.
            keep: dotted names of the parts that `into` keeps, such as ("head",) for another set of classes.

        Raises:
            Refused: depth < 1; `into` has another depth, width or names (each of its tensors must be filled, and each
                tensor of the learngene used, except under `keep`); encoder-decoders and blocks of several kinds.
        """
        require(type(depth) is int and depth >= 1, "expand needs a depth >= 1", depth, "Pass the number of blocks.")
        require(into is not None or not keep, "keep= needs into=", keep, "Pass the model that has those parts.")
        new = self._resized(depth) if into is None else copy.deepcopy(into)
        found = blocks_of(new, self.blocks)
        require(len(found) == depth, f"into= must have {depth} blocks", len(found), "Build it with that depth.")
        ours, theirs = (_kind(next(layer_of(one, self.blocks).children())) for one in (self.model, new))
        unlike = [".".join(at).lstrip(".") for at in ours.keys() | theirs.keys() if ours.get(at) != theirs.get(at)]
        require(not unlike, "Blocks of learngene and model must be of one kind", f"another {sorted(unlike)[:3]}",
                "Build it with the learngene's width and number of heads.")  # fmt: skip
        there, prefix = new.state_dict(), _prefix(self.blocks)
        lost = [part for part in keep if not any(_within(name, part) for name in there)]
        require(not lost, "keep= must name parts of the model", lost, suggestion(lost[0] if lost else "", there))
        shared = {name: value for name, value in self.model.state_dict().items() if not name.startswith(prefix)}
        filled = {name: value for name, value in {**shared, **self._tensors(new)}.items()
                  if not any(_within(name, part) for part in keep)}  # fmt: skip
        buffers = {name for name, _ in new.named_buffers() if name.startswith(prefix)}  # constants
        wanted = {name for name in there if name not in buffers and not any(_within(name, part) for part in keep)}
        odd = sorted(wanted ^ set(filled))
        require(not odd, "Learngene and model must have the same tensors", f"{odd[:3]} in only one of them",
                "Rename them, or name what stays as it is in keep=.")  # fmt: skip
        for name, value in filled.items():
            require(there[name].shape == value.shape, f"Tensor {name!r} must have one shape",
                    f"{tuple(value.shape)} in the learngene, {tuple(there[name].shape)} in the model",
                    "Build it with the learngene's width, or resize the tensor and name it in keep=.")  # fmt: skip
        new.load_state_dict(filled, strict=False)
        return new

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Every tensor of the blocks of this model, under its full name."""
        names = [name for name, _ in layer_of(model, self.blocks).named_children()]
        slopes, prefix, tensors = dict(self.slope.named_parameters()), _prefix(self.blocks), {}
        for name, base in self.base.named_parameters():
            rows = along(base, slopes[name], len(names)).unbind()
            tensors.update({f"{prefix}{block}.{name}": row for block, row in zip(names, rows, strict=True)})
        return tensors

    def _resized(self, depth: int) -> nn.Module:
        """The model with `depth` blocks whose tensors are not filled yet."""
        new = clone(self.model)
        found = layer_of(new, self.blocks)
        assert isinstance(found, nn.Sequential | nn.ModuleList)
        before, counts = len(found), _counts(found) if depth > len(found) else []
        for _ in range(before, depth):
            block = copy.deepcopy(found[-1])
            for name, attribute in counts:
                owner = block.get_submodule(name)
                setattr(owner, attribute, getattr(owner, attribute) + 1)
            found.append(block)
        if depth < before:
            del found[depth:]
        for block in found:
            for name, base in self.base.named_parameters():
                path, _, last = name.rpartition(".")
                empty = nn.Parameter(torch.empty_like(base), requires_grad=base.requires_grad)
                block.get_submodule(path).register_parameter(last, empty)
        if depth != before:
            _recount(new, self.blocks, before, depth)
        return new


def along(base: Tensor, slope: Tensor, depth: int) -> Tensor:
    """A tensor (...) in each of `depth` blocks: (depth, ...), computed in float32 or wider, rounded once.

    >>> along(torch.tensor(1.0), torch.tensor(6.0), 3)
    tensor([1., 3., 5.])
    """
    wide = wider(base.dtype)
    share = torch.arange(depth, dtype=wide, device=base.device) / depth  # (l - 1) / L, so the last is not 1
    return (base.to(wide) + share.view(-1, *[1] * base.dim()) * slope.to(wide)).to(base.dtype)


def blocks_of(model: nn.Module, blocks: str, least: int = 1) -> list[nn.Module]:
    """The blocks under this dotted name; refused unless they are alike, own their tensors and keep no statistics."""
    found = layer_of(model, blocks)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    require(isinstance(found, nn.Sequential | nn.ModuleList), "blocks= must name a list of blocks",
            f"{blocks!r}, a {type(found).__name__}", suggestion(blocks, filter(None, lists)))  # fmt: skip
    assert isinstance(found, nn.Sequential | nn.ModuleList)
    each = list(found)
    require(len(each) >= least, f"{blocks!r} must have at least {least} blocks", len(each), "Name another list.")
    shapes = [{name: p.shape for name, p in one.named_parameters(remove_duplicate=False)} for one in each]
    for number, own in enumerate(shapes):
        odd = sorted(name for name in {**shapes[0], **own} if shapes[0].get(name) != own.get(name))
        require(bool(own) and not odd, f"All of {blocks!r} must have the same tensors in the same shapes",
                f"block {number} with {odd[:3] or 'none'}, unlike block 0", "Name a list of equal blocks.")  # fmt: skip
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = [name for one in each for name, p in one.named_parameters() if uses[id(p)] > 1]
    require(not tied, "Each block must own its tensors", f"shared {tied[:3]}", "Untie them first.")
    kept = [
        name for name, value in each[0].named_buffers() if value.is_floating_point() and name in each[0].state_dict()
    ]
    require(not kept, "Blocks must keep no statistics of their own", kept[:3], "Use blocks with layer normalisation.")
    return each


def _held(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Modules that only hold parameters, under the dotted names of the tensors."""
    root = nn.Module()
    for name, value in tensors.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(value.detach().clone()))
    return root


def _prefix(blocks: str) -> str:
    return f"{blocks}." if blocks else ""


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _kind(block: nn.Module) -> dict[tuple[str, str], object]:
    """(submodule, attribute) -> what tells apart blocks of the same shapes: classes, whole numbers and words."""
    kind: dict[tuple[str, str], object] = {}
    for name, module in block.named_modules():
        kind[name, "class"] = type(module)
        kind.update({(name, key): value for key, value in vars(module).items() if type(value) in (int, str, tuple)})
    return kind


def _counts(blocks: Iterable[nn.Module]) -> list[tuple[str, str]]:
    """Attributes that count the blocks, such as a `layer_idx`; refused unless the blocks are alike otherwise."""
    kinds, buffers = [_kind(one) for one in blocks], [dict(one.named_buffers()) for one in blocks]
    names = set().union(*kinds)
    odd = [at for at in names if any(kind.get(at) != kinds[0].get(at) for kind in kinds)]
    counts = [at for at in odd if type(first := kinds[0].get(at)) is int
              and all(kind.get(at) == first + k for k, kind in enumerate(kinds))]  # fmt: skip
    unlike = sorted({at[1] for at in odd} - {at[1] for at in counts})
    unlike += [name for name in set().union(*buffers)
               if any(name not in own or not own[name].equal(buffers[0][name]) for own in buffers)]  # fmt: skip
    require(not unlike, "Blocks must be of one kind", f"another {unlike[:3]} from block to block",
            "Build the model of that depth yourself and pass it as into=.")  # fmt: skip
    return counts


def _recount(model: nn.Module, blocks: str, before: int, depth: int) -> None:
    """Tell the owner of the list, and a configuration of transformers, how many blocks there are now."""
    path = blocks.split(".")[:-1]
    owners = [model.get_submodule(".".join(path[:k])) for k in range(len(path), -1, -1)]
    if vars(owners[0]).get("num_layers") == before:  # torch.nn.TransformerEncoder
        owners[0].num_layers = depth  # type: ignore[assignment]
    configs: list[Any] = [getattr(owner, "config", None) for owner in owners]
    config = next((one for one in configs if callable(getattr(one, "to_dict", None))), None)
    if config is None:
        return
    told = getattr(config, "num_hidden_layers", None)
    require(told == before and not getattr(config, "is_encoder_decoder", False),
            f"A model of transformers must count {blocks!r} in config.num_hidden_layers",
            f"{told}, with {before} blocks", "Build the model yourself and pass it as into=.")  # fmt: skip
    config.num_hidden_layers = depth
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == before:
            require(len(set(map(str, value))) == 1, "Blocks must be of one kind", f"{name}={value}",
                    "Name a list of equal blocks.")  # fmt: skip
            setattr(config, name, value[:1] * depth)
