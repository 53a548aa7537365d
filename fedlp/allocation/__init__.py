"""Allocation of sparsity to layers: statistics, rules, exact budgets."""
