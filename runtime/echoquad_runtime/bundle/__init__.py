"""Bundles: manifest, graph headers, signature, model card."""
