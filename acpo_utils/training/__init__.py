"""How a training runs: its beginning, its state, its monitors, its cost."""
