"""Isolation of requests that make a computation fail, by halving the failing group.

A request can kill every worker that computes it: it triggers a library bug, or needs more memory
than there is. Its group is halved until the request stands alone; it is then set aside, and the
others are computed without it. A fault that affects all requests (no storage, a broken driver)
shows as too many failures, and is an error of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.data import Place, Shard
from pipeline.errors import WorkerError
from pipeline.failures import MEMORY_OF_WORKERS, Failure, remedy

GROUP_ATTEMPTS = 2
"""Attempts at a group of several requests: one that fails by chance is only split further."""
SINGLE_ATTEMPTS = 3
"""Attempts at a single request before it is set aside."""
_MOST = 5
_MOST_SHARE = 0.01
_SHOWN = 3


@dataclass(frozen=True)
class Piece:
    """Requests that are computed together: those of one shard, or the remainders of several.

    Attributes:
        shards: the shards that the requests belong to, in order.
        places: the requests' places among the accepted requests, ascending.
        groups: the group of each request, if a group's requests belong together.
    """

    shards: tuple[Shard, ...]
    places: tuple[Place, ...]
    groups: tuple[int, ...] = ()

    def __str__(self) -> str:
        first, last = self.places[0], self.places[-1]
        which = "shard" if len(self.shards) == 1 else "shards"
        if len(self.places) == 1:
            return f"{which} {self.name} (request {first})"
        if len(self.places) == sum(map(len, self.shards)):
            return f"{which} {self.name} (requests {first} to {last})"
        return f"{which} {self.name} ({len(self.places)} requests, {first} to {last})"

    @property
    def name(self) -> str:
        """The shard's name; those of the first and the last one if there are several."""
        return "-".join(dict.fromkeys((self.shards[0].name, self.shards[-1].name)))

    @property
    def attempts(self) -> int:
        """How often it is attempted while requests are isolated."""
        return SINGLE_ATTEMPTS if len(self.places) == 1 else GROUP_ATTEMPTS

    def halves(self) -> tuple[Piece, Piece]:
        """Both halves, in order; a single request has none.

        A group of requests is only split when nothing else is left to split.
        """
        count = len(self.places)
        cuts = [i for i in range(1, count) if self.groups[i - 1 : i] != self.groups[i : i + 1]]
        middle = min(cuts or range(1, count), key=lambda cut: abs(cut - count // 2))
        return self._part(slice(middle)), self._part(slice(middle, None))

    def _part(self, which: slice) -> Piece:
        places = self.places[which]
        shards = (s for s in self.shards if any(s.start <= p < s.stop for p in places))
        return Piece(tuple(shards), places, self.groups[which])


def most_isolated(count: int) -> int:
    """The number of a job's requests that may be set aside: 5, or 1 %, but at most half."""
    return min(max(_MOST, int(_MOST_SHARE * count)), count // 2)


def isolate(
    failed: Mapping[Piece, Failure],
    compute: Callable[[Sequence[Piece]], Mapping[Piece, Failure]],
    set_aside: Callable[[Piece, Failure], None],
    limit: int,
) -> None:
    """Halve failing pieces until single requests are left, and set those aside.

    A round computes at most twice as many pieces as the ``limit``, and there are as many rounds as
    a shard can be halved: finding one request in a shard of 256 takes some 20 failed attempts.

    Args:
        failed: the failure of each piece.
        compute: computes pieces, and returns the failure of each piece that failed.
        set_aside: called with each single request that fails, and its failure.
        limit: the maximum number of requests that may be set aside.

    Raises:
        WorkerError: more requests fail than the limit; the message gives the root causes.
    """
    found: dict[Piece, Failure] = {}
    suspects = dict(failed)
    while suspects:
        # Each suspect holds at least one request that fails, and no two share one.
        _refuse_too_many(found | suspects, limit)
        for piece, reason in suspects.items():
            if len(piece.places) == 1:
                found[piece] = reason
                set_aside(piece, reason)
        halves = [h for piece in suspects if len(piece.places) > 1 for h in piece.halves()]
        suspects = dict(compute(halves)) if halves else {}


def _refuse_too_many(failing: Mapping[Piece, Failure], limit: int) -> None:
    if len(failing) <= limit:
        return
    shown = "; ".join(f"{piece}: {failure}" for piece, failure in list(failing.items())[:_SHOWN])
    raise WorkerError(
        f"at least {len(failing)} requests fail repeatedly, of which {limit} may be set "
        f"aside; so many suggest a fault of the job or of its machines: {shown}. Finished work "
        f"is kept: {remedy((f.kind for f in failing.values()), MEMORY_OF_WORKERS)}",
        cause_text=next(iter(failing.values())).text,
    )
