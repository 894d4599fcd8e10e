"""What is each model family's own: a module of plain functions of the same names (load, encode_prompts, predict, ...)."""
