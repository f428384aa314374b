"""Neural networks: backbones, the quadrant classifier, ensembles, the torch engine, devices."""
