"""Make a model work on data whose labels it never saw."""

from .dann import DANN as DANN
