"""Lines of a Markdown table."""


def table_head(*columns: str) -> str:
    """The two lines with the names of the columns."""
    return f"{table_row(*columns)}\n{'|---' * len(columns)}|"


def table_row(*cells: str) -> str:
    """The line of a row."""
    return f"| {' | '.join(cells)} |"
