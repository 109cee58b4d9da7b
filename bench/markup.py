"""Tables of text as Markdown and as HTML."""

from __future__ import annotations

from html import escape

__all__ = ["Table", "as_html", "as_markdown", "drop_empty_columns"]

Table = list[list[str]]
"""Rows of cells, the head first. In HTML the second line of a cell is smaller."""


def as_markdown(table: Table) -> list[str]:
    """Lines of Markdown; the two lines of a cell are joined."""
    head, *rows = table
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |" for row in rows),
    ]


def as_html(table: Table) -> str:
    """An HTML table that scrolls if the page is too narrow. Columns of words are aligned to the left."""
    rows, columns = table[1:], range(len(table[0]))
    words = [not any(row[k][:1].isdigit() or row[k][:1] in "+-" for row in rows) for k in columns]
    lines = []
    for kind, row in zip(["th", *["td"] * (len(table) - 1)], table, strict=True):
        marked = (f'{kind} class="words"' if is_words else kind for is_words in words)
        cells = (f"<{mark}>{_html_cell(cell)}</{kind}>" for mark, cell in zip(marked, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _html_cell(cell: str) -> str:
    first, _, second = cell.partition("\n")
    return escape(first) + (f"<small>{escape(second)}</small>" if second else "")


def drop_empty_columns(table: Table, always: int) -> Table:
    """The table without columns that have no figure in any row; the first `always` columns stay."""
    columns = [k for k in range(len(table[0])) if k < always or any(line[k] != "-" for line in table[1:])]
    return [[line[k] for k in columns] for line in table]
