"""Whether all processes of a run see the same folder: several machines may each have one of its own by that name."""

import os
import secrets
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

_PATIENCE = 30.0  # seconds that a network file system may take to show a new file


def refuse_other_folders(accelerator: Accelerator, output_dir: Path, step: int):
    """Raises ValueError, in every process, unless all see the folder of the main process and start from its step.

    Args:
        accelerator: of the run.
        output_dir: exists where the main process runs.
        step: of the checkpoint that this process has found; 0 without one.
    """
    if accelerator.num_processes == 1:
        return
    mark = torch.tensor([secrets.randbits(62)], device=accelerator.device)
    file = output_dir / f".seen-by-all-{int(broadcast(mark))}"
    if accelerator.is_main_process:
        file.touch()
    accelerator.wait_for_everyone()
    end = time.monotonic() + _PATIENCE
    while not (seen := file.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    found = accelerator.gather(torch.tensor([[seen, step]], device=accelerator.device)).tolist()
    if accelerator.is_main_process:
        os.remove(file)
    others = [rank for rank, (seen, _) in enumerate(found) if not seen]
    if others:
        raise ValueError(
            f"processes {others} do not see the folder {output_dir} of the main process: name an --output_dir on a"
            " file system that all machines share."
        )
    steps = [step for _, step in found]
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes found different checkpoints in {output_dir} (steps {steps}): wait until all machines see"
            " the same files, or name the checkpoint with --resume_from_checkpoint."
        )
