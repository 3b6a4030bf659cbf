"""L-BFGS that remembers."""

import pytest
import torch
from trunkline_worker.training.sweep.search import Search

NUM_VARIABLES = 10
PENALISED = torch.ones(NUM_VARIABLES, dtype=torch.float64)
PENALISED[-1] = 0.0


class Problems:
    """Two ridge-like problems of different curvature, with a quartic term, that count their evaluations."""

    def __init__(self, l2: float) -> None:
        draw = torch.Generator().manual_seed(0)
        self.l2, self.calls = l2, 0
        self.scale = torch.stack([torch.logspace(-2, 2, NUM_VARIABLES), torch.logspace(1, -3, NUM_VARIABLES)]).double()
        self.goal = torch.randn(2, NUM_VARIABLES, generator=draw).double()

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        off = x - self.goal
        value = (self.scale * (off**2 + off**4)).sum(dim=1) + 0.5 * self.l2 * (PENALISED * x**2).sum(dim=1) + 1e-9
        return value, self.scale * (2 * off + 4 * off**3) + self.l2 * PENALISED * x


def minimise(search: Search, problems: Problems, start: torch.Tensor, tolerance: float = 1e-12) -> torch.Tensor:
    return search.minimise(problems, start, precondition=lambda x: x.clone(), on_step=lambda: None, tolerance=tolerance)


def start() -> torch.Tensor:
    return torch.zeros(2, NUM_VARIABLES, dtype=torch.float64)


def test_what_was_remembered_saves_evaluations_and_ends_in_the_same_place() -> None:
    search = Search()
    near = minimise(search, Problems(1.0), start())
    fresh, warm = Problems(0.8), Problems(0.8)
    expected = minimise(Search(), fresh, near)
    search.shift(0.8 - 1.0, PENALISED)
    found = minimise(search, warm, near)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert warm.calls * 1.2 < fresh.calls, (warm.calls, fresh.calls)


def test_a_shift_makes_of_the_pairs_what_the_new_penalty_would_have_shown() -> None:
    search = Search()
    minimise(search, Problems(1.0), start(), tolerance=1e-2)
    search.shift(-0.75, PENALISED)
    first = search._pairs[0]
    assert bool((first.rho_P > 0).all())
    problems = Problems(0.25)
    torch.testing.assert_close(problems(first.s_PV)[1] - problems(start())[1], first.y_PV)


def test_the_gradient_vanishes_where_it_ends() -> None:
    problems = Problems(0.5)
    _, gradient = problems(minimise(Search(), problems, start()))
    assert float(gradient.abs().max()) < 1e-2


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_problem_that_is_no_number_disturbs_no_other(broken: float) -> None:
    problems = Problems(1.0)
    expected = minimise(Search(), Problems(1.0), start())

    def objective(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, gradient = problems(x)
        value[0], gradient[0] = broken, broken
        return value, gradient

    search = Search()
    found = search.minimise(objective, start(), precondition=lambda x: x.clone(), on_step=lambda: None, tolerance=1e-12)
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)
