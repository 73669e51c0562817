"""Drawing a batch ahead changes no batch and no state."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titanmac_integration import ArithmeticTask, ProseTask
from titanmac_integration._training._batches import BatchStream

TASKS = (ProseTask("the quick brown fox jumps over the lazy dog. " * 20), ArithmeticTask())


@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from((0, 1)), st.sampled_from((24, 32)), st.sampled_from((None, 0, 1))
        ),
        max_size=8,
    )
)
@settings(max_examples=30, deadline=None)
def test_what_is_drawn_ahead_is_what_would_have_come(calls: list) -> None:
    plain, generator = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    batches = BatchStream(generator, torch.device("cpu"))
    for task, length, ahead in calls:
        expected = TASKS[task].batch(2, length, plain)
        got = batches.next(TASKS[task], 2, length)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        if ahead is not None:
            batches.draw_ahead(TASKS[ahead], 2, length)
        assert torch.equal(batches.get_state(), plain.get_state())
    batches.draw_ahead(TASKS[0], 2, 24)
    batches.set_state(batches.get_state())
    expected = TASKS[1].batch(2, 24, plain)
    assert torch.equal(batches.next(TASKS[1], 2, 24).input_ids, expected.input_ids)
