"""What a job minimises, learns by and tries, as messages and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline_wire import job_messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LOSSES, MAX_CONFIGURATIONS, PRECISIONS, LossConfig, OptimiserConfig, SweepConfig
from trunkline_wire.v1 import training_pb2 as pb

NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
SHARES = st.floats(0.0, 1.0, exclude_max=True)
ABOVE_0 = st.floats(0.0, 1e6, exclude_min=True, exclude_max=True)


def unweighted(**more):
    return st.builds(
        LossConfig,
        kind=st.sampled_from(LOSSES),
        huber_delta=ABOVE_0,
        quantile=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
        focal_gamma=st.floats(0.0, 10.0),
        **more,
    )


weights = st.lists(ABOVE_0, min_size=1, max_size=5).map(tuple)
orders = st.lists(NAMES, min_size=3, max_size=5, unique=True).map(tuple)
losses = st.one_of(
    unweighted(label_smoothing=SHARES, class_weights=weights),
    unweighted(label_smoothing=SHARES, balanced=st.booleans()),
    st.builds(LossConfig, class_order=orders, class_weights=weights),
)
optimisers = st.builds(
    OptimiserConfig,
    warmup=SHARES,
    clip_norm=st.floats(0.0, 1e6, exclude_max=True),
    ema=SHARES,
    precision=st.sampled_from(PRECISIONS),
    patience=st.integers(0, 2**32 - 1),
)


def axis(values, **options):
    return st.lists(values, max_size=3, unique=True, **options).map(tuple)


sweeps = st.builds(
    SweepConfig,
    l2=st.lists(st.floats(-1.0, 1e9), min_size=1, max_size=3, unique=True).map(tuple),
    learning_rate=axis(SHARES),
    hidden=axis(axis(st.integers(1, 2**16))),
    dropout=axis(SHARES),
    embeddings=axis(axis(NAMES, min_size=1)),
    folds=st.integers(2, 50),
)


def reread(message):
    """Send a message over a wire."""
    return type(message).FromString(message.SerializeToString())


@given(losses, optimisers)
def test_losses_and_optimisers_survive_the_wire_beside_each_other(loss, optimiser):
    fit = pb.FitConfig(seed=7)
    job_messages.write_loss(loss, fit)
    job_messages.write_optimiser(optimiser, fit)
    fit = reread(fit)
    assert job_messages.loss_from_proto(fit) == loss
    assert job_messages.optimiser_from_proto(fit) == optimiser
    assert fit.seed == 7


@given(losses, losses)
def test_what_is_written_last_is_what_is_read(first, second):
    fit = pb.FitConfig()
    job_messages.write_loss(first, fit)
    job_messages.write_loss(second, fit)
    assert job_messages.loss_from_proto(fit) == second


@given(sweeps)
def test_sweeps_survive_the_wire(sweep):
    assert job_messages.sweep_from_proto(reread(job_messages.sweep_to_proto(sweep))) == sweep


def test_what_is_not_said_takes_the_default():
    assert job_messages.loss_from_proto(pb.FitConfig()) == LossConfig()
    assert job_messages.optimiser_from_proto(pb.FitConfig()) == OptimiserConfig()
    assert job_messages.sweep_from_proto(pb.SweepConfig(l2=[1.0])) == SweepConfig(l2=(1.0,))


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (pb.FitConfig(loss=77), ErrorCode.UNSUPPORTED),  # type: ignore[arg-type]
        (pb.FitConfig(quantile=1.5), ErrorCode.INVALID_ARGUMENT),
        (pb.FitConfig(class_weights=[1.0, -1.0]), ErrorCode.INVALID_ARGUMENT),
        (pb.FitConfig(class_weights=[0.0, 0.0]), ErrorCode.INVALID_ARGUMENT),
    ],
)
def test_losses_that_cannot_be(message, code):
    with pytest.raises(WireError) as caught:
        job_messages.loss_from_proto(message)
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (pb.FitConfig(precision=77), ErrorCode.UNSUPPORTED),  # type: ignore[arg-type]
        (pb.FitConfig(ema=1.0), ErrorCode.INVALID_ARGUMENT),
    ],
)
def test_optimisers_that_cannot_be(message, code):
    with pytest.raises(WireError) as caught:
        job_messages.optimiser_from_proto(message)
    assert caught.value.code is code


def test_sweeps_that_cannot_be():
    for message in (pb.SweepConfig(), pb.SweepConfig(l2=range(MAX_CONFIGURATIONS + 1)), pb.SweepConfig(l2=[1.0, 1.0])):
        with pytest.raises(WireError) as caught:
            job_messages.sweep_from_proto(message)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
