"""A script over a grid of its flags: rows, runs, one table, plots."""
