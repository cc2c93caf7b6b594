"""How numbers are stored: rotations, the affine code, and pages in an arena."""
