"""`shapes`: the demo student, its world and the judge of its pictures."""
