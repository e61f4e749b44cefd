"""Users whose last interactions are not determined by time, because several of them have the same time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfedrec.data.interactions import Interactions, ordering

FEWEST = 3  # a user with fewer interactions has none held out


@dataclass(frozen=True)
class LastTies:
    """How many of ``users``, who have at least 3 interactions, have no certain last interactions.

    For ``last`` users the last interaction is not determined: several have the latest time. For ``last_two`` users
    (which include the former) the last two, in their order, are not determined.
    """

    users: int
    last: int
    last_two: int

    def lines(self) -> list[str]:
        """One sentence where there are ties, and none otherwise."""
        if not self.last_two:
            return []
        return [
            f"equal times: {self.last:,} of {self.users:,} users ({self.last / self.users:.0%}) have several "
            f"interactions at their last time; the last two are not determined for {self.last_two:,} "
            f"({self.last_two / self.users:.0%})"
        ]


def last_ties(interactions: Interactions) -> LastTies | None:
    """Count the users whose last interactions are not determined by time; ``None`` where there are no times."""
    if interactions.timestamps is None:
        return None
    users = interactions.users_of_rows()
    times = interactions.timestamps[ordering(users, interactions.timestamps)]
    last = interactions.offsets[1:][interactions.degrees >= FEWEST] - 1
    tied = times[last] == times[last - 1]
    before = times[last - 1] == times[last - 2]
    return LastTies(int(last.size), int(np.count_nonzero(tied)), int(np.count_nonzero(tied | before)))
