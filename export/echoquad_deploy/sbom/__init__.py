"""Software bill of materials: a CycloneDX document of wheels and a bundle."""

from echoquad_deploy.sbom.document import write_sbom

__all__ = ["write_sbom"]
