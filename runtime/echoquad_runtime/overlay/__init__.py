"""Pictures of a prediction: the frame with its four quadrants and class activation maps, and the colour palette."""
