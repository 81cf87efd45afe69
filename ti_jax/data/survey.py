"""``ti-jax data``: what a run would see in a folder of pictures. No model is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ti_jax.config import DataConfig
from ti_jax.data.buckets import Shape, nearest_shape, shape_name, shapes_of
from ti_jax.data.captions import read_captions, report_captions
from ti_jax.data.cropping import crop_box, cropped_to
from ti_jax.data.folder import MIN_SIDE
from ti_jax.data.masks import WHITE, MaskReader, cropped_mask, make_mask_reader
from ti_jax.data.picture_files import name_in, picture_paths, report_repeats, unread_pictures
from ti_jax.data.reading import read_picture
from ti_jax.errors import InputError
from ti_jax.files import writable_folder
from ti_jax.images import overview, save_png
from ti_jax.remote import local_copy

# Of the contact sheet: sides of a cell in pixels, cells in a row, and most pictures on it.
CELL, COLUMNS, MOST = 192, 6, 120
# Brightness of what a mask leaves out, on the contact sheet.
DIMMED = 0.25


@dataclass
class Row:
    """What is known of one picture: columns of the table, and what is wrong with it.

    Attributes:
      refused: a run would stop at it.
    """

    name: str
    size: str = ""
    used: str = ""
    mask: str = ""
    caption: str = ""
    problems: list[str] = field(default_factory=list)
    refused: bool = False


@dataclass(frozen=True)
class Survey:
    """What a run would see: a row for each picture, remarks on the folder, and the contact sheet's file."""

    rows: list[Row]
    remarks: list[str]
    sheet: Path | None

    @property
    def refused(self) -> int:
        """Pictures that a run would stop at."""
        return sum(row.refused for row in self.rows)

    def lines(self) -> Iterator[str]:
        """The table, and below it what concerns all pictures."""
        head = ("picture", "size", "learned from", "mask", "caption", "problems")
        table = [(row.name, row.size, row.used, row.mask, row.caption, "; ".join(row.problems)) for row in self.rows]
        kept = [number for number, name in enumerate(head) if name == "picture" or any(row[number] for row in table)]
        widths = [max(len(row[number]) for row in [head, *table]) for number in kept]
        for row in [head, *table]:
            yield "  ".join(row[number].ljust(width) for number, width in zip(kept, widths, strict=True)).rstrip()
        yield ""
        yield from self.remarks
        problems = sum(bool(row.problems) for row in self.rows)
        stops = f", {self.refused} of which would stop a run" if self.refused else ""
        yield f"{len(self.rows)} pictures, {problems} with problems{stops}"
        if self.sheet is not None:
            yield f"{self.sheet}: what is learned from; what masks leave out is dark"


def survey(config: DataConfig) -> Survey:
    """Look at every picture of a resolved config, one at a time, and write the contact sheet.

    Raises:
      InputError: no such folder, no picture in it, or the sheet cannot be written.
    """
    output = Path(config.contact_sheet)
    with writable_folder(output.parent):
        return _survey(config, output)


def _survey(config: DataConfig, output: Path) -> Survey:
    assert config.train_data_dir is not None and config.resolution is not None, "the config is resolved"
    folder = local_copy(config.train_data_dir)
    paths = picture_paths(folder, config.recursive)
    masks = make_mask_reader(config, folder, paths)
    shapes = shapes_of(config, config.resolution) or ((config.resolution, config.resolution),)
    remarks = [f"left out: {unread}"] if (unread := unread_pictures(folder, config.recursive)) else []
    names = [name_in(folder, path) for path in paths]
    report_repeats(names, remarks.append)
    captions = {}
    if not config.no_captions:
        captions = read_captions(folder, config.recursive, config.caption_column, config.templates)
    report_captions(config, folder, captions, names, remarks.append)
    rows: list[Row] = []
    cells: list[tuple[str, Image.Image]] = []
    for path in [path for path in paths if masks is None or not masks.holds(path)]:
        row = Row(name_in(folder, path), caption=_shown(captions.get(name_in(folder, path), "")))
        cell = _look(path, row, masks, shapes, config.center_crop)
        rows.append(row)
        if cell is not None and len(cells) < MOST:
            cells.append((row.name, cell))
    if len(rows) > MOST:
        remarks.append(f"the contact sheet has the first {len(cells)}")
    if cells:
        save_png(output, _contact_sheet(cells), f"the pictures of {folder.name}")
    return Survey(rows, remarks, output if cells else None)


def _shown(caption: str) -> str:
    """A caption for a column of the table."""
    return caption if len(caption) <= 60 else caption[:57] + "..."


def _look(
    path: Path, row: Row, masks: MaskReader | None, shapes: Sequence[Shape], center_crop: bool
) -> Image.Image | None:
    """Fill in a picture's row, and return its cell of the contact sheet; None if it cannot be read."""
    try:
        image = read_picture(path)
    except InputError as error:
        row.problems, row.refused = [str(error).removeprefix(f"{path}: ")], True
        return None
    row.size = f"{image.width} x {image.height}"
    if min(image.size) < MIN_SIDE:
        row.problems, row.refused = [f"a side of less than {MIN_SIDE} pixels"], True
        return None
    shape = nearest_shape(*image.size, shapes)
    left, top, right, bottom = box = crop_box(image.size, shape)
    row.used = shape_name(shape)
    cut = 1 - (right - left) * (bottom - top) / (image.width * image.height)
    if cut >= 0.005:
        row.used += f", {cut:.0%} cut off"
    if cut > 0.5:
        row.problems.append("less than half of it is used")
    if shape[1] > right - left:
        row.problems.append(f"enlarged {shape[1] / (right - left):.1f} times")
    pixels = np.asarray(cropped_to(image, shape, center_crop)[0], np.float64)
    try:
        mask = None if masks is None else masks.read(path, image)
    except InputError as error:
        row.problems.append(str(error).removeprefix(f"{path}: "))
        row.refused = True
        mask = None
    if mask is not None:
        part = cropped_mask(mask, box, shape)
        row.mask = f"{part.mean() / 255:.0%} white"
        if part.max() < WHITE:
            row.problems.append("nothing is white in the part of its mask that is left after cropping")
            row.refused = True
        pixels = pixels * (DIMMED + (1 - DIMMED) * part[..., None] / 255)
    elif masks is not None:
        row.mask = "none"
    cell = Image.fromarray(np.round(pixels).astype(np.uint8))
    cell.thumbnail((CELL, CELL))
    return cell


def _contact_sheet(cells: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """The cells in rows, each below its pictures' names."""
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    return overview([(",  ".join(name for name, _ in row), [image for _, image in row]) for row in rows])
