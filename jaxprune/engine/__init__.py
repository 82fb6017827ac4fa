"""A model on its devices: the stages, what composes them, and what they cost."""
