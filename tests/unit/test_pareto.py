from hypothesis import given
from hypothesis import strategies as st

from twin.plan.pareto import front


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_front_is_what_nothing_dominates(points):
    def dominated(i):
        x, y = points[i]
        return any((a >= x and b >= y) and (a > x or b > y) for a, b in points)

    assert front(points) == {i for i in range(len(points)) if not dominated(i)}
