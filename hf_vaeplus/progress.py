"""Progress bars that `TQDM_DISABLE` switches off, also where a process decides by itself whether it draws one."""

import os

from tqdm import auto


class tqdm(auto.tqdm):
    """`tqdm.auto.tqdm`, in which an explicit `disable=False` would win over the environment."""

    def __init__(self, *args, disable: bool = False, **options):
        super().__init__(*args, disable=disable or bool(os.environ.get("TQDM_DISABLE")), **options)
