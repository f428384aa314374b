"""Export of a trained run to a bundle whose decisions are proven equal to those of the training code."""
