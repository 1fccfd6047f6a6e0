"""Which images folders hold, by the names of their files."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm .pbm .jp2 .npy".split()
)  # lower case; file names are matched in any case


def is_address(root: str | os.PathLike[str]) -> bool:
    """Whether images lie on another machine (``s3://bucket/images``); ``local:FOLDER`` is treated as if they did."""
    return "://" in str(root) or str(root).startswith("local:")


def list_named(names: Sequence[str | os.PathLike[str]], without: Collection[str] = ()) -> list[str]:
    """The absolute paths of the named image files and of all images below the named folders, in this order, each once.

    Args:
        names: of files and folders.
        without: absolute paths of files that are no images, though their extension is that of one.

    Raises:
        FileNotFoundError: if a name is not there, a folder holds no images, or nothing is left.
    """
    paths: dict[str, None] = {}
    for name in names:
        paths.update(dict.fromkeys(_paths(name)))
    for path in without:
        paths.pop(path, None)
    if not paths:
        raise FileNotFoundError(f"no images in {', '.join(map(str, names)) or 'an empty list of names'}")
    return list(paths)


def _paths(name: str | os.PathLike[str]) -> list[str]:
    if os.path.isdir(name):
        root = os.path.abspath(name)
        return [os.path.join(root, image) for image in list_images(root)]
    if not os.path.isfile(name):
        raise FileNotFoundError(f"there is no image or folder {os.fspath(name)!r}")
    return [os.path.abspath(name)]


@dataclass
class _Listing:
    images: list[str] = field(default_factory=list)  # relative to the root, with "/" between the parts
    other_extensions: Counter[str] = field(default_factory=Counter)
    folders: int = 0  # below the root


def list_images(root: str | os.PathLike[str]) -> list[str]:
    """The images below a folder by their extension, sorted, relative to it and with "/" between the parts.

    Hidden files and folders are skipped, linked folders are followed.

    Raises:
        FileNotFoundError: if it is not there, or holds no images.
        NotADirectoryError: if it is a file.
    """
    if not os.path.exists(root):
        raise FileNotFoundError(f"there is no image folder {root}: check the path")
    if not os.path.isdir(root):
        raise NotADirectoryError(f"{root} is a file: pass the folder that holds the images")
    listing = _scan(root)
    if not listing.images:
        raise FileNotFoundError(_no_images(root, listing))
    # A folder lists its entries in no order; code points compare alike on every machine, whatever its locale.
    return sorted(listing.images)


def _scan(root: str) -> _Listing:
    listing = _Listing(folders=-1)  # the root itself does not count
    pending = [(root, "", frozenset())]
    while pending:
        folder, prefix, parents = pending.pop()
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in parents:  # a link back to a folder that this one lies in
            continue
        listing.folders += 1
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    pending.append((entry.path, f"{prefix}{entry.name}/", parents | {identity}))
                    continue
                extension = os.path.splitext(entry.name)[1].lower()
                if extension in IMAGE_EXTENSIONS:
                    listing.images.append(prefix + entry.name)
                else:
                    listing.other_extensions[extension] += 1
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # entry.is_dir() alone raises for a link to itself; isdir takes it for a file, which will not open when it is read.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _no_images(root: str, listing: _Listing) -> str:
    others = listing.other_extensions
    frequent = ", ".join(f"{name or 'no extension'} ({count})" for name, count in others.most_common(3))
    return (
        f"no images in {root}: found {listing.folders} folders and {others.total()} other files"
        f"{f', most of them {frequent}' if frequent else ''}. Files count as images by their extension: "
        f"{' '.join(sorted(IMAGE_EXTENSIONS))}. Convert the files to one of these, or pass another folder."
    )
