"""`python -m vlm_sft`: the same as the `vlm-sft` command."""

import sys

from vlm_sft.cli.main import main

sys.exit(main())
