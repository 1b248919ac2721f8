"""Tests about tracing trace anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.traces import Traces


@pytest.fixture(scope="module", autouse=True)
def _fresh_traces(traces: Traces) -> Iterator[None]:
    traces.fresh = True
    yield
    traces.fresh = False
