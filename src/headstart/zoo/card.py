"""The model card that travels with an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .source import Source

LIBRARIES = {"transformers-classifier": "transformers", "transformers-encoder": "transformers", "timm": "timm"}


def model_card(
    source: Source,
    layout: str,
    *,
    title: str,
    classes: Sequence[str],
    metrics: Mapping[str, float],
    task: str,
    tags: Sequence[str],
    notes: str,
) -> str:
    """README.md with YAML front matter that model hubs read, and how to load the model again.

    Args:
        source: what the model started from.
        layout: how the folder is written.
        title: the model's name.
        classes: what the outputs mean, in order.
        metrics: measured figures by name, such as accuracy on the sealed test split.
        task: what it was trained on.
        tags: further tags.
        notes: Markdown to add at the end.
    """
    what = {"image": "image-classification", "text": "text-classification", "numeric": "tabular-classification"}
    named = public_name(source)
    base = named.removeprefix("timm:").removeprefix("hf-hub:").removeprefix("hf:").removeprefix("dir:")
    front = {
        "library_name": LIBRARIES.get(layout, "headstart"),
        "base_model": base,
        "license": source.licence,
        "pipeline_tag": what[source.modality],
        "tags": list(dict.fromkeys(["headstart", "transfer-learning", what[source.modality], *tags])),
        "metrics": list(metrics),
    }
    # JSON scalars and lists are YAML, so no name can break out of its field
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---"]
    lines += ["", f"# {title}", "", f"Started from `{named}`" + (f", trained on {task}." if task else ".")]
    if metrics:
        lines += [
            "",
            "| measure | value |",
            "| --- | --- |",
            *(f"| {name} | {value:.4g} |" for name, value in metrics.items()),
        ]
    shown = ", ".join(classes[:50]) + (f" and {len(classes) - 50} more" if len(classes) > 50 else "")
    lines += [
        "",
        f"Classes, in the order of the outputs: {shown}.",
        "",
        "## Load it",
        "",
        "```python",
        *_loading(layout, source),
    ]
    return "\n".join([*lines, "```", *(["", notes.strip()] if notes.strip() else []), ""])


def public_name(source: Source) -> str:
    """The source's name without the folders of this machine: of a path, only its last part."""
    prefix, colon, rest = source.name.partition(":")
    local = prefix == "dir" or rest.startswith((".", "/", "~")) or Path(rest).expanduser().is_dir()
    return prefix + colon + Path(rest).expanduser().absolute().name if local else source.name


def _loading(layout: str, source: Source) -> list[str]:
    ours = [
        "from headstart.zoo.directory import load_model_directory",
        "model, preprocess, classes = load_model_directory(PATH)",
        "logits = model(preprocess(examples))",
    ]
    if layout == "transformers-classifier":
        kind = {"image": "AutoModelForImageClassification", "text": "AutoModelForSequenceClassification"}[
            source.modality
        ]
        return [f"from transformers import {kind}", f"model = {kind}.from_pretrained(PATH)", "", *ours]
    if layout == "timm":
        return ["import timm", 'model = timm.create_model("local-dir:PATH", pretrained=True).eval()', "", *ours]
    return ours
