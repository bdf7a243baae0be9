"""ImageFolder trees: one folder per class, with or without split folders above them."""

from __future__ import annotations

from collections import defaultdict

from cluster import storage
from cluster.errors import UserError
from stages.importing.source import TRAIN_NAMES, VAL_NAMES, Reader, Source, Split, find_split, make_source

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def is_image(name: str) -> bool:
    """Whether a file name has a suffix of an image."""
    return name.lower().endswith(SUFFIXES)


def matches(files: dict[str, int]) -> bool:
    """Whether there is any image below a folder."""
    return any(is_image(name) and "/" in name for name in files)


def scan(uri: str, files: dict[str, int]) -> Source:
    """Find splits and classes.

    With a folder ``train`` that holds folders, ``train`` and ``val`` (or ``validation``, ``valid``, ``test``;
    the first of them, in any case) are the splits; otherwise every folder is a class of the training split. An image
    belongs to the class folder it lies in, at whatever depth. Classes are in the order of their sorted folder
    names, which is also torchvision's.

    Raises:
        UserError: images outside a class folder; splits with different classes.
    """
    images = [name for name in files if is_image(name)]
    tops: dict[str, list[str]] = defaultdict(list)
    for name in images:
        tops[name.split("/")[0] if "/" in name else ""].append(name)

    # A folder `train` with nothing but images right inside is a class of that name (trains), not a split.
    train = find_split(TRAIN_NAMES, tops)
    if train and any(n.count("/") >= 2 for n in tops[train]):
        val = find_split(VAL_NAMES, tops)
        roots = [("train", f"{train}/")] + ([("val", f"{val}/")] if val else [])
    else:
        roots = [("train", "")]

    grouped = {split: _by_folder(uri, images, root) for split, root in roots}
    class_names = sorted(grouped["train"])
    if "val" in grouped:
        unknown = sorted(set(grouped["val"]) - set(class_names))
        if unknown:
            raise UserError(
                f"SRC: {storage.join(uri, roots[1][1])} holds the class folder {unknown[0]!r} "
                f"({len(unknown)} such), which {train}/ has not; give both splits the same class folders"
            )
    splits = []
    for split, classes in grouped.items():
        keys = [(key, label) for label, name in enumerate(class_names) for key in sorted(classes.get(name, []))]
        splits.append(Split(split, [k for k, _ in keys], [label for _, label in keys]))
    used = {key: files[key] for split in splits for key in split.keys}
    return make_source(uri, "imagefolder", class_names, splits, used, ignored=len(files) - len(used))


def _by_folder(uri: str, images: list[str], root: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = defaultdict(list)
    for name in images:
        if not name.startswith(root):
            continue
        folder, slash, _ = name[len(root) :].partition("/")
        if not slash:
            raise UserError(f"SRC: {storage.join(uri, name)} lies in no class folder; move it into one")
        out[folder].append(name)
    return out


def make_reader(uri: str) -> Reader:
    """Reads files; on an object store those of a shard are fetched concurrently."""
    fs, root = storage.resolve(uri)

    def read(keys: list[str]) -> list[bytes | Exception]:
        paths = [storage.join(root, key) for key in keys]
        found = fs.cat(paths, on_error="return")
        # A single path may come back as its content alone.
        return [found[path] for path in paths] if isinstance(found, dict) else [found]

    return read
