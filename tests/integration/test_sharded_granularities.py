"""In two real processes, every granularity prunes sharded weights like whole ones."""

from __future__ import annotations

import pytest
import sharded_run
from processes import results, run_on_two_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_on_two_ranks("sharded_run.py", folder)
    return results(folder)


@pytest.mark.parametrize("moment", ["pruning", "state", "resumed", "target", "final"])
@pytest.mark.parametrize("rule", sharded_run.RULES)
@pytest.mark.parametrize("granularity", sharded_run.GRANULARITIES)
def test_sharded_weights_are_pruned_like_whole_ones(ranks, granularity, rule, moment):
    assert [results_of_rank[f"{granularity}, {rule}"][moment] for results_of_rank in ranks] == [True, True]
