"""Search: the strongest rows of a store, exact and in bounded memory, and running reductions."""

from forebear.search.distribution import quantiles, ranks
from forebear.search.exact import TopRows, search_exact
from forebear.search.filters import Between, Equals, Filter, OneOf
from forebear.search.rows import ArrayRows, Rows
from forebear.search.running import RunningQuantiles, RunningTop

__all__ = [
    "ArrayRows",
    "Between",
    "Equals",
    "Filter",
    "OneOf",
    "Rows",
    "RunningQuantiles",
    "RunningTop",
    "TopRows",
    "quantiles",
    "ranks",
    "search_exact",
]
