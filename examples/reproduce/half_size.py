"""A pipeline for half the image size, without training: for studies at 64 x 64 where a model of 128 x 128 is at hand.

    python examples/reproduce/half_size.py model_cards/vaeplus-celeba128 FOLDER

The first layer of the autoencoder sees every pixel four times, and the last one averages four pixels into one. So the
image is that of the whole model, shrunk by its means. The gamma of the VAE stays that of the larger image.
"""

import argparse

import torch

from hf_vaeplus import VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel, VAEPlusImageProcessor, VAEPlusPipeline


def half_size(autoencoder: VAEPlusAutoencoderModel) -> VAEPlusAutoencoderModel:
    """An autoencoder of half the size that has the same codes, of images that are enlarged by repeating pixels."""
    config = autoencoder.config
    own = {name: getattr(config, name) for name in ("num_channels", "latent_dim", "hidden_channels", "num_blocks")}
    half = VAEPlusAutoencoderModel(
        VAEPlusAutoencoderConfig(image_size=config.image_size // 2, patch_size=config.patch_size // 2, **own)
    )
    weights, p, c = autoencoder.state_dict(), config.patch_size // 2, config.num_channels
    weights.pop("spectrum_gain", None)
    first, last = "encoder.1.weight", f"decoder.{len(autoencoder.decoder) - 2}"
    weights[first] = weights[first].unflatten(1, (c, p, 2, p, 2)).sum((3, 5)).flatten(1, 3)
    for name in (f"{last}.weight", f"{last}.bias"):
        weights[name] = weights[name].unflatten(0, (c, p, 2, p, 2)).mean((2, 4)).flatten(0, 2)
    half.load_state_dict(weights)
    return half.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a saved pipeline with an even patch_size")
    parser.add_argument("output", help="folder to save to")
    args = parser.parse_args()
    pipe = VAEPlusPipeline.from_pretrained(args.pipeline)
    autoencoder, vae = half_size(pipe.autoencoder), pipe.vae
    if vae.config.target_dim is not None:
        vae.config.target_dim //= 4
    small = VAEPlusPipeline(vae, autoencoder, pipe.second_stage)
    channels, size, _ = small.image_shape
    small.image_processor = VAEPlusImageProcessor(size, channels, pipe.image_processor.crop)
    small.save_pretrained(args.output)
    with torch.no_grad():
        code = autoencoder.encode(torch.rand(2, *small.image_shape))
        whole = torch.nn.functional.avg_pool2d(pipe.autoencoder.decode(code), 2)
        torch.testing.assert_close(autoencoder.decode(code), whole, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
