"""`contract`: which checks it expands to, how kinds are recognised, how known failures behave."""

from __future__ import annotations
