"""What pruned students are held against: pictures of the student itself, films one at a time."""

from edgegen.prune.trial import Trial
from edgegen.students.families.registry import new


def test_a_film_is_drawn_for_every_sample():
    student = new("mobilei2v", "tiny")
    trial = Trial.of(student, steps=1, samples=2)
    assert len(trial.pictures) == 2
    assert not trial.pictures[0].equal(trial.pictures[1])
    assert trial.loss(student) == 0.0
