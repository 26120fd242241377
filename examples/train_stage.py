"""Train one stage of VAE+ on one or many processes.

    accelerate launch examples/train_stage.py --stage autoencoder --dataset_name rendered-faces --output_dir runs/ae
    accelerate launch examples/train_stage.py --stage vae --dataset_name rendered-faces --autoencoder runs/ae \\
        --output_dir runs/vae
    accelerate launch examples/train_stage.py --stage second_stage --dataset_name rendered-faces \\
        --autoencoder runs/ae --vae runs/vae --output_dir runs/second_stage

Real pictures: --train_data_dir FOLDER, or --dataset_name with the id of a data set on the Hub. A preset fills in the
rest: --config celeba128-cpu. After an interruption add --resume_from_checkpoint latest, and --retrain if the images or
the stages before this one have changed since.
"""

import sys

from hf_vaeplus.cli.main import run_command


def main():  # the imports wait in here, so that Ctrl-C during them ends in a sentence as well
    from hf_vaeplus.cli.flags import check_resolution, parse_stage_options

    options = parse_stage_options(__doc__)
    if options is not None:
        from hf_vaeplus.training.stages import run_stage

        check_resolution(options)
        run_stage(options)


if __name__ == "__main__":
    again = "the same command with --resume_from_checkpoint latest goes on from the newest checkpoint"
    sys.exit(run_command(main, interrupted=again))
