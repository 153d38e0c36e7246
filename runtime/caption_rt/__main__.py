"""`python -m caption_rt` is the command `caption-rt`."""

import sys

from caption_rt.cli import main

sys.exit(main())
