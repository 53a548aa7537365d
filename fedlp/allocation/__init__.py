"""How sparsity is spread over layers: scores, rules, and budgets that are met exactly."""
