"""One way to refuse: a ValueError whose one line says what is wrong and what is allowed."""


def require(condition, message):
    """Raises ValueError(message) unless the condition holds; not-a-number never passes a comparison."""
    if not condition:
        raise ValueError(message)


class OutOfReach(ValueError):
    """A target that no choice of the free parameters attains; `target` names it, `best` is the nearest value within reach."""

    def __init__(self, message, target, best):
        super().__init__(message)
        self.target, self.best = target, best
