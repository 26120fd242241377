"""Progress bars that `TQDM_DISABLE` switches off, and that work goes on without if their terminal is closed."""

import contextlib
import os

from tqdm import auto


class tqdm(auto.tqdm):
    """`tqdm.auto.tqdm`, in which an explicit `disable=False` would win over the environment.

    A bar or a line that cannot be written any more is left out; tqdm itself does so after some errors alone.
    """

    def __init__(self, *args, disable: bool = False, **options):
        super().__init__(*args, disable=disable or bool(os.environ.get("TQDM_DISABLE")), **options)

    def display(self, *args, **options):
        with contextlib.suppress(OSError):
            return super().display(*args, **options)

    def close(self):
        with contextlib.suppress(OSError):
            super().close()

    @classmethod
    def write(cls, *args, **options):
        with contextlib.suppress(OSError):
            super().write(*args, **options)
