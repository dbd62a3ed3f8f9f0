"""Progress that nobody sees."""


class Silent:
    """Remembers what was said."""

    def __init__(self):
        self.stages, self.notes = [], []

    def stage(self, name, total):
        self.stages.append(name)

    def advance(self): ...

    def note(self, text):
        self.notes.append(text)

    def status(self, text): ...
