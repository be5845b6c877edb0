"""What tests of the engine have in common."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_llama


@pytest.fixture(scope="module")
def model() -> Any:
    """A llama; tests of other models define a fixture of their own."""
    return tiny_llama()
