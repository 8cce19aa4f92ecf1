"""Random problems with tasks and metrics, for hypothesis."""

from hypothesis import strategies as st

positive_numbers = st.floats(0.01, 100)


@st.composite
def problems(draw):
    """Directions, results and a baseline with one to four tasks of one to three metrics."""
    ways = {
        f"task {t}": {
            f"metric {m}": draw(st.sampled_from(["up", "down"]))
            for m in range(draw(st.integers(1, 3)))
        }
        for t in range(draw(st.integers(1, 4)))
    }

    def values():
        return {t: {m: draw(positive_numbers) for m in metrics} for t, metrics in ways.items()}

    return ways, values(), values()
