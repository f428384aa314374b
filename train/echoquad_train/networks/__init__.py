"""Networks: backbones with a head, alone and as one ensemble."""
