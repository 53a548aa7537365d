"""Budgets: limits, costs, and exact rounding."""
