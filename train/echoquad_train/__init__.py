"""Training: datasets, recipes, the model, fitting, evaluation. What a frame and a vote are, it asks the runtime."""
