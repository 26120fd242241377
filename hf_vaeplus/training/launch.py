"""Where a run takes place: this process among the others, what its launcher asks for, and what cannot run there."""

import os
from importlib.util import find_spec

from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import TorchDynamoPlugin, parse_flag_from_env

from .options import TrainingOptions, refuse_fp16_on_cpu, with_own_batch


def process_state() -> PartialState:
    """This process's rank and device. A bare `PartialState()` would overlook that CPUs alone were asked for."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def refuse_what_cannot_run(options: TrainingOptions):
    """Look before the data is read at what the options and the launcher ask for.

    Raises:
        ValueError: a distributed type that splits the model, a tracker or zuko that is not installed, fp16 on a CPU,
            or a batch that cannot be split evenly.
    """
    _refuse_split_models()
    if options.report_to not in ("none", "all", *(each.value for each in get_available_trackers())):
        raise ValueError(
            f"report_to {options.report_to} needs a package that is not installed: run `pip install"
            f" {options.report_to}`, or leave out --report_to."
        )
    if getattr(options, "second_stage", None) == "coupling_flow" and find_spec("zuko") is None:
        raise ValueError(
            "second_stage coupling_flow needs the package zuko, which is not installed: run pip install"
            " 'hf-vaeplus[flows]'."
        )
    state = process_state()
    refuse_fp16_on_cpu(options, state.device)
    with_own_batch(options, state.num_processes)


def _refuse_split_models():
    # Asked of the environment first: Accelerate imports the library of such a type, or fails to, when it finds it.
    kinds = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
    asked = [kind for kind in kinds if parse_flag_from_env(f"ACCELERATE_USE_{kind}")]
    kind = asked[0] if asked else process_state().distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"Accelerate's distributed type {kind} cannot train these models, expected one process, or several that"
            " each hold the whole model (NO, MULTI_CPU, MULTI_GPU and the like): run `accelerate config` again, or"
            " leave out its flag of `accelerate launch`."
        )
    if parse_flag_from_env("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"):
        raise ValueError(
            "these models are compiled as a whole: leave out --dynamo_use_regional_compilation of `accelerate launch`."
        )


def compile_settings() -> dict:
    """How to compile: keyword arguments of `torch.compile` from the launcher, if it names a backend."""
    is_given = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    return TorchDynamoPlugin().to_kwargs() if is_given else {}
