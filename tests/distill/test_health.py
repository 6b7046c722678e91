"""What is said of a run before it begins."""

import pytest

from attnconv.distill.health import warn_about_lengths

LONG, SHORT = "lower its sequence_length", "attnconv eval --suite long"


@pytest.mark.parametrize(
    ("lengths", "positions", "said"),
    [
        ({"stage 1": 128, "stage 2": 128}, 512, []),
        ({"stage 1": 16, "stage 2": 128}, 512, []),
        ({"stage 1": 128, "stage 2": 127}, 512, [("stage 2", SHORT)]),
        ({"stage 1": 513, "stage 2": 16}, 512, [("stage 1", LONG), ("stage 2", SHORT)]),
        ({"stage 1": 513}, 512, [("stage 1", LONG)]),
        ({"stage 1": 16}, None, []),
        ({"stage 1": None}, 512, []),
        ({}, 512, []),
    ],
)
def test_lengths_that_do_not_fit_the_model(
    lengths: dict[str, int | None],
    positions: int | None,
    said: list[tuple[str, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_about_lengths(lengths, positions)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said)
    for message, (stage, words) in zip(messages, said, strict=True):
        assert message.startswith(stage)
        assert words in message
