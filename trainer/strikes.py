"""Believes that a device computes wrongly only once chance can not explain it any more.

Where ranks are known to come to the same bits, one replay that comes out otherwise is proof. On
GPUs that is not known: kernels that add in the order in which they come differ now here, now there,
and a process that chose other kernels than most differs from them alike each time. A device that
errs at times differs from itself, and it is the same one again and again. So what came out
otherwise is computed anew and noted, until it was the same ranks so often that chance would have
hit nobody else once in `ODDS` times; if it is others, or one that comes to the same other bits each
time, nothing that is computed once more is evidence.
"""

from __future__ import annotations

import math

from trainer.blame import Verdict

ODDS = 1000
LET_PASS = 2
"""Mismatches that nobody in particular is to blame for, before they are given up."""


class Strikes:
    """Those of a world, alike on every rank.

    Args:
        groups: that compute micro-batches, and might have been the ones; 2 at least.

    Attributes:
        needed: so many in a row of the same ranks are proof.
        reason: why mismatches show nothing; "" as long as they may.
    """

    def __init__(self, groups: int) -> None:
        self.needed = 1 + math.ceil(math.log(ODDS) / math.log(groups))
        self.reason = ""
        self._heard: list[Verdict] = []

    def hear(self, found: Verdict) -> Verdict | None:
        """Take in who came to other bits; return that once it is to be believed."""
        self._heard.append(found)
        ranks = {each.ranks for each in self._heard}
        is_one = len(ranks) == 1 and all(each.proven and not each.same for each in self._heard)
        times = len(self._heard)
        if is_one and times >= self.needed:
            words = f"{found.evidence}; so it was {times} times, and never another's"
            return found._replace(evidence=words)
        if not is_one and times > LET_PASS:
            named = sorted({rank for each in ranks for rank in each})
            how = "the same each time" if any(each.same for each in self._heard) else "now and then"
            self.reason = (
                f"micro-batches came out otherwise {times} times, {how}, of which a device is not "
                f"known to be the cause (ranks {', '.join(map(str, named))}): it shows nothing"
            )
        return None
