"""Studies: arms × budgets × seeds, their statistics and their report."""
