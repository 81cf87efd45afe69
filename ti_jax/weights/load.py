"""Weights of one component -> parameter tree: each tensor is mapped exactly once, checked, and read one at a time."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ti_jax.errors import InputError, listed
from ti_jax.weights.files import Tensors, open_tensors, page_aligned, weight_files
from ti_jax.weights.identity import Identity
from ti_jax.weights.names import TreePath, shape_in_tree, to_tree_layout, tree_path

Tree = dict[str, Any]

logger = logging.getLogger(__name__)

BLOCK = 32  # output channels


def load_component(
    folder: Path,
    component: str,
    shapes: Tree,
    dtype: Any,
    variant: str | None = None,
    identity: Identity | None = None,
    subfolder: str | None = None,
) -> Tree:
    """Read the weights in ``<folder>/<component>/`` into a parameter tree on the default device.

    Layouts: ``diffusion_pytorch_model`` or ``model`` ``.safetensors``, PyTorch's ``.bin``, either of them as a variant
    (``.fp16.safetensors``) and sharded (``.index.json``); safetensors is preferred to pickles. The rule for names and
    layouts is in `ti_jax.weights.names`.

    Names, shapes and dtypes are checked before any values are read. Host memory peaks at the tree (if that is on the
    host) plus one tensor; for a ``.bin`` also pages of the file, which the system can reclaim.

    Args:
      folder: a diffusers model.
      component: ``text_encoder``, ``text_encoder_2``, ``unet``, ``vae``, or ``clip`` with its two towers.
      shapes: parameter shapes of the module, from `param_shapes`.
      dtype: floating dtype of the tree's leaves.
      variant: e.g. ``fp16``; None for the plain weights.
      identity: each tensor is added to it; see `Identity`.
      subfolder: where in `folder` the files are, if not in the subfolder named like the component.

    Returns:
      Nested dict of the structure of `shapes` whose leaves are arrays of `dtype`.

    Raises:
      InputError: files that are missing, broken or refused; or names, shapes or dtypes that differ from the module's.
    """
    where = Path(folder) / (component if subfolder is None else subfolder)
    targets: dict[TreePath, jax.ShapeDtypeStruct] = flatten_dict(shapes)
    with contextlib.ExitStack() as stack:
        paths = weight_files(where, variant)
        files = [stack.enter_context(open_tensors(path)) for path in paths]
        placed, faults = plan(files, component, targets)
        named = paths[0] if len(paths) == 1 else where
        refuse_faults(faults, f"{named}: weights that do not fit the model of config.json")
        return read_tree(placed, component, targets, dtype, identity)


def read_tree(
    placed: list[tuple[Tensors, str, TreePath]],
    component: str,
    targets: dict[TreePath, jax.ShapeDtypeStruct],
    dtype: Any,
    identity: Identity | None,
) -> Tree:
    """Parameter tree on the default device from the tensors `placed` by `plan`, read one at a time."""
    leaves: dict[TreePath, jax.Array] = {}
    for file, name, path in placed:
        tensor = file.read(name)
        if identity is not None:
            identity.add(component, path, targets[path].shape, tensor)
        tensor = in_tree_layout(tensor, path, len(targets[path].shape), dtype)
        # Wait for each transfer, or host buffers would queue up.
        leaves[path] = jax.device_put(tensor).block_until_ready()
    return unflatten_dict(leaves)


def in_tree_layout(tensor: np.ndarray, path: TreePath, target_ndim: int, dtype: Any) -> np.ndarray:
    """`tensor` as stored in the file -> the leaf at `path`, contiguous and in `dtype`; no copy if it is so already."""
    leaf = to_tree_layout(tensor, path, target_ndim)
    if leaf.flags.c_contiguous and leaf.dtype == np.dtype(dtype):
        return leaf
    converted = page_aligned(leaf.shape, dtype)
    if path[-1] != "kernel":
        converted[...] = leaf
        return converted
    # A few output channels at a time: cast in the file's order, then transpose. Such blocks fit the cache; all at once
    # takes three times as long for a Stable Diffusion.
    for start in range(0, leaf.shape[-1], BLOCK):
        block = leaf[..., start : start + BLOCK].astype(dtype, order="K")
        converted[..., start : start + BLOCK] = block
    return converted


FAULTS = ("missing", "unexpected", "given twice", "mis-shaped", "of a dtype that is not read")


def plan(
    files: Sequence[Tensors], component: str, targets: dict[TreePath, jax.ShapeDtypeStruct]
) -> tuple[list[tuple[Tensors, str, TreePath]], dict[str, list[str]]]:
    """The leaf for each tensor of `files`, and all faults.

    Returns:
      (file, name in it, tree path) for each leaf of `targets`; and names by kind of fault (`FAULTS`). Without faults
      each leaf has exactly one tensor, and each tensor a leaf.
    """
    placed: dict[TreePath, tuple[Tensors, str, TreePath]] = {}
    faults: dict[str, list[str]] = {kind: [] for kind in FAULTS}
    ignored = surplus_layers(files, component, targets) if component.startswith("text_encoder") else set()
    for file in files:
        for name, shape in file.shapes.items():
            path = tree_path(name, component, targets)
            if path is None or name in ignored:
                continue
            label = file.label(name)
            if path not in targets:
                faults["unexpected"].append(label)
                continue
            if path in placed:
                faults["given twice"].append(label)
            placed[path] = (file, name, path)
            wanted = targets[path].shape
            got = shape_in_tree(shape, path, len(wanted))
            if got != wanted:
                faults["mis-shaped"].append(f"{label} {list(shape)}: {list(got)} where the model has {list(wanted)}")
            if isinstance(file.dtypes[name], str):
                faults["of a dtype that is not read"].append(f"{label} {file.dtypes[name]}")
    faults["missing"] = ["/".join(path) for path in targets if path not in placed]
    return list(placed.values()), faults


LAYER = re.compile(r"((?:text_model\.)?encoder\.layers\.)(\d+)(\..+)")


def surplus_layers(
    files: Sequence[Tensors], component: str, targets: Mapping[TreePath, jax.ShapeDtypeStruct]
) -> set[str]:
    """Names of the tensors of complete layers beyond the ``num_hidden_layers`` of a text encoder's ``config.json``.

    A smaller ``num_hidden_layers`` makes clip skip permanent; transformers ignores such layers, too. A layer is
    complete if it has exactly the tensors of the first layer, with the same shapes.
    """
    first = {path: leaf.shape for path, leaf in targets.items() if path[:2] == ("encoder", "layers_0")}
    count = len({path[1] for path in targets if path[0] == "encoder" and path[1].startswith("layers_")})
    layers: dict[int, dict[str, tuple[TreePath | None, tuple[int, ...]]]] = {}
    for file in files:
        for name, shape in file.shapes.items():
            if (found := LAYER.fullmatch(name)) and int(found[2]) >= count:
                path = tree_path(f"{found[1]}0{found[3]}", component, targets)
                in_tree = shape if path not in first else shape_in_tree(shape, path, len(first[path]))
                layers.setdefault(int(found[2]), {})[name] = (path, in_tree)
    whole = {number: layer for number, layer in layers.items() if sorted(layer.values()) == sorted(first.items())}
    if whole:
        logger.warning(
            "%s: %d layers of its weights are not used, as num_hidden_layers in its config.json is %d (clip skip)",
            component, len(whole), count,
        )  # fmt: skip
    return {name for layer in whole.values() for name in layer}


def refuse_faults(faults: Mapping[str, list[str]], what: str) -> None:
    """Raise InputError if there are any faults: one line, `what` and all the names."""
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise InputError(f"{what}: {found}")
