"""The detail model of vaeplus-celeba128: trained at 64 x 64, where a step is far cheaper, and then at 128 x 128.

    python examples/reproduce/detail_celeba128.py --train_data_dir celeba128 --output_dir runs/detail

Leaves the pipeline of `model_cards/vaeplus-celeba128` with the detail model in `runs/detail/pipeline`. After an
interruption the same command goes on from the newest checkpoint.
"""

import argparse
from pathlib import Path

import torch
from half_size import half_size

from hf_vaeplus import VAEPlusDetailModel, VAEPlusPipeline
from hf_vaeplus.training.arithmetic import arithmetic_of
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import stage_options
from hf_vaeplus.training.stages import build_stage, open_images, run_stage

ZOO = Path(__file__).parents[2] / "model_cards"
SETTINGS = dict(
    dataset_name="celeba",
    random_flip=True,
    feature_loss="efficientnet-lite0",
    train_batch_size=32,
    num_directions=16,
    adam_weight_decay=0.05,
    max_grad_norm=10.0,
    use_ema=True,
    ema_decay=0.998,
    logging_steps=50,
    checkpointing_steps=200,
    resume_from_checkpoint="latest",
)


def double_size(model: VAEPlusDetailModel, weights: dict) -> dict:
    """Weights for twice the image size: the last layer draws every pixel of the smaller image four times.

    Args:
        model: of the smaller size.
        weights: its weights.
    """
    weights, p, c = dict(weights), model.config.patch_size, model.config.num_channels
    for name in ("exit.weight", "exit.bias"):
        patches = weights[name].unflatten(0, (c, p, p))
        weights[name] = patches.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(0, 2)
    return weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True, help="folder of CelebA's aligned faces, named by split")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pipeline", default=str(ZOO / "vaeplus-celeba128"), help="to add the detail model to")
    parser.add_argument(
        "--max_train_steps", type=int, nargs=2, default=[1800, 1200], help="at half the size, and at it"
    )
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = VAEPlusPipeline.from_pretrained(args.pipeline)
    size = pipe.autoencoder.config.image_size
    whole, half = args.output_dir / "autoencoder", args.output_dir / "half_autoencoder"
    if not half.exists():
        pipe.autoencoder.save_pretrained(whole)
        half_size(pipe.autoencoder).save_pretrained(half)

    def options(folder: str, autoencoder: Path, resolution: int, **own):
        data = dict(
            train_data_dir=args.train_data_dir, resolution=resolution, max_train_samples=args.max_train_samples
        )
        places = dict(output_dir=str(args.output_dir / folder), autoencoder=str(autoencoder), seed=args.seed)
        return stage_options("detail", **SETTINGS, **data, **places, **own)

    small = run_stage(
        options("detail_half", half, size // 2, max_train_steps=args.max_train_steps[0], learning_rate=2e-3)
    )
    large = options("detail", whole, size, max_train_steps=args.max_train_steps[1], learning_rate=1e-3)
    with arithmetic_of(large):
        stage = build_stage(large, open_images(large))
        stage.model.load_state_dict(double_size(small, small.state_dict()))
        pipe.register_modules(detail=train(stage, large))
    pipe.save_pretrained(args.output_dir / "pipeline")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
