"""One trained model for all tests of generated images."""

import pytest
from generated_cases import Small, trained


@pytest.fixture(scope="session")
def small() -> Small:
    return trained()
