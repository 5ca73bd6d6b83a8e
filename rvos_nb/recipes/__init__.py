"Recipes: lists of stages for `rvos run`, and what the training notebook learns from."
