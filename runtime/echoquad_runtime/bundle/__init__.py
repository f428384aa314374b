"""Bundles: the manifest, golden frames, graph headers, signatures and the model card."""
