"""Measure a saved pipeline on one or many processes. The options are those of `vaeplus evaluate`, see its --help.

    accelerate launch examples/evaluate.py vaeplus-quickstart/pipeline --dataset_name rendered-faces --num_images 2000
    accelerate launch examples/evaluate.py runs/celeba64/pipeline --train_data_dir celeba --split 'train[20000:]' \\
        --training_split 'train[:20000]' --ndb 100 200 300 --sampler second_stage prior --features extractor.onnx

Each process handles its share of the images; the numbers are those of one process. The work is done by
`hf_vaeplus.evaluation.evaluate`, for models in memory.
"""

import sys

from hf_vaeplus.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
