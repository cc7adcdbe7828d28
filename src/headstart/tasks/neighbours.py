"""A cheap second opinion on labels: do the nearest examples, by thumbnail, numbers or letters, say otherwise?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .examples import Rows
from .found import SKETCH, Found

MOST = 5000  # labelled examples compared with each other; more are sampled
NEIGHBOURS = 5
TRUSTED = 0.7  # below this share of agreeing neighbours such simple features say nothing about the labels


def suspicious(found: Found) -> list[tuple[int, int]]:
    """Examples whose five nearest neighbours all carry one other label, as (example, that label).

    Empty when the neighbours agree with fewer than 70 % of the labels, for then the comparison means nothing.

    Cost: compares at most 5,000 examples pairwise; a larger target is sampled.
    """
    from sklearn.neighbors import NearestNeighbors

    labelled = np.flatnonzero(found.labels >= 0)
    if len(labelled) > MOST:
        labelled = np.sort(np.random.default_rng(0).permutation(labelled)[:MOST])
    if len(labelled) <= NEIGHBOURS + 1:
        return []
    sketches, labels = sketch(found, labelled), found.labels[labelled]
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(sketches)
    near = labels[nearest.kneighbors(return_distance=False)]  # (n, 5), the example itself left out
    votes = np.array([np.bincount(row, minlength=labels.max() + 1) for row in near])
    if (votes.argmax(axis=1) == labels).mean() < TRUSTED:
        return []
    unanimous = (near == near[:, :1]).all(axis=1) & (near[:, 0] != labels)
    return [(int(labelled[i]), int(near[i, 0])) for i in np.flatnonzero(unanimous)]


def sketch(found: Found, indices: NDArray[np.int64]) -> Any:
    """Simple features (n, d) of some examples: thumbnail pixels, standardised numbers, or hashed letter triples."""
    if found.modality == "text":
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), n_features=2**14).transform(
            [found.inputs[i] for i in indices]
        )
    if isinstance(found.inputs, Rows):
        values = found.inputs.values[indices].astype(np.float64)
        spread = values.std(axis=0)
        return (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    if found.sketches is not None:
        small = found.sketches[indices]
    else:
        small = np.stack([thumbnail(found.inputs[i]) for i in indices])
    return small.reshape(len(indices), -1).astype(np.float32) / 255


def thumbnail(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) to (16, 16, 3), areas averaged."""
    from PIL import Image

    return np.array(Image.fromarray(picture).resize((SKETCH, SKETCH), Image.Resampling.BOX), dtype=np.uint8)
