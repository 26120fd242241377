"""`python -m hf_vaeplus.cli`, as `accelerate launch` starts it."""

import sys

from .main import main

sys.exit(main())
