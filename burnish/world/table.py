"""Word tables are written as text; this reads them."""


def listed(text: str) -> tuple[str, ...]:
    """The words of `text` in order."""
    return tuple(text.split())
