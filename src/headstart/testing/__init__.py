"""The common checks: `test_contract = contract(method)` in a test file runs all that its kind must pass."""

from .contract import contract as contract
from .contract import kind_of as kind_of
