"""The stick: a folder that installs EchoQuad and a bundle on a machine without a network."""
