"""Trials as the client shows them."""

from trunkline._calls.registry import _trials
from trunkline_wire.v1 import registry_pb2 as pb


def test_what_was_scored_on_fewer_folds_than_others_was_dropped_early():
    messages = [
        pb.Trial(scores=[0.5, 0.6, 0.7], score=0.6, won=True),
        pb.Trial(scores=[0.9], score=0.9),
        pb.Trial(error="the loss was no longer finite"),
        pb.Trial(scores=[0.1, 0.2, 0.3], score=0.2),
    ]
    trials = _trials(messages)
    assert [one.dropped for one in trials] == [False, True, False, False]
    assert trials[1].score == 0.9
    assert _trials([]) == ()
