"""A store with four moments to be reviewed."""

from __future__ import annotations

import pytest
from review_moments import moment

from apollo_curation.moments.moments import Moments
from apollo_curation.store import Store, store_path


@pytest.fixture
def store(config):
    with Store(store_path(config)) as store:
        yield store


@pytest.fixture
def moments(store):
    table = Moments(store)
    table.add(moment(i) for i in (1, 2, 3, 4))
    return table
