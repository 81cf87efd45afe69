"""Masks: which part of a picture is learned from. Read from files, alpha channels or `rembg`; weights of the loss."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ti_jax.config import TrainConfig
from ti_jax.data.reading import read_alpha, read_picture
from ti_jax.errors import InputError, listed, one_line
from ti_jax.remote import local_copy

# After the name of a picture without its own suffix: ours, and OneTrainer's.
SUFFIXES = (".mask.png", "-masklabel.png")
# Grey levels of a mask from which on a pixel counts as white, when a mask is looked at for faults; weights are exact.
WHITE = 128
# Of rembg: for any subject. Its authors' address of the file, for a machine that is not online.
MODEL = "u2net"
MODEL_ADDRESS = f"https://github.com/danielgatis/rembg/releases/download/v0.0.0/{MODEL}.onnx"


def picture_of(name: str) -> str | None:
    """The name, without suffix, of the picture that a file named like a mask belongs to; None if it is no mask."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None


@dataclass(frozen=True)
class MaskReader:
    """Finds and reads the mask of a picture: the file beside it, or in a folder, or its alpha channel, or `rembg`'s.

    Attributes:
      folder: with masks, under the pictures' names or those of masks beside pictures; None: there is none.
      alpha: take the alpha channel of pictures without a file. auto: cut out the subject of pictures without either.
    """

    folder: Path | None = None
    alpha: bool = False
    auto: Callable[[Image.Image], Image.Image] | None = None

    def path(self, picture: Path) -> Path | None:
        """The file with a picture's mask, or None."""
        places = [picture.with_name(picture.stem + suffix) for suffix in SUFFIXES]
        if self.folder is not None:
            places += [self.folder / f"{picture.stem}{suffix}" for suffix in (".png", *SUFFIXES)]
        return next((place for place in places if place.exists()), None)

    def holds(self, path: Path) -> bool:
        """Whether a file is in the folder with masks, which may itself be within that of the pictures."""
        return self.folder is not None and self.folder.resolve() in path.resolve().parents

    def read(self, path: Path, picture: Image.Image) -> Image.Image | None:
        """The mask of a picture in grey, as large as the picture; white is learned from. None if it has none.

        Args:
          path: of the picture. picture: from `read_picture`.

        Raises:
          InputError: the mask cannot be read, has another size or is black; a picture has no alpha channel.
        """
        file = self.path(path)
        if file is not None:
            mask, name = read_picture(file).convert("L"), str(file)
        elif self.alpha and (found := read_alpha(path)) is not None:
            mask, name = found, f"{path}: its alpha channel"
        elif self.auto is not None:
            mask, name = self.auto(picture), f"{path}: the mask of --auto_mask"
        elif self.alpha:
            raise InputError(
                f"{path}: --alpha_mask: this picture has no alpha channel; save it as a PNG with transparent "
                f"surroundings, or put a mask beside it, {path.stem}{SUFFIXES[0]}"
            )
        else:
            return None
        if mask.size != picture.size:
            raise InputError(
                f"{name}: the mask has {mask.width} x {mask.height} pixels and its picture {path.name} "
                f"{picture.width} x {picture.height}; make them alike"
            )
        if mask.getextrema()[1] < WHITE:  # type: ignore[operator]
            raise InputError(
                f"{name}: not one pixel of the mask is white, so nothing would be learned from {path.name}; paint "
                f"white what is to be learned, or remove the mask to learn from the whole picture"
            )
        return mask


def make_mask_reader(config: TrainConfig, data: Path, pictures: Sequence[Path]) -> MaskReader | None:
    """The reader for a run's settings; None if none of its pictures can have a mask.

    Args:
      data: the folder of the pictures. pictures: their files.

    Raises:
      InputError: no such ``--mask_dir`` or nothing in it belongs to a picture; `rembg` or its model is not there.
    """
    folder = None if config.mask_dir is None else local_copy(config.mask_dir)
    reader = MaskReader(folder, config.alpha_mask)
    if folder is not None:
        if not folder.is_dir():
            raise InputError(f"--mask_dir {folder}: no such folder; give the folder with the masks")
        if folder.resolve() == data.resolve():
            raise InputError(
                f"--mask_dir {folder}: has the pictures, too; move the masks to a folder of their own, or name them "
                f"like {pictures[0].stem}{SUFFIXES[0]} and leave --mask_dir out"
            )
        if not any(reader.path(path) for path in pictures):
            raise InputError(
                f"--mask_dir {folder}: no mask in it belongs to a picture; that of {pictures[0].name} would be "
                f"{pictures[0].stem}.png"
            )
        pictures = [path for path in pictures if not reader.holds(path)]
    if config.auto_mask and (config.alpha_mask or not all(reader.path(path) for path in pictures)):
        reader = MaskReader(folder, config.alpha_mask, _make_auto_mask())
    return reader if config.alpha_mask or reader.auto or any(reader.path(path) for path in pictures) else None


def orphans(files: Iterable[Path], pictures: Iterable[Path]) -> str | None:
    """A line on masks that belong to no picture; None if there are none.

    Args:
      files: all in the pictures' folders.
    """
    stems = {path.with_name(path.stem) for path in pictures}
    lost = [path.name for path in files if (stem := picture_of(path.name)) and path.with_name(stem) not in stems]
    if not lost:
        return None
    return (
        f"left out: named like masks, but of no picture: {listed(lost, 3)}; give a mask the name of its picture, or a "
        f"picture another name"
    )


def _make_auto_mask() -> Callable[[Image.Image], Image.Image]:
    """`rembg`'s cutting out, as a function from a picture to its mask.

    Raises:
      InputError: it is not installed, or has no model.
    """
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # it ends the program without a library to run its model
        raise InputError("--auto_mask: rembg is not installed; pip install 'ti_jax[rembg]'") from error
    try:
        session = rembg.new_session(MODEL)
    except Exception as error:  # its libraries', for lack of a network or a broken file
        raise InputError(
            f"--auto_mask: the model {MODEL} of rembg is not here and cannot be fetched ({one_line(error)}); go online "
            f"once, or put {MODEL_ADDRESS} into {_model_folder()}"
        ) from error

    def cut_out(picture: Image.Image) -> Image.Image:
        mask: Any = rembg.remove(picture, session=session, only_mask=True)
        return mask.convert("L")

    return cut_out


def _model_folder() -> Path:
    """Where rembg looks for its models."""
    import os

    return Path(os.environ.get("U2NET_HOME") or Path(os.environ.get("XDG_DATA_HOME", "~")) / ".u2net").expanduser()


class Masks:
    """The masks of pictures, cropped as they are: in memory, but compressed, because most are two or three areas.

    A picture without a mask is learned from as a whole.
    """

    def __init__(self, shape: tuple[int, ...], packed: Iterable[bytes | None]):
        """Args:
        shape: height and width of the cropped pictures. packed: the mask of each picture, by `pack`; None: all of it.
        """
        self._shape, self._packed = shape, list(packed)

    @staticmethod
    def pack(mask: np.ndarray) -> bytes:
        """Compress a mask uint8 [H, W], in which white is learned from."""
        return zlib.compress(mask.tobytes(), 1)

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> np.ndarray:
        """The mask of a picture, uint8 [H, W]."""
        packed = self._packed[index]
        if packed is None:
            return np.full(self._shape, 255, np.uint8)
        return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(self._shape)

    @property
    def count(self) -> int:
        """Pictures that have a mask."""
        return sum(packed is not None for packed in self._packed)

    @property
    def digest(self) -> str:
        """A hash of all masks."""
        found = hashlib.sha256()
        for index in range(len(self)):
            found.update(self[index].tobytes())
        return found.hexdigest()

    def weights(self, factor: int, unmasked: float) -> np.ndarray:
        """Weights of the loss on the latent grid, float32 [N, h, w].

        A latent's weight is ``unmasked + (1 - unmasked) m`` with ``m`` the mean of its pixels in the mask, divided by
        the mean of the weights over the picture. So the loss is the mean error where it counts, whether that is much
        or little of the picture, and a learning rate means what it does without masks.

        Args:
          factor: pixels of a latent's side. unmasked: weight outside the mask, in [0, 1].
        """
        height, width = (side // factor for side in self._shape)
        found = np.ones((len(self), height, width), np.float32)
        for index, packed in enumerate(self._packed):
            if packed is None:
                continue
            cells = self[index][: height * factor, : width * factor].reshape(height, factor, width, factor)
            inside = cells.mean(axis=(1, 3), dtype=np.float64) / 255.0
            weights = unmasked + (1.0 - unmasked) * inside
            found[index] = weights / weights.mean()
        return found


def cropped_mask(mask: Image.Image, box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    """The part of a mask that belongs to a crop of its picture, uint8 [H, W]; it may be black.

    Args:
      box: left, top, right and bottom of the crop in the picture. shape: the crop's height and width after scaling.
    """
    rows, columns = shape
    # The mean over each pixel's area: other filters would darken the inside near an edge, or brighten the outside.
    return np.asarray(mask.resize((columns, rows), Image.Resampling.BOX, box=box))
