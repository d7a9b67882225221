"""What the scenarios start from."""

import pytest

from tests import replicas


@pytest.fixture
def wide() -> replicas.Wide:
    """Make a run that trains with so many replicas of some nodes of one rank each."""
    return replicas.wide
