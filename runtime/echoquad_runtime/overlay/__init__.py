"""Pictures of a decision: the four boxes and the class activation map."""
