"""Images rated by people: the published sets, their stages, and how well an evaluator agrees with them (stage 1)."""
