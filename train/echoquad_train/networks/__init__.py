"""Networks: backbones, the quadrant classifier, ensembles, and the torch engine that runs them."""
