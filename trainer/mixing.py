"""Says which source each sample of a run comes from: a function of the sample's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Samples of several sources in proportion to their weights.

    The first source takes its share of all samples, spread evenly; the second takes its own of
    what is left, and so on. How many a source has given after `n` samples is therefore a formula
    of `n`: nothing is drawn, stored, or known to some rank only.

    Args:
        weights: of the sources, at least one, each greater than 0; their sum does not matter.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        # As they are written: 0.1 is a tenth, and not the nearest binary fraction.
        exact = [Fraction(repr(weight)) for weight in weights]
        self._shares = [weight / sum(exact[at:]) for at, weight in enumerate(exact)]

    def offsets(self, samples: int) -> tuple[int, ...]:
        """Return how many of the first `samples` samples come from each source.

        >>> Mixture([3, 1]).offsets(8)
        (6, 2)
        """
        left, offsets = samples, []
        for share in self._shares:
            # Rounded half up; grows by at most one with each sample, since no share exceeds 1.
            taken = (2 * left * share.numerator + share.denominator) // (2 * share.denominator)
            offsets.append(taken)
            left -= taken
        return tuple(offsets)

    def place(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample, and how many came from there before it.

        >>> [Mixture([3, 1]).place(sample) for sample in range(4)]
        [(0, 0), (0, 1), (1, 0), (0, 2)]
        """
        before, after = self.offsets(sample), self.offsets(sample + 1)
        (source,) = [at for at, (b, a) in enumerate(zip(before, after, strict=True)) if a > b]
        return source, before[source]
