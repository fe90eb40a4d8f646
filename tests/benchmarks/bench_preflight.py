"""What `plan`, `doctor` and `submit` look at of a folder of images against decoding all of them,
four threads each.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench_loader import photographs
from bench_step import seconds
from dense_step import row

from mugs.data.sources.convert import find_bad_images
from mugs.data.sources.folder import FolderSource
from stages import convert
from stages.shared import image_data

COPIES, THREADS = 30, 4


def look(root: Path, images: int) -> None:
    """As the commands do: list the images, check their number, look at the ends of their files."""
    image_data.list_data_set.cache_clear()
    fields = {"num_classes": COPIES, "num_train_images": images, "num_val_images": 0}
    convert.check_images(
        image_data.ConvertConfig(dataset="copies", train_dir=str(root), **fields), {}
    )


def run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photographs(root)
        for copy in range(COPIES - 1):
            shutil.copytree(root / "a", root / f"a{copy}")
        source = FolderSource(root)
        look(root, len(source))  # which also warms the cache of files
        ours = sorted(seconds(lambda: look(root, len(source))) for _ in range(5))[2]
        decoding = sorted(
            seconds(lambda: find_bad_images(source, range(len(source)), THREADS)) for _ in range(3)
        )[1]
    each_us = 1e6 * ours / len(source)
    note = f"{len(source):,} images of about 100 kB, {each_us:.0f} us an image, files in memory"
    return [row("preflight_images", ours, decoding, "s", note)]
