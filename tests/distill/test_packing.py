"""Packing: nothing lost, order kept, boundaries marked, and any place to begin again from."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnconv.distill.packing import Position, pack
from attnconv.errors import DataError


def documents_of(lists):
    """Documents whose order turns around with every epoch."""

    def documents(epoch, skip):
        ordered = lists if epoch % 2 == 0 else lists[::-1]
        yield from ordered[skip:]

    return documents


def endless(lists):
    for epoch in itertools.count():
        yield from itertools.chain.from_iterable(lists if epoch % 2 == 0 else lists[::-1])


documents_strategy = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=8)


@given(lists=documents_strategy, length=st.integers(2, 12))
def test_no_token_is_lost_or_moved(lists, length):
    if sum(map(len, lists)) < length:
        with pytest.raises(DataError, match="needs more"):
            next(pack(documents_of(lists), length))
        return
    sequences = list(itertools.islice(pack(documents_of(lists), length), 7))
    assert all(sequence.tokens.shape == (length,) for sequence in sequences)
    packed = torch.cat([sequence.tokens for sequence in sequences]).tolist()
    assert packed == list(itertools.islice(endless(lists), 7 * length))


@given(lists=documents_strategy, length=st.integers(2, 12), stop=st.integers(1, 6))
def test_every_end_is_a_place_to_begin_again(lists, length, stop):
    if sum(map(len, lists)) < length:
        return
    whole = list(itertools.islice(pack(documents_of(lists), length), 10))
    rest = list(itertools.islice(pack(documents_of(lists), length, whole[stop - 1].end), 10 - stop))
    assert [sequence.tokens.tolist() for sequence in rest] == [s.tokens.tolist() for s in whole[stop:]]
    assert [sequence.end for sequence in rest] == [sequence.end for sequence in whole[stop:]]


def test_another_length_can_go_on_where_one_stopped():
    lists = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    first = next(pack(documents_of(lists), 4))
    assert first.end == Position(0, 1, 1)
    assert next(pack(documents_of(lists), 5, first.end)).tokens.tolist() == [5, 6, 7, 8, 9]


def test_documents_are_read_only_as_they_are_needed():
    read = []

    def documents(epoch, skip):
        for index in range(skip, 1000):
            read.append(index)
            yield [index] * 10

    sequences = pack(documents, 16)
    next(sequences)
    assert read == [0, 1]


def test_a_length_below_two_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        next(pack(documents_of([[1, 2]]), 1))
