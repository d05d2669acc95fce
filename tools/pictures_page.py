"""Write the table of `docs/pictures.md`: `python -m tools.pictures_page`.

Each row is a file that this script creates in a temporary folder and reads as a device does. The
row lists the conversions.
"""

from __future__ import annotations

import tempfile
import warnings
from itertools import groupby
from pathlib import Path

from edge_client.data.errors import CorruptImageError
from edge_client.data.pictures import FORMATS, OTHER_SUFFIXES, read_picture
from tools.picture_cases import Case, all_cases

PAGE = Path(__file__).parents[1] / "docs" / "pictures.md"

_BEGIN = "<!-- The table is written by `make docs`; edits here are lost. -->"

_END = "<!-- End of the table. -->"


def render() -> str:
    """Return the whole page as Markdown, with a new table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns while it writes some files
        cases = all_cases()
    suffixes = ", ".join(f"`{suffix}`" for names in FORMATS.values() for suffix in names)
    others = ", ".join(f"`{suffix}`" for suffix in sorted(OTHER_SUFFIXES))
    parts = (
        f"Suffixes of supported formats: {suffixes}.",
        f"Suffixes of unsupported formats, whose files are skipped with a remark: {others}.",
        f"The table has {len(cases)} files, read with a white background. *mode* is Pillow's mode "
        "of the stored pixels.",
        _table(cases),
    )
    return f"{before}{_BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{_END}{after}"


def _table(cases: list[Case]) -> str:
    lines = ["| format | stored as | mode | conversions |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, group in groupby(cases, key=lambda case: case.format):
            lines += [
                f"| {name} | {case.stored} | {_outcome(case, Path(folder))} |" for case in group
            ]
    return "\n".join(lines)


def _outcome(case: Case, folder: Path) -> str:
    """Return the columns *mode* and *conversions* of one file."""
    path = folder / f"picture{case.suffix}"
    path.write_bytes(case.data)
    try:
        picture = read_picture(path)
    except CorruptImageError as error:
        return f"| **not read**: {error.hint}"
    steps = "; ".join(str(step) for step in picture.steps)
    return f"{picture.mode} | {steps or 'none'}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
