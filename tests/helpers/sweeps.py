"""Tests of many combinations, of which an ordinary run takes enough, and a long one all.

``FASTSN_TESTS=long`` is a long run. Otherwise tests and cases marked `long` are left out, and of
tests and classes marked with one of these only so many cases are run that

* `sweep`: each value of each parameter meets each value of every other one;
* `each_value`: each value of each parameter occurs.

``FASTSN_TEST_SHARE=I/N`` runs the I-th of N shares of what is left.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import pytest

LONG = os.environ.get("FASTSN_TESTS") == "long"
sweep = pytest.mark.sweep(2)
each_value = pytest.mark.sweep(1)
long = pytest.mark.long


def covering(rows: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    """The indices of rows, in order, in which all that so many columns have anywhere occurs.

    Of rows that bring equally much that is new, the first whose values have been used least.
    """
    strength = min(strength, len(rows[0]))
    parts = [set(itertools.combinations(enumerate(row), strength)) for row in rows]
    missing = set().union(*parts)
    used: Counter[tuple[int, Hashable]] = Counter()
    chosen = []
    while missing:
        worth = [(len(own & missing), -sum(used[x] for x in enumerate(row)))
                 for own, row in zip(parts, rows, strict=True)]  # fmt: skip
        best = max(range(len(rows)), key=worth.__getitem__)
        chosen.append(best)
        missing -= parts[best]
        used.update(enumerate(rows[best]))
    return sorted(chosen)


def beyond_need(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Those of the collected tests that only a long run has."""
    out = [item for item in items if item.get_closest_marker("long")]
    groups = defaultdict(list)
    for item in items:
        if item.get_closest_marker("long") is None and hasattr(item, "callspec"):
            if (mark := item.get_closest_marker("sweep")) is not None:
                groups[(item.nodeid.partition("[")[0], *mark.args)].append(item)
    for (_, strength), group in groups.items():
        # Values may be of any type; where they are the same, they are the same object.
        rows = [[id(value) for _, value in sorted(x.callspec.params.items())] for x in group]
        kept = set(covering(rows, strength))
        out += [item for i, item in enumerate(group) if i not in kept]
    return out


def share(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What this run has of the collected tests."""
    out = set() if LONG else set(beyond_need(items))
    own, shares = map(int, os.environ.get("FASTSN_TEST_SHARE", "1/1").split("/"))
    return [item for item in items if item not in out][own - 1 :: shares]
