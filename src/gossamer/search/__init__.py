"""From a budget to choices: one option for each item, the least loss in all, within what may be spent."""

from gossamer.search.knapsack import knapsack, monotone

__all__ = ["knapsack", "monotone"]
