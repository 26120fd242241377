"""A Hugging Face Space that shows a pipeline; also `python app.py` on any machine."""

import os

import torch

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.demo import build_demo, serve

# Your pipeline: its id on the Hub (or a folder), here or as a variable in the settings of the Space.
PIPELINE = os.environ.get("VAEPLUS_PIPELINE", "your-name/vaeplus-drawings")

pipe = VAEPlusPipeline.from_pretrained(PIPELINE).to("cuda" if torch.cuda.is_available() else "cpu")
demo = build_demo(pipe)

if __name__ == "__main__":
    serve(demo)
