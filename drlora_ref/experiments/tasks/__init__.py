"""What a model is trained on and how it is judged: one module for each family of tasks."""
