"""The compiler's main path: from a student and a target to a bundle, every stage in the order of the house."""
