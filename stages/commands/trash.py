"""The trash of a run root: what `clean` removes is moved there, and deleted days later.

    <run_root>/.trash-<user id>/<time>-<hex>/<stage>/<name>-<run id>/...

Everything is reached from the run root without following a link, and only what belongs to the
user of this process is moved or deleted. Moving back is one `mv`.
"""

import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.ownership import ForeignOwnerError, describe_owner, is_mine, open_folder_below

KEEP_DAYS = 7
_MODE = 0o700


class Trash:
    """The trash of this user in a run root. One object is one `clean`, with a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / f".trash-{os.geteuid()}"
        self.place = self.folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"

    def move(self, path: Path) -> None:
        """Move a file or folder of the run root into the trash.

        Raises:
            OSError: a part of its path is a link, or it cannot be moved.
            ForeignOwnerError: it belongs to another user.
        """
        parts = path.relative_to(self.root).parts
        self._make_place(parts[:-1])
        with (
            open_folder_below(self.root, parts[:-1]) as source,
            open_folder_below(
                self.root, (*self.place.relative_to(self.root).parts, *parts[:-1])
            ) as target,
        ):
            found = os.stat(parts[-1], dir_fd=source, follow_symlinks=False)
            if not is_mine(found, path.parent):
                raise ForeignOwnerError(f"{path}: belongs to {describe_owner(found.st_uid)}")
            os.rename(parts[-1], parts[-1], src_dir_fd=source, dst_dir_fd=target)

    def _make_place(self, parts: tuple[str, ...]) -> None:
        """Make the folder in the trash for what lies below these parts of the run root."""
        wanted = (*self.place.relative_to(self.root).parts, *parts)
        for depth, part in enumerate(wanted):
            with open_folder_below(self.root, wanted[:depth]) as folder:
                try:
                    os.mkdir(part, _MODE, dir_fd=folder)
                except FileExistsError:
                    found = os.stat(part, dir_fd=folder, follow_symlinks=False)
                    if not (stat.S_ISDIR(found.st_mode) and is_mine(found, self.root)):
                        raise ForeignOwnerError(
                            f"{self.root.joinpath(*wanted[: depth + 1])}: is no folder of ours, "
                            "so nothing is moved there"
                        ) from None

    def list_expired(self, now: float, *, everything: bool = False) -> list[str]:
        """Return the names of what was moved here more than KEEP_DAYS ago, or of all of it."""
        found = []
        for name, moved in self._list_entries():
            if everything or now - moved > KEEP_DAYS * 86400:
                found.append(name)
        return found

    def _list_entries(self) -> Iterator[tuple[str, float]]:
        """Yield name and time of each earlier `clean`."""
        if not self._is_usable():
            return
        with open_folder_below(self.root, (self.folder.name,)) as folder:
            for name in sorted(os.listdir(folder)):
                yield name, os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime

    def _is_usable(self) -> bool:
        """Return whether there is a trash, and it is ours."""
        try:
            found = self.folder.lstat()
        except FileNotFoundError:
            return False
        return stat.S_ISDIR(found.st_mode) and is_mine(found, self.root)

    def delete(self, name: str) -> None:
        """Delete for good what one `clean` moved here."""
        with open_folder_below(self.root, (self.folder.name,)) as folder:
            # From descriptor to descriptor, so that a link put in its way is not followed.
            shutil.rmtree(name, dir_fd=folder)
