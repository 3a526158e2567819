"""Spans are cut and grouped without losing a byte."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diptych.transceiver.spans import Spans, batches


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100), st.integers(1, 6))
def test_batches_cover_all_spans_within_their_limits(lengths, max_bytes, max_spans):
    found = list(batches(np.array(lengths, np.int64), max_bytes, max_spans))
    assert [i for batch in found for i in range(batch.start, batch.stop)] == list(range(len(lengths)))
    for batch in found:
        spans = lengths[batch]
        assert 1 <= len(spans) <= max_spans
        assert len(spans) == 1 or sum(spans) <= max_bytes


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 4)), max_size=20))
def test_merging_joins_exactly_the_neighbours(rows):
    source, destination, length = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    merged = Spans(source, destination, length).merged()
    bytes_before = [(s + i, d + i) for s, d, n in rows for i in range(n)]
    arrays = (merged.source_offset, merged.destination_offset, merged.length)
    spans = list(zip(*(array.tolist() for array in arrays), strict=True))
    assert [(s + i, d + i) for s, d, n in spans for i in range(n)] == bytes_before
    assert not any((a[0] + a[2], a[1] + a[2]) == b[:2] for a, b in pairwise(spans))
